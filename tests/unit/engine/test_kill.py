"""A run killed at any moment and continued ends bit for bit like one that was never stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import prefkit
from prefkit.engine import files
from prefkit.engine.journal import Journal

from . import toy

OPTIONS = {
    "max_steps": 16,
    "save_steps": 3,
    "eval_steps": 4,
    "keep_best": "-error",
    "gradient_accumulation_steps": 2,
}


def final_state(directory: Path) -> dict[str, object]:
    """Everything a run leaves that is not a time."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    content: dict[str, object] = {"rows": [_timeless(row) for row in rows]}
    content["names"] = sorted(path.name for path in directory.iterdir())
    for path in sorted(directory.glob("checkpoint-*/*")):
        key = path.relative_to(directory).as_posix()
        if path.suffix == ".safetensors":
            content[key] = path.read_bytes()
        elif path.name != "manifest.json":
            content[key] = _timeless(json.loads(path.read_text()))
    content["result"] = _timeless(json.loads((directory / "result.json").read_text()))
    return content


def _timeless(row: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in row.items() if name != "seconds"}


def config(directory: Path) -> toy.Config:
    return dataclasses.replace(toy.Config(), output_dir=str(directory), **OPTIONS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    directory = tmp_path_factory.mktemp("whole") / "run"
    toy.train(config(directory))
    return final_state(directory)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; gives its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def exit_of(child: int) -> int:
    """0 for success, minus the signal number for a killed process."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def die_at_write(count: int) -> None:
    """Kill this process just before its count-th operation on the disk."""
    left = [count]

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    for owner, name in (
        (files, "force"),
        (files, "sha256"),
        (os, "fsync"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
        (Journal, "append"),
        (toy, "save_file"),
    ):
        wrap(owner, name)


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_a_kill_at_any_disk_operation(tmp_path: Path, undisturbed: dict[str, object], first: int) -> None:
    directory = tmp_path / "run"
    kills = 0
    for point in range(first, 400, 19):

        def killed(point: int = point) -> None:
            die_at_write(point)
            toy.train(config(directory))

        code = exit_of(in_child(killed))
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        kills += 1
        if kills % 3 == 0:  # every third time the run gets further before the next kill
            assert exit_of(in_child(lambda: toy.train(config(directory)))) == 0
            assert final_state(directory) == undisturbed
            shutil.rmtree(directory)
    assert kills >= 3
    assert exit_of(in_child(lambda: toy.train(config(directory)))) == 0
    assert final_state(directory) == undisturbed


def test_kills_at_random_moments(tmp_path: Path, undisturbed: dict[str, object]) -> None:
    directory = tmp_path / "run"
    moments = random.Random(7)
    code = 1
    kills = 0

    def slow() -> None:
        toy._slow_down_checkpoints(0.004)
        toy.train(config(directory), slow_step=0.01)

    for _ in range(30):
        child = in_child(slow)
        time.sleep(moments.uniform(0.02, 0.45))
        if kills < 10:
            os.kill(child, signal.SIGKILL)
        code = exit_of(child)
        kills += code != 0
        if code == 0:
            break
    assert code == 0
    assert kills >= 3
    assert final_state(directory) == undisturbed


def test_a_killed_program_continues(tmp_path: Path, undisturbed: dict[str, object]) -> None:
    directory = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(prefkit.__file__).parents[1])}
    command = [sys.executable, toy.__file__, str(directory), json.dumps(OPTIONS)]
    program = subprocess.Popen([*command, "--slow-step", "0.2"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (directory / "checkpoint-3").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    program.kill()
    assert program.wait() == -signal.SIGKILL
    assert not (directory / "result.json").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "after step" in again.stderr
    assert final_state(directory) == undisturbed
