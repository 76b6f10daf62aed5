"""`prefkit judge run`: any judge on a file of candidates, continued after a kill, with pairs to train on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import judge_server
import tiny
from prefkit import cli
from prefkit.domains.text.candidates import read_candidates
from prefkit.domains.text.check import check
from prefkit.domains.text.columns import read_preferences
from prefkit.domains.text.load import load
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.reward import RewardModel
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.feedback.config import SeededJudging
from prefkit.loops import labelling
from prefkit.loops.judging import judge_of
from prefkit.methods import dpo, reward
from prefkit.records import Question

SCORES = "def length(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
CHAT = [{"role": "user", "content": "red dog"}]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "scores_of_mine.py").write_text(SCORES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "scores_of_mine", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("PREFKIT_JUDGE_API_KEY", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"))


def answers(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{i}", "answers": ["a" * (i % 3 + 1), "bb", "ccc"], "group": f"g{i // 2}"} for i in range(count)
    ]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(candidates: Path, out: str, *words: str, judge: str = "gold:scores_of_mine:length") -> int:
    return cli.run(["judge", "run", "--judge", judge, "--candidates", str(candidates), "--out", out, *words])


def test_labels_say_who_beats_whom_and_pairs_can_be_trained_on(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny.jsonl(workplace / "c.jsonl", answers(6))
    assert run(file, "deep/l.jsonl", "--pairs", "deep/pairs.jsonl") == 0
    found = rows(workplace / "deep" / "l.jsonl")
    assert [row["row"] for row in found] == list(range(6))
    first = found[0]
    assert first["scores"] == [1, 2, 3] and first["order"] == [2, 1, 0] and first["group"] == "g0"
    assert [(c["first"], c["second"], c["prob_first"]) for c in first["comparisons"]] == [
        (0, 1, 0),
        (0, 2, 0),
        (1, 2, 0),
    ]
    assert first["judge"].startswith("gold:scores_of_mine:length@") and found[1]["comparisons"][0]["prob_first"] == 0.5
    out = capsys.readouterr().out
    assert "6 prompts: 18 of 18 comparisons decided, ties 22.2%" in out and "18 calls" in out
    assert "labels: deep/l.jsonl" in out
    pairs = read_preferences(load("deep/pairs.jsonl"))
    assert len(pairs) == 6 and all(len(str(pair.chosen)) == 3 and pair.strength == 1 for pair in pairs)
    assert pairs[0].judge == first["judge"] and pairs[0].score_chosen == 3 and pairs[0].extra["group"] == "g0"
    assert not [problem for problem in check(pairs).problems if problem.level == "error"]


def test_accuracy_on_labels_has_an_interval_over_groups(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [{"prompt": f"p{i}", "chosen": "x" * (i % 4), "rejected": "y", "group": f"g{i // 4}"} for i in range(4, 24)]
    file = tiny.jsonl(workplace / "p.jsonl", [row for row in given if row["chosen"]])
    assert run(file, "l.jsonl", "--pairs", "q.jsonl", "--pairing", "all") == 0
    out = capsys.readouterr().out
    assert "accuracy on the file's labels: 0.833 (95 %: 0.833 to 0.833) of 15 pairs" in out
    assert "pairs: q.jsonl (10 rows; prompts without one: tie 5)" in out


def test_samples_of_a_conversation_are_put_together(workplace: Path, model: Path) -> None:
    (workplace / "p.txt").write_text("red dog\n\ncat\n")
    words = ["--num", "3", "--max_new_tokens", "5", "--dtype", "float32", "--out", "s.jsonl"]
    assert cli.run(["sample", str(model), "--prompts", "p.txt", *words]) == 0
    assert run(Path("s.jsonl"), "l.jsonl", "--pairs", "pairs.jsonl") == 0
    found = rows(workplace / "l.jsonl")
    assert [row["row"] for row in found] == [0, 2] and found[0]["prompt"] == CHAT
    assert [one[0]["role"] for one in found[0]["answers"]] == ["assistant"] * 3
    assert all(isinstance(row["chosen"], list) for row in rows(workplace / "pairs.jsonl"))


@pytest.mark.parametrize("cut", [0, 40, 700, -1])
def test_killed_work_goes_on_where_it_stopped(workplace: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    file = tiny.jsonl(workplace / "c.jsonl", answers(70))
    assert run(file, "whole.jsonl") == 0
    text = (workplace / "whole.jsonl").read_text()
    asked: list[int] = []
    original = labelling.Parts.append
    monkeypatch.setattr(labelling.Parts, "append", lambda self, new: asked.append(len(new)) or original(self, new))
    (workplace / "cut.jsonl").write_text(text[:cut])
    assert run(file, "cut.jsonl") == 0
    assert (workplace / "cut.jsonl").read_text() == text
    assert sum(asked) == 70 - text[:cut].count("\n")
    assert run(file, "cut.jsonl") == 0
    assert sum(asked) == 70 - text[:cut].count("\n"), "nothing is judged twice"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"judge": "gold:other"}, "was labelled by gold:other"),
        ({"prompt": "another"}, "labels other candidates"),
        ({"answers": ["x"]}, "labels other candidates"),
        ({"row": 99}, "labels other candidates"),
    ],
)
def test_a_file_never_mixes_judges_or_candidates(
    workplace: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], complaint: str
) -> None:
    file = tiny.jsonl(workplace / "c.jsonl", answers(2))
    assert run(file, "l.jsonl") == 0
    text = json.dumps(rows(workplace / "l.jsonl")[0] | change) + "\n"
    (workplace / "l.jsonl").write_text(text)
    capsys.readouterr()
    assert run(file, "l.jsonl") == 2
    error = capsys.readouterr().err
    assert complaint in error and "l.jsonl line 1" in error
    assert (workplace / "l.jsonl").read_text() == text


def test_an_endpoint_is_paid_once_and_its_orders_are_reported(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("httpx2")
    file = tiny.jsonl(workplace / "c.jsonl", answers(4))

    def play(body: dict[str, Any], count: int) -> judge_server.Response:
        return judge_server.Response(judge_server.preferring(judge_server.longer(body)))

    with judge_server.serving(play) as server:
        words = ["--judge_base_url", server.url, "--judge_price_in", "10", "--judge_price_out", "100"]
        assert run(file, "l.jsonl", *words, "--dry_run", judge="llm:judge") == 0
        told = capsys.readouterr().out
        assert "4 prompts, 12 answers, 12 comparisons" in told and "24 calls, 0 more on disk" in told
        assert not server.bodies and not (workplace / "l.jsonl").exists()
        assert run(file, "l.jsonl", *words, judge="llm:judge") == 0
        out = capsys.readouterr().out
        assert len(server.bodies) == 24
        assert "both orders prefer the same answer in 100.0% of 12 comparisons" in out
        assert "24 calls" in out and "2,640 tokens" in out and "cost 0.0480" in out
        (workplace / "l.jsonl").unlink()
        assert run(file, "l.jsonl", *words, judge="llm:judge") == 0
        assert len(server.bodies) == 24 and "0 calls, 24 cached" in capsys.readouterr().out
    assert (workplace / "judge-cache").is_dir(), "beside the output"
    assert run(file, "again.jsonl", judge="stored:l.jsonl") == 0
    assert [row["comparisons"][1]["prob_first"] for row in rows(workplace / "again.jsonl")] == [0, 0, 0.5, 0]


def judge(spec: str, **options: Any) -> Any:
    policy = options.pop("policy", None)
    return judge_of(SeededJudging(judge=spec, judge_dtype="float32", **options), directory=Path(), policy=policy)


def probabilities(judge: Any) -> tuple[float, float]:
    """P(0 beats 1), and 1 - P(1 beats 0)."""
    texts = ["one two", "moon sun star"]
    verdicts = judge.judge([Question(prompt=CHAT, answers=texts), Question(prompt=CHAT, answers=texts[::-1])])
    return verdicts[0].prob(0, 1), 1 - verdicts[1].prob(0, 1)


def test_a_reward_model_judges_by_its_scores(workplace: Path, model: Path) -> None:
    config = reward.Config(model_name_or_path=str(model), dtype="float32")
    RewardModel.create(config, World.start()).save_final(workplace / "rm")
    found = judge(f"reward:{workplace}/rm/model")
    forward, backward = probabilities(found)
    assert forward == pytest.approx(backward, abs=1e-6) and 0 < forward < 1 and forward != 0.5
    assert found.name.startswith("reward:model@") and str(workplace) not in found.name
    verdict = found.judge([Question(prompt=CHAT, answers=["one two", "moon"])])[0]
    assert verdict.prob(0, 1) == pytest.approx(1 / (1 + math.exp(verdict.scores[1] - verdict.scores[0])))


def test_a_model_in_process_is_asked_for_its_letter(workplace: Path, model: Path) -> None:
    (workplace / "short.toml").write_text('user = "{prompt} {answer_a} {answer_b}"\n')
    for spec, template in ((f"transformers:{model}", "short.toml"), (f"self:{model}", "chat")):
        found = judge(spec, judge_template=template)
        forward, backward = probabilities(found)
        assert forward == pytest.approx(backward, abs=1e-6) and 0 < forward < 1
        assert str(model.parent) not in found.name and found.name == judge(spec, judge_template=template).name
    long = Question(prompt="dog " * 400, answers=["a", "b"])
    for spec in (f"transformers:{model}", f"self:{model}"):
        comparison = judge(spec).judge([long])[0].comparisons[0]
        assert comparison.prob_first is None and comparison.reason, "no room is no opinion"


def test_a_ranker_judges_pairs(workplace: Path, model: Path) -> None:
    from transformers import AutoModel

    from prefkit.feedback.ranker import PairRanker
    from prefkit.feedback.ranker_input import Form

    form = Form(source_maxlength=20, candidate_maxlength=12)
    PairRanker.start(AutoModel.from_pretrained(model), tiny.tokenizer(), form, seed=0).save(workplace / "ranker")
    found = judge(f"ranker:{workplace}/ranker")
    forward, backward = probabilities(found)
    assert forward == pytest.approx(backward, abs=1e-5) and found.name.startswith("ranker:")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("", "names no judge"),
        ("rewrad:x", "did you mean reward"),
        ("gold", "write gold:NAME or gold:module:function"),
        ("self", "write self:MODEL"),
        ("reward:nowhere/at/all", "--judge reward:nowhere/at/all"),
        ("gold:nowhere_at_all:f", "--judge: nowhere_at_all:f"),
        ("stored:missing.jsonl", "missing.jsonl"),
        ("transformers:nowhere/at/all", "nowhere/at/all"),
    ],
)
def test_what_names_no_judge_is_refused(workplace: Path, spec: str, complaint: str) -> None:
    with pytest.raises(InputError) as caught:
        judge(spec)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([{"prompt": "p", "answers": "text"}], "answers is 'text'"),
        ([{"prompt": "p", "answers": []}], "answers is []"),
        ([{"prompt": "p", "answers": ["a", 3]}], "holds a int"),
        ([{"answers": ["a"], "prompt": None}], "field 'prompt': is missing"),
        ([{"question": "p", "reply": "x"}], "holds no candidates"),
        (
            [{"row": 0, "prompt": "p", "completion": "a"}, {"row": 0, "prompt": "q", "completion": "a"}],
            "another prompt",
        ),
        ([{"row": 0, "index": 1, "prompt": "p", "completion": "a"}] * 2, "stands twice"),
        ([{"row": -1, "prompt": "p", "completion": "a"}], "row is -1"),
    ],
)
def test_bad_candidates_are_named_with_their_line(tmp_path: Path, given: list[dict[str, Any]], complaint: str) -> None:
    good = {"prompt": "p", "answers": ["a", "b"]} if "answers" in given[0] else None
    file = tiny.jsonl(tmp_path / "c.jsonl", [*([good] if good else []), *given])
    with pytest.raises(InputError) as caught:
        read_candidates(str(file))
    assert complaint in str(caught.value) and "c.jsonl" in str(caught.value)
    assert not good or "line 2" in str(caught.value)


def test_one_answer_alone_can_only_be_scored(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny.jsonl(workplace / "c.jsonl", [{"prompt": "p", "answers": ["aaa"]}])
    assert run(file, "l.jsonl", judge="stored:c.jsonl") == 2
    assert "nothing to compare" in capsys.readouterr().err
    assert run(file, "l.jsonl") == 0
    assert rows(workplace / "l.jsonl")[0]["scores"] == [3]


def test_the_bare_command_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["judge"]) == 0
    assert "prefkit judge run --judge" in capsys.readouterr().out
    assert cli.run(["judge", "run", "--candidates", "x", "--out", "y"]) == 2
    assert "no judge given" in capsys.readouterr().err


def test_a_gold_object_has_another_name_when_its_module_changes(workplace: Path) -> None:
    text = "class Scores:\n    def __call__(self, prompts, completions):\n        return [{} for _ in completions]\n"
    names: list[str] = []
    for value in (1.0, 2.0):
        (workplace / f"object_{value:.0f}.py").write_text(text.format(value) + "scores = Scores()\n")
        names.append(judge(f"gold:object_{value:.0f}:scores").name.partition("@")[2])
    assert names[0] != names[1] and len(names[0]) == 12


def test_a_batch_of_no_rows_is_refused(workplace: Path, model: Path) -> None:
    for spec in (f"reward:{model}", f"self:{model}", "ranker:nowhere"):
        with pytest.raises(InputError, match="judge_batch_size"):
            judge(spec, judge_batch_size=0)


def test_self_asks_the_reference_of_the_policy_in_training(model: Path) -> None:
    policy = TextPolicy.create(dpo.Config(model_name_or_path=str(model), dtype="float32"), World.start())
    found = judge("self", policy=policy)
    before = probabilities(found)
    with torch.no_grad():
        for weight in policy.module.parameters():
            weight.add_(0.1)
    assert probabilities(found) == before
