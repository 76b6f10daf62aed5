"""Rounds end to end: reductions between methods, the reference of a round, resuming in any stage, the label budget."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import prefkit.domains.text.round_maker as round_maker
from method_runs import Inputs, assert_same_state, call, column, lines, metrics, read, run, state, weights
from prefkit.domains.text.policy import TextPolicy
from prefkit.engine.parts import Parts
from prefkit.errors import InputError
from prefkit.feedback import gold
from prefkit.feedback.scored import ScoredJudge
from prefkit.loops.rounds import RoundTask

ONLINE = ("selm", "iterative_dpo", "online_dpo", "xpo")
STEADY: dict[str, Any] = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_steps": 0}


def rows_of(directory: Path, number: int) -> list[dict[str, Any]]:
    return lines(directory / "rounds" / f"{number:05d}.jsonl")


def same_weights(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_selm_with_alpha_0_is_iterative_dpo_bit_for_bit(inputs: Inputs, tmp_path: Path) -> None:
    selm = run(inputs, "selm", tmp_path / "selm", alpha=0.0, **STEADY)
    iterative = run(inputs, "iterative_dpo", tmp_path / "iterative", **STEADY)
    one, two = state(selm), state(iterative)
    different = {name for name in one if one[name] != two.get(name)}
    assert different <= {"result"} and metrics(selm) == metrics(iterative), (
        "logs, weights, optimizer, evaluation, names"
    )
    assert any(name.endswith("optimizer.safetensors") for name in one)
    for path in sorted((selm / "rounds").glob("*.jsonl")):
        assert path.read_bytes() == (iterative / "rounds" / path.name).read_bytes(), "the same answers and verdicts"
    acting = run(inputs, "selm", tmp_path / "acting", **STEADY)
    assert not same_weights(acting, iterative)


def test_a_round_starts_at_log_2_and_the_optimism_term_at_0(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "selm", tmp_path / "run", alpha=0.3, **STEADY)
    rows = {row["step"]: row for row in metrics(directory)}
    for step in (1, 3):
        assert rows[step]["loss"] == pytest.approx(0.6931472, abs=2e-6)
        assert rows[step]["optimism/loss"] == pytest.approx(0.0, abs=2e-6)
    assert rows[2]["loss"] != pytest.approx(0.6931472, abs=1e-5)
    assert [rows[step]["rounds/round"] for step in (1, 2, 3, 4)] == [1, 1, 2, 2]


def test_with_the_start_model_as_reference_the_second_round_does_not(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "iterative_dpo", tmp_path / "run", "--no_reset_reference", **STEADY)
    losses = column(directory, "loss")
    assert losses[0] == pytest.approx(0.6931472, abs=2e-6)
    assert losses[2] != pytest.approx(0.6931472, abs=1e-4)
    assert not list((directory / "rounds").glob("*.reference.jsonl"))


def test_the_kept_reference_is_what_a_frozen_copy_gives(inputs: Inputs, tmp_path: Path) -> None:
    """In the first round the round's reference is the start model, which the other run scores live."""
    kept = run(inputs, "selm", tmp_path / "kept", max_steps=2, **STEADY)
    live = run(inputs, "selm", tmp_path / "live", "--no_reset_reference", max_steps=2, **STEADY)
    torch.testing.assert_close(
        torch.tensor(column(kept, "grad_norm")), torch.tensor(column(live, "grad_norm")), rtol=1e-5, atol=1e-6
    )
    one, two = weights(kept), weights(live)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_every_answer_stands_on_disk_with_what_made_it(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "selm", tmp_path / "run")
    first, second = rows_of(directory, 1), rows_of(directory, 2)
    assert [row["position"] for row in first] == [0, 1, 2, 3]
    assert [row["row"] for row in first + second] == list(range(8))
    for row in first:
        assert row["seed"] == 0 and row["policy_version"].endswith("@0") and row["prompt"].startswith("user: ")
        own, chosen, rejected = row["answers"]
        assert (own["origin"], chosen["origin"], rejected["origin"]) == ("own", "chosen", "rejected")
        assert own["log_prob"] < 0 and own["tokens"]
        verdict = row["verdicts"][0]
        assert verdict["judge"].startswith("gold:") and len(verdict["scores"]) == 3 and len(verdict["comparisons"]) == 3
        texts = [answer["text"] for answer in row["answers"]]
        best, worst = min(texts, key=len), max(texts, key=len)
        match = row["matches"][0]
        assert (len(texts[match["chosen"]]), len(texts[match["rejected"]])) == (len(best), len(worst))
    assert {row["policy_version"].split("@")[1] for row in second} == {"2"}


def test_the_label_budget_adds_up(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "selm", tmp_path / "run")
    asked = [sum(len(v["comparisons"]) for row in rows_of(directory, t) for v in row["verdicts"]) for t in (1, 2)]
    assert [read(directory / "rounds" / f"0000{t}.json")["comparisons"] for t in (1, 2)] == asked
    assert column(directory, "rounds/comparisons") == [asked[0]] * 2 + [sum(asked)] * 2
    assert asked[0] == 12  # one ranking of three for each of four prompts


def test_rows_between_which_rounds_begin_tell_the_budget_and_the_share(inputs: Inputs, tmp_path: Path, capsys) -> None:
    """Rounds of two steps begin at 1 and 3, where the cadence writes no row; each end of a round has one."""
    directory = run(inputs, "selm", tmp_path / "run", "--num_rounds", "2", logging_steps=10, **STEADY)
    assert [row["step"] for row in metrics(directory) if "loss" in row] == [2, 4]
    assert column(directory, "rounds/comparisons") == [12, 24]
    assert min(column(directory, "optimism/gradient_share")) > 0.01
    assert "indistinguishable" not in capsys.readouterr().err


def test_own_answers_that_meet_are_scored_once(inputs: Inputs, tmp_path: Path, monkeypatch) -> None:
    """ŷ is the shortest or the longest answer of most prompts here: its tokens are laid out once all the same."""
    seen: list[int] = []
    original = TextPolicy.token_log_probs

    def counting(self: TextPolicy, groups: Sequence[Any], **settings: Any) -> Any:
        if torch.is_grad_enabled():
            for group in groups:
                assert len(set(group.answers)) == len(group.answers)
            seen.extend(len(group.answers) for group in groups)
        return original(self, groups, **settings)

    monkeypatch.setattr(TextPolicy, "token_log_probs", counting)
    directory = run(inputs, "selm", tmp_path / "run")
    expected = []
    for number in (1, 2):
        for row in rows_of(directory, number):
            match = row["matches"][0]
            places = {match["chosen"], match["rejected"], 0}
            expected.append(len({tuple(row["answers"][place]["tokens"]) for place in places}))
    assert sorted(seen) == sorted(expected)
    assert 2 in expected


@pytest.mark.parametrize("method", ONLINE)
def test_a_judge_that_dies_costs_nothing(inputs: Inputs, tmp_path: Path, monkeypatch, method: str) -> None:
    monkeypatch.setattr(round_maker, "PIECE", 1)
    whole = run(inputs, method, tmp_path / "whole", **STEADY)
    asked: list[str] = []
    original = ScoredJudge.judge

    def dying(self: ScoredJudge, questions: Any) -> Any:
        if len(asked) == 5:
            asked.append("dead")
            raise InputError("the endpoint is gone", where="--judge")
        asked.extend(question.answers[0] for question in questions)
        return original(self, questions)

    monkeypatch.setattr(ScoredJudge, "judge", dying)
    assert run_code(inputs, method, tmp_path / "run") == 2
    before = len(asked) - 1
    run(inputs, method, tmp_path / "run", **STEADY)
    assert_same_state(whole, tmp_path / "run")
    total = sum(1 for number in whole.glob("rounds/?????.jsonl") for row in lines(number) if row["verdicts"])
    assert len(asked) - 1 == total and before == 5, "no prompt is judged twice"


def run_code(inputs: Inputs, method: str, directory: Path) -> int:
    from prefkit import cli

    return cli.run(inputs.arguments(method, directory, **STEADY))


STAGES = {
    "while answers are drawn": (Parts, "append", 2),
    "between drawing and judging": (Parts, "finish", 1),
    "while it judges": (Parts, "append", 6),
    "before the reference is scored": (RoundTask, "_score_reference", 1),
    "in the second round": (RoundTask, "_score_reference", 2),
    "while it trains": (RoundTask, "compute", 2),
    "after the second round began": (RoundTask, "compute", 3),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_stopped_in_any_stage_goes_on(
    inputs: Inputs, tmp_path: Path, monkeypatch, stage: str, lora: bool
) -> None:
    monkeypatch.setattr(round_maker, "PIECE", 1)
    options = {**STEADY, "use_peft": lora}
    whole = run(inputs, "selm", tmp_path / "whole", **options)
    owner, name, turn = STAGES[stage]
    original, calls = getattr(owner, name), [0]

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == turn:
            raise RuntimeError("killed")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(RuntimeError, match="killed"):
            call(inputs, "selm", tmp_path / "run", **options)
    call(inputs, "selm", tmp_path / "run", **options)
    for number in (1, 2):
        assert rows_of(whole, number) == rows_of(tmp_path / "run", number)
    assert column(whole, "loss") == column(tmp_path / "run", "loss")
    assert same_weights(whole, tmp_path / "run")
    left = {path.name for path in (tmp_path / "run" / "rounds").iterdir()}
    assert left == {path.name for path in (whole / "rounds").iterdir()}


def test_a_lost_round_file_is_refused_and_named(inputs: Inputs, tmp_path: Path) -> None:
    options = {**STEADY, "save_steps": 1}
    directory = tmp_path / "run"
    run(inputs, "selm", directory, max_steps=1, **options)
    (directory / "rounds" / "00001.jsonl").unlink()
    with pytest.raises(InputError, match="round 1 had begun, and its file is gone"):
        call(inputs, "selm", directory, max_steps=4, **options)


def test_optimizer_and_schedule_start_anew_in_each_round(inputs: Inputs, tmp_path: Path) -> None:
    options = {"learning_rate": 1e-3, "prompts_per_round": 8, "max_steps": 8, "lr_scheduler_type": "linear"}
    directory = run(inputs, "iterative_dpo", tmp_path / "run", **options)
    rates = column(directory, "learning_rate")
    assert rates[:4] == rates[4:] and rates[0] == 1e-3 and rates[3] == pytest.approx(2.5e-4)
    given = run(
        inputs,
        "iterative_dpo",
        tmp_path / "given",
        "--learning_rates",
        "1e-3",
        "5e-4",
        prompts_per_round=8,
        max_steps=8,
        lr_scheduler_type="constant",
    )
    assert column(given, "learning_rate") == [1e-3] * 4 + [5e-4] * 4
    kept = run(inputs, "iterative_dpo", tmp_path / "kept", "--no_reset_optimizer", **options)
    falling = column(kept, "learning_rate")
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == 8


def test_arms_share_the_answers_of_the_first_round(inputs: Inputs, tmp_path: Path, monkeypatch) -> None:
    first = run(inputs, "selm", tmp_path / "first", **STEADY)
    alone = run(inputs, "selm", tmp_path / "alone", alpha=0.4, **STEADY)
    drawn: list[int] = []
    original = round_maker.RoundMaker._answers

    def counting(self: Any, one: Any, *rest: Any) -> Any:
        drawn.append(one.number)
        return original(self, one, *rest)

    monkeypatch.setattr(round_maker.RoundMaker, "_answers", counting)
    second = run(inputs, "selm", tmp_path / "second", alpha=0.4, share_samples=first, **STEADY)
    assert set(drawn) == {2}
    assert same_weights(alone, second)
    assert read(second / "rounds" / "00001.json")["shared_from"] == str(first)


def test_a_round_that_is_not_whole_is_not_shared(inputs: Inputs, tmp_path: Path, capsys) -> None:
    """The other run was killed between a round's two files, or is just writing them."""
    first = run(inputs, "selm", tmp_path / "first", max_steps=1, **STEADY)
    (first / "rounds" / "00001.jsonl").unlink()
    capsys.readouterr()
    second = run(inputs, "selm", tmp_path / "second", share_samples=first, max_steps=1, **STEADY)
    assert "not those of this run" in capsys.readouterr().err
    assert read(second / "rounds" / "00001.json")["shared_from"] == ""


def test_a_run_in_rounds_of_steps_may_grow(inputs: Inputs, tmp_path: Path) -> None:
    """The last round is whole, though the first call ends inside it."""
    options = {**STEADY, "steps_per_round": 2}
    whole = run(inputs, "online_dpo", tmp_path / "whole", max_steps=4, **options)
    grown = run(inputs, "online_dpo", tmp_path / "grown", max_steps=3, **options)
    run(inputs, "online_dpo", tmp_path / "grown", max_steps=4, **options)
    assert rows_of(grown, 2) == rows_of(whole, 2)
    assert same_weights(grown, whole)


def test_recomputed_layers_have_the_same_share(inputs: Inputs, tmp_path: Path) -> None:
    """The published presets checkpoint their layers, and the share takes backward passes of its own."""
    plain = run(inputs, "selm", tmp_path / "plain", max_steps=2, **STEADY)
    saving = run(inputs, "selm", tmp_path / "saving", "--gradient_checkpointing", max_steps=2, **STEADY)
    for name in ("optimism/gradient_share", "grad_norm"):
        assert column(saving, name) == pytest.approx(column(plain, name), rel=1e-3)


def test_answers_of_another_seed_are_not_shared(inputs: Inputs, tmp_path: Path, capsys) -> None:
    first = run(inputs, "selm", tmp_path / "first", **STEADY)
    capsys.readouterr()
    second = run(inputs, "selm", tmp_path / "second", share_samples=first, seed=1, **STEADY)
    assert "not those of this run" in capsys.readouterr().err
    assert read(second / "rounds" / "00001.json")["shared_from"] == ""


def test_offline_rounds_train_on_the_stored_pairs(inputs: Inputs, tmp_path: Path) -> None:
    sdpo = run(inputs, "sdpo", tmp_path / "sdpo", **STEADY)
    offline = run(inputs, "selm", tmp_path / "selm", offline_rounds=2, **STEADY)
    assert column(sdpo, "loss") == column(offline, "loss")
    assert same_weights(sdpo, offline)
    for row in rows_of(sdpo, 1):
        assert [answer["origin"] for answer in row["answers"]] == ["chosen", "rejected"]
        assert row["matches"][0]["chosen"] == 0 and not row["verdicts"]
    assert all("judge" not in row for row in metrics(sdpo))


def test_an_offline_round_before_online_ones(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "selm", tmp_path / "run", offline_rounds=1, **STEADY)
    rows = {row["step"]: row for row in metrics(directory)}
    assert "optimism/loss" not in rows[1] and "optimism/loss" in rows[3]
    assert read(directory / "rounds" / "00001.json")["comparisons"] == 0


def test_xpo_pushes_down_what_the_start_model_answers(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "xpo", tmp_path / "run", alpha=0.05, **STEADY)
    origins = [tuple(answer["origin"] for answer in row["answers"]) for row in rows_of(directory, 1)]
    assert set(origins) == {("own", "reference")}
    plain = run(inputs, "xpo", tmp_path / "plain", alpha=0.0, **STEADY)
    first = [rows_of(path, 1) for path in (directory, plain)]
    assert first[0] == first[1]
    assert column(directory, "grad_norm")[0] != column(plain, "grad_norm")[0]
    later = rows_of(directory, 4)
    assert any(row["answers"][0]["text"] != row["answers"][1]["text"] for row in later)


def test_online_dpo_draws_at_every_step_and_keeps_the_start_model_as_reference(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "online_dpo", tmp_path / "run", **STEADY)
    versions = [read(directory / "rounds" / f"0000{t}.json")["policy_version"].split("@")[1] for t in range(1, 5)]
    assert versions == ["0", "1", "2", "3"]
    assert all(len(row["answers"]) == 2 for row in rows_of(directory, 3))


def test_the_gradient_share_is_that_of_the_optimism_term(inputs: Inputs, tmp_path: Path) -> None:
    shares = {}
    for alpha in (0.001, 0.1, 10.0):
        directory = run(inputs, "selm", tmp_path / str(alpha), alpha=alpha, max_steps=1, learning_rate=1e-9)
        shares[alpha] = column(directory, "optimism/gradient_share")[0]
    assert shares[0.001] < 0.01 < shares[0.1] < 0.5 < shares[10.0] < 1
    ratio = {alpha: share / (1 - share) / alpha for alpha, share in shares.items()}
    assert ratio[0.1] == pytest.approx(ratio[10.0], rel=1e-3) == pytest.approx(ratio[0.001], rel=1e-3)


def test_a_term_without_influence_is_said_once(inputs: Inputs, tmp_path: Path, capsys) -> None:
    run(inputs, "selm", tmp_path / "weak", alpha=0.0001)
    assert capsys.readouterr().err.count("indistinguishable from `iterative_dpo`") == 1
    run(inputs, "selm", tmp_path / "acting", alpha=0.2)
    assert "indistinguishable" not in capsys.readouterr().err
    run(inputs, "xpo", tmp_path / "xpo", max_steps=2)
    assert capsys.readouterr().err.count("indistinguishable from `online_dpo`") == 1, "TRL's default does not act"


def test_an_optimism_term_that_runs_away_stops_the_run(inputs: Inputs, tmp_path: Path) -> None:
    options = {"alpha": 1e4, "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    with pytest.raises(InputError, match=r"nats a token|training has diverged"):
        call(inputs, "selm", tmp_path / "run", prompts_per_round=8, max_steps=8, **options)


def test_a_bound_on_the_log_ratio_takes_the_push_away(inputs: Inputs, tmp_path: Path) -> None:
    options = {"alpha": 50.0, "learning_rate": 3e-3, "lr_scheduler_type": "constant", "prompts_per_round": 8}
    free = run(inputs, "selm", tmp_path / "free", max_steps=4, **options)
    bound = run(inputs, "selm", tmp_path / "bound", max_steps=4, max_log_ratio=0.5, **options)
    assert column(free, "optimism/loss")[-1] < column(bound, "optimism/loss")[-1]
    assert min(column(bound, "optimism/loss")) >= -50.0 * 0.1 * 0.5 - 1e-4


def test_a_judge_that_prefers_nothing_is_an_error(inputs: Inputs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gold, "brevity", lambda prompts, completions: [0.0] * len(completions))
    with pytest.raises(InputError, match="prefers none of the answers"):
        call(inputs, "iterative_dpo", tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"judge": ""}, "nobody ranks"),
        ({"judge": "", "offline_rounds": 2}, "nobody ranks"),
        ({"num_generations": 0, "response": "sample"}, "num_generations"),
        ({"learning_rates": (1e-3,)}, "1 learning rates for 2 rounds"),
        ({"learning_rates": (1e-3, 1e-3), "reset_optimizer": False}, "schedule that starts anew"),
        ({"steps_per_round": 1}, "learns no moments"),
        ({"num_rounds": 50, "prompts_per_round": 0}, "cannot be cut"),
        ({"offline_rounds": 1, "replay_rounds": 1}, "no answer of the model's own"),
        ({"judge": "oracle:x"}, "names no judge"),
        ({"alpha": -0.1}, "alpha"),
        ({"share_samples": "/nowhere"}, "holds no rounds"),
    ],
)
def test_bad_options_are_refused(inputs: Inputs, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        call(inputs, "selm", tmp_path / "run", **options)


def test_replayed_rounds_are_trained_on_again(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "selm", tmp_path / "run", replay_rounds=1, max_steps=6, **STEADY)
    kept = lines(directory / "rounds" / "00002.reference.jsonl")
    assert len(kept) == 8, "the replayed items are scored under the new round's reference"
    assert len(column(directory, "loss")) == 6


def test_cut_answers_have_no_end_token_and_can_be_left_out(inputs: Inputs, tmp_path: Path) -> None:
    kept = run(inputs, "online_dpo", tmp_path / "kept", max_new_tokens=3)
    answers = [a for t in range(1, 5) for row in rows_of(kept, t) for a in row["answers"]]
    assert any(not answer["finished"] for answer in answers)
    assert all((answer["tokens"][-1] == 2) == answer["finished"] for answer in answers)
    dropped = run(inputs, "online_dpo", tmp_path / "dropped", max_new_tokens=3, unfinished="drop")
    for t in range(1, 5):
        for row in rows_of(dropped, t):
            for match in row["matches"]:
                assert row["answers"][match["chosen"]]["finished"] and row["answers"][match["rejected"]]["finished"]


def test_answers_are_cut_to_max_length_as_stored_ones_are(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "online_dpo", tmp_path / "run", max_length=42, long_prompts="drop", max_new_tokens=20)
    for t in range(1, 5):
        for row in rows_of(directory, t):
            for answer in row["answers"]:
                assert answer["finished"] == (answer["tokens"][-1] == 2)
                assert len(answer["tokens"]) <= 20


def test_all_pairs_weigh_one_prompt(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "iterative_dpo", tmp_path / "run", pairing="all", num_generations=2, **STEADY)
    assert column(directory, "loss")[0] == pytest.approx(0.6931472, abs=2e-6)
    assert any(len(row["matches"]) > 1 for row in rows_of(directory, 1))


def test_run_is_told_of_each_round(inputs: Inputs, tmp_path: Path, capsys) -> None:
    run(inputs, "selm", tmp_path / "run")
    said = capsys.readouterr().err
    assert "round 1: 4 prompts, 4 answers, 12 comparisons by gold:" in said and "2 rounds of 4 prompts" in said


@pytest.mark.parametrize("method", ["selm", "iterative_dpo"])
def test_the_presets_are_the_published_settings(method: str) -> None:
    """The table of section 2.2 of the paper's specification; batches are those of 8 processes."""
    presets = importlib.import_module(f"prefkit.methods.{method}").PRESETS
    zephyr, llama, phi = (presets[name] for name in ("zephyr", "llama3", "phi3"))
    models = ("mistral-7b-sft-beta", "Meta-Llama-3-8B-Instruct", "Phi-3-mini-4k-instruct")
    for one, model in zip((zephyr, llama, phi), models, strict=True):
        assert one.model_name_or_path.endswith(model)
        assert (one.judge, one.beta, one.seed, one.response) == ("ranker:llm-blender/PairRM", 0.01, 42, "greedy")
        assert (one.candidates, one.pairing, one.num_generations) == ("both", "best_worst", 1)
        assert (one.num_train_epochs, one.lr_scheduler_type, one.warmup_ratio, one.optim) == (1, "cosine", 0.1, "adamw")
        assert (one.max_length, one.max_new_tokens, one.replay_rounds) == (1024, 1024, 0)
        assert one.reset_reference and one.reset_optimizer and one.gradient_checkpointing
    assert zephyr.learning_rates == (5e-7, 5e-7, 5e-7, 1e-7) and (zephyr.num_rounds, zephyr.offline_rounds) == (4, 1)
    for one in (llama, phi):
        assert one.learning_rates == (5e-7, 3e-7, 1e-7) and (one.num_rounds, one.offline_rounds) == (3, 0)
    batches = [8 * one.per_device_train_batch_size * one.gradient_accumulation_steps for one in (zephyr, llama, phi)]
    assert batches == [256, 128, 128]
    if method == "selm":
        assert [one.alpha for one in (zephyr, llama, phi)] == [1e-3, 1e-4, 1e-3]
        assert {preset.max_log_ratio for preset in presets.values()} == {0.0}


def test_the_default_acts() -> None:
    from prefkit.methods import selm

    assert (selm.Config().alpha, selm.Config().response) == (0.1, "greedy")
