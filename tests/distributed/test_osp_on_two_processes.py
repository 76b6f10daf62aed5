"""OSP's two stages on two processes, plain and sharded, against one process with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import prefkit
from method_runs import Inputs, column, lines, read
from prefkit import cli

OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "prompts_per_round": 8,
    "stage1_steps": 3,
    "stage1_learning_rate": 1e-3,
    "learning_rate": 1e-3,
    "max_length": 250,
    "save_steps": 2,
    "use_peft": True,
}
PROGRAM = "import sys, torch; torch.set_num_threads(1); from prefkit import cli; cli.main([*sys.argv[1:], '--debug'])"


def launch(inputs: Inputs, directory: Path, how: str) -> Path:
    size = {"per_device_train_batch_size": 4, "stage1_batch_size": 8}
    if how != "one":
        size = {name: number // 2 for name, number in size.items()}
    words = inputs.arguments("osp", directory, **OPTIONS, **size)
    if how == "one":
        torch.set_num_threads(1)
        assert cli.run([*words, "--debug"]) == 0
        return directory
    program = directory.with_suffix(".py")
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(Path(prefkit.__file__).parents[1])
    environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if how == "fsdp" else {}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


@pytest.mark.parametrize("how", ["gloo", "fsdp"])
def test_both_stages_and_the_judge_are_those_of_one_process(tmp_path: Path, how: str) -> None:
    inputs = Inputs.make(tmp_path)
    one, two = launch(inputs, tmp_path / "one", "one"), launch(inputs, tmp_path / "two", how)
    assert read(two / "environment.json")["processes"] == 2
    for stage in (".", "stage1"):
        first, second = (torch.tensor(column(directory / stage, "loss")) for directory in (one, two))
        torch.testing.assert_close(second, first, rtol=1e-4, atol=2e-5)
    judges = [read(directory / "evaluation" / "judge.json") for directory in (one, two)]
    assert judges[1]["temperature"] == pytest.approx(judges[0]["temperature"], rel=0.02)
    assert judges[1]["mass"] == pytest.approx(judges[0]["mass"], rel=1e-3)
    rows = [lines(directory / "rounds" / "00001.jsonl") for directory in (one, two)]
    assert [row["answers"][0]["text"] for row in rows[0]] == [row["answers"][0]["text"] for row in rows[1]]
    strengths = [[m["strength"] for row in found for m in row["matches"]] for found in rows]
    assert strengths[0] and strengths[1] == pytest.approx(strengths[0], abs=0.02), json.dumps(strengths)
