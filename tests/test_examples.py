"""Every example runs, on a tiny model, and stays short."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import tiny

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
TOLD = {
    "01_sft": "held-out loss per token",
    "02_reward_model": "Dull, long",
    "03_dpo": "report.html",
    "04_hypo": "KL to the reference",
    "05_loss_in_your_own_trainer": "HyPO",
    "06_evaluate_and_compare": "comparison.html",
}
"""what each prints near its end"""


def test_examples_are_numbered_and_listed() -> None:
    assert [file.stem for file in EXAMPLES] == sorted(TOLD)
    assert [file.name[:2] for file in EXAMPLES] == [f"{i:02}" for i in range(1, len(EXAMPLES) + 1)]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    monkeypatch.chdir(tmp_path)
    words = [file.name]
    if "--model" in text:
        words += ["--model", str(tiny.folder(tmp_path / "model")), "--steps", "2"]
    if "--data" in text:
        words += ["--data", str(tiny.jsonl(tmp_path / "pairs.jsonl", tiny.pairs(200 if "compare" in text else 40)))]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(file), run_name="__main__")
    assert TOLD[file.stem] in capsys.readouterr().out
