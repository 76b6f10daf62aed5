"""Two processes equal one, whole (gloo) or sharded (FSDP2), and what a sharded run writes is an ordinary
model.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prefkit

PROGRAM = Path(__file__).with_name("program.py")
LAUNCHES = Path(prefkit.__file__).parent / "commands" / "accelerate"


def launch(directory: Path, how: str, *options: str, code: int = 0) -> Path:
    """Run the program by itself (`one`) or under `accelerate launch` with a shipped file; checks its exit
    code.
    """
    command = [sys.executable]
    if how != "one":
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
        command += ["--config_file", str(LAUNCHES / f"{how}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(prefkit.__file__).parents[1])
    done = subprocess.run(
        [*command, str(PROGRAM), str(directory), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode == 0) == (code == 0), done.stderr[-3000:]
    return directory


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory):
    """Each kind of launch, done once."""
    return functools.cache(lambda how, *options: launch(tmp_path_factory.mktemp("run") / how, how, *options))


def rows(directory: Path, name: str) -> torch.Tensor:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)[name] for line in lines], dtype=torch.float64)


def facts(directory: Path) -> dict[str, object]:
    return json.loads((directory / "facts.json").read_text())


def assert_alike(one: Path, two: Path, *, parameters: bool = True) -> None:
    assert rows(one, "loss").numel() == 5
    for name in ("loss", "likeliest"):
        torch.testing.assert_close(rows(two, name), rows(one, name), rtol=1e-5, atol=0)
    whole, summed = load_file(one / "gradients.safetensors"), load_file(two / "gradients.safetensors")
    assert whole.keys() == summed.keys()
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)
    if parameters:
        before, after = load_file(one / "state.safetensors"), load_file(two / "state.safetensors")
        for name, weight in before.items():
            torch.testing.assert_close(after[name], weight, rtol=1e-5, atol=1e-5 * float(weight.abs().max()), msg=name)


def test_two_processes_equal_one(ran) -> None:
    one, two = ran("one"), ran("multi_gpu")
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    assert facts(two)["sharded"] == [False]
    assert_alike(one, two)


def test_fsdp2_equals_one_process_and_samples_from_weights_gathered_once(ran) -> None:
    one, two = ran("one"), ran("fsdp2")
    assert facts(two)["sharded"] == [True], "every parameter must be a DTensor"
    assert_alike(one, two)
    assert facts(two)["answers"] == facts(one)["answers"] == facts(two)["again"]
    # six tokens were sampled: a gather per token would have cost six times the units
    assert facts(two)["gathers"] == facts(two)["units"] == 4
    assert facts(two)["head_gathers"] == 1, "once a step, whatever the number of forward passes"


def test_an_fsdp2_checkpoint_is_an_ordinary_model_folder(ran) -> None:
    directory = ran("fsdp2")
    model = AutoModelForCausalLM.from_pretrained(directory / "checkpoint-5")
    assert type(model).__name__ == "LlamaForCausalLM"
    state = load_file(directory / "state.safetensors")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name]), name


def test_an_fsdp2_run_that_stopped_continues_bit_for_bit(ran, tmp_path: Path) -> None:
    directory = launch(tmp_path / "run", "fsdp2", "--stop-after", "4", code=3)
    assert not (directory / "facts.json").exists()
    launch(directory, "fsdp2")
    for name in ("state.safetensors", "checkpoint-5/optimizer.safetensors"):
        assert (directory / name).read_bytes() == (ran("fsdp2") / name).read_bytes(), name
    for name in ("loss", "grad_norm"):
        assert torch.equal(rows(directory, name), rows(ran("fsdp2"), name))


def test_fsdp2_with_lora_equals_one_process(ran) -> None:
    one, two = ran("one", "--lora"), ran("fsdp2", "--lora")
    assert facts(two)["sharded"] == [True]
    # Adam turns rounding in the smallest gradients into whole steps: the losses stand for the weights
    assert_alike(one, two, parameters=False)
    assert facts(two)["answers"] == facts(one)["answers"]
