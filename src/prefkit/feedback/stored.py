"""A judge that looks labels up: preferences, scores or verdicts that somebody has given before."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from prefkit.errors import InputError
from prefkit.feedback.templates import content_of, readable
from prefkit.records import Comparison, Question, Text, Verdict

FORMS = (
    'give "prompt" and one of: "chosen", "rejected" [, "strength"]; "answers", "scores"; "answers", "comparisons" '
    '(as `prefkit judge run` writes them); "first", "second", "prob_first"'
)


@dataclass(frozen=True)
class _Label:
    """P(the pair's lower text is the better one), None where the source was unsure, and the row that says so."""

    prob: float | None
    reason: str
    row: int


class StoredJudge:
    """Labels from rows. Prompts and answers are found again by their text; order and repetition do not matter."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], name: str, where: Callable[[int], str]) -> None:
        """rows: in any of FORMS, mixed as one likes; where: a row's place in its file, for messages.

        Raises InputError for rows of no known form, values out of range, and two rows that contradict each other. Rows
        that compare a text with itself are passed over and counted in `passed_over`.
        """
        self.name = name
        self.passed_over = 0
        self._where = where
        self._labels: dict[tuple[str, str, str], _Label] = {}
        self._scores: dict[str, list[Mapping[str, float]]] = {}
        for place, row in enumerate(rows):
            self._add(place, row)

    def __len__(self) -> int:
        """Pairs with a label."""
        return len(self._labels)

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """Verdicts in order. What the file does not say is `absent`; equal answers tie."""
        return [self._verdict(question) for question in questions]

    def _verdict(self, question: Question) -> Verdict:
        prompt = _canonical(question.prompt)
        made: list[Comparison] = []
        for i, j in question.wanted():
            prob, reason = self._look_up(prompt, question.answers[i], question.answers[j])
            made.append(Comparison(first=i, second=j, prob_first=prob, reason=reason))
        scores = next((s for s in self._scores.get(prompt, ()) if all(a in s for a in question.answers)), None)
        return Verdict(
            judge=self.name,
            comparisons=made,
            scores=None if scores is None else [scores[answer] for answer in question.answers],
            cached=sum(comparison.prob_first is not None for comparison in made),
        )

    def _look_up(self, prompt: str, first: str, second: str) -> tuple[float | None, str]:
        if first == second:
            return 0.5, ""
        low, high = sorted((first, second))
        label = self._labels.get((prompt, low, high))
        if label is None:
            return None, "absent"
        if label.prob is None:
            return None, label.reason
        return (label.prob if first == low else 1 - label.prob), ""

    def _add(self, place: int, row: Mapping[str, Any]) -> None:
        if "prompt" not in row:
            raise InputError("has no prompt", where=self._where(place), mend=FORMS)
        prompt = _canonical(self._text(place, row, "prompt"))
        if "chosen" in row and "rejected" in row:
            strength = row.get("strength")
            prob = 1.0 if strength is None else self._probability(place, "strength", strength)
            self._label(place, prompt, self._answer(place, row, "chosen"), self._answer(place, row, "rejected"), prob)
        elif "answers" in row and ("scores" in row or "comparisons" in row):
            self._add_answers(place, prompt, row)
        elif {"first", "second", "prob_first"} <= row.keys():
            first, second = (self._answer(place, row, name) for name in ("first", "second"))
            value = row["prob_first"]
            prob = None if value is None else self._probability(place, "prob_first", value)
            self._label(place, prompt, first, second, prob, str(row.get("reason") or "unsure"))
        else:
            raise InputError("holds no label", where=self._where(place), mend=FORMS)

    def _add_answers(self, place: int, prompt: str, row: Mapping[str, Any]) -> None:
        """A list of answers with a score each, or with comparisons between places in the list."""
        raw: Any = row["answers"]
        if not isinstance(raw, Sequence) or isinstance(raw, str):
            raise InputError("answers is no list", where=self._where(place), mend=FORMS)
        answers = [self._answer(place, {"answers": answer}, "answers") for answer in cast("Sequence[Any]", raw)]
        if (scores := row.get("scores")) is not None:
            self._add_scores(place, prompt, answers, scores)
        if row.get("comparisons") is not None:
            for made in row["comparisons"]:
                self._add_comparison(place, prompt, answers, made)
        elif scores is None:
            raise InputError("holds no label", where=self._where(place), mend=FORMS)
        else:
            values = self._scores[prompt][-1]
            for i, first in enumerate(answers):
                for second in answers[i + 1 :]:
                    difference = values[first] - values[second]
                    prob = 0.5 if difference == 0 else float(difference > 0)
                    self._label(place, prompt, first, second, prob)

    def _add_scores(self, place: int, prompt: str, answers: Sequence[str], scores: Any) -> None:
        listed = isinstance(scores, Sequence) and not isinstance(scores, str)
        numbers = list(cast("Sequence[Any]", scores)) if listed else []
        if len(numbers) != len(answers) or not all(_is_number(score) for score in numbers):
            raise InputError(
                f"scores are {scores!r} for {len(answers)} answers",
                where=self._where(place),
                mend="one finite number for each answer",
            )
        found: dict[str, float] = {}
        for answer, score in zip(answers, numbers, strict=True):
            if found.setdefault(answer, float(score)) != float(score):
                raise InputError(
                    f"the same answer has the scores {found[answer]:g} and {float(score):g}",
                    where=self._where(place),
                    mend="keep one of them",
                )
        self._scores.setdefault(prompt, []).append(found)

    def _add_comparison(self, place: int, prompt: str, answers: Sequence[str], made: Any) -> None:
        try:
            first, second = answers[_place(made["first"])], answers[_place(made["second"])]
            value, reason = made["prob_first"], str(made.get("reason") or "unsure")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"comparison {made!r} cannot be read",
                where=self._where(place),
                mend='"first" and "second" are places in "answers", from 0; "prob_first" is a probability or null',
            ) from error
        prob = None if value is None else self._probability(place, "prob_first", value)
        self._label(place, prompt, first, second, prob, reason)

    def _label(
        self, place: int, prompt: str, first: str, second: str, prob: float | None, reason: str = "unsure"
    ) -> None:
        """Enter P(first is better), the texts in the order of their letters."""
        if first == second:
            self.passed_over += 1
            return
        low, high = sorted((first, second))
        if prob is not None and first != low:
            prob = 1 - prob
        new = _Label(prob, "" if prob is not None else reason, place)
        old = self._labels.setdefault((prompt, low, high), new)
        if old.prob is None and prob is not None:
            self._labels[prompt, low, high] = new  # who is unsure contradicts nobody
        elif old.prob is not None and prob is not None and not math.isclose(old.prob, prob, abs_tol=1e-6):
            told = " and ".join(f"{value if first == low else 1 - value:g}" for value in (old.prob, prob))
            raise InputError(
                f"contradicts {self._where(old.row)}: the same two answers to the same prompt, with probabilities "
                f"{told} for the same one",
                where=self._where(place),
                mend="keep one of the two rows, or one with their mean as strength",
            )

    def _text(self, place: int, row: Mapping[str, Any], name: str) -> Text:
        """A string or a list of messages. Raises InputError for anything else."""
        value: Any = row.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, Sequence) and value:
            turns = cast("Sequence[Any]", value)
            if all(isinstance(turn, Mapping) and "content" in turn for turn in turns):
                return cast("Text", turns)
        raise InputError(
            f"{name} is {value!r}", where=self._where(place), mend="a string, or a list of messages with role, content"
        )

    def _answer(self, place: int, row: Mapping[str, Any], name: str) -> str:
        """An answer's text: a string, or the content of its one message."""
        text = self._text(place, row, name)
        if isinstance(text, str):
            return text
        return content_of(text[0]) if len(text) == 1 else readable(text)

    def _probability(self, place: int, name: str, value: Any) -> float:
        if not _is_number(value) or not 0 <= float(value) <= 1:
            raise InputError(f"{name} is {value!r}", where=self._where(place), mend="a probability, from 0 to 1")
        return float(value)


def _canonical(prompt: Text) -> str:
    """One string per prompt; a single user turn is the same prompt as its text."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and str(prompt[0].get("role")) == "user":
        return content_of(prompt[0])
    return "\x00" + json.dumps([[str(turn.get("role")), content_of(turn)] for turn in prompt])


def _place(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("no place")
    return value


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, numpy's scalars included; a truth value is none."""
    if isinstance(value, bool | str):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
