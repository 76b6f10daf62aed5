"""Which prompts make up a batch of episodes, and which of them each optimizer step trains on: pure functions of the
options, so that a resumed run needs no state.

A batch of episodes has the prompts of `num_mini_batches` steps. It is passed over `num_ppo_epochs` times, in another
order each time, so it takes num_mini_batches x num_ppo_epochs steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from prefkit.domains.text.batches import num_steps, process_slice, step_batches
from prefkit.domains.text.datasets import TextData
from prefkit.engine.seeds import generator
from prefkit.engine.world import World


@dataclass(frozen=True, kw_only=True)
class EpisodeData:
    """Tokenized prompts with their offline answers, cut into batches of episodes. See `loops.training.Prepared`."""

    data: TextData[Any]
    size: int
    """processes"""

    @classmethod
    def of(cls, data: TextData[Any]) -> EpisodeData:
        """The data as the processes of this launch see it."""
        return cls(data=data, size=World.start().size)

    @property
    def config(self) -> Any:
        return self.data.config

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    @property
    def prompts_per_step(self) -> int:
        return self.data.global_batch(self.size)

    @property
    def prompts_per_batch(self) -> int:
        return self.prompts_per_step * self.config.num_mini_batches

    @property
    def steps_per_batch(self) -> int:
        return self.config.num_mini_batches * self.config.num_ppo_epochs

    @property
    def episodes_per_batch(self) -> int:
        return self.prompts_per_batch * self.config.num_generations

    def batch_of(self, step: int) -> tuple[int, int, int]:
        """(batch of episodes from 1, pass over it from 0, minibatch from 0) of a 1-based step."""
        batch, rest = divmod(step - 1, self.steps_per_batch)
        epoch, part = divmod(rest, self.config.num_mini_batches)
        return batch + 1, epoch, part

    def first_step(self, batch: int) -> int:
        return (batch - 1) * self.steps_per_batch + 1

    def prompts(self, batch: int) -> list[int]:
        """The training rows of a batch of episodes, in the order of their places."""
        size = self.prompts_per_batch
        return step_batches(len(self.data.train), step=batch, global_batch=size, seed=self.config.seed)

    def places(self, step: int) -> list[int]:
        """Places in its batch of episodes that a step trains on, over all processes."""
        batch, epoch, part = self.batch_of(step)
        order = _shuffled(self.config.seed, batch, epoch, self.prompts_per_batch)
        return list(order[part * self.prompts_per_step : (part + 1) * self.prompts_per_step])

    def report(self) -> dict[str, Any]:
        return self.data.report()

    def describe(self) -> Sequence[str]:
        config = self.config
        return [
            *self.data.describe(),
            f"batches of {self.episodes_per_batch} episodes ({self.prompts_per_batch} prompts), passed over "
            f"{config.num_ppo_epochs} times in {config.num_mini_batches} part(s)",
        ]

    def forecast(self) -> Sequence[str]:
        return self.data.forecast()

    def rows(self, step: int, rank: int, size: int) -> tuple[list[int], int]:
        mine = process_slice(self.places(step), rank=rank, size=size)
        return mine, rank * len(mine)

    def num_tokens(self, step: int, size: int) -> int:
        """Prompt tokens of the batch of episodes that a step begins; what is sampled is counted apart."""
        batch, epoch, part = self.batch_of(step)
        return 0 if epoch or part else sum(len(self.data.train[row].prompt) for row in self.prompts(batch))

    def total_steps(self, size: int) -> int:
        config = self.config
        if config.max_steps > 0:
            return config.max_steps
        batches = num_steps(len(self.data.train), epochs=config.num_train_epochs, global_batch=self.prompts_per_batch)
        if config.total_episodes:
            batches = max(1, config.total_episodes // self.episodes_per_batch)
        return batches * self.steps_per_batch

    def steps_per_epoch(self, size: int) -> float:
        return len(self.data.train) / self.prompts_per_batch * self.steps_per_batch


@lru_cache(maxsize=4)
def _shuffled(seed: int, batch: int, epoch: int, count: int) -> tuple[int, ...]:
    order = torch.randperm(count, generator=generator(seed, "minibatch", batch, epoch))
    return tuple(order.tolist())
