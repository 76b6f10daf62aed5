"""Which steps and training rows make up each round: pure functions of the options, so a resumed run needs no state.

With `steps_per_round` 0 the training rows are cut, in their order, into parts: `num_rounds` equal ones (the remainder
is left over) or of `prompts_per_round`. A round passes over its part and over those of `replay_rounds` before it; when
the parts are used up the first comes again. With a number of steps, rounds are that many steps long and take the rows
their batches need, epoch after epoch: 1 is fully on-policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prefkit.domains.text.batches import num_steps, process_slice, step_batches
from prefkit.domains.text.datasets import TextData
from prefkit.engine.seeds import number
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.records import Pair


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round: the steps it takes and the training rows that are new in it."""

    number: int
    """from 1"""
    first_step: int
    num_steps: int
    rows: tuple[int, ...]
    """training rows, by their place in it; in rounds of a few steps a row may come twice"""
    before: tuple[int, ...] = ()
    """earlier rounds whose items are trained on again"""
    offline: bool = False

    @property
    def last_step(self) -> int:
        return self.first_step + self.num_steps - 1


@dataclass(frozen=True, kw_only=True)
class RoundData:
    """Tokenized pairs, cut into rounds. See `loops.training.Prepared`: the rows of a step are items of its round."""

    data: TextData[Pair]
    size: int
    """processes"""

    @classmethod
    def of(cls, data: TextData[Pair]) -> RoundData:
        """The data as the processes of this launch see it."""
        return cls(data=data, size=World.start().size)

    @property
    def config(self) -> Any:
        return self.data.config

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    @property
    def part(self) -> int:
        """Training prompts of a round that passes over a part of the data."""
        return self.config.prompts_per_round or len(self.data.train) // self.config.num_rounds

    @property
    def left_over(self) -> int:
        """Training rows that no round takes."""
        return max(0, len(self.data.train) - self.part * self.config.num_rounds)

    def report(self) -> dict[str, Any]:
        return self.data.report()

    def describe(self) -> Sequence[str]:
        config = self.config
        if config.steps_per_round:
            every = "every step" if config.steps_per_round == 1 else f"every {config.steps_per_round} steps"
            return [*self.data.describe(), f"answers are drawn anew {every}"]
        over = f"; {self.left_over} rows are left over" if self.left_over else ""
        return [*self.data.describe(), f"{config.num_rounds} rounds of {self.part} prompts{over}"]

    def forecast(self) -> Sequence[str]:
        return self.data.forecast()

    @property
    def global_batch(self) -> int:
        return self.data.global_batch(self.size)

    @cached_property
    def rounds(self) -> Sequence[Round]:
        """All rounds, in order. Raises InputError where a part holds no row."""
        return self._by_steps() if self.config.steps_per_round else self._by_parts()

    def _by_parts(self) -> list[Round]:
        config, found, part, num_rows = self.config, list[Round](), self.part, len(self.data.train)
        if not 1 <= part <= num_rows:
            raise InputError(
                f"{num_rows} training rows cannot be cut into "
                + (f"rounds of {part}" if config.prompts_per_round else f"{config.num_rounds} rounds"),
                where="--prompts_per_round" if config.prompts_per_round else "--num_rounds",
                mend="ask for less, or give more rows",
            )
        first = 1
        while len(found) < config.num_rounds if config.max_steps < 1 else first <= config.max_steps:
            t = len(found) + 1
            before = tuple(range(max(1, t - config.replay_rounds), t))
            # Whole even where max_steps ends it early: a run that may grow later must find the same rounds.
            steps = num_steps(part * (1 + len(before)), epochs=config.num_train_epochs, global_batch=self.global_batch)
            start = (t - 1) % (num_rows // part) * part
            found.append(
                Round(
                    number=t,
                    first_step=first,
                    num_steps=steps,
                    rows=tuple(range(start, start + part)),
                    before=before,
                    offline=t <= config.offline_rounds,
                )
            )
            first += steps
        return found

    def _by_steps(self) -> list[Round]:
        config, total, found = self.config, self.data.total_steps(self.size), list[Round]()
        for first in range(1, total + 1, config.steps_per_round):
            steps = config.steps_per_round  # whole, as by parts: a run that may grow later must find the same rounds
            rows = [row for step in range(first, first + steps) for row in self.data.step_rows(step, self.size)]
            t = len(found) + 1
            before = tuple(range(max(1, t - config.replay_rounds), t))
            found.append(
                Round(
                    number=t,
                    first_step=first,
                    num_steps=steps,
                    rows=tuple(rows),
                    before=before,
                    offline=t <= config.offline_rounds,
                )
            )
        return found

    def round_of(self, step: int) -> Round:
        """The round that a step belongs to."""
        if self.config.steps_per_round:
            return self.rounds[(step - 1) // int(self.config.steps_per_round)]
        return next(one for one in self.rounds if step <= one.last_step)

    def step_items(self, step: int) -> list[int]:
        """The items of the round's pool (earlier rounds' items first) that a step trains on, over all processes."""
        one = self.round_of(step)
        local, pool = step - one.first_step + 1, self.pool_size(one)
        if self.config.steps_per_round and not one.before:  # the rows were chosen batch by batch
            return list(range((local - 1) * self.global_batch, local * self.global_batch))
        seed = number(self.config.seed, "round", one.number) % 2**31
        return step_batches(pool, step=local, global_batch=self.global_batch, seed=seed)

    def pool_size(self, one: Round) -> int:
        """Items that a round trains on: its own, and those of the rounds it replays."""
        by_number: Mapping[int, Round] = {other.number: other for other in self.rounds}
        return len(one.rows) + sum(len(by_number[t].rows) for t in one.before)

    def rows(self, step: int, rank: int, size: int) -> tuple[list[int], int]:
        mine = process_slice(self.step_items(step), rank=rank, size=size)
        return mine, rank * len(mine)

    def num_tokens(self, step: int, size: int) -> int:
        """Stored tokens behind a step's new items: their prompts, and where they take part the stored answers."""
        one, total = self.round_of(step), 0
        stored = one.offline or self.config.candidates != "own"
        for item in self.step_items(step):
            place = item - (self.pool_size(one) - len(one.rows))
            if place >= 0:
                pair = self.data.train[one.rows[place]]
                total += len(pair.prompt) + (len(pair.chosen) + len(pair.rejected) if stored else 0)
        return total

    def total_steps(self, size: int) -> int:
        return self.config.max_steps if self.config.max_steps > 0 else self.rounds[-1].last_step

    def steps_per_epoch(self, size: int) -> float:
        return self.data.steps_per_epoch(size)
