"""A prompt with its ranked candidate answers in token ids: what a round trains on, and how it stands on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prefkit.domains.text.prompts import last_content
from prefkit.errors import InputError
from prefkit.records import Comparison, Group, Match, Pair, Question, Ranked, Sample, Verdict

Origin = Literal["own", "reference", "chosen", "rejected"]
"""who wrote an answer: the policy, the start model, or the data set (its chosen or its rejected answer)"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One candidate."""

    text: str
    tokens: tuple[int, ...]
    origin: Origin
    finished: bool = True
    """False where a token budget cut it off: it then ends without an end-of-sequence token"""
    log_prob: float | None = None
    """under the distribution it was drawn from, whole answer, in nats; None for stored answers"""

    @classmethod
    def drawn(cls, sample: Sample, origin: Origin, *, max_length: int) -> Answer:
        """A sample, cut as stored answers are: prompt and answer take `max_length` tokens at most."""
        room = max_length - len(sample.prompt)
        return cls(
            text=sample.text,
            tokens=tuple(sample.tokens[:room]),
            origin=origin,
            finished=sample.finished and len(sample.tokens) <= room,
            log_prob=math.fsum(sample.log_probs),
        )


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """A prompt and the answers that may be ranked, before a judge has seen them."""

    position: int
    """place among the round's prompts"""
    row: int
    """place among the training rows"""
    answers: tuple[Answer, ...]

    def question(self, pair: Pair, *, keep_unfinished: bool, keep_drawn: bool) -> tuple[Question, tuple[int, ...]]:
        """What a judge is asked, and the places of its answers among the candidates."""
        places = tuple(
            i
            for i, answer in enumerate(self.answers)
            if answer.log_prob is None or (keep_drawn and (keep_unfinished or answer.finished))
        )
        texts = [self.answers[i].text for i in places]
        return Question(prompt=pair.source.prompt, answers=texts, row=self.position), places


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Ranked candidates: an item that a round trains on."""

    position: int
    row: int
    answers: tuple[Answer, ...]
    order: tuple[int, ...] = ()
    matches: tuple[Match, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    dropped: str = ""

    @classmethod
    def of(cls, candidates: Candidates, ranked: Ranked, places: Sequence[int]) -> Contest:
        """Join candidates with their ranking, whose answers are those at `places`."""
        matches = [
            Match(chosen=places[m.chosen], rejected=places[m.rejected], strength=m.strength, weight=m.weight)
            for m in ranked.matches
        ]
        return cls(
            position=candidates.position,
            row=candidates.row,
            answers=candidates.answers,
            order=tuple(places[place] for place in ranked.order),
            matches=tuple(matches),
            verdicts=tuple(_moved(verdict, places) for verdict in ranked.verdicts),
            dropped=ranked.dropped,
        )

    @classmethod
    def stored(cls, position: int, row: int, pair: Pair) -> Contest:
        """The data set's own pair, as it is."""
        strength = 1.0 if pair.source.strength is None else pair.source.strength
        return cls(
            position=position,
            row=row,
            answers=stored_answers(pair),
            order=(0, 1),
            matches=(Match(chosen=0, rejected=1, strength=strength),),
        )

    def scored(self, extra: Sequence[int] = ()) -> list[int]:
        """Places of the answers that a loss needs: those that meet, and `extra`; equal token ids come once."""
        wanted = [place for match in self.matches for place in (match.chosen, match.rejected)] + list(extra)
        first: dict[tuple[int, ...], int] = {}
        for place in wanted or [0]:
            first.setdefault(self.answers[place].tokens, place)
        return list(first.values())

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        for verdict in row["verdicts"]:
            if verdict["scores"] is not None:
                verdict["scores"] = [None if math.isnan(score) else score for score in verdict["scores"]]
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str) -> Contest:
        """What `to_json` gave; InputError for anything else."""
        try:
            return cls(
                position=row["position"],
                row=row["row"],
                answers=tuple(answer_of(answer) for answer in row["answers"]),
                order=tuple(row["order"]),
                matches=tuple(Match(**match) for match in row["matches"]),
                verdicts=tuple(_verdict(verdict) for verdict in row["verdicts"]),
                dropped=row["dropped"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"is no item of a round ({error})", where=where, mend="delete the file") from error


def answer_of(row: Mapping[str, Any]) -> Answer:
    values: dict[str, Any] = {**row, "tokens": tuple(row["tokens"])}
    return Answer(**values)


def stored_answers(pair: Pair) -> tuple[Answer, Answer]:
    """The data set's two answers, chosen first."""
    source = pair.source
    return (
        Answer(
            text=last_content(source.chosen),
            tokens=tuple(pair.chosen),
            origin="chosen",
            finished=not pair.chosen_truncated,
        ),
        Answer(
            text=last_content(source.rejected),
            tokens=tuple(pair.rejected),
            origin="rejected",
            finished=not pair.rejected_truncated,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class MatchScores:
    """Log-probs of a batch's matches, one entry per match over all its prompts, (p,) each, in nats.

    `reference` values carry no gradient. The `own` ones are those of the prompt's first own answer, repeated for each
    of its matches.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    strength: Tensor
    weight: Tensor
    own: Tensor | None = None
    ref_own: Tensor | None = None
    num_own_tokens: Tensor | None = None


class Plan:
    """Where the answers of a batch stand in its one forward pass: each prompt once, each distinct answer once."""

    def __init__(self, contests: Sequence[Contest], prompts: Sequence[Sequence[int]], *, own: Sequence[int]) -> None:
        """`own`: the place of each contest's own answer that the loss needs; empty where it needs none."""
        self.groups: list[Group] = []
        self.places: list[list[int]] = []
        """of each contest, the places of the answers that are scored"""
        flat: list[dict[tuple[int, ...], int]] = []
        count = 0
        for i, (contest, prompt) in enumerate(zip(contests, prompts, strict=True)):
            places = contest.scored([own[i]] if own else ())
            self.places.append(places)
            self.groups.append(Group(prompt, [contest.answers[place].tokens for place in places]))
            flat.append({contest.answers[place].tokens: count + j for j, place in enumerate(places)})
            count += len(places)
        matches = [(i, match) for i, contest in enumerate(contests) for match in contest.matches]

        def slots(places: Sequence[tuple[int, int]]) -> list[int]:
            return [flat[i][contests[i].answers[place].tokens] for i, place in places]

        self.chosen = slots([(i, match.chosen) for i, match in matches])
        self.rejected = slots([(i, match.rejected) for i, match in matches])
        self.own = slots([(i, own[i]) for i, _ in matches]) if own else None
        self._own_tokens = [len(contests[i].answers[own[i]].tokens) for i, _ in matches] if own else []
        self._strength = [match.strength for _, match in matches]
        self._weight = [match.weight for _, match in matches]

    def scores(self, log_probs: Tensor, reference: Tensor) -> MatchScores:
        """Sort the flat log-probs (n,) of policy and reference by match."""
        device = log_probs.device

        def at(values: Tensor, slots: list[int]) -> Tensor:
            return values.index_select(0, torch.tensor(slots, dtype=torch.long, device=device))

        def numbers(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return MatchScores(
            chosen=at(log_probs, self.chosen),
            rejected=at(log_probs, self.rejected),
            ref_chosen=at(reference, self.chosen),
            ref_rejected=at(reference, self.rejected),
            strength=numbers(self._strength),
            weight=numbers(self._weight),
            own=None if self.own is None else at(log_probs, self.own),
            ref_own=None if self.own is None else at(reference, self.own),
            num_own_tokens=None if self.own is None else numbers(self._own_tokens),
        )


def _moved(verdict: Verdict, places: Sequence[int]) -> Verdict:
    """A verdict on the answers at `places`, told on the candidates' own places."""
    comparisons = tuple(
        Comparison(
            first=places[c.first],
            second=places[c.second],
            prob_first=c.prob_first,
            orders=c.orders,
            reason=c.reason,
        )
        for c in verdict.comparisons
    )
    scores = None
    if verdict.scores is not None:
        by_place = {places[i]: score for i, score in enumerate(verdict.scores)}
        scores = tuple(by_place.get(place, math.nan) for place in range(max(places, default=-1) + 1))
    return Verdict(
        judge=verdict.judge,
        comparisons=comparisons,
        scores=scores,
        calls=verdict.calls,
        cached=verdict.cached,
        tokens=verdict.tokens,
    )


def _verdict(row: Mapping[str, Any]) -> Verdict:
    comparisons: list[Comparison] = []
    for found in row["comparisons"]:
        told: dict[str, Any] = {**found, "orders": None if found["orders"] is None else tuple(found["orders"])}
        comparisons.append(Comparison(**told))
    scores = row["scores"]
    if scores is not None:
        scores = tuple(math.nan if score is None else score for score in scores)
    values: dict[str, Any] = {**row, "comparisons": tuple(comparisons), "scores": scores}
    return Verdict(**values)
