"""Advantages, the value function's loss and whitening, for one reward at every token.

    δ_t = r_t + γ V_{t+1} - V_t          A_t = δ_t + γ λ A_{t+1}          return_t = A_t + V_t

where V_{t+1} and A_{t+1} are 0 if token t+1 is no action. So there is no bootstrap past an answer's last token, and
what stands after the end-of-sequence token, in a prompt, in a forced prefix or in another row enters nothing.

Shapes: b rows of t tokens. V_t is the value of the state *before* token t. A mask (b, t) is true on the tokens that
count; what else a tensor holds, even NaN, enters neither value nor gradient. Results are in float32 or better.

What the mask says is the caller's: `continuation` accounting of DR-PO has it true from the cut to the end of the
sequence, `episode` accounting (the released code's) on every position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def counted(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is true, else 0; same shape, float32 or better.

    >>> counted(torch.tensor([[2.0, float("nan")]]), torch.tensor([[True, False]]))
    tensor([[2., 0.]])
    """
    if values.shape != mask.shape:
        raise ValueError(f"values {tuple(values.shape)} and mask {tuple(mask.shape)} must have one shape")
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.where(mask.bool(), wide, wide.new_zeros(()))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns, three times (b, t) -> (b, t) and (b, t), without gradient; 0 off the mask.

    Each unbroken run of the mask is an episode of its own. λ = γ = 1 gives the rewards to go minus V.

    Raises:
        ValueError: shapes that differ or are not (b, t); gamma or lam outside [0, 1].

    >>> rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.25, 9.0]])
    >>> gae(rewards, values, torch.tensor([[True, True, False]]), lam=0.5)
    (tensor([[0.1250, 0.7500, 0.0000]]), tensor([[0.6250, 1.0000, 0.0000]]))
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam lie in [0, 1]; got {gamma} and {lam}")
    _check(mask, rewards=rewards, values=values)
    reward, value = counted(rewards.detach(), mask), counted(values.detach(), mask)
    # one (t, b) tensor each, a row to a step; after the last token there is nothing
    steps = zip(reward.T.flip(0), value.T.flip(0), mask.T.bool().flip(0), strict=True)
    nothing = value.new_zeros(len(value))
    next_value = next_advantage = nothing
    advantages: list[Tensor] = []
    for r, v, acts in steps:
        delta = r + gamma * next_value - v
        next_advantage = torch.where(acts, delta + gamma * lam * next_advantage, nothing)
        next_value = v
        advantages.append(next_advantage)
    advantage = torch.stack(advantages[::-1], 1) if advantages else torch.zeros_like(value)
    return advantage, advantage + value


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> Tensor:
    """½ max((V - R)², (V_old + clip(V - V_old, ±clip) - R)²), summed over the mask, four times (b, t) -> (b,).

    Only `values` carries gradient. It is 0 where V has left the band around the rollout's value and the clipped
    value is the worse of the two. None clips nothing: half the squared error.

    Raises:
        ValueError: shapes that differ or are not (b, t); a clip that is not above 0.

    >>> row = [torch.tensor([[x]]) for x in (1.0, 0.5, 2.0)]
    >>> clipped_value_loss(*row, torch.tensor([[True]]))
    tensor([0.8450])
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, or None for none; got {clip}")
    _check(mask, values=values, old_values=old_values, returns=returns)
    value, old, target = counted(values, mask), counted(old_values.detach(), mask), counted(returns.detach(), mask)
    loss = (value - target) ** 2
    if clip is not None:
        loss = torch.maximum(loss, (old + (value - old).clamp(-clip, clip) - target) ** 2)
    return loss.sum(-1) / 2


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares over the mask, any shape -> (3,) in float64, without gradient.

    They add: over micro-batches, over processes and over time.

    >>> moments(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor([ 2.,  4., 10.], dtype=torch.float64)
    """
    wide = counted(x.detach().double(), mask)
    return torch.stack([mask.bool().sum().double(), wide.sum(), (wide * wide).sum()])


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of what `moments` counted, (3,) -> two numbers in float64; 0 and 0 of nothing.

    >>> mean_and_variance(torch.tensor([2.0, 4.0, 10.0], dtype=torch.float64))
    (tensor(2., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    count, total, squares = moments.double()
    mean = total / count.clamp(min=1)
    return mean, (squares / count.clamp(min=1) - mean * mean).clamp(min=0)


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    keep_mean: bool = False,
    eps: float = 1e-8,
    mean: Tensor | float | None = None,
    var: Tensor | float | None = None,
) -> Tensor:
    """(x - mean) / √(var + eps) over the mask, any shape, same shape out, without gradient; 0 off the mask.

    The variance is the biased one, so one element gives 0, and no element gives zeros.

    Args:
        keep_mean: add the mean again, as is done to rewards. Every token then gains mean · (1 - 1/σ): a bonus or a
            penalty on length.
        mean, var: those of more than this tensor, for one whitening over micro-batches and processes:
            `mean_and_variance` of summed `moments`. Both or neither.

    Raises:
        ValueError: shapes differ, or one of mean and var alone.

    >>> whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    if mean is None and var is None:
        mean, var = mean_and_variance(moments(x, mask))
    if mean is None or var is None:
        raise ValueError("mean and var go together: hand both, or neither to have them taken from x")
    white = (counted(x.detach(), mask) - mean) * (var + eps) ** -0.5
    return counted(white + mean if keep_mean else white, mask)


def unit_scale(scores: Tensor, moments: Tensor) -> Tensor:
    """Scores divided by the standard deviation in `moments`, any shape; unchanged while that is 0.

    With the `moments` of all scores so far, summed, this is running reward scaling; the mean stays.

    >>> unit_scale(torch.tensor([3.0, 6.0]), torch.tensor([2.0, 0.0, 18.0]))
    tensor([1., 2.])
    """
    _, var = mean_and_variance(moments)
    return scores / torch.where(_varies(moments), var, torch.ones_like(var)).sqrt().to(scores.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the mask, two times (b, t) -> one number in float64, without gradient.

    1 is a perfect value function, 0 a constant one, below 0 a worse one; NaN where the returns do not vary. Over
    several processes take the ratio of the variances in the summed `moments` of R - V and of R.

    >>> every = torch.ones(1, 2, dtype=torch.bool)
    >>> explained_variance(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]]), every)
    tensor(0.7500, dtype=torch.float64)
    """
    _check(mask, values=values, returns=returns)
    of_returns = moments(returns, mask)
    (_, total), (_, left) = mean_and_variance(of_returns), mean_and_variance(moments(returns - values, mask))
    return torch.where(_varies(of_returns), 1 - left / total, math.nan)


def _varies(moments: Tensor) -> Tensor:
    """Whether the variance is more than rounding of the squares it is a difference of."""
    mean, var = mean_and_variance(moments)
    return var > 1e-12 * (mean * mean + var)


def _check(mask: Tensor, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.dim() != 2 or value.shape != mask.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, mask {tuple(mask.shape)}; both must be one (b, t)")
