"""A program killed with SIGKILL at a random moment and started again ends with the same bits as one left alone."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tqdm.auto
import tqdm.std

import tiny
from method_runs import Inputs, assert_same_state, run
from prefkit import cli
from prefkit.engine import files
from prefkit.engine.journal import Journal
from prefkit.engine.learner import Learner

OPTIONS: dict[str, Any] = {"max_steps": 8, "save_steps": 2, "eval_steps": 4, "logging_steps": 1, "learning_rate": 1e-3}
CASES = {
    "hypo-lora": ("hypo", {"use_peft": True}),
    "dpo-full": ("dpo", {}),
    "dpo-cached-reference": ("dpo", {"precompute_ref_log_probs": True, "use_peft": True}),
    "dpo-token-budget": ("dpo", {"tokens_per_batch": 130, "gradient_accumulation_steps": 2}),
    "reward-lora": ("reward", {"use_peft": True, "keep_best": "-eval_rewards/margins"}),
    "ranker-lora": ("ranker", {"use_peft": True}),
    "selm-rounds": ("selm", {"prompts_per_round": 6, "alpha": 0.2}),
    "online-dpo-lora": ("online_dpo", {"use_peft": True}),
    "osp-ema-lora": ("osp", {"use_peft": True, "self_judge": "ema", "ema_decay": 0.5}),
    "drpo-resets": ("drpo", {"num_mini_batches": 2, "reset_prob": 0.5, "kl_target": 0.5, "kl_horizon": 20}),
    "rloo-lora": ("rloo", {"use_peft": True, "num_ppo_epochs": 3, "reset_prob": 0.5}),
}


def slowed(seed: int) -> None:
    """Random pauses around whatever touches the disk, so that a random moment hits them all."""
    moments = random.Random(seed)

    def slow(owner: object, name: str, most: float) -> None:
        original = getattr(owner, name)

        def later(*args: Any, **kwargs: Any) -> Any:
            time.sleep(moments.uniform(0, most))
            return original(*args, **kwargs)

        setattr(owner, name, later)

    slow(Learner, "update", 0.1)
    slow(files, "write_json", 0.08)
    slow(Journal, "append", 0.03)
    slow(os, "fsync", 0.03)


def start(arguments: list[str], seed: int) -> int:
    """The command line in a forked process; gives its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        # Progress bars lock across forks, and a child killed inside that lock would stop its parent for good.
        for bars in (tqdm.auto.tqdm, tqdm.std.tqdm):
            bars.set_lock(threading.RLock())
        slowed(seed)
        code = cli.run(arguments)
    finally:
        os._exit(code)


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments(inputs: Inputs, tmp_path: Path, case: str) -> None:
    method, options = CASES[case]
    options = {**OPTIONS, **options}
    whole = run(inputs, method, tmp_path / "whole", **options)
    directory = tmp_path / "run"
    arguments = inputs.arguments(method, directory, **options)
    moments = random.Random(case)
    kills = 0
    for attempt in range(4):
        child = start(arguments, attempt)
        deadline = time.monotonic() + 60
        while not (directory / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moments.uniform(0.05, 1.2))
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert kills, "the program must have been killed at work at least once"
    if case == "dpo-full":
        assert cli.run(["resume", str(directory)]) == 0
    else:
        run(inputs, method, directory, **options)
    assert_same_state(whole, directory)


@pytest.mark.parametrize(("method", "damage"), [("dpo", "cut"), ("hypo", "flip"), ("dpo", "missing")])
def test_a_corrupted_checkpoint_falls_back_to_the_one_before(
    inputs: Inputs, tmp_path: Path, method: str, damage: str, capsys
) -> None:
    options = {**OPTIONS, "use_peft": True}
    whole = run(inputs, method, tmp_path / "whole", **options)
    directory = run(inputs, method, tmp_path / "run", **options)
    file = directory / "checkpoint-8" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "flip":
        content[-10] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    capsys.readouterr()
    run(inputs, method, directory, **options)
    said = capsys.readouterr().err
    assert "continuing from checkpoint-6 instead" in said
    assert "checkpoint-8" in said and "adapter_model.safetensors" in said
    assert_same_state(whole, directory)


def test_nothing_but_corrupted_checkpoints_is_refused(inputs: Inputs, tmp_path: Path, capsys) -> None:
    directory = run(inputs, "dpo", tmp_path / "run", **OPTIONS)
    for file in directory.glob("checkpoint-*/model.safetensors"):
        file.write_bytes(b"gone")
    capsys.readouterr()
    assert cli.run(inputs.arguments("dpo", directory, **OPTIONS)) == 2
    said = capsys.readouterr().err
    assert "checkpoint-6" in said and "checkpoint-8" in said and "mend" in said and "Traceback" not in said


def test_other_data_under_the_same_name_is_refused_on_resume(inputs: Inputs, tmp_path: Path, capsys) -> None:
    train = tiny.jsonl(tmp_path / "train.jsonl", tiny.pairs(16))
    options = {**OPTIONS, "dataset_name": train}
    directory = run(inputs, "dpo", tmp_path / "run", **options)
    about = (directory / "data.json").read_bytes()
    tiny.jsonl(train, tiny.pairs(16, seed=9))
    assert cli.run(inputs.arguments("dpo", directory, **options)) == 2
    assert "the data is not what this run was started with" in capsys.readouterr().err
    assert (directory / "data.json").read_bytes() == about, "a refused start must leave the run's record alone"


def test_other_online_prompts_under_the_same_name_are_refused_on_resume(inputs: Inputs, tmp_path: Path, capsys) -> None:
    prompts = tiny.jsonl(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in tiny.pairs(6, seed=3)])
    options = {**OPTIONS, "prompt_dataset": prompts}
    directory = run(inputs, "hypo", tmp_path / "run", **options)
    tiny.jsonl(prompts, [{"prompt": row["prompt"]} for row in tiny.pairs(6, seed=4)])
    assert cli.run(inputs.arguments("hypo", directory, **options)) == 2
    assert "is not what this run was started with" in capsys.readouterr().err
