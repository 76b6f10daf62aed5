"""Losses of a margin between two scores: convex, one number per pair, small when the better answer is ahead.

Two margins appear, and they differ by the temperature:

    gap  d = [log π(y⁺) - log π_ref(y⁺)] - [log π(y⁻) - log π_ref(y⁻)]     in nats
    h    h = β d, or a difference of two rewards                           no unit

    logistic        -log σ(h)                              DPO, Bradley-Terry
    soft logistic   -p log σ(h) - (1-p) log σ(-h)          p = probability that the first answer is better
    hinge           max(0, 1 - h)
    squared         (d - 1/(2β))²                          IPO

Every function takes tensors of any one shape and returns that shape; nothing is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Logistic:
    """-log σ(βd), the loss of DPO; the only kind with label smoothing."""


@dataclass(frozen=True)
class Ipo:
    """(d - 1/(2β))²: the gap is drawn to a finite target. β is IPO's τ."""


@dataclass(frozen=True)
class Hinge:
    """max(0, 1 - βd): pairs with a wide enough margin give no gradient."""


Kind = Logistic | Ipo | Hinge

# By the name that TRL's `loss_type` gives each.
KINDS: dict[str, Kind] = {"sigmoid": Logistic(), "ipo": Ipo(), "hinge": Hinge()}


def logistic(h: Tensor) -> Tensor:
    """-log σ(h); any shape, same shape out.

    >>> logistic(torch.tensor([0.0, 2.0]))
    tensor([0.6931, 0.1269])
    """
    return -logsigmoid(h)


def soft_logistic(h: Tensor, prob_first: Tensor | float) -> Tensor:
    """Cross-entropy between the label `prob_first` in [0, 1] and σ(h), shaped like h.

    It is least, the entropy of the label, where σ(h) equals the label. No gradient flows into the label.

    >>> soft_logistic(torch.tensor([0.0, 2.0]), 0.9)
    tensor([0.6931, 0.3269])
    """
    p = prob_first.detach() if isinstance(prob_first, Tensor) else prob_first
    return -p * logsigmoid(h) - (1 - p) * logsigmoid(-h)


def hinge(h: Tensor) -> Tensor:
    """max(0, 1 - h); any shape, same shape out.

    >>> hinge(torch.tensor([-1.0, 0.25, 3.0]))
    tensor([2.0000, 0.7500, 0.0000])
    """
    return torch.relu(1 - h)


def squared(gap: Tensor, *, beta: float) -> Tensor:
    """(gap - 1/(2 beta))², the gap in nats, summed over tokens.

    >>> squared(torch.tensor([0.0, 5.0]), beta=0.1)
    tensor([25.,  0.])
    """
    return (gap - 1 / (2 * beta)) ** 2


def pairwise(gap: Tensor, *, kind: Kind, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The loss `kind` of a gap between two log-ratios; any shape, same shape out.

    Args:
        gap: log-ratio of the chosen answer minus that of the rejected one, in nats.
        beta: temperature of the implicit reward, > 0.
        label_smoothing: probability in [0, 0.5) that the label is wrong (cDPO), for `Logistic` alone.

    Raises:
        ValueError: a value out of range, or label smoothing with another kind.

    >>> pairwise(torch.tensor([10.0]), kind=Logistic(), beta=0.1, label_smoothing=0.1)
    tensor([0.4133])
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing, the chance of a wrong label, lies in [0, 0.5); got {label_smoothing}")
    if label_smoothing and not isinstance(kind, Logistic):
        raise ValueError(
            f"label_smoothing needs Logistic(), got {kind}: a smoothed label is a probability, and only the "
            "logistic loss is its likelihood (on a hinge or a square it would merely move the target)"
        )
    match kind:
        case Logistic():
            h = beta * gap
            return soft_logistic(h, 1 - label_smoothing) if label_smoothing else logistic(h)
        case Ipo():
            return squared(gap, beta=beta)
        case Hinge():
            return hinge(beta * gap)


def bradley_terry(chosen_reward: Tensor, rejected_reward: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log σ(r⁺ - r⁻ - margin) for rewards of one shape; `margin` asks clearer pairs to lie further apart.

    >>> bradley_terry(torch.tensor([2.0]), torch.tensor([0.0]))
    tensor([0.1269])
    """
    return logistic(chosen_reward - rejected_reward - margin)
