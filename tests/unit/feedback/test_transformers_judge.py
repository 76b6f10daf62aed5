"""The in-process judge: softmax over two letters, both orders averaged; a judge of places is corrected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judge_server import longer
from prefkit.errors import InputError
from prefkit.feedback.llm import TransformersJudge
from prefkit.feedback.templates import Template
from prefkit.records import Question

CHAT = Template.load("chat")
Conversations = Sequence[list[dict[str, str]]]


class Model:
    """Prefers the longer answer by `gap` nats and the place A by `bias`, with `mass` on the two letters."""

    def __init__(self, gap: float = 1.0, bias: float = 0.0, mass: float = 0.9) -> None:
        self.gap, self.bias, self.mass = gap, bias, mass
        self.asked: list[list[dict[str, str]]] = []

    def __call__(self, conversations: Conversations) -> list[tuple[float, float]]:
        self.asked += conversations
        found: list[tuple[float, float]] = []
        for messages in conversations:
            sign = {"A": 1, "B": -1, "tie": 0}[longer({"messages": messages})]
            a = 1 / (1 + math.exp(-(sign * self.gap + self.bias)))
            found.append((math.log(self.mass * a), math.log(self.mass * (1 - a))))
        return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_probabilities_of_both_orders() -> None:
    model = Model(gap=1.0, bias=0.5, mass=0.25)
    judge = TransformersJudge(model, CHAT, model="tiny")
    (verdict,) = judge.judge([Question(prompt="hi", answers=["longer", "short"])])
    (made,) = verdict.comparisons
    assert made.orders == pytest.approx((sigmoid(1.5), sigmoid(0.5)))
    assert made.prob_first == pytest.approx((sigmoid(1.5) + sigmoid(0.5)) / 2)
    assert verdict.judge == judge.name == "transformers:tiny@chat-1" and verdict.calls == 2
    assert judge.tally.row()["letter_mass"] == pytest.approx(0.25)
    assert all('"Preferred: A"' in messages[-1]["content"] for messages in model.asked)


@given(st.floats(-5, 5), st.floats(-20, 20))
def test_probabilities_of_a_pair_sum_to_one_whatever_the_bias(gap: float, bias: float) -> None:
    judge = TransformersJudge(Model(gap, bias), CHAT, model="tiny")
    one, two = judge.judge([Question(prompt="hi", answers=answers) for answers in (["aa", "b"], ["b", "aa"])])
    first, second = one.prob(0, 1), two.prob(0, 1)
    assert first is not None and second is not None and first + second == pytest.approx(1)
    assert (first - 0.5) * gap >= -1e-9


def test_equal_questions_are_asked_once() -> None:
    model = Model()
    judge = TransformersJudge(model, CHAT, model="tiny")
    question = Question(prompt="hi", answers=["aa", "b", "aa"])
    one, two = judge.judge([question, question])
    # three pairs, one of them of equal texts, the other two the same one
    assert len(model.asked) == 2 and one.calls == 2 and (two.calls, two.cached) == (0, 2)
    assert [c.prob_first == 0.5 for c in one.comparisons] == [False, True, False]
    assert judge.judge([]) == [] and judge.judge([Question(prompt="hi", answers=["x"])])[0].comparisons == []


def test_impossible_letters_say_nothing_and_broken_numbers_stop() -> None:
    question = Question(prompt="hi", answers=["aa", "b"])
    judge = TransformersJudge(lambda messages: [(-math.inf, -math.inf)] * len(messages), CHAT, model="tiny")
    (made,) = judge.judge([question])[0].comparisons
    assert made.prob_first is None and made.reason == "unparsable" and judge.tally.replies["unparsable"] == 2
    sure = TransformersJudge(lambda messages: [(0.0, -math.inf)] * len(messages), CHAT, model="tiny")
    assert sure.judge([question])[0].comparisons[0].orders == (1.0, 0.0)
    broken = TransformersJudge(lambda messages: [(math.nan, 0.0)] * len(messages), CHAT, model="tiny")
    with pytest.raises(InputError, match="nan"):
        broken.judge([question])
