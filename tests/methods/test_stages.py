"""SFT, a reward model and reinforcement learning from one command: made once, taken up, and nameable afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from method_runs import Inputs, call, lines, read, run, state, weights
from prefkit import cli
from prefkit.engine import checkpoint
from prefkit.errors import InputError
from prefkit.loops import stages
from prefkit.loops.policy_optimization import PolicyOptimization
from prefkit.loops.reward_fit import RewardTask
from prefkit.loops.supervised import SupervisedTask

ALL: dict[str, Any] = {
    "reward": "",
    "sft_steps": 2,
    "reward_steps": 2,
    "sft_learning_rate": 1e-2,
    "reward_learning_rate": 1e-2,
    "max_steps": 2,
    "save_steps": 1,
}


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory):
    made: dict[bool, Path] = {}

    def get(lora: bool) -> Path:
        if lora not in made:
            made[lora] = run(inputs, "drpo", tmp_path_factory.mktemp("stages") / "run", use_peft=lora, **ALL)
        return made[lora]

    return get


@pytest.mark.parametrize("lora", [False, True])
def test_three_stages_in_one_command(whole: Any, inputs: Inputs, lora: bool) -> None:
    directory = whole(lora)
    for stage, method in (("sft", "sft"), ("reward", "reward")):
        config, result = read(directory / stage / "config.json"), read(directory / stage / "result.json")
        assert config["method"] == method and config["config"]["use_peft"] == lora
        assert result["status"] == "complete" and result["steps"] == 2
        assert (directory / stage / "report.html").is_file()
    assert read(directory / "reward" / "config.json")["config"]["model_name_or_path"] == str(directory / "sft")
    assert read(directory / "config.json")["config"]["model_name_or_path"] == str(inputs.model)
    assert read(directory / "config.json")["config"]["reward"] == ""
    final = read(directory / "evaluation.json")["final"]
    assert "eval_objective/scores" in final and "eval_objective/kl" in final
    shared = (directory / "checkpoint-2" / "value.safetensors").is_file()
    assert shared == lora, "the reward model is an adapter on what SFT left, which the policy starts from"
    start = AutoModelForCausalLM.from_pretrained(directory / "sft" / "model").state_dict()
    begun = AutoModelForCausalLM.from_pretrained(inputs.model).state_dict()
    moved = weights(directory)
    far = {name: float((start[name] - begun[name]).abs().max()) for name in moved}
    near = {name: float((moved[name] - start[name]).abs().max()) for name in moved}
    assert max(far.values()) > 1e-3 > 1e-4 > max(near.values()) > 0, "the policy started from what SFT left"


def test_stages_are_nameable_by_later_runs(whole: Any, inputs: Inputs, tmp_path: Path) -> None:
    """The same RL from the stages by name is the same RL, bit for bit."""
    directory = whole(False)
    named = {"reward": f"reward:{directory / 'reward'}", "model_name_or_path": directory / "sft"}
    again = run(inputs, "drpo", tmp_path / "again", **{**ALL, "sft_steps": 0, **named})
    one, other = state(directory), state(again)
    assert one["metrics"] == other["metrics"]
    assert one["model/model.safetensors"] == other["model/model.safetensors"]
    run(inputs, "rloo", tmp_path / "rloo", max_steps=1, **named)


def test_the_same_command_again_makes_no_stage_anew(whole: Any, inputs: Inputs) -> None:
    directory = whole(False)
    before = state(directory)
    stamps = {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")}
    run(inputs, "drpo", directory, **ALL)
    assert state(directory) == before
    made = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert not [path for path in made if "sft" in path.parts or "reward" in path.parts]


def test_another_option_of_rl_before_its_first_step_keeps_the_stages(
    inputs: Inputs, tmp_path: Path, monkeypatch
) -> None:
    def dies(*_: Any, **__: Any) -> Any:
        raise Killed

    directory = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("prefkit.methods.drpo.optimization", dies)
        run(inputs, "drpo", directory, **ALL)
    stamps = {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")}
    assert len(stamps) > 2
    run(inputs, "drpo", directory, **{**ALL, "kl_coef": 0.2})
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert cli.run(inputs.arguments("drpo", directory, **{**ALL, "kl_coef": 0.3})) == 2
    run(inputs, "drpo", directory, "--overwrite", **{**ALL, "kl_coef": 0.3, "sft_steps": 0})
    assert not (directory / "sft").exists(), "--overwrite deletes the stages, too"
    assert (directory / "reward").is_dir()


@pytest.mark.parametrize(("task", "lora"), [(SupervisedTask, False), (RewardTask, True), (PolicyOptimization, True)])
def test_killed_in_a_stage_it_goes_on_to_the_same_bits(
    whole: Any, inputs: Inputs, tmp_path: Path, task: Any, lora: bool, monkeypatch
) -> None:
    calls: list[int] = []
    compute = task.compute

    def dying(self: Any, batch: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise Killed
        return compute(self, batch)

    directory = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(task, "compute", dying)
        run(inputs, "drpo", directory, use_peft=lora, **ALL)
    assert not (directory / "result.json").exists()
    run(inputs, "drpo", directory, use_peft=lora, **ALL)
    one, other = state(whole(lora)), state(directory)
    assert one["metrics"] == other["metrics"]
    assert one["names"] == other["names"]
    differing = [name for name in one if name.endswith(".safetensors") and one[name] != other[name]]
    assert not differing


def test_stages_of_other_data_of_that_name_are_refused(inputs: Inputs, tmp_path: Path, monkeypatch) -> None:
    def dies(*_: Any, **__: Any) -> Any:
        raise Killed

    train = tiny.jsonl(tmp_path / "train.jsonl", tiny.pairs(16))
    options: dict[str, Any] = {**ALL, "reward_steps": 1, "sft_steps": 1, "dataset_name": str(train)}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("prefkit.methods.drpo.optimization", dies)
        call(inputs, "drpo", tmp_path / "run", **options)
    tiny.jsonl(train, tiny.pairs(16, seed=9))
    with pytest.raises(InputError, match="other data"):
        call(inputs, "drpo", tmp_path / "run", **options)


@pytest.mark.slow
def test_a_reward_model_may_learn_from_pairs_of_their_own(inputs: Inputs, tmp_path: Path) -> None:
    """As for TL;DR: demonstrations for SFT and resets, pairs for the reward."""
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny.pairs(16)]
    data = tiny.jsonl(tmp_path / "references.jsonl", rows)
    held = tiny.jsonl(tmp_path / "held.jsonl", rows[:4])
    own = {"dataset_name": data, "eval_dataset": held, "reward_dataset": inputs.train, "reset_source": "reference"}
    directory = run(inputs, "drpo", tmp_path / "run", **{**ALL, **own})
    assert read(directory / "reward" / "config.json")["config"]["dataset_name"] == str(inputs.train)
    assert read(directory / "reward" / "config.json")["config"]["eval_dataset"] == ""


@pytest.mark.slow
def test_a_model_in_memory_starts_every_stage(inputs: Inputs, tmp_path: Path) -> None:
    """A reward model is fit to a copy of it: the policy starts from it as it was."""
    import dataclasses

    from prefkit.methods import drpo

    def objects() -> dict[str, Any]:
        return {
            "model": AutoModelForCausalLM.from_pretrained(inputs.model),
            "tokenizer": AutoTokenizer.from_pretrained(inputs.model),
            "train": lines(inputs.train),
            "evaluation": lines(inputs.held_out),
        }

    shared = {**ALL, "sft_steps": 0, "dtype": "float32"}
    config = dataclasses.replace(drpo.PRESETS["tiny"], **shared, output_dir=str(tmp_path / "memory"))
    drpo.run(config, **objects())
    named = {"reward": f"reward:{tmp_path / 'memory' / 'reward'}"}
    again = run(inputs, "drpo", tmp_path / "named", **{**shared, **named})
    one, other = weights(tmp_path / "memory"), weights(again)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    whole = dataclasses.replace(config, sft_steps=1, output_dir=str(tmp_path / "whole"))
    drpo.run(whole, **objects())
    assert not checkpoint.problem(tmp_path / "whole" / "sft" / "checkpoint-1")


def test_another_spelling_of_the_run_directory_is_no_other_model(whole: Any) -> None:
    directory = whole(False)
    values = read(directory / "reward" / "config.json")["config"]
    moved = {**values, "output_dir": "elsewhere/run/reward", "model_name_or_path": "elsewhere/run/sft"}
    assert stages.placeless(values)["model_name_or_path"] == stages.placeless(moved)["model_name_or_path"] == "sft"
    assert stages.placeless({**values, "model_name_or_path": "another"})["model_name_or_path"] == "another"


def test_a_judge_without_a_name_is_a_reward_model_fit_first(inputs: Inputs, tmp_path: Path) -> None:
    options = {"judge": "reward", "reward_steps": 2, "max_steps": 2, "num_rounds": 1}
    made = run(inputs, "selm", tmp_path / "made", **options)
    assert read(made / "reward" / "result.json")["steps"] == 2
    about = read(made / "rounds" / "00001.json")
    assert about["judge"].startswith("reward:reward@")
    assert read(made / "config.json")["config"]["judge"] == "reward"
    named = run(inputs, "selm", tmp_path / "named", **{**options, "judge": f"reward:{made / 'reward'}"})
    assert lines(named / "rounds" / "00001.jsonl") == lines(made / "rounds" / "00001.jsonl")
    assert weights(named).keys() == weights(made).keys()
    assert all(torch.equal(weights(named)[name], tensor) for name, tensor in weights(made).items())
