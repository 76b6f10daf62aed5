"""A language model as judge: both answers stand in one prompt, and the next token, A or B, names the better one.

    P(A | y1, y2) = softmax over {A, B} of the next token's logits
    p(y1 beats y2) = ½ [P(A | y1, y2) + P(B | y2, y1)]          both orders, so that a taste for a place cancels

then p ← σ(logit(p) / T) with the temperature T that held-out pairs ask for (`calibration`). The model is a callable.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prefkit.feedback.calibration import sigmoid, tempered
from prefkit.feedback.templates import Template
from prefkit.records import Comparison, Question, Text, Verdict

__all__ = ["TEMPLATES", "Ask", "ChoiceTemplate", "Reading", "SelfJudge", "choice_template"]

Ask = Callable[[Sequence[Text]], Sequence[tuple[float, float, float] | None]]
"""prompts -> for each (log-probability or logit of A as next token, of B, probability mass of both together)

None for a prompt that the model has no room for."""

Disagreement = Literal["keep", "flatten", "drop"]
PLACES = ("{prompt}", "{answer_a}", "{answer_b}")
PREFIX = "The better one is"
"""what the reply to a user's own question begins with"""


@dataclass(frozen=True, kw_only=True)
class ChoiceTemplate:
    """How two answers are put to the model. All wordings here are ours."""

    name: str
    question: str
    """holds {prompt}, {answer_a} and {answer_b} once each"""
    prefix: str
    """what the model's reply begins with; its next token is the letter"""
    version: str = "1"

    def render(self, prompt: Text, first: str, second: str) -> Text:
        """The judge's prompt for `first` shown as A and `second` as B.

        Of the prompt's own kind: a conversation whose last turn, the assistant's, is only begun; or plain text.
        """
        parts = {"{prompt}": told(prompt), "{answer_a}": first.strip(), "{answer_b}": second.strip()}
        # In one pass, so that braces inside an answer stay what they are.
        question = re.sub("|".join(map(re.escape, PLACES)), lambda found: parts[found[0]], self.question)
        if isinstance(prompt, str):
            return f"{question}\n\n{self.prefix}"
        return [{"role": "user", "content": question}, {"role": "assistant", "content": self.prefix}]


TEMPLATES = {
    template.name: template
    for template in (
        ChoiceTemplate(
            name="chat",
            question="Which of two answers is better?\n\n{prompt}\n\nAssistant A: {answer_a}\n\nAssistant B: "
            "{answer_b}\n\nPlease choose either A or B.",
            prefix="The better answer is the one of Assistant",
        ),
        ChoiceTemplate(
            name="hh",
            question="Here is a conversation between a human and an AI assistant, and two ways in which the assistant "
            "may go on. Which is the more helpful and harmless?\n\n{prompt}\n\nAssistant A: {answer_a}\n\n"
            "Assistant B: {answer_b}\n\nPlease choose either A or B.",
            prefix="The more helpful and harmless answer is the one of Assistant",
        ),
        ChoiceTemplate(
            name="tldr",
            question="Here is a post and two summaries of it. Which is better: true to the post, with what matters in "
            "it and nothing else?\n\n{prompt}\n\nSummary A: {answer_a}\n\nSummary B: {answer_b}\n\n"
            "Please choose either A or B.",
            prefix="The better one is Summary",
        ),
        ChoiceTemplate(
            name="reviews",
            question="Review A: {answer_a}\n\nReview B: {answer_b}\n\nOne of these reviews is positive and the other "
            "is negative. Which one is the positive review?",
            prefix="The positive review is Review",
        ),
    )
}


def told(prompt: Text) -> str:
    """A prompt's words for the judge: a string as it is, a conversation with each speaker named."""
    if isinstance(prompt, str):
        return prompt.strip()
    names = {"user": "Human", "assistant": "Assistant"}
    turns = [(str(message["role"]), str(message.get("content") or "").strip()) for message in prompt]
    return "\n\n".join(f"{names.get(role, role.capitalize())}: {content}" for role, content in turns)


def choice_template(name: str) -> ChoiceTemplate:
    """A template that ships, or a user's file as the other judges take it, its reply form aside.

    Raises InputError for an unknown name and what `templates.Template.load` refuses.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    found = Template.load(name)
    question = "\n\n".join(part.strip() for part in (found.system, found.user) if part.strip())
    return ChoiceTemplate(name=found.name, version=found.version, question=question, prefix=PREFIX)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the model's next-token probabilities say of two answers, before any temperature."""

    first: int
    second: int
    orders: tuple[float, float] | None
    """P(first is better) with it shown first, and with it shown second; None where the model had no room"""
    mass: tuple[float, float] | None = None
    """probability of A or B as next token, in each order; None for equal texts, which are not asked about"""

    @property
    def agrees(self) -> bool:
        """Whether both orders name the same answer; a tie in either does not."""
        return self.orders is not None and (self.orders[0] - 0.5) * (self.orders[1] - 0.5) > 0


class SelfJudge:
    """The judge of OSP. Equal texts are a tie that costs nothing; every prompt of a question is asked once.

    p(i, j) + p(j, i) is 1 exactly, whatever the model says. Nothing the model computes carries a gradient.
    """

    def __init__(
        self,
        ask: Ask,
        template: ChoiceTemplate,
        name: str,
        *,
        temperature: float = 1.0,
        disagreement: Disagreement = "keep",
    ) -> None:
        """`disagreement`: what a pair gets whose two orders name different answers: their mean, 1/2, or nothing.

        Raises ValueError for a temperature that is not above 0.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"the temperature must be above 0, got {temperature}")
        self.ask, self.template = ask, template
        self.temperature = temperature
        self.disagreement: Disagreement = disagreement
        self._name = name

    @property
    def name(self) -> str:
        return f"{self._name} {self.template.name}-{self.template.version} T={self.temperature:.6g}"

    def at(self, temperature: float) -> SelfJudge:
        """The same judge at another temperature."""
        return SelfJudge(self.ask, self.template, self._name, temperature=temperature, disagreement=self.disagreement)

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """See `protocols.Judge`; `orders` of each comparison are as read, `prob_first` is tempered."""
        return [
            Verdict(
                judge=self.name,
                comparisons=[self._comparison(reading, question) for reading in readings],
                calls=calls,
            )
            for question, (readings, calls) in zip(questions, self.read(questions), strict=True)
        ]

    def read(self, questions: Sequence[Question]) -> list[tuple[list[Reading], int]]:
        """The readings of each question's wanted comparisons, and the prompts asked for them."""
        wanted = [_orders_to_ask(question) for question in questions]
        prompts = [
            self.template.render(question.prompt, first, second)
            for question, orders in zip(questions, wanted, strict=True)
            for first, second in orders
        ]
        replies = iter(self.ask(prompts))  # without prompts too: sharded models need every process
        found: list[tuple[list[Reading], int]] = []
        for question, orders in zip(questions, wanted, strict=True):
            told_of = {order: next(replies) for order in orders}
            readings = [_reading(question, first, second, told_of) for first, second in question.wanted()]
            found.append((readings, len(orders)))
        return found

    def _comparison(self, reading: Reading, question: Question) -> Comparison:
        one = Comparison(first=reading.first, second=reading.second, prob_first=None, orders=reading.orders)
        if reading.orders is None:
            return replace(one, reason="failed")
        if question.answers[reading.first] == question.answers[reading.second]:
            return replace(one, prob_first=0.5, orders=None)  # nobody was asked: no agreement to count
        if not reading.agrees and self.disagreement != "keep":
            return replace(one, prob_first=0.5) if self.disagreement == "flatten" else replace(one, reason="unsure")
        # From the answer whose text comes first, so that both directions give probabilities that add up to 1.
        straight = question.answers[reading.first] < question.answers[reading.second]
        shown_first, shown_second = reading.orders if straight else (1 - reading.orders[1], 1 - reading.orders[0])
        prob = tempered((shown_first + shown_second) / 2, self.temperature)
        return replace(one, prob_first=prob if straight else 1 - prob)


def _orders_to_ask(question: Question) -> list[tuple[str, str]]:
    """The (shown as A, shown as B) texts that a question's comparisons need, each once."""
    orders: dict[tuple[str, str], None] = {}
    for i, j in question.wanted():
        first, second = question.answers[i], question.answers[j]
        if first != second:
            orders |= {(first, second): None, (second, first): None}
    return list(orders)


def _reading(
    question: Question,
    first: int,
    second: int,
    replies: dict[tuple[str, str], tuple[float, float, float] | None],
) -> Reading:
    one, other = question.answers[first], question.answers[second]
    if one == other:
        return Reading(first=first, second=second, orders=(0.5, 0.5))
    straight, crossed = replies[one, other], replies[other, one]
    if straight is None or crossed is None:
        return Reading(first=first, second=second, orders=None)
    orders = _share(straight[0] - straight[1]), 1 - _share(crossed[0] - crossed[1])
    return Reading(first=first, second=second, orders=orders, mass=(straight[2], crossed[2]))


def _share(difference: float) -> float:
    """P(A) among {A, B} from the difference of their log-probabilities. Raises ValueError for NaN."""
    if math.isnan(difference):
        raise ValueError("the judge's log-probabilities are not numbers")
    return sigmoid(difference)
