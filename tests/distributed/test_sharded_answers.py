"""`prefkit sample` and `prefkit judge run` on two processes write, byte for byte, what one process writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prefkit
import tiny
from prefkit import cli
from prefkit.domains.text.reward import RewardModel
from prefkit.engine.world import World
from prefkit.methods import reward

LAUNCH = Path(prefkit.__file__).parent / "commands" / "accelerate" / "multi_gpu.yaml"
PROGRAM = """
import json, sys, torch
torch.set_num_threads(1)
from prefkit import cli
from prefkit.engine.world import leave
leave(max([cli.run(words) for words in json.loads(sys.argv[1])]))
"""
SHORT = ["--dtype", "float32", "--max_new_tokens", "6"]


def launch(folder: Path, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the commands one after another on two processes with one thread each."""
    (folder / "program.py").write_text(PROGRAM)
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(prefkit.__file__).parents[1])
    return subprocess.run(
        [*words, "--config_file", str(LAUNCH), "program.py", json.dumps(commands)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "model")
    config = reward.Config(model_name_or_path="model", dtype="float32")
    RewardModel.create(config, World.start()).save_final(tmp_path / "rm")
    words = [" ".join(tiny.WORDS[i % 5 : i % 5 + 1 + i % 4]) for i in range(45)]
    (tmp_path / "p.txt").write_text("".join(f"{text} {i}\n" for i, text in enumerate(words)))
    return tmp_path


def test_two_processes_write_what_one_writes(workplace: Path) -> None:
    """45 prompts are three pieces of 21; the launch takes up what three killed processes and then one left behind."""
    sampled = ["sample", "model", "--prompts", "p.txt", "--num", "3", *SHORT, "--out"]
    greedy = ["sample", "model", "--prompts", "p.txt", "--temperature", "0", *SHORT, "--out"]
    judged = [
        "judge",
        "run",
        "--judge",
        "reward:rm/model",
        "--judge_dtype",
        "float32",
        "--candidates",
        "one.jsonl",
        "--out",
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for words, out in ((sampled, "one.jsonl"), (greedy, "greedy.jsonl"), (judged, "labels.jsonl")):
            assert cli.run([*words, out]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = (workplace / "one.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 135 and [json.loads(line)["row"] for line in lines] == [i // 3 for i in range(135)]
    (workplace / "two.jsonl").write_text("".join(lines[70:74]))
    (workplace / "two.jsonl.part-0").write_text("".join(lines[:5]) + lines[5][:30])
    (workplace / "two.jsonl.part-2").write_text("".join([lines[130], lines[72]]))
    again = [*greedy, "greedy2.jsonl"]
    done = launch(workplace, [*sampled, "two.jsonl"], again, [*judged, "labels2.jsonl"], again)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in (("one", "two"), ("greedy", "greedy2"), ("labels", "labels2")):
        assert (workplace / f"{two}.jsonl").read_bytes() == (workplace / f"{one}.jsonl").read_bytes(), two
    assert not list(workplace.glob("*.part-*"))
    assert "10 answers are in two.jsonl; 44 of 45 prompts are left" in done.stderr
    assert done.stdout.count("135 answers: two.jsonl") == 1, "the main process speaks alone"
    assert "45 prompts judged now, 1" in done.stdout and "comparisons decided" in done.stdout
