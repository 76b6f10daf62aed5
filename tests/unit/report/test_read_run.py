"""Reading run directories: whole ones, unfinished ones, damaged ones."""

import json
import math

import pytest

import run_directory
from prefkit.errors import InputError
from prefkit.report.read import read


@pytest.fixture
def run(tmp_path):
    return run_directory.build(tmp_path / "run", steps=30, num_pairs=20, num_prompts=4)


def test_a_whole_run(run):
    found = read(run)
    assert (found.method, found.preset, found.name) == ("hypo", "demo", "run")
    assert len(found.metrics) == 31 and len(found.pairs) == 20 and len(found.samples) == 4
    assert found.evaluation.intervals["eval_rewards/margins"].groups == 20
    assert found.result is not None and not found.result.selected_by_held_out
    assert found.test is None and found.main_evaluation is found.evaluation
    steps, values = found.series("eval_loss")
    assert steps == [0, 20, 30] and values[0] == 0.6931


def test_series_leave_out_what_is_not_finite(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": NaN}\n{"step": 32, "loss": null}\n')
    assert max(read(run).series("loss")[0]) == 30


def test_null_ends_are_unbounded(run):
    path = run / "evaluation.json"
    content = json.loads(path.read_text())
    content["intervals"] = {"gold": run_directory.interval(0.5, 0.1) | {"low": None, "high": None}}
    run_directory.write(path, content)
    estimate = read(run).evaluation.intervals["gold"]
    assert estimate.low == -math.inf and not estimate.bounded and not estimate.excludes(0)


def test_a_separate_test_split_leads(run):
    path = run / "evaluation.json"
    content = json.loads(path.read_text())
    run_directory.write(path, content | {"test": {"final": {"gold": 0.25}}})
    found = read(run)
    assert found.main_evaluation.final == {"gold": 0.25}


def test_an_unfinished_run_reads(tmp_path):
    folder = run_directory.build(tmp_path / "run", steps=5, finished=False)
    for name in ("evaluation.json", "data.json", "environment.json", "metrics.jsonl"):
        (folder / name).unlink()
    found = read(folder)
    assert found.result is None and found.metrics == () and found.notes == ("No step was logged.",)


def test_a_cut_last_line_is_noted_not_refused(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    found = read(run)
    assert len(found.metrics) == 31
    assert "cut off" in found.notes[0]


def test_line_separators_inside_a_string_do_not_split_the_line(run):
    path = run / "evaluation" / "samples.jsonl"
    path.write_text(json.dumps({"row": 0, "prompt": "a\u2028b", "answer_final": "c\x85d"}, ensure_ascii=False) + "\n")
    assert read(run).samples[0]["prompt"] == "a\u2028b"


def test_not_a_run(tmp_path):
    with pytest.raises(InputError, match=r"no such folder.*\n  mend: give the --output_dir"):
        read(tmp_path / "absent")
    with pytest.raises(InputError, match="not a run directory"):
        read(tmp_path)
    run_directory.write(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(InputError, match=r"not prefkit's.*\n.*not its model folder"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", r"config.json: damaged JSON at line 1"),
        ("metrics.jsonl", '{"step": 1}\n{"step": \n{"step": 3}\n', r"metrics.jsonl: damaged JSON at line 2"),
        ("metrics.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("evaluation/pairs.jsonl", '{"row": 1, "prompt": "p"}\n', "line 1 has no field 'margin'"),
        ("evaluation/samples.jsonl", '\n{"row": 1', r"samples.jsonl: damaged JSON at line 2"),
        ("evaluation.json", '{"intervals": {"gold": {"mean": 1}}}', "unexpected shape .KeyError: 'low'"),
        ("evaluation.json", '{"final": {"gold": "high"}}', "unexpected shape"),
        ("result.json", '{"steps": 3}', "has no 'status'"),
        ("data.json", "[]", "must hold a JSON object"),
    ],
)
def test_damage_is_named_with_file_and_line(run, name, content, words):
    (run / name).write_text(content)
    with pytest.raises(InputError, match=words):
        read(run)


def test_bytes_that_are_no_text(run):
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read(run)


def test_a_held_out_series_ends_with_the_final_evaluation(run):
    rows = [{"step": 0, "eval_gold": 0.25}, *({"step": step, "loss": 1.0} for step in range(1, 31))]
    run_directory.rows(run / "metrics.jsonl", rows)
    final = read(run).evaluation.final["eval_gold"]
    assert read(run).series("eval_gold") == ([0, 30], [0.25, final])
    run_directory.rows(run / "metrics.jsonl", [*rows[:-1], {"step": 30, "eval_gold": 0.75}])
    assert read(run).series("eval_gold") == ([0, 30], [0.25, 0.75])  # it was measured there already
    run_directory.rows(run / "metrics.jsonl", rows)
    data = json.loads((run / "data.json").read_text())
    run_directory.write(run / "data.json", data | {"parts": {"selection": 9}})
    assert read(run).series("eval_gold") == ([0], [0.25])  # other rows: not one curve
