"""Judges made of scores: order or Bradley-Terry, equal answers scored once, nothing that is no number."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkit.errors import InputError
from prefkit.feedback.ranking import order_of
from prefkit.feedback.scored import ScoredJudge
from prefkit.records import Question


class Lengths:
    """Scores an answer by its length and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, str]] = []

    def __call__(self, prompts: Any, completions: Any) -> list[float]:
        self.asked += zip(prompts, completions, strict=True)
        return [float(len(text)) for text in completions]


def test_a_gold_reward_is_certain_and_ties_where_scores_are_equal() -> None:
    verdict = ScoredJudge(Lengths(), "gold:length").judge([Question(prompt="p", answers=["aa", "b", "cc"])])[0]
    assert [(c.first, c.second, c.prob_first) for c in verdict.comparisons] == [(0, 1, 1), (0, 2, 0.5), (1, 2, 0)]
    assert verdict.scores == [2, 1, 2] and verdict.judge == "gold:length"
    assert all(c.orders is None and not c.reason for c in verdict.comparisons)


def test_a_reward_model_gives_bradley_terry_probabilities() -> None:
    verdict = ScoredJudge(Lengths(), "reward:x", scale=0.5).judge([Question(prompt="p", answers=["aaaa", "b"])])[0]
    assert verdict.prob(0, 1) == pytest.approx(1 / (1 + math.exp(-0.5 * 3)))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=5), st.sampled_from([None, 0.01, 1.0, 30.0]))
def test_both_directions_add_up_and_the_order_is_that_of_the_scores(values: list[float], scale: float | None) -> None:
    answers = [str(i) for i in range(len(values))]
    judge = ScoredJudge(lambda prompts, texts: [values[int(text)] for text in texts], "x", scale=scale)
    pairs = [(i, j) for i in range(len(values)) for j in range(len(values)) if i != j]
    question = Question(prompt="p", answers=answers, pairs=pairs)
    verdict = judge.judge([question])[0]
    told = {(c.first, c.second): c.prob_first for c in verdict.comparisons}
    assert list(told) == pairs
    for (i, j), prob in told.items():
        assert prob is not None and 0 <= prob <= 1 and prob + (told[j, i] or 0) == 1
        assert (prob >= 0.5) or values[i] < values[j]
    order = order_of(question, verdict)
    assert [values[i] for i in order] == sorted(values, reverse=True)


def test_equal_answers_are_scored_once_and_only_wanted_pairs_come_back() -> None:
    score = Lengths()
    questions = [
        Question(prompt="p", answers=["a", "a", "bb"], pairs=[(2, 0)]),
        Question(prompt="q", answers=[]),
        Question(prompt="q", answers=["a"]),
    ]
    first, nothing, single = ScoredJudge(score, "x").judge(questions)
    assert score.asked == [("p", "a"), ("p", "bb"), ("q", "a")]
    assert [(c.first, c.second, c.prob_first) for c in first.comparisons] == [(2, 0, 1)]
    assert (first.calls, nothing.calls, single.calls) == (2, 0, 1)
    assert first.scores == [1, 1, 2] and list(single.comparisons) == []
    assert ScoredJudge(score, "x").judge([]) == []


def test_what_is_no_number_is_named_with_its_row() -> None:
    judge = ScoredJudge(lambda prompts, texts: [math.nan for _ in texts], "reward:x")
    with pytest.raises(InputError, match="not finite") as caught:
        judge.judge([Question(prompt="p", answers=["a", "b"], row=6)])
    assert caught.value.where == "row 7"
    with pytest.raises(ValueError):
        ScoredJudge(Lengths(), "x", scale=0.0)
