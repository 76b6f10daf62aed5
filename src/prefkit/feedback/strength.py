"""OSP's pairs: candidates are ranked by how they do against one baseline answer, and a pair carries a strength.

    s_i = p(candidate i beats the baseline)        asked in both orders

Strength of a pair (i, j), the probability that i beats j:

    direct    asked of the judge again, both orders         assumes nothing; 2 more passes a pair
    logit     σ(logit s_i - logit s_j)                      exact for a Bradley-Terry judge
    linear    (1 + s_i - s_j) / 2                           the closed form's difference of strengths; flatter

A question's first answer is the baseline; where answers were left out, the first that is left. Ranks and pairs do not
depend on the order of the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

from prefkit.feedback.calibration import logit, sigmoid
from prefkit.feedback.ranking import Match, Ranked
from prefkit.protocols import Judge
from prefkit.records import Question, Verdict

__all__ = ["BASELINE", "Composition", "Pairs", "RankedPairing", "compose", "stored_pairs"]

BASELINE = 0
"""place of the answer that the others are compared with"""

Pairs = Literal["adjacent", "all", "best_worst", "vs_baseline"]
Composition = Literal["direct", "logit", "linear"]


def compose(better: float, worse: float, how: Literal["logit", "linear"]) -> float:
    """Strength of a pair from both answers' strengths over the same baseline, all in [0, 1].

    >>> compose(0.75, 0.25, "linear"), round(compose(0.75, 0.25, "logit"), 6)
    (0.75, 0.9)
    """
    return (1 + better - worse) / 2 if how == "linear" else sigmoid(logit(better) - logit(worse))


@dataclass(frozen=True, kw_only=True)
class _Field:
    """A question's candidates as the first pass left them."""

    question: Question
    strengths: Mapping[int, float]
    """over the baseline, by place; each distinct text once, those the judge is unsure of left out"""
    verdict: Verdict | None

    @property
    def ranks(self) -> list[int]:
        """Places of the candidates, best first; equal strengths by the texts."""
        answers = self.question.answers
        return sorted(self.strengths, key=lambda place: (-self.strengths[place], answers[place]))


@dataclass(frozen=True, kw_only=True)
class RankedPairing:
    """A `Pairing`: K candidates behind a baseline are ranked by 2K passes, then paired.

    Each match has the better-ranked answer as `chosen`, the strength with which it beats the other (below 1/2 where
    the judge, asked directly, contradicts the ranks), and 1 / number of the prompt's matches as weight.
    """

    pairs: Pairs = "all"
    """adjacent: K-1 neighbours in rank; all: K(K-1)/2; best_worst: 1; vs_baseline: each candidate and the baseline"""
    composition: Composition = "direct"

    def __call__(self, judge: Judge, questions: Sequence[Question]) -> list[Ranked]:
        """Two calls of the judge, or one, whatever the questions: processes that judge together stay in step."""
        fields = self._against_baseline(judge, questions)
        drawn = [self._places(field) for field in fields]
        if self.composition == "direct" and self.pairs != "vs_baseline":
            return self._asked_again(judge, fields, drawn)
        return [
            _ranked(field, [(i, j, self._composed(field, i, j)) for i, j in places], ())
            for field, places in zip(fields, drawn, strict=True)
        ]

    def _against_baseline(self, judge: Judge, questions: Sequence[Question]) -> list[_Field]:
        """Every distinct candidate compared with the baseline; one that equals it is not asked about."""
        candidates = [_distinct(question) for question in questions]
        asked = [
            dataclasses.replace(
                question, pairs=[(place, BASELINE) for place in places if not _is_baseline(question, place)]
            )
            for question, places in zip(questions, candidates, strict=True)
        ]
        # An empty `pairs` would mean every pair, and a single candidate makes no pair of candidates.
        needed = [
            bool(question.pairs) and (len(places) > 1 or self.pairs == "vs_baseline")
            for question, places in zip(asked, candidates, strict=True)
        ]
        verdicts = iter(judge.judge([question for question, yes in zip(asked, needed, strict=True) if yes]))
        fields: list[_Field] = []
        for question, places, yes in zip(questions, candidates, needed, strict=True):
            verdict = next(verdicts) if yes else None
            probs = {} if verdict is None else {place: verdict.prob(place, BASELINE) for place in places}
            probs |= {place: 0.5 for place in probs if _is_baseline(question, place)}
            known = {place: prob for place, prob in probs.items() if prob is not None}
            fields.append(_Field(question=question, strengths=known, verdict=verdict))
        return fields

    def _places(self, field: _Field) -> list[tuple[int, int]]:
        """The pairs to make, better first."""
        ranks = field.ranks
        if self.pairs == "vs_baseline":
            others = [place for place in ranks if not _is_baseline(field.question, place)]
            return [(i, BASELINE) if field.strengths[i] >= 0.5 else (BASELINE, i) for i in others]
        if len(ranks) < 2:
            return []
        if self.pairs == "best_worst":
            return [(ranks[0], ranks[-1])]
        return list(pairwise(ranks) if self.pairs == "adjacent" else combinations(ranks, 2))

    def _composed(self, field: _Field, better: int, worse: int) -> float:
        strengths = {BASELINE: 0.5, **field.strengths}
        if self.pairs == "vs_baseline":  # nothing to compose: the strength over the baseline itself
            return strengths[better] if worse == BASELINE else 1 - strengths[worse]
        assert self.composition != "direct", "direct strengths are asked for"
        return compose(strengths[better], strengths[worse], self.composition)

    def _asked_again(
        self, judge: Judge, fields: Sequence[_Field], drawn: Sequence[Sequence[tuple[int, int]]]
    ) -> list[Ranked]:
        asked = [
            dataclasses.replace(field.question, pairs=tuple(places))
            for field, places in zip(fields, drawn, strict=True)
            if places
        ]
        verdicts = iter(judge.judge(asked))
        found: list[Ranked] = []
        for field, places in zip(fields, drawn, strict=True):
            verdict = next(verdicts) if places else None
            pairs = [self._oriented(field, i, j, verdict.prob(i, j)) for i, j in places] if verdict is not None else []
            found.append(_ranked(field, pairs, () if verdict is None else (verdict,)))
        return found

    @staticmethod
    def _oriented(field: _Field, better: int, worse: int, prob: float | None) -> tuple[int, int, float | None]:
        """Candidates of one rank (a judge that only says who wins gives many) stand as the direct answer says."""
        if prob is not None and prob < 0.5 and field.strengths[better] == field.strengths[worse]:
            return worse, better, 1 - prob
        return better, worse, prob


def stored_pairs(judge: Judge, questions: Sequence[Question]) -> list[Ranked]:
    """A `Pairing` for the offline variant: the first two answers, as stored, with the strength the judge gives."""
    different = [question for question in questions if question.answers[0] != question.answers[1]]
    verdicts = iter(judge.judge([dataclasses.replace(question, pairs=((0, 1),)) for question in different]))
    found: list[Ranked] = []
    for question in questions:
        if question.answers[0] == question.answers[1]:
            found.append(Ranked(order=(0,), dropped="identical"))
            continue
        verdict = next(verdicts)
        prob = verdict.prob(0, 1)
        if prob is None:
            found.append(Ranked(order=(0, 1), verdicts=(verdict,), dropped="unsure"))
            continue
        order = (0, 1) if prob >= 0.5 else (1, 0)
        match = Match(chosen=order[0], rejected=order[1], strength=max(prob, 1 - prob))
        found.append(Ranked(order=order, matches=(match,), verdicts=(verdict,)))
    return found


def _ranked(field: _Field, pairs: Sequence[tuple[int, int, float | None]], more: tuple[Verdict, ...]) -> Ranked:
    """The matches of a question, and where there is none the reason."""
    known = [(better, worse, strength) for better, worse, strength in pairs if strength is not None]
    matches = tuple(
        Match(chosen=better, rejected=worse, strength=strength, weight=1 / len(known))
        for better, worse, strength in known
    )
    verdicts = (*(() if field.verdict is None else (field.verdict,)), *more)
    dropped = "" if matches else "unsure" if field.verdict is not None else _unasked(field.question)
    return Ranked(order=_order(field), matches=matches, verdicts=verdicts, dropped=dropped)


def _unasked(question: Question) -> str:
    """Why nothing was asked about a question: its texts are equal, or a baseline and one candidate make no pair."""
    return "identical" if len(set(question.answers)) < len(question.answers) else "alone"


def _order(field: _Field) -> tuple[int, ...]:
    """Places of the distinct answers, best first, the baseline at its own 1/2; those without a strength last."""
    question, strengths = field.question, dict(field.strengths)
    if not question.answers:
        return ()
    if not any(_is_baseline(question, place) for place in strengths):
        strengths[BASELINE] = 0.5
    known = sorted(strengths, key=lambda place: (-strengths[place], question.answers[place]))
    texts = {question.answers[place] for place in known}
    return (*known, *(place for place in _distinct(question) if question.answers[place] not in texts))


def _distinct(question: Question) -> list[int]:
    """Places of the first of every distinct candidate text; the baseline is no candidate."""
    first: dict[str, int] = {}
    for place in range(1, len(question.answers)):
        first.setdefault(question.answers[place], place)
    return list(first.values())


def _is_baseline(question: Question, place: int) -> bool:
    return question.answers[place] == question.answers[BASELINE]
