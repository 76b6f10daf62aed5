"""What commands print: the summary, the samples, the comparison; and how numbers are written."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

import run_directory
from prefkit.commands import compare
from prefkit.errors import InputError
from prefkit.report import table
from prefkit.report.metrics import METRICS, duration, metric, number, rank, signed
from prefkit.report.read import read

GLOSSARY = Path(__file__).parents[3] / "docs" / "metrics.md"


def printed(function, *arguments, **options):
    console = Console(width=150, record=True, quiet=False, file=io.StringIO())
    function(*arguments, console=console, **options)
    return console.export_text()


@pytest.fixture
def runs(tmp_path):
    return [
        run_directory.build(tmp_path / name, steps=3, num_pairs=40, effect=effect, seed=seed, reference=True)
        for seed, (name, effect) in enumerate((("new", 1.0), ("old", 0.1)))
    ]


def test_summary(runs):
    (runs[0] / "report.html").write_text("")
    text = printed(table.print_summary, runs[0])
    assert "Preference accuracy" in text and "0.5 is excluded" in text
    assert f"Report: {runs[0] / 'report.html'}" in text
    assert "Model:" not in text  # the folder is not there


def test_samples_are_shown_as_they_are():
    rows = [{"prompt": "[bold]p", "answer_start": "[red]a[/red]", "answer_final": "", "gold_final": 0.25}] * 3
    text = printed(table.print_samples, rows, 2)
    assert "[bold]p" in text and "[red]a[/red]" in text and "(empty)" in text and "gold 0.25" in text
    assert "first 2 of 3" in text
    assert printed(table.print_samples, [], 2) == ""


def test_compare_prints_and_writes_json(runs, tmp_path, capsys):
    out = tmp_path / "comparison.json"
    assert compare.main([str(runs[0]), str(runs[1]), "--json", str(out), "--num_resamples", "500"]) == 0
    text = capsys.readouterr().out
    assert "Reward margin" in text and "40 held-out rows and 8 own answers matched" in text
    content = json.loads(out.read_text())
    margins = content["differences"][0]
    assert margins["metric"] == "rewards/margins" and margins["difference"]["method"] == "paired bootstrap"
    assert margins["a"] - margins["b"] == pytest.approx(margins["difference"]["mean"])
    assert {(win["first"], win["second"]) for win in content["wins"]} >= {
        ("new", "old"),
        ("new", "the answers in the data"),
    }


def test_compare_refuses_other_rows(tmp_path, runs):
    other = run_directory.build(tmp_path / "other", steps=3, num_pairs=15)
    with pytest.raises(InputError, match="15 match, 25 only in A, 0 only in B"):
        compare.main([str(runs[0]), str(other)])


def test_compare_needs_rows(tmp_path, runs):
    bare = run_directory.build(tmp_path / "bare", steps=3)
    for file in (bare / "evaluation").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="share no kind of held-out rows"):
        compare.compared(read(runs[0]), read(bare))


def test_compare_with_itself_finds_nothing(runs):
    run = read(runs[0])
    result = compare.compared(run, run, num_resamples=200)
    assert all(d.difference.low == d.difference.high == 0 and d.p == 1 for d in result.differences)
    assert result.wins[0].outcome.rate.mean == 0.5


SCORES = "def length(prompts, completions):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture
def judge(tmp_path, monkeypatch):
    (tmp_path / "lengths_of_mine.py").write_text(SCORES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "lengths_of_mine", raising=False)
    return ["--judge", "gold:lengths_of_mine:length"]


def test_compare_asks_any_judge_and_controls_length(runs, judge, tmp_path, capsys):
    out = tmp_path / "comparison.json"
    words = [str(runs[0]), str(runs[1]), "--num_resamples", "200", "--json", str(out)]
    assert compare.main([*words, *judge, "--length_controlled"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Win rate at equal length" in text and "comparisons of 8 prompts' answers, by gold:lengths_of_mine" in text
    found = {(win["first"], win["second"]): win for win in json.loads(out.read_text())["judged"]}
    assert found["new", "old"]["outcome"]["rate"]["mean"] == 0.5, "both answered alike"
    over_start = found["new", "new at its start"]
    pairs = zip(run_directory.BEFORE, run_directory.AFTER, strict=True)
    credit = [(len(after) > len(before)) + 0.5 * (len(after) == len(before)) for before, after in pairs]
    assert over_start["outcome"]["rate"]["mean"] == sum(credit) / 4
    assert over_start["controlled"]["slope"] > 0 and over_start["unusable"] == 0
    assert compare.main(words) == 0 and json.loads(out.read_text())["judged"] == []


def test_compare_needs_a_judge_to_control_length_and_can_only_forecast(runs, judge, capsys):
    words = [str(runs[0]), str(runs[1])]
    with pytest.raises(InputError, match="needs a judge"):
        compare.main([*words, "--length_controlled"])
    assert compare.main([*words, *judge, "--dry_run"]) == 0
    assert capsys.readouterr().out.startswith("16 comparisons of 8 prompts' answers")
    assert compare.main([*words, "--judge", "llm:m", "--dry_run"]) == 0
    assert "calls, 0 more on disk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"), (-0.0, "0.000"), (0.6931, "0.693"), (-1.5, "−1.500"), (3, "3"), (12345, "12,345"),
        (123.456, "123.5"), (45678.9, "45,679"), (0.00012, "1.20e−04"), (None, "–"), (2000.0, "2,000"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_signs_and_durations():
    assert (signed(0.25), signed(-0.25), signed(0.0)) == ("+0.250", "−0.250", "0.000")
    assert (duration(59), duration(497.3), duration(7300)) == ("59 s", "8 min 17 s", "2 h 1 min")


def test_metric_names():
    assert metric("eval_rewards/margins").neutral == 0
    judged = metric("eval_win_rate_over_start/reward_model")
    assert judged.label == "Win rate over the start, by reward model" and judged.neutral == 0.5
    assert metric("my/own_thing").label == "my / own thing"
    assert rank("eval_rewards/accuracies") < rank("win_rate_over_start/gold") < rank("my/own_thing")


def test_the_glossary_page_lists_every_metric():
    page = GLOSSARY.read_text()
    assert [name for name in METRICS if f"`{name}`" not in page] == []
