"""The hard-exploration bandit of SELM's theory: one prompt, eight answers, the best one rare; every mean is exact.

    π_ref = (0.6, six answers that share 0.4 - 1e-4, 1e-4)      gold r* = (0.3, evenly spaced -0.2 .. 0.4, 1.0)

Each round draws y₁ ~ π and y₂ ~ π_ref, labels the pair by Bradley-Terry with slope 5, keeps all pairs, fits

    r̂ = argmax over r in [-1, 1]⁸ of   mean log σ(r(y⁺) - r(y⁻))  +  α (β log Z(r) - E_ref r),   Z = E_ref exp(r/β)

and goes on with π = π_ref exp(r̂/β) / Z. The box is the R_max that the theory needs. The optimism term is convex in r,
so the fit has many local optima, and it matters who looks for them:

    local    projected gradient ascent from the last round's solution
    oracle   the same from the last solution and from the eight vertices (one answer at 1, the others at -1); the best

A batch runs over seeds, with the same random numbers for every α.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NUM_ARMS, BEST = 8, 7
BETA, LABEL_SLOPE = 0.05, 5.0
REFERENCE = torch.tensor([0.6, *[(0.4 - 1e-4) / 6] * 6, 1e-4], dtype=torch.float64)
LOG_REFERENCE = REFERENCE.log()
GOLD = torch.tensor([0.3, *torch.linspace(-0.2, 0.4, 6).tolist(), 1.0], dtype=torch.float64)

FIRST, SECOND = torch.triu_indices(NUM_ARMS, NUM_ARMS, 1)
DIFFERENCES = torch.eye(NUM_ARMS, dtype=torch.float64)[FIRST] - torch.eye(NUM_ARMS, dtype=torch.float64)[SECOND]
"""(28, 8): r @ DIFFERENCES.T holds r(first) - r(second) of every pair of answers"""
PLACE = torch.zeros(NUM_ARMS, NUM_ARMS, dtype=torch.long)
PLACE[FIRST, SECOND] = PLACE[SECOND, FIRST] = torch.arange(len(FIRST))
VERTICES = 2 * torch.eye(NUM_ARMS, dtype=torch.float64) - 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What each seed ended with, (seeds,) each."""

    found: Tensor
    """whether the rare answer was ever drawn"""
    gold: Tensor
    """E_π r*"""
    gap: Tensor
    """J(π*) - J(π) = β KL(π‖π*), J = E r* - β KL(·‖π_ref)"""


def optimal_log_policy(reward: Tensor) -> Tensor:
    """log of π_ref exp(r/β) / Z, (..., 8)."""
    return (LOG_REFERENCE + reward / BETA).log_softmax(-1)


def play(
    alpha: float,
    optimiser: Literal["local", "oracle"],
    *,
    num_labels: int = 120,
    num_seeds: int = 24,
    seed: int = 0,
    fit_slope: float = 1.0,
    num_steps: int = 60,
) -> Outcome:
    """Spend `num_labels` labels. `fit_slope` is that of the likelihood: 1 as in the paper's loss, 5 is the labels'."""
    draws = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_labels, 3, num_seeds, generator=draws, dtype=torch.float64)
    every = torch.arange(num_seeds)
    ahead, total = torch.zeros(2, num_seeds, 1, len(FIRST), dtype=torch.float64)
    reward = torch.zeros(num_seeds, 1, NUM_ARMS, dtype=torch.float64)
    found = torch.zeros(num_seeds, dtype=torch.bool)
    for label, (of_policy, of_reference, of_label) in enumerate(uniform):
        policy = optimal_log_policy(reward.squeeze(1)).exp()
        one, two = draw(policy, of_policy), draw(REFERENCE.expand_as(policy), of_reference)
        found |= (one == BEST) | (two == BEST)
        one_wins = of_label < torch.sigmoid(LABEL_SLOPE * (GOLD[one] - GOLD[two]))
        differ = (one != two).double()  # an answer against itself says nothing and is still paid for
        total[every, 0, PLACE[one, two]] += differ
        ahead[every, 0, PLACE[one, two]] += differ * (one_wins == (one < two))
        starts = reward
        if optimiser == "oracle":
            starts = torch.cat([reward, VERTICES.expand(num_seeds, -1, -1)], 1)
        shares = ahead / (label + 1), total / (label + 1)
        ends, values = climb(starts, *shares, alpha=alpha, slope=fit_slope, num_steps=num_steps)
        values[:, 0] += 1e-9  # of equals the last solution: nothing is gained by going elsewhere
        reward = ends[every, values.argmax(-1)].unsqueeze(1)
    log_policy = optimal_log_policy(reward.squeeze(1))
    policy = log_policy.exp()
    gap = BETA * (policy * (log_policy - optimal_log_policy(GOLD))).sum(-1)
    return Outcome(found=found, gold=policy @ GOLD, gap=gap)


def climb(
    reward: Tensor, ahead: Tensor, total: Tensor, *, alpha: float, slope: float, num_steps: int
) -> tuple[Tensor, Tensor]:
    """Projected gradient ascent from rewards (s, starts, 8): where it ends and the objective there.

    `ahead`, `total` (s, 1, 28): share of all labels on each pair, and of those that its first answer won. The step is
    the inverse of the likelihood's curvature; the convex rest can only add to the ascent, so no step goes down.
    """
    for _ in range(num_steps):
        pull = ahead - total * torch.sigmoid(slope * (reward @ DIFFERENCES.T))
        bonus = torch.softmax(LOG_REFERENCE + reward / BETA, -1) - REFERENCE
        reward = (reward + 2 / slope**2 * (slope * (pull @ DIFFERENCES) + alpha * bonus)).clamp(-1, 1)
    return reward, objective(reward, ahead, total, alpha=alpha, slope=slope)


def objective(reward: Tensor, ahead: Tensor, total: Tensor, *, alpha: float, slope: float) -> Tensor:
    """What the fit maximises, (s, starts)."""
    margin = slope * (reward @ DIFFERENCES.T)
    likelihood = ahead * margin + total * torch.nn.functional.logsigmoid(-margin)
    log_z = torch.logsumexp(LOG_REFERENCE + reward / BETA, -1)
    return likelihood.sum(-1) + alpha * (BETA * log_z - reward @ REFERENCE)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """One answer for each row of (s, 8) from its uniform number."""
    return (probs.cumsum(-1) < uniform.unsqueeze(-1)).sum(-1).clamp(max=NUM_ARMS - 1)
