"""Fitting rewards to preferences, whatever produces the rewards: losses, metrics and centring."""

from __future__ import annotations

import torch
from torch import Tensor

from prefkit.objectives.margin import bradley_terry


def fit_step(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry losses (b,) and per-pair metrics without gradient, from rewards (b,).

    margin (b,): how much further apart a pair should lie, in reward units.
    """
    losses = bradley_terry(chosen, rejected, 0.0 if margin is None else margin)
    difference = (chosen - rejected).detach()
    return losses, {
        "rewards/chosen": chosen.detach(),
        "rewards/rejected": rejected.detach(),
        "rewards/margins": difference,
        "rewards/accuracies": accuracy(difference),
    }


def accuracy(difference: Tensor) -> Tensor:
    """1 where the chosen item is ahead, 0.5 for a tie, else 0."""
    return (difference > 0).float() + 0.5 * (difference == 0)


def mean_reward(rewards: list[Tensor]) -> float:
    """Mean over all reference answers; subtracting it makes 0 mean 'as good as a reference'."""
    return float(torch.cat(rewards).double().mean())
