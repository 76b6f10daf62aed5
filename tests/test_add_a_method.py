"""The page "Add a method" is true: its file becomes a command that trains, and its test passes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pages
import prefkit.methods
import tiny
from prefkit import cli

METHOD, TEST = (block.code for block in pages.blocks(pages.ROOT / "docs" / "add-a-method.md", "python"))


@pytest.fixture
def simpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's file, dropped beside the other methods."""
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "simpo.py").write_text(METHOD, encoding="utf-8")
    monkeypatch.setattr(prefkit.methods, "__path__", [*prefkit.methods.__path__, str(folder)])
    monkeypatch.chdir(tmp_path)
    yield folder / "simpo.py"
    sys.modules.pop("prefkit.methods.simpo", None)
    if "simpo" in vars(prefkit.methods):
        delattr(prefkit.methods, "simpo")


def test_it_is_new() -> None:
    assert "simpo" not in cli.modules("methods")


@pytest.mark.usefixtures("simpo")
def test_the_file_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    listed = capsys.readouterr().out
    assert "simpo" in listed and METHOD.splitlines()[0].strip('"') in listed
    with pytest.raises(SystemExit) as left:
        cli.run(["simpo", "--help"])
    assert left.value.code == 0 and "--gamma" in capsys.readouterr().out


@pytest.mark.usefixtures("simpo")
def test_the_command_trains(tmp_path: Path) -> None:
    model, data = tiny.folder(tmp_path / "model"), tiny.jsonl(tmp_path / "pairs.jsonl", tiny.pairs(40))
    words = ["simpo", "tiny", "--model_name_or_path", str(model), "--dataset_name", str(data), "--gamma", "1"]
    assert cli.run(words) == 0
    run = tmp_path / "runs" / "simpo-tiny"
    assert (run / "model" / "config.json").is_file() and (run / "report.html").is_file()
    assert '"gamma": 1.0' in (run / "config.json").read_text(encoding="utf-8")


@pytest.mark.usefixtures("simpo")
def test_the_test_passes(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "test_simpo"}
    exec(compile(TEST, "docs/add-a-method.md", "exec"), namespace)
    tests = {name: test for name, test in namespace.items() if name.startswith("test_")}
    assert len(tests) == 3
    for name, test in tests.items():
        (tmp_path / name).mkdir()
        test(*[tmp_path / name for _ in inspect.signature(test).parameters])
