"""Win rates by a judge that is asked: who meets whom, what is not asked, and what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from prefkit.evaluation.judged import judged, questions_of
from prefkit.records import Comparison, Question, Verdict


class Longer:
    """Prefers the longer answer; answers that contain "?" leave it unsure."""

    name = "longer"

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        self.asked += questions
        return [Verdict(judge=self.name, comparisons=[self._one(q, i, j) for i, j in q.pairs]) for q in questions]

    def _one(self, question: Question, i: int, j: int) -> Comparison:
        first, second = question.answers[i], question.answers[j]
        if "?" in first + second:
            return Comparison(first=i, second=j, prob_first=None, reason="unsure")
        ahead = (len(first) > len(second)) - (len(first) < len(second))
        return Comparison(first=i, second=j, prob_first=0.5 + 0.5 * ahead)


def row(place: int, final: str, **more: Any) -> dict[str, Any]:
    return {"row": place, "prompt": f"p{place}", "group": f"g{place}", "answer_final": final, **more}


def test_every_contest_has_its_rate_and_equal_answers_are_not_asked_about() -> None:
    a = [
        row(0, "aaaa", answer_start="aa", answer_reference="aaa"),
        row(1, "b", answer_start="b", answer_reference="bb"),
    ]
    b = [row(0, "a", answer_start="aa"), row(1, "b", answer_start="bbb")]
    judge = Longer()
    wins, verdicts = judged([*zip(a, b, strict=True)], judge, names=("new", "old"), num_resamples=50)
    rates = {(win.first, win.second): win.outcome and win.outcome.rate.mean for win in wins}
    assert rates == {
        ("new", "old"): 0.75,
        ("new", "new at its start"): 0.75,
        ("old", "old at its start"): 0.0,
        ("new", "the answers in the data"): 0.5,
        ("old", "the answers in the data"): 0.0,
    }
    assert [len(question.pairs) for question in judge.asked] == [5, 3] and len(verdicts) == 2
    assert all(win.unusable == 0 and win.controlled is None for win in wins)


def test_answers_that_were_not_written_take_no_part() -> None:
    a, b = [row(0, "a", answer_start="s"), row(1, "a")], [row(0, "b", answer_start="s"), row(1, "bb")]
    wins, _ = judged([*zip(a, b, strict=True)], Longer(), num_resamples=50)
    assert [(win.first, win.second) for win in wins] == [("A", "B")]


def test_verdicts_without_a_probability_are_left_out_and_counted() -> None:
    a = [row(0, "aaa"), row(1, "why?"), row(2, "a")]
    b = [row(0, "a"), row(1, "because"), row(2, "aaa")]
    (win,), _ = judged([*zip(a, b, strict=True)], Longer(), num_resamples=50)
    assert win.unusable == 1 and win.outcome is not None
    assert (win.outcome.wins, win.outcome.ties, win.outcome.losses) == (1, 0, 1)
    (none,), _ = judged([(row(0, "a?"), row(0, "b"))], Longer())
    assert none.outcome is None and none.unusable == 1


def test_identical_policies_tie_and_ask_nothing() -> None:
    rows = [row(i, "same") for i in range(3)]
    judge = Longer()
    (win,), verdicts = judged([*zip(rows, rows, strict=True)], judge, num_resamples=50)
    assert win.outcome is not None and win.outcome.rate.mean == 0.5 and win.outcome.ties == 3
    assert judge.asked == [] and verdicts == [] and questions_of([*zip(rows, rows, strict=True)]) == []


def test_a_judge_of_length_alone_says_nothing_at_equal_length() -> None:
    lengths = [(9, 5), (8, 3), (7, 2), (3, 6), (9, 1), (2, 5), (6, 4), (8, 7), (1, 2), (9, 4)]
    samples = [(row(i, "x" * a), row(i, "y" * b)) for i, (a, b) in enumerate(lengths)]
    (win,), _ = judged(samples, Longer(), control_length=True, num_resamples=300)
    assert win.outcome is not None and win.controlled is not None
    assert win.outcome.rate.mean == pytest.approx(0.7)
    assert win.controlled.slope > 1 and win.controlled.rate.low < 0.5 < win.controlled.rate.high
