"""ZeRO 1 and 2 on two CPU processes equal one process. Skipped where deepspeed is not installed, as in `make test`."""

from __future__ import annotations

import functools
import importlib.util
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
from method_runs import Inputs, column, metrics, weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (extra `deepspeed`)"
)
PROGRAM = Path(__file__).with_name("program.py")
LAUNCHES = Path(prefkit.__file__).parent / "commands" / "accelerate"
OPTIONS = {
    "max_steps": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "save_steps": 2,
    "num_eval_prompts": 3,
    "kl_weight": 0.1,
}


def launch(how: str, *words: str, code: int = 0) -> str:
    """A program by itself (`one`) or under `accelerate launch` with a shipped file; gives what it printed."""
    start = [sys.executable]
    if how != "one":
        start += ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
        start += ["--config_file", str(LAUNCHES / f"{how}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(prefkit.__file__).parents[1])
    done = subprocess.run([*start, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == (code == 0), done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory):
    """Each run of the tiny program, done once."""

    @functools.cache
    def get(how: str, *options: str) -> Path:
        directory = tmp_path_factory.mktemp("run") / how
        launch(how, str(PROGRAM), str(directory), *options)
        return directory

    return get


def rows(directory: Path, name: str) -> torch.Tensor:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)[name] for line in lines], dtype=torch.float64)


@pytest.mark.parametrize("how", ["deepspeed_zero1", "deepspeed_zero2"])
def test_two_processes_equal_one(ran, how: str) -> None:
    one, two = ran("one"), ran(how)
    for name in ("loss", "likeliest", "grad_norm"):
        torch.testing.assert_close(rows(two, name), rows(one, name), rtol=1e-5, atol=0)
    for file in ("state.safetensors", "checkpoint-5/optimizer.safetensors"):
        before, after = load_file(one / file), load_file(two / file)
        assert before.keys() == after.keys()
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)
    assert (one / "facts.json").read_text() == (two / "facts.json").read_text()
    assert {path.suffix for path in (two / "checkpoint-5").iterdir()} == {".json", ".safetensors"}
    AutoModelForCausalLM.from_pretrained(two / "checkpoint-5")


@pytest.mark.parametrize("how", ["deepspeed_zero1", "deepspeed_zero2"])
def test_a_stopped_run_continues_bit_for_bit(ran, how: str, tmp_path: Path) -> None:
    launch(how, str(PROGRAM), str(tmp_path / "run"), "--stop-after", "4", code=3)
    assert "after step 3" in launch(how, str(PROGRAM), str(tmp_path / "run"))
    for name in ("state.safetensors", "checkpoint-5/optimizer.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (ran(how) / name).read_bytes(), name
    assert torch.equal(rows(tmp_path / "run", "grad_norm"), rows(ran(how), "grad_norm"))


def test_lora_equals_one_process(ran) -> None:
    one, two = ran("one", "--lora"), ran("deepspeed_zero2", "--lora")
    torch.testing.assert_close(rows(two, "loss"), rows(one, "loss"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("lora", [False, True])
def test_hypo_equals_one_process(tmp_path: Path, lora: bool) -> None:
    inputs = Inputs.make(tmp_path)
    for how, size in (("one", 4), ("deepspeed_zero2", 2)):
        words = inputs.arguments("hypo", tmp_path / how, per_device_train_batch_size=size, use_peft=lora, **OPTIONS)
        launch(how, "-m", "prefkit", *words, "--debug")
    one, two = tmp_path / "one", tmp_path / "deepspeed_zero2"
    assert [row["step"] for row in metrics(two)] == [row["step"] for row in metrics(one)]
    for name in ("loss", "grad_norm", "rewards/margins", "objective/kl", "completions/mean_length"):
        first, second = torch.tensor(column(one, name)), torch.tensor(column(two, name))
        torch.testing.assert_close(second, first, rtol=1e-5 if name == "loss" else 1e-3, atol=2e-5, msg=name)
    for name, value in weights(one).items():
        assert (weights(two)[name] - value).abs().mean() < 2e-5, name
