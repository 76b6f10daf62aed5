"""The KL to the reference in reinforcement learning: as a reward at every token, or as a loss beside the surrogate.

    reward      r_t = -c (log π(y_t) - log π_ref(y_t)), plus the answer's score at its last action
    loss        c Σ_t k(log π(y_t) - log π_ref(y_t)),   k one of three estimators

Shapes and masks are those of `policy_gradient`: b rows of t tokens, a mask (b, t) that is true on actions, and what
stands elsewhere, even NaN, enters neither value nor gradient. Log-probabilities are in nats.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from prefkit.objectives.value import counted

KlKind = Literal["k1", "k2", "k3"]
MAX_LOG_RATIO = 20.0


def log_ratio(log_probs: Tensor, other: Tensor, mask: Tensor, *, bound: float = math.inf) -> Tensor:
    """log_probs - other at actions, within ±bound, else 0, two times (b, t) -> (b, t); no gradient into `other`.

    Raises:
        ValueError: shapes that differ or are not (b, t); a bound that is not above 0.

    >>> new, old = torch.tensor([[-1.0, -30.0]]), torch.tensor([[-1.5, -1.0]])
    >>> log_ratio(new, old, torch.ones(1, 2, dtype=torch.bool), bound=20.0)
    tensor([[  0.5000, -20.0000]])
    """
    if not bound > 0:
        raise ValueError(f"the bound of a log-ratio must be above 0, got {bound}")
    _check(mask, log_probs=log_probs, other=other)
    return (counted(log_probs, mask) - counted(other.detach(), mask)).clamp(-bound, bound)


def kl_reward(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, *, coefficient: float) -> Tensor:
    """-c (log π - log π_ref) at each action, 0 elsewhere, two times (b, t) -> (b, t), without gradient.

    `log_probs` are the rollout's, not those of a later epoch. Summed to go by `value.gae` this has the gradient of
    c KL(π‖π_ref) of the whole answer (`divergence`'s rtg); the loss below has not.

    >>> new, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    >>> kl_reward(new, ref, torch.ones(1, 2, dtype=torch.bool), coefficient=0.1)
    tensor([[-0.0500,  0.1000]])
    """
    return -coefficient * log_ratio(log_probs.detach(), ref_log_probs, mask)


def kl_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    *,
    kind: KlKind = "k3",
    old_log_probs: Tensor | None = None,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """KL to the reference as a loss, summed over actions, two times (b, t) -> (b,); the coefficient is the caller's.

        k1   d = log π - log π_ref        k2   d²/2        k3   e^-d - 1 + d

    Right for the KL of the next-token distributions in the states that were sampled (not of the whole answer, which
    also depends on which states come: `divergence.BIASED["token_local"]`) is d ∇ log π, in the mean over π:

        without old_log_probs    k2 has it, for fresh samples. k3, GRPO's, has the gradient of the *forward* KL;
                                 k1 has mean zero and is refused
        with old_log_probs       each entry is weighted by ρ: k1 and k3, whose ρ carries gradient, and k2, whose ρ
                                 does not, have it, also for samples of π_old

    Args:
        max_log_ratio: bounds |log ρ|, and for k3 |d|; a token beyond has no gradient.

    Raises:
        ValueError: shapes that differ or are not (b, t), an unknown kind, or k1 without old_log_probs.

    >>> new, ref = torch.tensor([[-1.0]]), torch.tensor([[-2.0]])
    >>> torch.cat([kl_loss(new, ref, torch.tensor([[True]]), kind=k, old_log_probs=new) for k in ("k1", "k2", "k3")])
    tensor([1.0000, 0.5000, 0.3679])
    """
    if kind not in get_args(KlKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(KlKind))}; got {kind!r}")
    if kind == "k1" and old_log_probs is None:
        raise ValueError("k1 as a loss needs old_log_probs: alone its gradient has mean zero; take k2, or kl_reward")
    d = log_ratio(log_probs, ref_log_probs, mask, bound=max_log_ratio if kind == "k3" else math.inf)
    value = d if kind == "k1" else d * d / 2 if kind == "k2" else torch.expm1(-d) + d
    if old_log_probs is None:
        return value.sum(-1)
    ratio = log_ratio(log_probs, old_log_probs, mask, bound=max_log_ratio).exp()
    return ((ratio.detach() if kind == "k2" else ratio) * value).sum(-1)


def last_action(mask: Tensor) -> Tensor:
    """Index of each row's last action, (b, t) -> (b,): the end-of-sequence token if there is one; 0 of no action.

    >>> last_action(torch.tensor([[False, True, True, False]]))
    tensor([2])
    """
    places = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask.bool(), places, 0).amax(-1)


def token_rewards(kl: Tensor, scores: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    """`kl_reward` (b, t) plus each row's score (b,) at its token `ends` (b,) -> (b, t), without gradient.

    Args:
        ends: `last_action` of the mask; where the mask goes on after the end-of-sequence token, that token's index.

    Raises:
        ValueError: a wrong shape, or an end that is no action. A row without actions may end anywhere; it gets 0.

    >>> kl = torch.tensor([[-0.1, 0.2, 0.0]])
    >>> token_rewards(kl, torch.tensor([1.0]), torch.tensor([1]), torch.tensor([[True, True, False]]))
    tensor([[-0.1000,  1.2000,  0.0000]])
    """
    _check(mask, kl=kl)
    if scores.shape != mask.shape[:1] or ends.shape != mask.shape[:1]:
        raise ValueError(f"scores {tuple(scores.shape)} and ends {tuple(ends.shape)} must be ({len(mask)},)")
    acts = mask.bool()
    here = acts & (torch.arange(acts.shape[1], device=ends.device) == ends.unsqueeze(-1))
    if bool((here.any(-1) != acts.any(-1)).any()):
        raise ValueError("a score would fall on a token that is no action: ends must lie in the mask")
    reward = counted(kl.detach(), mask)
    return torch.where(here, reward + scores.detach().unsqueeze(-1), reward)


def adaptive_coefficient(coefficient: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """The KL coefficient after `episodes` more answers: c (1 + clip(kl / target - 1, ±0.2) episodes / horizon).

    Args:
        kl: mean over answers of the KL *summed* over their actions, in nats; so is `target`.
        horizon: episodes within which the coefficient changes by 20 % of itself at most.

    Raises:
        ValueError: a target or horizon that is not above 0, a negative coefficient, or a kl that is not finite.

    >>> round(adaptive_coefficient(0.15, 12.0, target=6.0, horizon=10_000, episodes=512), 6)
    0.151536
    """
    if not (target > 0 and horizon > 0 and coefficient >= 0 and math.isfinite(kl)):
        raise ValueError(
            f"target and horizon must be above 0, coefficient 0 or more and kl finite; got {target}, {horizon}, "
            f"{coefficient} and {kl}"
        )
    return coefficient * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


def _check(mask: Tensor, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.dim() != 2 or value.shape != mask.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, mask {tuple(mask.shape)}; both must be one (b, t)")
