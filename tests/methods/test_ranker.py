"""`prefkit ranker` from pairs to a judge: on an encoder and on a causal model, with LoRA and without, and resumed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from method_runs import Inputs, assert_same_state, column, lines, metrics, read, run, weights
from prefkit import cli
from prefkit.engine.learner import Learner
from prefkit.engine.world import World
from prefkit.feedback.ranker import PairRanker, RankerJudge
from prefkit.loops.ranker_fit import RankerTask, create
from prefkit.methods import ranker
from prefkit.records import Pair, Preference, Question
from tiny_encoders import deberta, encoder_tokenizer

FAST: dict[str, Any] = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 8}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeBERTa as `save_pretrained` leaves it: no chat template, no end-of-sequence token."""
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("encoder") / "deberta"
    torch.manual_seed(0)
    AutoModel.from_config(deberta(max_position_embeddings=16)).save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["encoder", "encoder-lora", "causal", "causal-lora"])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    """Runs in which '... yes' is always chosen over '... no'."""
    folder = tmp_path_factory.mktemp("learned")
    inputs = Inputs.make(folder)
    train = tiny.jsonl(folder / "many.jsonl", tiny.pairs(96, seed=3))
    options: dict[str, Any] = {
        "encoder": {"model_name_or_path": encoder, "learning_rate": 1e-2, "max_steps": 60, "orders": "both"},
        "encoder-lora": {
            "model_name_or_path": encoder,
            "learning_rate": 1e-2,
            "max_steps": 60,
            "orders": "both",
            "use_peft": True,
        },
        "causal": {"learning_rate": 3e-3, "max_steps": 40},
        "causal-lora": {"learning_rate": 1e-2, "max_steps": 40, "use_peft": True},
    }[request.param]
    return run(inputs, "ranker", folder / "run", dataset_name=train, **FAST, **options)


def question(row: dict[str, Any]) -> Question:
    return Question(prompt=row["prompt"], answers=[row[name][0]["content"] for name in ("chosen", "rejected")])


def logit(probability: float | None) -> float:
    assert probability is not None
    return math.log(probability / (1 - probability))


def test_it_learns_what_can_be_learned(learned: Path) -> None:
    report = read(learned / "evaluation.json")
    assert report["final"]["eval_rewards/accuracies"] == 1.0
    assert report["final"]["eval_order_agreement"] > 0.7
    assert report["final"]["eval_loss"] < 0.2 < 0.6 < report["start"]["eval_loss"]
    losses = column(learned, "loss")
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert {"eval_rewards/accuracies", "eval_rewards/margins"} <= set(report["intervals"])


def test_the_run_is_a_judge_that_gives_the_margins_of_its_evaluation(learned: Path) -> None:
    judge = RankerJudge(PairRanker.load(learned, device="cpu", dtype="float32"))
    assert judge.name.startswith("ranker:run@")
    held = tiny.pairs(8, seed=5)
    rows = lines(learned / "evaluation" / "pairs.jsonl")
    verdicts = judge.judge([question(row) for row in held])
    found = [logit(verdict.prob(0, 1)) for verdict in verdicts]
    assert found == pytest.approx([row["margin"] for row in rows], abs=1e-3)
    expected = [math.log1p(math.exp(-value)) for value in found]
    assert [row["loss"] for row in rows] == pytest.approx(expected, abs=1e-3)


def test_a_ranker_can_be_trained_further(learned: Path, tmp_path: Path) -> None:
    inputs = Inputs.make(tmp_path)
    directory = run(inputs, "ranker", tmp_path / "on", model_name_or_path=learned, max_steps=1, learning_rate=0.0)
    before, after = read(learned / "evaluation.json")["final"], read(directory / "evaluation.json")["start"]
    assert after == pytest.approx(before, abs=1e-4)
    first, second = weights(learned), weights(directory)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    both = [read(folder / "model" / "config.json") for folder in (learned, directory)]
    assert both[0] == both[1] and str(learned.parent) not in str(both[1])


def test_the_places_of_an_encoder_are_its_markers(inputs: Inputs, encoder: Path, tmp_path: Path) -> None:
    found = {
        kind: read(run(inputs, "ranker", tmp_path / kind, **options) / "model" / "config.json")
        for kind, options in {"causal": {}, "encoder": {"model_name_or_path": encoder}}.items()
    }
    assert found["causal"]["prefkit_ranker"] == {"read_out": "ends", "cut_source": "left"}
    assert found["encoder"]["prefkit_ranker"] == {"read_out": "markers", "cut_source": "left"}
    assert found["encoder"]["architectures"] == ["DebertaV2PairRM"]
    sizes = {kind: (made["source_maxlength"], made["candidate_maxlength"]) for kind, made in found.items()}
    assert sizes["encoder"] == (1224, 412), "DeBERTa's positions are relative, whatever its config says"
    assert sizes["causal"] == (153, 51), "shrunk to 256 positions"


def test_what_the_ranker_cuts_is_told(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(inputs, "ranker", tmp_path / "run", source_maxlength=6, candidate_maxlength=100)
    assert "of 16 prompts and 0 of 32 answers (at most 6 tokens of a prompt" in capsys.readouterr().err.replace(
        "\n", " "
    )


@pytest.mark.parametrize("case", ["whole", "lora", "encoder-lora"])
def test_a_run_stopped_in_the_middle_ends_as_one_that_was_not(
    inputs: Inputs, encoder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-3, "use_peft": "lora" in case}
    if "encoder" in case:
        options["model_name_or_path"] = encoder
    whole = run(inputs, "ranker", tmp_path / "whole", **options)
    plain = Learner.update

    def dies(self: Learner, *arguments: Any, **named: Any) -> Any:
        if self.step == 3:
            raise KeyboardInterrupt
        return plain(self, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "update", dies)
        assert cli.run(inputs.arguments("ranker", tmp_path / "run", **options)) == 130
    assert not (tmp_path / "run" / "result.json").exists()
    run(inputs, "ranker", tmp_path / "run", **options)
    assert_same_state(whole, tmp_path / "run")


def test_an_export_is_a_whole_ranker(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", str(learned), "--to", str(tmp_path / "out")]) == 0
    assert "pairwise ranker" in capsys.readouterr().out
    judges = [
        RankerJudge(PairRanker.load(folder, device="cpu", dtype="float32")) for folder in (learned, tmp_path / "out")
    ]
    verdicts = [judge.judge([question(tiny.pairs(1)[0])])[0].comparisons for judge in judges]
    assert verdicts[0] == verdicts[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PairRanker.load" in card and "LLM-Blender" in card and "AutoPeft" not in card
    assert cli.run(["export", str(learned), "--to", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 2
    assert "a ranker is kept in float32" in capsys.readouterr().err and not (tmp_path / "half").exists()


# the task


def task(inputs: Inputs, pairs: list[Preference], **changes: Any) -> RankerTask:
    options = {"model_name_or_path": str(inputs.model), "dtype": "float32", **changes}
    config = dataclasses.replace(ranker.PRESETS["tiny"], **options)
    form = ranker.Form(source_maxlength=40, candidate_maxlength=30, read_out="ends", cut_source="left")
    trained = create(
        config,
        World.start(),
        model=tiny.model(),
        tokenizer=tiny.tokenizer(),
        form=form,
        source="",
        is_ranker=False,
    )
    rows = [Pair(prompt=[], chosen=[], rejected=[], source=pair) for pair in pairs]
    return RankerTask(trained=trained, pairs=rows, test=rows, selection=[], config=config)


PAIR = Preference(prompt="red", chosen="one two", rejected="cat")


def test_the_loss_is_that_of_the_equation(inputs: Inputs) -> None:
    made = task(inputs, [PAIR], orders="both")
    batch = made.batches(1, [0], 0)[0]
    losses, found = made.compute(batch)
    ahead, behind = made.ranker.logits(batch[0].rows).tolist()
    expected = [-math.log(1 / (1 + math.exp(-h))) for h in (ahead, -behind)]
    assert losses.tolist() == pytest.approx([sum(expected) / 2], abs=1e-5)
    assert found["rewards/margins"].tolist() == pytest.approx([(ahead - behind) / 2], abs=1e-5)
    swapped = task(inputs, [dataclasses.replace(PAIR, chosen="cat", rejected="one two")], orders="both")
    assert swapped.compute(swapped.batches(1, [0], 0)[0])[1]["rewards/margins"].tolist() == pytest.approx(
        [(behind - ahead) / 2], abs=1e-5
    )


def test_a_soft_label_is_a_cross_entropy(inputs: Inputs) -> None:
    hard, soft, turned = (
        task(inputs, [dataclasses.replace(PAIR, strength=p)], orders="both") for p in (None, 0.7, 0.0)
    )
    values = [float(made.compute(made.batches(1, [0], 0)[0])[0].detach()) for made in (hard, soft, turned)]
    assert values[1] == pytest.approx(0.7 * values[0] + 0.3 * values[2], abs=1e-5)
    assert values[0] != pytest.approx(values[2], abs=1e-3)


def test_orders_are_drawn_by_step_and_place(inputs: Inputs) -> None:
    made = task(inputs, [PAIR] * 4, per_device_train_batch_size=4)

    def drawn(step: int, first: int = 0, count: int = 4) -> list[bool]:
        return [item.swapped[0] for item in made.batches(step, list(range(count)), first)[0]]

    many = [value for step in range(1, 41) for value in drawn(step)]
    assert 0.3 < sum(many) / len(many) < 0.7
    assert len(set(drawn(2) + drawn(5))) == 2 and any(len(set(drawn(step))) == 2 for step in range(1, 9))
    assert drawn(3) == drawn(3) and drawn(7)[2:] == drawn(7, first=2, count=2), "whatever process has the rows"
    before = [item.rows[0].ids for item in made.batches(1, [0, 1, 2, 3], 0)[0]]
    assert len(set(before)) == len(set(drawn(1))), "a swap swaps the tokens"


# refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter_name_or_path": "somewhere"}, ("--adapter_name_or_path", "whole model")),
        ({"load_in_4bit": True, "use_peft": True}, ("--load_in_4bit",)),
        ({"source_maxlength": -1}, ("--source_maxlength",)),
        ({"source_maxlength": 200, "candidate_maxlength": 40}, ("context of 256", "--candidate_maxlength")),
        ({"candidate_maxlength": 2}, ("leave no text", "--candidate_maxlength")),
        ({"tokens_per_batch": 45, "orders": "both"}, ("tokens_per_batch is 45", "--tokens_per_batch")),
        ({"use_peft": True, "lora_target_modules": "nonsense"}, ("--lora_target_modules",)),
    ],
)
def test_options_that_cannot_be(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], said: tuple[str, ...]
) -> None:
    assert cli.run(inputs.arguments("ranker", tmp_path / "run", **options)) == 2
    message = capsys.readouterr().err
    message = message[message.rfind("prefkit: ") :]
    assert all(word in message for word in (*said, "mend")), message
    assert not metrics(tmp_path / "run") if (tmp_path / "run" / "metrics.jsonl").exists() else True
    run(inputs, "ranker", tmp_path / "run", max_steps=1)


def test_a_dry_run_on_an_encoder(inputs: Inputs, encoder: Path, tmp_path: Path, capsys: Any) -> None:
    run(inputs, "ranker", tmp_path / "run", "--dry_run", model_name_or_path=encoder)
    said = capsys.readouterr().out
    assert all(word in said for word in ("memory", "disk", "time")) and not (tmp_path / "run").exists()


def test_a_token_budget_leaves_losses_as_they_are(inputs: Inputs, tmp_path: Path) -> None:
    options = {"max_steps": 2, "gradient_accumulation_steps": 4, "learning_rate": 1e-3}
    plain = run(inputs, "ranker", tmp_path / "plain", **options)
    packed = run(inputs, "ranker", tmp_path / "packed", tokens_per_batch=160, **options)
    for name in ("loss", "grad_norm"):
        assert column(packed, name) == pytest.approx(column(plain, name), rel=2e-4)
