"""One batch of episodes, made: cuts, answers sampled behind them, and scores by reward, policy, reference and value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from prefkit.domains.text.episodes import EpisodeData
from prefkit.domains.text.generators import sampler_for
from prefkit.domains.text.packing import num_tokens, passes
from prefkit.domains.text.policy import TextPolicy, reference_policy
from prefkit.domains.text.resets import Offline, ResetSampler
from prefkit.domains.text.reward import RewardModel
from prefkit.domains.text.rollouts import Accounting, Rollout, group_of
from prefkit.domains.text.sampler import MAX_ROWS, Decoding, Sampler, end_tokens
from prefkit.engine.parts import dealt
from prefkit.engine.seeds import number
from prefkit.errors import InputError
from prefkit.protocols import Gold
from prefkit.records import Example, Group, Pair

T = TypeVar("T")
Unit = list[Rollout]
"""the answers to one prompt; they begin with the same forced tokens"""


class Values(Protocol):
    """What a value function offers: (b * K, t) value before each answer token."""

    def values(self, groups: Sequence[Group]) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class TokenReward:
    """A reward model that reads the policy's own tokens: nothing is written out and encoded again."""

    model: RewardModel
    batch_size: int

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        groups = [Group(rollout.prompt, [rollout.tokens[: rollout.end]]) for rollout in rollouts]
        order = sorted(range(len(groups)), key=lambda i: (num_tokens(groups[i]), i))
        found = [0.0] * len(groups)
        for start in range(0, len(order), self.batch_size):
            piece = order[start : start + self.batch_size]
            for i, score in zip(piece, self.model.rewards([groups[i] for i in piece])[:, 0].tolist(), strict=True):
                found[i] = score
        return found


@dataclass(frozen=True, kw_only=True)
class TextReward:
    """A reward that reads prompts and answers as text: any function, or a model with a tokenizer of its own."""

    score: Gold
    rows: Sequence[Pair] | Sequence[Example]
    """the training rows"""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        prompts = [self.rows[rollout.row].source.prompt for rollout in rollouts]
        return [float(score) for score in self.score(prompts, [rollout.text for rollout in rollouts])]


Scoring = Callable[[Sequence[Rollout]], Sequence[float]]


def scoring(reward: RewardModel | Gold, policy: TextPolicy, rows: Sequence[Any], *, batch_size: int) -> Scoring:
    """How rollouts are scored: in the policy's own tokens where the reward model reads them, else as text."""
    if not isinstance(reward, RewardModel):
        return TextReward(score=reward, rows=rows)
    same = reward.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    if same and reward.reads_last_token and not reward.made_elsewhere:
        return TokenReward(model=reward, batch_size=batch_size)
    return TextReward(score=reward.judge, rows=rows)


@dataclass(frozen=True, kw_only=True)
class RolloutMaker:
    """Makes batches of episodes."""

    policy: TextPolicy
    sampler: Sampler
    data: EpisodeData
    score: Scoring
    resets: ResetSampler | None
    value: Values | None
    accounting: Accounting
    config: Any

    @property
    def decoding(self) -> Decoding:
        found = Decoding.of(self.config)
        return replace(found, ignore_end=True) if self.accounting == "episode" else found

    def make(self, batch: int, *, progress: float) -> list[Rollout]:
        """The rollouts of a batch of episodes in order of place and index, on every process."""
        rows = self.data.prompts(batch)
        cuts = self._cuts(rows, batch, progress)
        size = max(1, MAX_ROWS // self.config.num_generations)
        pieces = [list(range(start, min(len(rows), start + size))) for start in range(0, len(rows), size)]
        self.sampler.refresh()
        found: list[Rollout] = []
        for piece in self._dealt(pieces):
            found += self._drawn(batch, piece, rows, cuts)
        found = self._rewarded(found)
        units = list(units_of(found))
        found = [rollout for unit in self._scored(units) for rollout in unit]
        by_place = {(rollout.place, rollout.index): rollout for rollout in self.policy.world.gather_objects(found)}
        return [by_place[key] for key in sorted(by_place)]

    def _cuts(self, rows: Sequence[int], batch: int, progress: float) -> list[tuple[int, ...]]:
        """The forced tokens of each place."""
        if self.resets is None or self.resets.prob == 0:
            return [()] * len(rows)
        offline = self._offline(rows, batch)
        limit = self.config.max_new_tokens
        return [
            tuple(answer.tokens[:count]) if answer is not None else ()
            for answer, count in zip(offline, self.resets.draw(offline, progress=progress, limit=limit), strict=True)
        ]

    def _offline(self, rows: Sequence[int], batch: int) -> list[Offline | None]:
        assert self.resets is not None
        if self.resets.source == "policy":
            return self._start_samples(rows, batch)
        ends, train = end_tokens(self.policy), self.data.data.train
        return [
            offline_answer(train[row], self.resets.source, number(self.config.seed, "side", batch, i), ends=ends)
            for i, row in enumerate(rows)
        ]

    def _start_samples(self, rows: Sequence[int], batch: int) -> list[Offline | None]:
        """The start model's own answers, drawn anew for each batch."""
        places = list(range(len(rows)))
        pieces = [places[start : start + MAX_ROWS] for start in range(0, len(places), MAX_ROWS)]
        found: list[tuple[int, Offline]] = []
        with reference_policy(self.policy) as start:
            sampler = sampler_for(start, self.config)
            for piece in self._dealt(pieces):
                drawn = sampler.sample(
                    [self._prompt(rows[i]) for i in piece],
                    num=1,
                    decoding=Decoding.of(self.config),
                    seed=self.config.seed,
                    path=("rollin", batch),
                    rows=piece,
                )
                found += [
                    (i, Offline(answers[0].tokens, answers[0].finished, rows[i]))
                    for i, answers in zip(piece, drawn, strict=True)
                ]
        by_place = dict(self.policy.world.gather_objects(found))
        return [by_place[i] for i in places]

    def _prompt(self, row: int) -> Sequence[int]:
        return self.data.data.train[row].prompt

    def _drawn(
        self, batch: int, places: Sequence[int], rows: Sequence[int], cuts: Sequence[tuple[int, ...]]
    ) -> list[Rollout]:
        samples = self.sampler.sample(
            [self._prompt(rows[i]) for i in places],
            num=self.config.num_generations,
            decoding=self.decoding,
            seed=self.config.seed,
            path=("rollout", batch),
            rows=places,
            prefixes=[cuts[i] for i in places],
        )
        ends = end_tokens(self.policy)

        def decode(tokens: Sequence[int]) -> str:
            return self.policy.tokenizer.decode(list(tokens), skip_special_tokens=True)

        return [
            Rollout.of(sample, place=place, row=rows[place], prefix=len(cuts[place]), ends=ends, decode=decode)
            for place, answers in zip(places, samples, strict=True)
            for sample in answers
        ]

    def _rewarded(self, rollouts: list[Rollout]) -> list[Rollout]:
        """With scores. InputError for a reward that gives another number of them, or one that is not finite."""
        scores = list(self.score(rollouts)) if rollouts else []
        if len(scores) != len(rollouts):
            raise InputError(
                f"the reward gave {len(scores)} scores for {len(rollouts)} answers",
                where="--reward",
                mend="it must give one number for each answer, in order",
            )
        for rollout, score in zip(rollouts, scores, strict=True):
            if not abs(score) < float("inf"):
                row = self.data.data.train[rollout.row].source.row
                raise InputError(
                    f"the reward of an answer is {score}",
                    where=f"{self.data.data.where(row)}, answer {rollout.text!r}",
                    mend="look at what the reward makes of this answer; training has not used it",
                )
        return [replace(rollout, score=float(score)) for rollout, score in zip(rollouts, scores, strict=True)]

    @torch.no_grad()
    def _scored(self, units: Sequence[Unit]) -> list[Unit]:
        """With log-probs under policy and reference, and values: what the updates are measured against."""
        groups = [group_of(unit, self.accounting) for unit in units]
        sizes = [num_tokens(group) for group in groups]
        order = sorted(range(len(units)), key=lambda i: (sizes[i], i))
        agree = self.policy.world.most if self.policy.world.in_step else None
        budget = max([self.config.tokens_per_batch, *sizes]) if self.config.tokens_per_batch else 0
        rows = self.config.per_device_train_batch_size
        found: dict[int, Unit] = {}
        pieces = passes([sizes[i] for i in order], rows=rows, budget=budget, agree=agree)
        if agree is not None:
            pieces += pieces[-1:] * (agree(len(pieces)) - len(pieces))
        for piece in pieces:
            part = [order[place] for place in piece]
            columns = self._columns([groups[i] for i in part])
            line = 0
            for i in part:
                found[i] = []
                for rollout in units[i]:
                    length = len(rollout.counted(self.accounting))
                    one, other, value = (column[line][:length] for column in columns)
                    found[i].append(rollout.scored_by(log_probs=one, reference=other, values=value))
                    line += 1
        return [found[i] for i in range(len(units))]

    def _columns(self, groups: Sequence[Group]) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
        """(log-probs, reference, values) token by token, a list for each answer."""
        heat = self.config.temperature
        own: list[list[float]] = self.policy.token_log_probs(groups, temperature=heat).tolist()
        nothing: list[list[float]] = [[] for _ in own]
        reference = nothing
        if self.config.kl_coef:
            reference = self.policy.reference_token_log_probs(groups, temperature=heat).tolist()
        values = nothing if self.value is None else self.value.values(groups).tolist()
        return own, reference, values

    def _dealt(self, pieces: list[T]) -> list[T]:
        """This process's pieces; where weights are sharded every process gets equally many."""
        world = self.policy.world
        if world.in_step and pieces:
            pieces = pieces + [pieces[-1]] * (-len(pieces) % world.size)
        return dealt(pieces, world)


def units_of(rollouts: Sequence[Rollout]) -> list[Unit]:
    """Rollouts by prompt, in order of places."""
    by_place: dict[int, Unit] = {}
    for rollout in rollouts:
        by_place.setdefault(rollout.place, []).append(rollout)
    return list(by_place.values())


def offline_answer(row: Pair | Example, source: str, drawn: int, *, ends: Sequence[int]) -> Offline:
    """The stored answer that a reset of this row's prompt may start from; `drawn` decides between two.

    It ends with its first end token: what follows one is the next turn of a conversation.
    """
    side = source if source != "both" else ("chosen", "rejected")[drawn % 2]
    if isinstance(row, Example):
        tokens, cut = row.completion, row.truncated
    elif side == "rejected":
        tokens, cut = row.rejected, row.rejected_truncated
    else:
        tokens, cut = row.chosen, row.chosen_truncated
    first = next((i + 1 for i, token in enumerate(tokens) if token in ends), 0)
    return Offline(tokens[:first] if first else tokens, bool(first) or not cut, row.source.row)
