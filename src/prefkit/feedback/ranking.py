"""From a judge's verdicts to pairs worth training on: an order of the candidates, and which of them meet.

The order never depends on the order in which the candidates are given, and a judge is never asked about two equal
texts. Nothing is guessed: a prompt whose answers the judge cannot tell apart is dropped, with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

from prefkit.engine.seeds import number
from prefkit.protocols import Judge
from prefkit.records import Match, Question, Ranked, Verdict

__all__ = [
    "Match",
    "Pairing",
    "Ranked",
    "all_pairs",
    "best_random",
    "best_worst",
    "order_of",
    "pairing_of",
    "ranked",
    "values_of",
]


Pairing = Callable[[Judge, Sequence[Question]], list[Ranked]]
"""asks a judge about the questions and chooses the matches, in order"""


def best_worst(judge: Judge, questions: Sequence[Question]) -> list[Ranked]:
    """The best answer against the worst (SELM, iterative DPO); with two answers, the pair itself."""
    return [_extremes(*found) for found in ranked(judge, questions)]


def best_random(judge: Judge, questions: Sequence[Question], *, seed: int) -> list[Ranked]:
    """The best answer against any of those ranked below it, drawn by (seed, row)."""
    return [_best_and_one(*found, seed=seed) for found in ranked(judge, questions)]


def all_pairs(judge: Judge, questions: Sequence[Question]) -> list[Ranked]:
    """Every two answers of which the judge prefers one, each weighing 1 / their number."""
    return [_every(*found) for found in ranked(judge, questions)]


def ranked(judge: Judge, questions: Sequence[Question]) -> list[tuple[Question, Ranked]]:
    """Each question with its answers in order and no match yet. Equal texts are judged once.

    `dropped` is set where there is nothing to match: one distinct answer, or none the judge would compare.
    """
    distinct = [_distinct(question) for question in questions]
    asked = [place for place, kept in enumerate(distinct) if len(kept) > 1]
    short = [
        dataclasses.replace(questions[i], answers=[questions[i].answers[j] for j in distinct[i]], pairs=())
        for i in asked
    ]
    verdicts = dict(zip(asked, judge.judge(short) if short else [], strict=True))
    found: list[tuple[Question, Ranked]] = []
    for place, question in enumerate(questions):
        if place not in verdicts:
            why = "identical" if len(question.answers) > 1 else "alone"
            found.append((question, Ranked(order=tuple(distinct[place]), dropped=why)))
            continue
        verdict = on_places(verdicts[place], distinct[place])
        unsure = verdict.scores is None and all(c.prob_first is None for c in verdict.comparisons)
        order = order_of(question, verdict, distinct[place])
        found.append((question, Ranked(order=order, verdicts=(verdict,), dropped="unsure" if unsure else "")))
    return found


def order_of(question: Question, verdict: Verdict, places: Sequence[int] | None = None) -> tuple[int, ...]:
    """Places of the answers, best first: by scores, else by mean probability of winning, ties by the texts."""
    places = range(len(question.answers)) if places is None else places
    values = values_of(question, verdict, places)
    return tuple(sorted(places, key=lambda place: (-values[place], question.answers[place], place)))


def values_of(question: Question, verdict: Verdict, places: Sequence[int]) -> dict[int, float]:
    """What the order goes by: each answer's score, or its mean probability of winning where the judge gave one."""
    if verdict.scores is not None:
        return {place: float(verdict.scores[place]) for place in places}
    values: dict[int, float] = {}
    for place in places:
        found = [verdict.prob(place, other) for other in places if other != place]
        known = [prob for prob in found if prob is not None]
        # Rounded, for 1 - 0.9 is not 0.1: the order of the candidates must not decide a tie.
        values[place] = round(math.fsum(known) / len(known), 12) if known else 0.5
    return values


def on_places(verdict: Verdict, places: Sequence[int]) -> Verdict:
    """A verdict on some of a question's answers, told on the places of the question itself."""
    comparisons = [
        dataclasses.replace(found, first=places[found.first], second=places[found.second])
        for found in verdict.comparisons
    ]
    scores = None
    if verdict.scores is not None:
        by_place = dict(zip(places, verdict.scores, strict=True))
        scores = tuple(by_place.get(place, float("nan")) for place in range(max(places) + 1))
    return dataclasses.replace(verdict, comparisons=comparisons, scores=scores)


def _distinct(question: Question) -> list[int]:
    """Places of the first of every distinct text."""
    first: dict[str, int] = {}
    for place, answer in enumerate(question.answers):
        first.setdefault(answer, place)
    return list(first.values())


def _match(verdict: Verdict, values: dict[int, float], better: int, worse: int) -> Match | str:
    """The match of two answers, or why there is none."""
    if values[better] == values[worse]:
        return "tie"
    prob = verdict.prob(better, worse)
    if prob is None:
        return "unsure"
    return Match(chosen=better, rejected=worse, strength=prob)


def _extremes(question: Question, found: Ranked) -> Ranked:
    if found.dropped:
        return found
    values = values_of(question, found.verdicts[0], found.order)
    match = _match(found.verdicts[0], values, found.order[0], found.order[-1])
    if isinstance(match, str):
        return dataclasses.replace(found, dropped=match)
    return dataclasses.replace(found, matches=(match,))


def _best_and_one(question: Question, found: Ranked, *, seed: int) -> Ranked:
    if found.dropped:
        return found
    verdict, best = found.verdicts[0], found.order[0]
    values = values_of(question, verdict, found.order)
    # In the order of the texts, so that neither the candidates' order nor their values steer the draw.
    rest = sorted(found.order[1:], key=lambda place: question.answers[place])
    matches = [_match(verdict, values, best, place) for place in rest]
    usable = [match for match in matches if isinstance(match, Match)]
    if not usable:
        return dataclasses.replace(found, dropped=next(match for match in matches if isinstance(match, str)))
    return dataclasses.replace(found, matches=(usable[number(seed, "rejected", question.row) % len(usable)],))


def _every(question: Question, found: Ranked) -> Ranked:
    if found.dropped:
        return found
    values = values_of(question, found.verdicts[0], found.order)
    order = found.order
    matches = [
        _match(found.verdicts[0], values, order[i], order[j])
        for i in range(len(order))
        for j in range(i + 1, len(order))
    ]
    usable = [match for match in matches if isinstance(match, Match)]
    if not usable:
        return dataclasses.replace(found, dropped=next(match for match in matches if isinstance(match, str)))
    weight = 1 / len(usable)
    return dataclasses.replace(found, matches=tuple(dataclasses.replace(match, weight=weight) for match in usable))


def pairing_of(name: str, *, seed: int) -> Pairing:
    """The pairing that `--pairing` names: best_worst | best_random | all."""
    known: dict[str, Pairing] = {
        "best_worst": best_worst,
        "best_random": partial(best_random, seed=seed),
        "all": all_pairs,
    }
    return known[name]
