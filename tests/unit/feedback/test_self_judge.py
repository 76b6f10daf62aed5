from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkit.errors import InputError
from prefkit.feedback.self_judge import TEMPLATES, SelfJudge, choice_template
from prefkit.records import Question, Text

CHAT = TEMPLATES["chat"]
ASKED = "Which of two answers is better?"


def shown(prompt: Text) -> tuple[str, str]:
    """The answers a rendered prompt of the chat template shows as A and as B."""
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    first, rest = text.partition("\n\nAssistant A: ")[2].split("\n\nAssistant B: ")
    return first, rest.partition("\n\nPlease choose")[0]


class Model:
    """A stand-in: the letter's logit is the difference of the answers' lengths times `sharp`, plus a bias for A."""

    def __init__(self, *, sharp: float = 0.5, bias: float = 0.0, room: int = 10_000) -> None:
        self.sharp, self.bias, self.room = sharp, bias, room
        self.prompts: list[Text] = []

    def __call__(self, prompts: Sequence[Text]) -> list[tuple[float, float, float] | None]:
        self.prompts += prompts
        found: list[tuple[float, float, float] | None] = []
        for prompt in prompts:
            first, second = shown(prompt)
            logit = self.sharp * (len(first) - len(second)) + self.bias
            found.append(None if len(first) + len(second) > self.room else (logit - 3, -3.0, 0.25))
        return found


def question(*answers: str, pairs: Sequence[tuple[int, int]] = ()) -> Question:
    return Question(prompt="Say something.", answers=answers, pairs=pairs)


def judge(model: Model, **options: object) -> SelfJudge:
    return SelfJudge(model, CHAT, "self:frozen", **options)  # type: ignore[arg-type]


def test_the_strength_is_the_mean_of_both_orders():
    model = Model(sharp=0.5, bias=1.0)
    verdict = judge(model).judge([question("abcd", "ab")])[0]
    (found,) = verdict.comparisons

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert found.orders == pytest.approx((sigmoid(1 + 1), 1 - sigmoid(-1 + 1)))
    assert found.prob_first == pytest.approx((sigmoid(2) + 0.5) / 2)
    assert verdict.calls == 2 and [shown(prompt) for prompt in model.prompts] == [("abcd", "ab"), ("ab", "abcd")]


def test_a_judge_that_only_likes_a_place_holds_every_pair_for_a_tie():
    verdict = judge(Model(sharp=0.0, bias=4.0)).judge([question("abcd", "ab", "a")])[0]
    assert [c.prob_first for c in verdict.comparisons] == pytest.approx([0.5] * 3)
    assert all(c.orders is not None and c.orders[0] > 0.98 and c.orders[1] < 0.02 for c in verdict.comparisons)


def test_a_biased_judge_keeps_the_right_order():
    answers = ["a" * n for n in (1, 3, 5, 9)]
    verdict = judge(Model(sharp=0.3, bias=2.0)).judge([question(*answers)])[0]
    assert all((verdict.prob(i, j) or 0) < 0.5 for i, j in itertools.combinations(range(4), 2))


@given(
    st.floats(-40, 40),
    st.floats(-40, 40),
    st.floats(0.05, 20),
    st.sampled_from([("x", "y"), ("y", "x"), ("same", "same")]),
)
def test_both_directions_add_up_to_1_exactly(
    straight: float, crossed: float, temperature: float, texts: tuple[str, str]
):
    def ask(prompts: Sequence[Text]) -> list[tuple[float, float, float]]:
        return [(straight if shown(p)[0] == "x" else crossed, 0.0, 1.0) for p in prompts]

    made = SelfJudge(ask, CHAT, "self", temperature=temperature)
    one, other = (made.judge([question(*texts, pairs=[pair])])[0].comparisons[0] for pair in ((0, 1), (1, 0)))
    assert one.prob_first is not None and other.prob_first is not None
    assert one.prob_first + other.prob_first == 1
    assert 0 <= one.prob_first <= 1


def test_pairs_are_answered_in_the_order_wanted_and_each_prompt_is_asked_once():
    model = Model()
    verdict = judge(model).judge([question("ab", "abcd", "a", pairs=[(1, 0), (0, 1), (2, 1)])])[0]
    assert [(c.first, c.second) for c in verdict.comparisons] == [(1, 0), (0, 1), (2, 1)]
    assert verdict.calls == len(model.prompts) == 4
    assert verdict.prob(1, 0) == 1 - (verdict.prob(0, 1) or 0)


def test_equal_texts_are_a_tie_and_cost_nothing():
    model = Model()
    verdict = judge(model).judge([question("same", "same")])[0]
    assert verdict.comparisons[0].prob_first == 0.5 and verdict.calls == 0 and not model.prompts
    assert verdict.comparisons[0].orders is None, "nobody was asked: no agreement of orders to count"


@pytest.mark.parametrize(
    ("option", "prob", "reason"), [("keep", 0.5, ""), ("flatten", 0.5, ""), ("drop", None, "unsure")]
)
def test_pairs_whose_orders_disagree(option: str, prob: float | None, reason: str):
    made = judge(Model(sharp=0.5, bias=2.0), disagreement=option)
    agreed, disagreed = made.judge([question("abcdefghi", "a"), question("ab", "a")])
    assert (agreed.prob(0, 1) or 0) > 0.9
    found = disagreed.comparisons[0]
    assert found.orders is not None and found.orders[0] > 0.5 > found.orders[1]
    if option == "keep":
        assert found.prob_first is not None and 0.5 < found.prob_first < 0.6
    else:
        assert (found.prob_first, found.reason) == (prob, reason)


def test_a_pair_that_does_not_fit_the_context_has_no_probability():
    verdict = judge(Model(room=10)).judge([question("a" * 6, "b" * 6, "c")])[0]
    assert [(c.prob_first is None, c.reason) for c in verdict.comparisons] == [
        (True, "failed"),
        (False, ""),
        (False, ""),
    ]


def test_the_temperature_draws_strengths_to_a_half_and_stands_in_the_name():
    sharp, calm = judge(Model()), judge(Model(), temperature=4.0)
    one, other = (made.judge([question("abcd", "a")])[0].comparisons[0] for made in (sharp, calm))
    assert one.orders == other.orders
    assert one.prob_first is not None and other.prob_first is not None
    assert 0.5 < other.prob_first < one.prob_first
    p = one.prob_first
    assert math.log(other.prob_first / (1 - other.prob_first)) == pytest.approx(math.log(p / (1 - p)) / 4)
    assert calm.name != sharp.name and "T=4" in calm.name and "chat-1" in calm.name


def test_the_mass_on_the_letters_is_read():
    readings, calls = judge(Model()).read([question("ab", "b")])[0]
    assert readings[0].mass == (0.25, 0.25) and calls == 2


def test_nan_and_bad_temperatures_are_refused():
    with pytest.raises(ValueError, match="not numbers"):
        SelfJudge(lambda prompts: [(math.nan, 0.0, 1.0) for _ in prompts], CHAT, "x").judge([question("a", "b")])
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            judge(Model(), temperature=temperature)


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"reviews"}))
def test_templates_keep_the_kind_of_the_prompt_and_put_values_in_once(name: str):
    template = TEMPLATES[name]
    text = template.render("The {answer_a} prompt", "one {prompt}", "two {answer_b}")
    assert isinstance(text, str) and text.endswith(f"\n\n{template.prefix}")
    assert text.count("The {answer_a} prompt") == text.count("one {prompt}") == text.count("two {answer_b}") == 1
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    chat = template.render(turns, "one", "two")
    assert not isinstance(chat, str) and [turn["role"] for turn in chat] == ["user", "assistant"]
    assert chat[1]["content"] == template.prefix and not template.prefix.endswith(" ")
    said = chat[0]["content"]
    assert "Human: Hi\n\nAssistant: Yes?\n\nHuman: Go" in said and said.index(" A: one") < said.index(" B: two")


def test_a_template_may_leave_the_prompt_out():
    text = TEMPLATES["reviews"].render("the film", "good {answer_b}", "bad")
    assert isinstance(text, str) and "the film" not in text
    assert "Review A: good {answer_b}\n\nReview B: bad\n" in text


def test_a_users_file_is_taken_as_other_judges_take_it(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text('user = """Which is funnier?\n{prompt}\n1: {answer_a}\n2: {answer_b}"""\n')
    template = choice_template(str(file))
    assert template.name == "mine" and template.version
    text = template.render("Joke", "x", "y")
    assert text == "Which is funnier?\nJoke\n1: x\n2: y\n\nThe better one is"
    assert choice_template("hh") is TEMPLATES["hh"]
    with pytest.raises(InputError, match="neither"):
        choice_template("nothing")


def test_the_template_asks_in_words_that_ship():
    assert isinstance(CHAT.render("p", "a", "b"), str) and ASKED in CHAT.render("p", "a", "b")
