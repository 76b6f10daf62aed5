"""Gold rewards of the user's own: found in the working folder, called with two keywords, their scores checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from prefkit.errors import InputError
from prefkit.loops.judging import gold

MODULE = """
import math

def length(prompts, completions):
    import helpers_of_mine
    return [helpers_of_mine.size(answer) + len(prompts) for answer in completions]

def loose(completions, **others):
    assert list(others) == ["prompts"], others
    return tuple(map(len, completions))

def returns(value):
    return lambda prompts, completions: value

short, nothing, none = returns([1.0]), returns([1.0, None]), returns(None)
nan, infinite, text = returns([1.0, math.nan]), returns([math.inf, 1]), returns("12")
positional = lambda questions, answers: [0.0] * len(answers)
number = 3
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that is not on the import path, as with the installed command."""
    (tmp_path / "rewards_of_mine.py").write_text(MODULE)
    (tmp_path / "helpers_of_mine.py").write_text("size = len\n")
    (tmp_path / "broken_of_mine.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    for name in ("rewards_of_mine", "helpers_of_mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.usefixtures("workplace")
def test_a_module_in_the_working_folder_is_found_and_may_import_its_neighbours_late() -> None:
    assert gold("rewards_of_mine:length", 0)(["p", "q"], ["a", "bcd"]) == [3.0, 5.0]
    assert gold("rewards_of_mine:loose", 0)([[{"role": "user", "content": "p"}]], ["ab"]) == [2.0]


@pytest.mark.usefixtures("workplace")
def test_installed_modules_are_not_hidden(workplace: Path) -> None:
    (workplace / "statistics.py").write_text("raise RuntimeError('hidden')\n")
    gold("rewards_of_mine:length", 0)
    assert sys.path[-1] == str(workplace)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("short", "returned 1 numbers for 2 completions"),
        ("nothing", "no list of numbers"),
        ("none", "no list of numbers"),
        ("nan", "returned nan for completion 2"),
        ("infinite", "returned inf for completion 1"),
        ("text", "returned '12'"),
    ],
)
def test_what_is_no_score_is_refused(name: str, complaint: str) -> None:
    judge: Any = gold(f"rewards_of_mine:{name}", 0)
    with pytest.raises(InputError, match=complaint) as caught:
        judge(["p", "q"], ["a", "b"])
    assert f"rewards_of_mine:{name}" in str(caught.value)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("rewards_of_mine:positional", "cannot be called with prompts"),
        ("rewards_of_mine:number", "is 3, not a function"),
        ("rewards_of_mine:missing", "cannot be imported: AttributeError"),
        ("nowhere_at_all:f", "cannot be imported: ModuleNotFoundError"),
        ("broken_of_mine:f", "cannot be imported: ZeroDivisionError"),
        ("rewards_of_mine", "neither a packaged gold reward nor module:function"),
        (":f", "neither a packaged gold reward nor module:function"),
    ],
)
def test_what_cannot_judge_is_refused_at_the_start(name: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        gold(name, 0)
