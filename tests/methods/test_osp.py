"""OSP from end to end: both stages, the judge that is measured, and what it must not change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from method_runs import Inputs, call, column, lines, metrics, read, run, state, weights
from prefkit.errors import InputError
from prefkit.methods import osp


def options(**values: Any) -> dict[str, Any]:
    return {"num_generations": 3, "temperature": 1.5, **values}


def items(directory: Path, number: int) -> list[dict[str, Any]]:
    return lines(directory / "rounds" / f"{number:05d}.jsonl")


def test_a_pair_carries_the_judges_strength_and_weight(inputs: Inputs, tmp_path: Path):
    directory = run(inputs, "osp", tmp_path / "run", **options())
    matched = [item for item in items(directory, 1) if item["matches"]]
    assert matched
    for item in matched:
        assert len(item["answers"]) == 4
        assert sum(match["weight"] for match in item["matches"]) == pytest.approx(1)
        texts = {item["answers"][place]["text"] for m in item["matches"] for place in (m["chosen"], m["rejected"])}
        assert len(item["matches"]) == len(texts) * (len(texts) - 1) // 2
        first, direct = item["verdicts"]
        assert first["judge"] == direct["judge"] and "self:frozen" in first["judge"]
        asked = {(c["first"], c["second"]): c["prob_first"] for c in direct["comparisons"]}
        for match in item["matches"]:
            assert 0 <= match["strength"] <= 1
            assert match["strength"] == asked[match["chosen"], match["rejected"]]
    rows = metrics(directory)
    assert all(0 <= row["strength"] <= 1 for row in rows[1:])
    assert 0 <= column(directory, "judge/prefers_longer")[0] <= 1


def test_the_judge_is_measured_before_training_and_remembered(inputs: Inputs, tmp_path: Path):
    directory = run(inputs, "osp", tmp_path / "run", **options())
    found = read(directory / "evaluation" / "judge.json")
    assert set(found) >= {"order_agreement", "mass", "accuracy", "temperature", "calibration", "num"}
    assert 0 < found["num"] <= 16 and 0 < found["mass"] < 1
    judge = items(directory, 1)[0]["verdicts"][0]["judge"] if items(directory, 1)[0]["verdicts"] else ""
    assert not judge or f"T={found['temperature']:.6g}" in judge


@pytest.mark.parametrize("lora", [False, True])
def test_the_frozen_judge_is_the_start_model_and_stays_it(inputs: Inputs, tmp_path: Path, lora: bool):
    """Round 2 is judged as the start model would judge it, though the policy has moved."""
    from prefkit.domains.text.choice import LetterReader
    from prefkit.domains.text.policy import TextPolicy
    from prefkit.feedback.self_judge import SelfJudge, choice_template
    from prefkit.records import Question

    settings = options(use_peft=lora, learning_rate=1e-2, judge_temperature=1.0)
    directory = run(inputs, "osp", tmp_path / "run", **settings)
    start = TextPolicy.pretrained(str(inputs.model), dtype="float32")
    judge = SelfJudge(LetterReader(start), choice_template("chat"), "x")
    pairs = [json.loads(line) for line in inputs.train.read_text().splitlines()]
    checked = 0
    for item in items(directory, 2):
        answers = [answer["text"] for answer in item["answers"]]
        for verdict in item["verdicts"]:
            wanted = [(c["first"], c["second"]) for c in verdict["comparisons"]]
            question = Question(prompt=pairs[item["row"]]["prompt"], answers=answers, pairs=wanted)
            again = judge.judge([question])[0]
            for one, other in zip(again.comparisons, verdict["comparisons"], strict=True):
                assert one.prob_first == pytest.approx(other["prob_first"], abs=1e-4)
                checked += 1
    assert checked
    moved = weights(directory)
    assert any(not torch.equal(value, moved[name]) for name, value in start.model.state_dict().items() if name in moved)


@pytest.mark.parametrize("whose", ["policy", "ema"])
def test_other_weights_judge_otherwise_once_the_policy_has_moved(inputs: Inputs, tmp_path: Path, whose: str):
    settings = options(learning_rate=1e-2, judge_temperature=1.0, ema_decay=0.5, save_steps=2)
    frozen = run(inputs, "osp", tmp_path / "frozen", **settings)
    other = run(inputs, "osp", tmp_path / whose, self_judge=whose, **settings)

    def strengths(directory: Path, number: int) -> list[float]:
        found = [item["verdicts"] for item in items(directory, number)]
        return [c["prob_first"] for verdicts in found for c in (verdicts[0]["comparisons"] if verdicts else [])]

    assert strengths(frozen, 1) == strengths(other, 1)
    assert items(frozen, 1)[0]["answers"] == items(other, 1)[0]["answers"]
    assert strengths(frozen, 2) != strengths(other, 2)
    assert (other / "checkpoint-4" / "average.safetensors").is_file() == (whose == "ema")


def test_the_offline_variant_scores_stored_pairs_and_draws_nothing(inputs: Inputs, tmp_path: Path):
    directory = run(inputs, "osp", tmp_path / "run", candidates="data")
    for item in items(directory, 1):
        assert [answer["origin"] for answer in item["answers"]] == ["chosen", "rejected"]
        (match,) = item["matches"]
        assert 0.5 <= match["strength"] <= 1
    assert {match["chosen"] for number in (1, 2) for item in items(directory, number) for match in item["matches"]} == {
        0,
        1,
    }


def test_another_judge_may_rank(inputs: Inputs, tmp_path: Path):
    directory = run(inputs, "osp", tmp_path / "run", **options(judge="gold:prefkit.feedback.gold:brevity"))
    assert not (directory / "evaluation" / "judge.json").exists()
    strengths = {match["strength"] for item in items(directory, 1) for match in item["matches"]}
    assert strengths <= {0.5, 1.0} and 1.0 in strengths


def test_stored_pairs_of_strength_1_are_dpo_bit_for_bit(inputs: Inputs, tmp_path: Path):
    shared: dict[str, Any] = {"offline_rounds": 2, "prompts_per_round": 4, "max_steps": 4}
    soft = run(inputs, "osp", tmp_path / "osp", **shared)
    settings = {"reset_reference": False, "reset_optimizer": False}
    hard = run(inputs, "iterative_dpo", tmp_path / "dpo", **shared, **settings)
    one, other = weights(soft), weights(hard)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert column(soft, "loss") == column(hard, "loss")


def test_a_judge_at_chance_is_refused_and_may_be_forced(inputs: Inputs, tmp_path: Path):
    with pytest.raises(InputError, match="not better than chance") as error:
        call(inputs, "osp", tmp_path / "run", force_judge=False)
    assert "--force_judge" in error.value.mend
    with pytest.raises(InputError, match=r"not understood|by chance"):
        call(inputs, "osp", tmp_path / "unlabelled", force_judge=False, judge_labels=False)


@pytest.mark.parametrize("lora", [False, True])
def test_stage_1_teaches_the_model_to_judge(inputs: Inputs, tmp_path: Path, lora: bool):
    """Chosen answers end in yes, rejected ones in no: after stage 1 the judge knows, and it was at chance before."""
    train = tiny.jsonl(tmp_path / "train.jsonl", tiny.pairs(160))
    settings: dict[str, Any] = {"dataset_name": str(train), "max_length": 250, "use_peft": lora, "lora_r": 32}
    before = read(run(inputs, "osp", tmp_path / "no", **settings, max_steps=1) / "evaluation" / "judge.json")
    stage1 = {
        "stage1_steps": 60,
        "stage1_learning_rate": 1e-2 if lora else 3e-3,
        "stage1_batch_size": 16,
        "judgment_share": 0.9,
    }
    directory = run(inputs, "osp", tmp_path / "run", **settings, **stage1, max_steps=2, force_judge=False)
    after = read(directory / "evaluation" / "judge.json")
    assert after["mass"] > 4 * before["mass"]
    assert before["accuracy"]["low"] < 0.5 < 0.8 < after["accuracy"]["low"]
    assert after["order_agreement"]["mean"] >= before["order_agreement"]["mean"]
    inner = read(directory / "stage1" / "config.json")
    assert inner["method"] == "osp_stage1" and inner["config"]["max_steps"] == 60
    assert "beta" not in inner["config"]
    assert read(directory / "config.json")["config"]["model_name_or_path"] == str(inputs.model)


def test_a_run_killed_in_stage_1_or_behind_it_goes_on_to_the_same_bits(
    inputs: Inputs, tmp_path: Path, monkeypatch: Any
):
    from prefkit.loops import training
    from prefkit.loops.supervised import SupervisedTask

    settings = options(stage1_steps=3, save_steps=1, max_length=250)
    whole = run(inputs, "osp", tmp_path / "whole", **settings)

    class Killed(BaseException):
        pass

    compute = SupervisedTask.compute
    calls = 0

    def dying(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return compute(self, batch)

    monkeypatch.setattr(SupervisedTask, "compute", dying)
    with pytest.raises(Killed):
        call(inputs, "osp", tmp_path / "cut", **settings)
    monkeypatch.undo()
    assert (tmp_path / "cut" / "stage1" / "checkpoint-2").is_dir()

    def dead(*_: Any) -> Any:
        raise Killed

    monkeypatch.setattr(training, "_start", dead)  # stage 1 is taken up and ended by the same function
    with pytest.raises(Killed):
        call(inputs, "osp", tmp_path / "cut", **settings)
    monkeypatch.undo()
    run(inputs, "osp", tmp_path / "cut", **settings)
    one, other = state(whole), state(tmp_path / "cut")
    assert one["metrics"] == other["metrics"]
    for name, value in one.items():
        if name.endswith(".safetensors"):
            assert value == other[name], name


def test_a_finished_stage_1_is_not_done_again_and_other_options_make_it_anew(
    inputs: Inputs, tmp_path: Path, monkeypatch: Any
):
    from prefkit.loops import judge_fit

    settings = options(stage1_steps=2, max_length=250, force_judge=False)
    directory = tmp_path / "run"
    with pytest.raises(InputError, match="chance"):
        call(inputs, "osp", directory, **settings)
    made = (directory / "stage1" / "result.json").stat().st_mtime_ns
    with pytest.raises(InputError, match="chance"):
        call(inputs, "osp", directory, **settings)
    assert (directory / "stage1" / "result.json").stat().st_mtime_ns == made
    (directory / "stage1" / "report.html").unlink()  # as if killed before stage 1 had written its last file
    before = (directory / "stage1" / "model" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="chance"):
        call(inputs, "osp", directory, **settings)
    assert (directory / "stage1" / "report.html").is_file()
    assert (directory / "stage1" / "model" / "model.safetensors").read_bytes() == before
    made = (directory / "stage1" / "result.json").stat().st_mtime_ns
    call(inputs, "osp", directory, **settings | {"force_judge": True, "num_generations": 2})
    assert (directory / "stage1" / "result.json").stat().st_mtime_ns == made, "the advice --force_judge must be cheap"
    for values in ({"model_name_or_path": "another"}, {"stage1_steps": 3}):
        config = judge_fit.stage1_config(dataclasses.replace(osp.PRESETS["tiny"], **{**settings, **values}), directory)
        assert judge_fit.state(directory, config, "") == "other"
        assert judge_fit.state(tmp_path, config, "") == "absent"


def test_stage_1_of_other_pairs_under_the_same_name_is_refused(inputs: Inputs, tmp_path: Path):
    train = tiny.jsonl(tmp_path / "train.jsonl", tiny.pairs(16))
    settings = options(stage1_steps=1, max_length=250, dataset_name=str(train))
    with pytest.raises(InputError, match="chance"):
        call(inputs, "osp", tmp_path / "run", **settings, force_judge=False)
    tiny.jsonl(train, tiny.pairs(16, seed=9))
    with pytest.raises(InputError, match="other pairs"):
        call(inputs, "osp", tmp_path / "run", **settings)


def test_stage_1_has_a_schedule_of_its_own(inputs: Inputs, tmp_path: Path):
    from prefkit.loops import judge_fit

    own = judge_fit.stage1_config(osp.PRESETS["hh"], tmp_path)
    assert (own.lr_scheduler_type, own.warmup_ratio, own.learning_rate) == ("cosine", 0.03, 2e-5)
    assert (osp.PRESETS["hh"].lr_scheduler_type, osp.PRESETS["hh"].learning_rate) == ("constant_with_warmup", 5e-6)


def test_options_that_do_not_go_together_are_refused(inputs: Inputs, tmp_path: Path):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"stage1_steps": 2, "judge_labels": False}, "labels"),
        ({"judgment_share": 1.0}, "judgment_share"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"judge_template": "nothing"}, "neither"),
        ({"judge": ""}, "nobody"),
        ({"num_generations": 1}, "makes no pair"),
    ]
    for values, message in cases:
        with pytest.raises(InputError, match=message):
            call(inputs, "osp", tmp_path / "run", **values)
    assert not (tmp_path / "run").exists()


def test_prompts_whose_answers_were_all_cut_off_are_dropped_and_counted(inputs: Inputs, tmp_path: Path):
    with pytest.raises(InputError, match="'alone': 4"):
        call(inputs, "osp", tmp_path / "run", **options(unfinished="drop"))


def test_equal_answers_are_counted(inputs: Inputs, tmp_path: Path):
    directory = run(inputs, "osp", tmp_path / "run", **options(max_new_tokens=1, temperature=0.3))
    about = read(directory / "rounds" / "00001.json")
    texts = [[answer["text"] for answer in item["answers"]] for item in items(directory, 1)]
    assert about["duplicates"] == sum(len(found) - len(set(found)) for found in texts) > 0


def test_stored_strengths_alone_ask_and_measure_no_judge(inputs: Inputs, tmp_path: Path):
    settings: dict[str, Any] = {"offline_rounds": 2, "num_rounds": 2, "max_steps": -1, "force_judge": False}
    call(inputs, "osp", tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "evaluation" / "judge.json").exists()


def test_the_model_under_the_adapter_is_the_same_bits_after_training(inputs: Inputs, tmp_path: Path):
    """It is the frozen judge and the reference: one base and one adapter serve all three."""
    from transformers import AutoModelForCausalLM

    result = call(inputs, "osp", tmp_path / "run", **options(use_peft=True, learning_rate=1e-2))
    start = AutoModelForCausalLM.from_pretrained(inputs.model).state_dict()
    base = {
        name.replace(".base_layer", ""): value for name, value in result.model.base_model.model.state_dict().items()
    }
    assert all(torch.equal(value, base[name]) for name, value in start.items())
    assert any("lora_" in name and value.any() for name, value in base.items()), "the adapter must have moved"
