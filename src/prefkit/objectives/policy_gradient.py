"""Policy gradients over tokens: the clipped surrogate, and the advantages of methods without a value function.

    ρ_t = exp(log π(y_t) - log π_old(y_t))        π_old: the policy that drew the rollout

    PPO         Σ_t max(-ρ_t A_t, -clip(ρ_t) A_t)         A_t from `value.gae` of `kl_penalty.token_rewards`
    GRPO        the same                                  A = `group_normalised` scores, on every token alike
    RLOO        max(-ρ A, -clip(ρ) A), ρ = Π_t ρ_t        A = `leave_one_out` scores, the sequence's KL inside them

Shapes: b rows of t tokens; the mask (b, t) is true on actions, the tokens that the policy chose: not on the prompt, on
a forced prefix or after the end-of-sequence token. What a tensor holds elsewhere, even NaN, enters neither value nor
gradient; NaN at an action stays NaN. Log-probabilities are in nats and at the temperature of the sampler.

Each loss is a sum per row, (b,). The mean over tokens is the caller's, who alone knows how many tokens the whole batch
has: a mean per micro-batch would weigh a token by its neighbours. Only `log_probs` carries gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefkit.objectives import divergence
from prefkit.objectives.kl_penalty import MAX_LOG_RATIO, log_ratio
from prefkit.objectives.value import counted


def clipped_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """Σ_t max(-ρ_t A_t, -clip(ρ_t, 1 - clip, 1 + clip_high) A_t), four times (b, t) -> (b,), to minimise.

    At ρ = 1 it is -Σ A_t, and its gradient is the policy gradient -Σ A_t ∇ log π(y_t).

    Args:
        clip_high: ε above 1 where it differs from the ε below; None is `clip`.
        dual_clip: c > 1: where A < 0 no token costs more than -c A, and beyond that it has no gradient. None, as in
            PPO, has no such bound.
        max_log_ratio: |log ρ| is cut there, so that ρ stays finite; a token beyond has no gradient. See
            `RatioSums.largest` for whether it ever is.

    Raises:
        ValueError: shapes that differ or are not (b, t), or a hyperparameter out of range.

    >>> new, old = torch.tensor([[-1.0, -1.0, -9.0]]), torch.tensor([[-1.0, -2.0, float("nan")]])
    >>> clipped_surrogate(new, old, torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[True, True, False]]))
    tensor([-3.4000])
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, or None for none; got {dual_clip}")
    _check(mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    low, high = _band(clip, clip_high)
    ratio = log_ratio(log_probs, old_log_probs, mask, bound=max_log_ratio).exp()
    gain = counted(advantages.detach(), mask)
    loss = torch.maximum(-ratio * gain, -ratio.clamp(low, high) * gain)
    if dual_clip is not None:
        loss = torch.where(gain < 0, torch.minimum(loss, -dual_clip * gain), loss)
    return loss.sum(-1)


def sequence_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Tensor:
    """`clipped_surrogate` of one action per row, the answer, whose ratio is Π_t ρ_t; (b, t), advantages (b,) -> (b,).

    A row without actions gives 0. The answer's log-ratio is a sum, and the clip is reached sooner the longer it is.

    Raises:
        ValueError: as `clipped_surrogate`; advantages that are not (b,).

    >>> new, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -1.1]])
    >>> sequence_surrogate(new, old, torch.tensor([2.0]), torch.ones(1, 2, dtype=torch.bool))
    tensor([-2.2103])
    """
    _check(mask, log_probs=log_probs, old_log_probs=old_log_probs)
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"advantages is {tuple(advantages.shape)}; it must be ({len(mask)},), one per row")
    total = log_ratio(log_probs, old_log_probs, mask).sum(-1, keepdim=True)
    return clipped_surrogate(
        total,
        torch.zeros_like(total),
        advantages.unsqueeze(-1),
        mask.bool().any(-1, keepdim=True),
        clip=clip,
        clip_high=clip_high,
        dual_clip=dual_clip,
        max_log_ratio=max_log_ratio,
    )


@dataclass(frozen=True, kw_only=True)
class RatioSums:
    """What the ratios say of an update, per row, (b,) each and without gradient.

    All but `largest` add up over rows, micro-batches and processes; divide by `tokens`, once.
    """

    tokens: Tensor
    """actions"""
    ratio: Tensor
    """Σ ρ"""
    approx_kl: Tensor
    """Σ (ρ - 1 - log ρ): KL(π_old‖π) per token, never negative"""
    clipped: Tensor
    """tokens whose gradient the clip took away"""
    largest: Tensor
    """max |log ρ| before it is cut; 0 of no action"""


@torch.no_grad()
def ratio_sums(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    max_log_ratio: float = MAX_LOG_RATIO,
) -> RatioSums:
    """Statistics of the `clipped_surrogate` with these arguments, four times (b, t).

    For a `sequence_surrogate` hand `reduce.sum_tokens` of the log-probabilities as (b, 1).

    >>> new, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -2.0]])
    >>> sums = ratio_sums(new, old, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    >>> sums.ratio, sums.approx_kl, sums.clipped
    (tensor([3.7183]), tensor([0.7183]), tensor([1]))
    """
    _check(mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    low, high = _band(clip, clip_high)
    uncut = log_ratio(log_probs, old_log_probs, mask)
    cut = uncut.clamp(-max_log_ratio, max_log_ratio)
    gain, ratio = counted(advantages, mask), cut.exp()
    out = ((gain > 0) & (ratio > high)) | ((gain < 0) & (ratio < low))
    return RatioSums(
        tokens=mask.bool().sum(-1),
        ratio=counted(ratio, mask).sum(-1),
        approx_kl=(torch.expm1(cut) - cut).sum(-1),
        clipped=out.sum(-1),
        largest=uncut.abs().amax(-1),
    )


def leave_one_out(scores: Tensor, groups: Tensor | None = None) -> Tensor:
    """Each score minus the mean of the others of its group, without gradient: RLOO's advantages, same shape out.

    Args:
        scores: (n, k), k answers to each of n prompts; or (b,) with `groups`.
        groups: (b,) whole numbers, equal for answers to one prompt, for groups of unequal size.

    Raises:
        ValueError: a wrong shape, or a group of one, which has no others.

    >>> leave_one_out(torch.tensor([3.0, 1.0, 2.0, 5.0, 6.0]), torch.tensor([0, 0, 0, 7, 7]))
    tensor([ 1.5000, -1.5000,  0.0000, -1.0000,  1.0000])
    """
    scores = scores.detach()
    if groups is None:
        if scores.dim() != 2:
            raise ValueError(f"scores must be (n, k), or (b,) with groups; got {tuple(scores.shape)}")
        return divergence.leave_one_out(scores)
    if scores.dim() != 1 or groups.shape != scores.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and groups {tuple(groups.shape)} must be one (b,)")
    same = groups.unsqueeze(0) == groups.unsqueeze(1)
    others = same.sum(-1) - 1
    if bool((others == 0).any()):
        raise ValueError("a group has one answer: leaving one out needs 2 or more")
    # differences before the sum: equal scores give exactly 0
    return torch.where(same, scores.unsqueeze(1) - scores.unsqueeze(0), 0.0).sum(-1) / others


def group_normalised(scores: Tensor, *, scale: bool, eps: float = 1e-4) -> Tensor:
    """Each score minus its group's mean, (n, k) -> (n, k), without gradient: GRPO's advantages.

    Args:
        scale: divide by the group's standard deviation (k - 1 in its denominator, as in TRL) plus `eps`. It gives
            prompts that are almost always or almost never solved more weight; off, it is Dr. GRPO's advantage.
        eps: in the unit of the scores, so that a group of nearly equal scores is not blown up.

    Raises:
        ValueError: scores that are not (n, k) with k ≥ 2.

    >>> group_normalised(torch.tensor([[3.0, 1.0, 2.0]]), scale=True)
    tensor([[ 0.9999, -0.9999,  0.0000]])
    """
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must be (n, k) with k of 2 or more; got {tuple(scores.shape)}")
    # from the first score on: equal scores give exactly 0, whatever their size
    scores = scores.detach() - scores.detach()[:, :1]
    centred = scores - scores.mean(-1, keepdim=True)
    return centred / (centred.std(-1, keepdim=True) + eps) if scale else centred


def _band(clip: float, clip_high: float | None) -> tuple[float, float]:
    high = clip if clip_high is None else clip_high
    if not (0 < clip < 1 and high > 0):
        raise ValueError(f"clip must lie in (0, 1) and clip_high above 0; got {clip} and {clip_high}")
    return 1 - clip, 1 + high


def _check(mask: Tensor, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.dim() != 2 or value.shape != mask.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, mask {tuple(mask.shape)}; both must be one (b, t)")
