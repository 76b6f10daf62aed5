"""Whole methods on two processes, plain (gloo) and sharded (FSDP2), against one process with the same global batch."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import prefkit
from method_runs import Inputs, column, lines, metrics, read, weights
from prefkit import cli

STEPS = 5
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "save_steps": 3,
    "eval_steps": STEPS,
    "num_eval_prompts": 3,
    "lr_scheduler_type": "constant",
    "kl_weight": 0.1,
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from torch.distributed.tensor import DTensor
from prefkit import cli
from prefkit.engine import learner
built = learner.Learner.__init__
def watched(self, module, *args, **kwargs):
    built(self, module, *args, **kwargs)
    kinds = {isinstance(weight, DTensor) for weight in module.parameters()}
    print("SHARDED", sorted(kinds), flush=True)
learner.Learner.__init__ = watched
cli.main([*sys.argv[1:], "--debug"])
"""


def arguments(inputs: Inputs, method: str, directory: Path, how: str, **options: Any) -> list[str]:
    """The same global batch whatever the processes."""
    options = {**OPTIONS, "per_device_train_batch_size": 4 if how == "one" else 2, **options}
    if method != "hypo":
        options.pop("kl_weight")
    return inputs.arguments(method, directory, **options)


def launch(inputs: Inputs, method: str, directory: Path, how: str, **options: Any) -> str:
    """The command line in this process (`one`) or on two (`gloo`, `fsdp`), half the rows each; gives its output."""
    words = arguments(inputs, method, directory, how, **options)
    if how == "one":
        torch.set_num_threads(1)
        assert cli.run([*words, "--debug"]) == 0
        return ""
    program = directory.with_suffix(".py")
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(Path(prefkit.__file__).parents[1])
    environment |= FSDP if how == "fsdp" else {}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs.make(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def ran(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory):
    """(directory, output) of each launch, done once."""

    @functools.cache
    def get(method: str, how: str, lora: bool = False) -> tuple[Path, str]:
        directory = tmp_path_factory.mktemp(f"{method}-{how}") / "run"
        return directory, launch(inputs, method, directory, how, use_peft=lora)

    return get


def assert_alike(one: Path, two: Path, *, lora: bool) -> None:
    assert [row["step"] for row in metrics(two)] == [row["step"] for row in metrics(one)]
    for name in (
        "loss",
        "grad_norm",
        "rewards/margins",
        "logps/chosen",
        "eval_rewards/chosen",
        "eval_rewards/accuracies",
    ):
        first, second = torch.tensor(column(one, name)), torch.tensor(column(two, name))
        assert len(first) and first.abs().max() > 0, name
        torch.testing.assert_close(second, first, rtol=1e-5 if name == "loss" else 1e-3, atol=2e-5, msg=name)
    before, after = weights(one), weights(two)
    assert before.keys() == after.keys()
    for name, value in before.items():
        # Adam turns rounding in the smallest gradients into steps of up to the learning rate
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=2e-3 if lora else 1e-3, msg=name)
        assert (after[name] - value).abs().mean() < 2e-5, name


@pytest.mark.parametrize("method", ["hypo", "dpo"])
def test_two_processes_equal_one(ran, method: str) -> None:
    (one, _), (two, said) = ran(method, "one"), ran(method, "gloo")
    assert read(two / "environment.json")["processes"] == 2
    assert said.count("SHARDED [False]") == 2
    assert_alike(one, two, lora=False)


def test_own_samples_do_not_depend_on_the_number_of_processes(ran) -> None:
    for how in ("gloo", "fsdp"):
        (one, _), (two, _) = ran("hypo", "one"), ran("hypo", how)
        assert column(two, "completions/mean_length") == column(one, "completions/mean_length")
        first, second = torch.tensor(column(one, "objective/kl")), torch.tensor(column(two, "objective/kl"))
        torch.testing.assert_close(second, first, rtol=1e-3, atol=2e-5)
        answers = [read(folder / "evaluation" / "start.json")["samples"] for folder in (one, two)]
        assert [row["answer"] for row in answers[0]] == [row["answer"] for row in answers[1]]


@pytest.mark.parametrize("lora", [False, True])
def test_fsdp2_equals_one_process(ran, lora: bool) -> None:
    (one, _), (two, said) = ran("hypo", "one", lora), ran("hypo", "fsdp", lora)
    assert said.count("SHARDED [True]") == 2, "every parameter must be a DTensor, on both processes"
    assert_alike(one, two, lora=lora)
    model = AutoModelForCausalLM.from_pretrained(two / "model")
    saved = weights(two)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert (two / "report.html").is_file() and (two / "model" / "README.md").is_file()


def test_a_stopped_fsdp2_run_continues(ran, inputs: Inputs, tmp_path: Path) -> None:
    whole, _ = ran("hypo", "fsdp")
    directory = tmp_path / "run"
    launch(inputs, "hypo", directory, "fsdp", max_steps=3, use_peft=False)
    said = launch(inputs, "hypo", directory, "fsdp", use_peft=False)
    assert "after step 3" in said
    assert column(directory, "loss") == column(whole, "loss")
    one, two = weights(whole), weights(directory)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_number_of_processes_is_refused(ran, inputs: Inputs, capsys) -> None:
    directory, _ = ran("dpo", "gloo")
    words = arguments(inputs, "dpo", directory, "one", per_device_train_batch_size=2, use_peft=False)
    assert cli.run(words) == 2
    said = capsys.readouterr().err
    assert "2 process(es)" in said and "continued with 1" in said


@pytest.mark.parametrize("method", ["sft", "reward"])
def test_the_other_methods_run_sharded(ran, method: str) -> None:
    (one, _), (two, said) = ran(method, "one"), ran(method, "fsdp")
    assert said.count("SHARDED [True]") == 2
    torch.testing.assert_close(
        torch.tensor(column(two, "loss")), torch.tensor(column(one, "loss")), rtol=1e-5, atol=1e-6
    )


def test_processes_whose_rows_pack_differently_stay_in_step(ran, inputs: Inputs, tmp_path: Path) -> None:
    (one, _), directory = ran("sft", "one"), tmp_path / "run"
    launch(inputs, "sft", directory, "fsdp", tokens_per_batch=48, use_peft=False)
    torch.testing.assert_close(
        torch.tensor(column(directory, "loss")), torch.tensor(column(one, "loss")), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("how", ["gloo", "fsdp"])
def test_rounds_on_two_processes_are_those_of_one(inputs: Inputs, tmp_path: Path, how: str) -> None:
    options = {"prompts_per_round": 8, "use_peft": False}
    one, two = tmp_path / "one", tmp_path / "two"
    launch(inputs, "selm", one, "one", **options)
    launch(inputs, "selm", two, how, **options)
    for number in (1, 2, 3):
        first, second = (lines(path / "rounds" / f"0000{number}.jsonl") for path in (one, two))
        for row, other in zip(first, second, strict=True):
            assert [a["tokens"] for a in row["answers"]] == [a["tokens"] for a in other["answers"]]
            assert row["matches"] == other["matches"]
    counts = [read(path / "rounds" / "00003.json") for path in (one, two)]
    assert counts[0]["spent"] == counts[1]["spent"]
    shares = [column(path, "optimism/gradient_share") for path in (one, two)]
    assert min(shares[0]) > 0.01 and (shares[1] == [] if how == "fsdp" else len(shares[1]) == len(shares[0]))
    assert_alike(one, two, lora=False)


def test_rounds_stopped_on_two_processes_go_on(inputs: Inputs, tmp_path: Path) -> None:
    options = {"prompts_per_round": 8, "use_peft": False}
    whole, directory = tmp_path / "whole", tmp_path / "run"
    launch(inputs, "selm", whole, "gloo", **options)
    launch(inputs, "selm", directory, "gloo", **options, max_steps=3)
    launch(inputs, "selm", directory, "gloo", **options)
    assert column(directory, "loss") == column(whole, "loss")
    one, two = weights(whole), weights(directory)
    assert all(torch.equal(one[name], two[name]) for name in one)


EPISODES: dict[str, dict[str, Any]] = {
    "ppo": {"num_mini_batches": 2, "kl_coef": 0.1},
    "drpo": {"reset_prob": 0.5, "kl_target": 0.5, "kl_horizon": 20},
    "rloo": {"num_generations": 3, "reset_prob": 0.5},
    "grpo": {"num_generations": 3},
}


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "how"), [("ppo", "gloo"), ("drpo", "fsdp"), slow("rloo", "gloo"), slow("grpo", "fsdp")]
)
def test_episodes_on_two_processes_are_those_of_one(inputs: Inputs, tmp_path: Path, method: str, how: str) -> None:
    options = {**EPISODES[method], "use_peft": False}
    one, two = tmp_path / "one", tmp_path / "two"
    launch(inputs, method, one, "one", **options)
    launch(inputs, method, two, how, **options)
    for step in (3, STEPS):
        first, second = (lines(path / f"checkpoint-{step}" / "rollouts.jsonl") for path in (one, two))
        assert [row["tokens"] for row in first[1:]] == [row["tokens"] for row in second[1:]]
        assert [row["prefix"] for row in first[1:]] == [row["prefix"] for row in second[1:]]
        assert first[0]["sampled_tokens"] == second[0]["sampled_tokens"]
    for name in ("loss", "grad_norm", "objective/scores", "objective/kl", "objective/entropy", "policy/ratio"):
        first, second = torch.tensor(column(one, name)), torch.tensor(column(two, name))
        assert len(first), name
        torch.testing.assert_close(second, first, rtol=1e-3, atol=5e-5, msg=name)
    before, after = weights(one), weights(two)
    for name, value in before.items():
        assert (after[name] - value).abs().mean() < 2e-5, name


def test_sharded_processes_with_unequal_shares_of_answers_stay_in_step(inputs: Inputs, tmp_path: Path) -> None:
    """Four prompts are drawn as three and one, which is another number of passes on each process."""
    options = {"num_generations": 21, "max_new_tokens": 3, "max_steps": 2, "use_peft": False}
    launch(inputs, "rloo", tmp_path / "run", "fsdp", **options)
    assert len(lines(tmp_path / "run" / "checkpoint-2" / "rollouts.jsonl")) == 1 + 4 * 21


@pytest.mark.slow
def test_a_stopped_run_on_episodes_continues_on_two_processes(inputs: Inputs, tmp_path: Path) -> None:
    options = {**EPISODES["drpo"], "use_peft": False, "max_steps": 4, "save_steps": 1}
    whole, directory = tmp_path / "whole", tmp_path / "run"
    launch(inputs, "drpo", whole, "fsdp", **options)
    launch(inputs, "drpo", directory, "fsdp", **{**options, "max_steps": 3})
    launch(inputs, "drpo", directory, "fsdp", **options)
    assert column(directory, "loss") == column(whole, "loss")
    one, two = weights(whole), weights(directory)
    assert all(torch.equal(one[name], two[name]) for name in one)
