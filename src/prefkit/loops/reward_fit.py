"""Fitting a text reward model to stored pairs: the task behind `reward`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.domains.text.metrics import agreed, in_order, spread, summarize_pairs
from prefkit.domains.text.packing import num_tokens, passes, scoring_passes
from prefkit.domains.text.prompts import group_of, plain
from prefkit.domains.text.reward import RewardModel
from prefkit.protocols import Metrics, Trackable
from prefkit.records import HeldOut, Pair
from prefkit.rewards.fit import accuracy, fit_step, mean_reward

MAX_REFERENCES = 512
"""chosen answers of the training data over which rewards are centred"""


class _Tracked:
    """A reward model as a checkpoint holds it."""

    def __init__(self, reward: RewardModel) -> None:
        self.model, self.tokenizer = reward.model, reward.tokenizer
        self.save, self.load = reward.save, reward.restore


@dataclass(kw_only=True)
class RewardTask:
    """Stored pairs and the Bradley-Terry loss of their rewards. See `protocols.Task`."""

    reward: RewardModel
    pairs: Sequence[Pair]
    test: Sequence[Pair]
    selection: Sequence[Pair]
    config: Any

    def __post_init__(self) -> None:
        self.num_rows = len(self.pairs)
        self.module: nn.Module = self.reward.module
        self.micro = self.config.per_device_train_batch_size

    def tracked(self) -> Mapping[str, Trackable]:
        return {"policy": _Tracked(self.reward)}

    def batches(self, step: int, rows: Sequence[int], first: int) -> Sequence[Sequence[Pair]]:
        pairs = [self.pairs[row] for row in rows]
        agree = self.reward.world.most if self.reward.world.in_step else None
        sizes = [num_tokens(pair.group) for pair in pairs]
        places = passes(sizes, rows=self.micro, budget=self.config.tokens_per_batch, agree=agree)
        return [[pairs[i] for i in piece] for piece in places]

    def compute(self, batch: Sequence[Pair]) -> tuple[Tensor, Metrics]:
        rewards = self.reward.rewards([pair.group for pair in batch])
        margins = [pair.source.margin for pair in batch]
        margin = None
        if any(value is not None for value in margins):
            margin = torch.tensor([value or 0.0 for value in margins], device=rewards.device)
        return fit_step(rewards[:, 0], rewards[:, 1], margin)

    def weight(self, batch: Sequence[Pair]) -> float:
        return float(len(batch))

    @torch.no_grad()
    def evaluate(self, *, selecting: bool = False) -> HeldOut:
        pairs = self.selection if selecting and self.selection else self.test
        mine = spread(self.reward.world, len(pairs)) if pairs else []
        rows: list[dict[str, Any]] = []
        sizes, budget = [num_tokens(pairs[i].group) for i in mine], self.config.tokens_per_batch
        for piece in scoring_passes(sizes, rows=2 * self.micro, budget=budget, agree=agreed(self.reward.world)):
            indices = [mine[place] for place in piece]
            rewards = self.reward.rewards([pairs[i].group for i in indices])
            difference = rewards[:, 0] - rewards[:, 1]
            right = accuracy(difference).tolist()
            for i, (chosen, rejected), hit in zip(indices, rewards.tolist(), right, strict=True):
                source = pairs[i].source
                rows.append(
                    {
                        "index": i,
                        "row": source.row,
                        "group": group_of(source),
                        "prompt": plain(source.prompt),
                        "reward_chosen": chosen,
                        "reward_rejected": rejected,
                        "margin": chosen - rejected,
                        "accuracy": hit,
                    }
                )
        rows = in_order(self.reward.world, rows)
        return HeldOut(metrics=summarize_pairs(rows), pairs=rows)

    @torch.no_grad()
    def finish(self) -> None:
        """Centre the rewards: chosen answers of the training data get mean 0."""
        chosen = [pair.group for pair in self.pairs[:MAX_REFERENCES]]
        pieces = [
            self.reward.rewards(chosen[start : start + 2 * self.micro])[:, 0].cpu()
            for start in range(0, len(chosen), 2 * self.micro)
        ]
        self.reward.centre(self.reward.mean + mean_reward(pieces))

    def save_final(self, directory: Path) -> Mapping[str, str | None]:
        return self.reward.save_final(directory)
