"""Stored labels: found by text, absent where the file is silent, refused where it contradicts itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkit.errors import InputError
from prefkit.feedback.stored import StoredJudge
from prefkit.records import Question


def judge_of(*rows: Mapping[str, Any]) -> StoredJudge:
    return StoredJudge(rows, "stored:labels", lambda place: f"labels.jsonl line {place + 1}")


def ask(judge: StoredJudge, prompt: Any, *answers: str, pairs: Sequence[tuple[int, int]] = ()) -> list[float | None]:
    (verdict,) = judge.judge([Question(prompt=prompt, answers=answers, pairs=pairs)])
    return [comparison.prob_first for comparison in verdict.comparisons]


def test_preference_rows() -> None:
    judge = judge_of(
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": "p", "chosen": "good", "rejected": "fair", "strength": 0.75},
        {"prompt": "q", "chosen": "bad", "rejected": "good"},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
    )
    assert ask(judge, "p", "good", "bad", "fair") == [1.0, 0.75, None]
    assert ask(judge, "p", "fair", "bad", "good", pairs=[(2, 1), (0, 2)]) == [1.0, 0.25]
    assert ask(judge, "q", "good", "bad") == [0.0], "the prompt counts"
    assert ask(judge, "q", "other", "other") == [0.5]
    (verdict,) = judge.judge([Question(prompt="r", answers=["good", "bad"])])
    assert verdict.comparisons[0].reason == "absent" and verdict.judge == "stored:labels" and verdict.calls == 0
    assert len(judge) == 3 and judge.passed_over == 1


def test_scored_rows() -> None:
    judge = judge_of({"prompt": "p", "answers": ["a", "b", "c"], "scores": [1, 2.5, 1]})
    assert ask(judge, "p", "a", "b", "c") == [0.0, 0.5, 1.0]
    (verdict,) = judge.judge([Question(prompt="p", answers=["c", "b"])])
    assert verdict.scores == [1.0, 2.5]
    assert judge.judge([Question(prompt="p", answers=["c", "d"])])[0].scores is None


def test_rows_of_probabilities_and_of_verdicts() -> None:
    judge = judge_of(
        {"prompt": "p", "first": "z", "second": "a", "prob_first": 0.9},
        {"prompt": "p", "first": "x", "second": "y", "prob_first": None, "reason": "refused"},
        {
            "prompt": "q",
            "answers": ["a", "b", "c"],
            "scores": None,
            "comparisons": [
                {"first": 2, "second": 0, "prob_first": 0.25, "orders": [0.5, 0.0], "reason": ""},
                {"first": 0, "second": 1, "prob_first": None, "reason": "unsure"},
            ],
        },
    )
    assert ask(judge, "p", "z", "a") == [0.9] and ask(judge, "p", "a", "z") == [pytest.approx(0.1)]
    assert ask(judge, "q", "a", "c") == [0.75]
    asked = [Question(prompt="p", answers=["y", "x"]), Question(prompt="q", answers=["a", "b"])]
    reasons = [verdict.comparisons[0].reason for verdict in judge.judge(asked)]
    assert reasons == ["refused", "unsure"]


def test_conversations_are_the_same_however_they_are_written() -> None:
    turns = [{"role": "user", "content": "hi"}]
    judge = judge_of(
        {"prompt": turns, "chosen": [{"role": "assistant", "content": "good"}], "rejected": "bad"},
        {"prompt": [{"role": "system", "content": "s"}, *turns], "chosen": "bad", "rejected": "good"},
    )
    assert ask(judge, "hi", "good", "bad") == ask(judge, turns, "good", "bad") == [1.0]
    assert ask(judge, [{"role": "system", "content": "s"}, *turns], "good", "bad") == [0.0]


def test_repetition_is_no_contradiction() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "strength": 0.7}
    judge = judge_of(row, row, {"prompt": "p", "first": "b", "second": "a", "prob_first": 0.3})
    assert ask(judge, "p", "a", "b") == [0.7]
    unsure = {"prompt": "p", "first": "b", "second": "a", "prob_first": None}
    assert ask(judge_of(unsure, row), "p", "a", "b") == ask(judge_of(row, unsure), "p", "a", "b") == [0.7]


def test_contradictions_name_both_rows() -> None:
    with pytest.raises(InputError) as caught:
        judge_of(
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "p", "chosen": "b", "rejected": "a"},
        )
    assert caught.value.where == "labels.jsonl line 3" and "labels.jsonl line 1" in caught.value.what


ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "a", "rejected": "b"}, "has no prompt"),
        ({"prompt": "p", "answer": "a"}, "holds no label"),
        ({"prompt": "p", "answers": ["a", "b"], "scores": None}, "holds no label"),
        ({**ROW, "chosen": None}, "chosen is None"),
        ({**ROW, "prompt": 7}, "prompt is 7"),
        ({**ROW, "strength": 1.5}, "strength is 1.5"),
        ({**ROW, "strength": float("nan")}, "strength is nan"),
        ({**ROW, "strength": True}, "strength is True"),
        ({"prompt": "p", "answers": "ab", "scores": [1, 2]}, "answers is no list"),
        ({"prompt": "p", "answers": ["a", "b"], "scores": [1]}, "for 2 answers"),
        ({"prompt": "p", "answers": ["a", "b"], "scores": [1, None]}, "for 2 answers"),
        ({"prompt": "p", "answers": ["a", "a"], "scores": [1, 2]}, "the scores 1 and 2"),
        ({"prompt": "p", "answers": ["a"], "comparisons": [{"first": 0, "second": 1, "prob_first": 1}]}, "cannot be"),
        ({"prompt": "p", "answers": ["a"], "comparisons": [{"first": -1, "second": 0, "prob_first": 1}]}, "cannot be"),
    ],
)
def test_bad_rows_are_named(row: Mapping[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        judge_of({"prompt": "fine", "chosen": "a", "rejected": "b"}, row)
    assert words in caught.value.what and caught.value.where == "labels.jsonl line 2" and caught.value.mend


@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 3)), min_size=2, max_size=5, unique_by=lambda x: x[0]))
def test_a_pair_and_its_mirror_sum_to_one(scored: list[tuple[str, int]]) -> None:
    answers, scores = [a for a, _ in scored], [s for _, s in scored]
    judge = judge_of({"prompt": "p", "answers": answers, "scores": scores})
    count = len(answers)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    found = dict(zip(pairs, ask(judge, "p", *answers, pairs=pairs), strict=True))
    for (i, j), prob in found.items():
        mirror = found[j, i]
        assert prob is not None and mirror is not None and prob + mirror == 1
        assert prob == (0.5 if scores[i] == scores[j] else float(scores[i] > scores[j]))
