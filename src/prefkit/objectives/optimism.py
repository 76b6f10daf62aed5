"""Optimism for preference learning: DPO that is paid for moving away from what the reference would answer.

Both losses add a term that pushes one answer's likelihood *down*, which looks wrong and is right. For SELM, with
ŷ drawn from π_ref, the term is a KL with a minus sign:

    SELM   -log σ(m) + α β (log π(ŷ) - log π_ref(ŷ))          E over ŷ ~ π_ref:  L_DPO - α β KL(π_ref‖π)
    XPO    -log σ(m) + α log π(ỹ)                             ỹ ~ π_ref; α stands alone

m = β · `preference.gap`. The coefficient of SELM is α β (arXiv 2405.19332, eq. 4.2; its Algorithm 1 prints α alone),
that of XPO is α (arXiv 2405.21046): with the same answer and α_XPO = α_SELM β the gradients are equal.

Coefficients of the gradient, s = σ(-m):

    answer      log π(y⁺)          log π(y⁻)          log π(ŷ)
    SELM        -β s               +β s               +α β           whatever ŷ's rank and the margin
    ŷ = y⁺      -β (s - α)         +β s                              zero at m = log((1 - α)/α)
    ŷ = y⁻      -β s               +β (s + α)

Log-probabilities are summed over the answer's tokens, in nats; b pairs with one ŷ each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefkit.objectives.preference import dpo_loss, gap

__all__ = ["bounded_log_ratio", "optimism_share", "selm_loss", "xpo_loss"]


def selm_loss(
    chosen: Tensor,
    rejected: Tensor,
    own: Tensor | None,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    ref_own: Tensor | None,
    *,
    beta: float,
    alpha: float,
    max_log_ratio: float | None = None,
) -> Tensor:
    """SELM: DPO plus alpha · beta · (own - ref_own), six times (b,) -> (b,).

    With alpha 0 this *is* `dpo_loss`, bit for bit, and `own` may be None. With alpha above 0 it has no lower bound:
    an answer in no pair may be sent to probability 0 and pays without end. `max_log_ratio` bounds it.

    Args:
        own, ref_own: log π and log π_ref of one answer ŷ to each pair's prompt. It may be the chosen or the rejected
            one; then hand that very tensor, and the gradient adds up.
        alpha: α ≥ 0, weight of the optimism relative to β.
        max_log_ratio: M > 0 in nats: an answer already M below the reference is pushed no further, and the loss is
            then at least -α β M. None, as in the paper, has no bound.

    Raises:
        ValueError: as `dpo_loss`; alpha below 0; own missing or of another shape; max_log_ratio not above 0.

    >>> pair = [torch.tensor([x]) for x in (-9.0, -16.0, -3.0, -10.0, -15.0, -4.0)]
    >>> selm_loss(*pair, beta=0.5, alpha=0.1)
    tensor([0.3633])
    """
    offline = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    if not _acts(alpha):
        return offline
    if own is None or ref_own is None:
        raise ValueError("alpha above 0 needs own and ref_own: optimism is about an own answer")
    _check(offline, own=own, ref_own=ref_own)
    return offline + alpha * beta * bounded_log_ratio(own, ref_own, max_log_ratio=max_log_ratio)


def xpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_sample: Tensor | None,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    alpha: float,
    reference_of_sample: Tensor | None = None,
    max_log_ratio: float | None = None,
) -> Tensor:
    """XPO: DPO plus alpha · log π(ỹ), ỹ drawn from the reference; all (b,) -> (b,). alpha is *not* times beta.

    With alpha 0 this is `dpo_loss`, bit for bit, and `ref_sample` may be None.

    Args:
        ref_sample: log π, with gradient, of ỹ. It is the policy's log-probability of the reference's answer.
        alpha: α ≥ 0, per nat.
        reference_of_sample: log π_ref of ỹ, (b,). Only the bound needs it; the gradient does not.
        max_log_ratio: as in `selm_loss`; the loss is then at least α (log π_ref(ỹ) - M).

    Raises:
        ValueError: as `selm_loss`; max_log_ratio without reference_of_sample.

    >>> pair = [torch.tensor([x]) for x in (-9.0, -16.0, -3.0, -10.0, -15.0)]
    >>> xpo_loss(*pair, beta=0.5, alpha=0.05)
    tensor([0.1633])
    """
    offline = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    if not _acts(alpha):
        return offline
    if ref_sample is None:
        raise ValueError("alpha above 0 needs ref_sample: optimism is about an answer of the reference")
    _check(offline, ref_sample=ref_sample)
    if max_log_ratio is None:
        return offline + alpha * ref_sample
    if reference_of_sample is None:
        raise ValueError("max_log_ratio needs reference_of_sample: it bounds log π(ỹ) - log π_ref(ỹ)")
    _check(offline, reference_of_sample=reference_of_sample)
    ratio = bounded_log_ratio(ref_sample, reference_of_sample, max_log_ratio=max_log_ratio)
    return offline + alpha * (reference_of_sample.detach() + ratio)


def bounded_log_ratio(own: Tensor, ref_own: Tensor, *, max_log_ratio: float | None = None) -> Tensor:
    """log π - log π_ref of one answer, at least -max_log_ratio; the gradient is zero below. Any shape, same out.

    The bound takes the push away, it does not pull back: shared weights and momentum may carry the answer further.
    NaN stays NaN.

    >>> bounded_log_ratio(torch.tensor([-3.0, -90.0]), torch.tensor([-4.0, -4.0]), max_log_ratio=50.0)
    tensor([  1., -50.])
    """
    ratio = own - ref_own.detach()
    if max_log_ratio is None:
        return ratio
    if not max_log_ratio > 0:
        raise ValueError(f"max_log_ratio must be above 0, or None for no bound; got {max_log_ratio}")
    return ratio.clamp(min=-max_log_ratio)


def optimism_share(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float, alpha: float
) -> Tensor:
    """Share (b,) in [0, 1] of SELM's optimism in the sizes of the gradient's coefficients, without gradient.

    The three coefficients are β s, β s and α β, so the share is α / (α + 2 s), s = σ(-m): α / (1 + α) at the start,
    more for pairs already apart. It is free of charge and leaves out how long the answers are and how far their
    gradients agree; the share of the gradient's norm takes two backward passes. For XPO hand alpha / beta.

    Raises:
        ValueError: a shape that is not (b,), beta ≤ 0, alpha below 0.

    >>> start = torch.tensor([-10.0])
    >>> optimism_share(start, start, start, start, beta=0.1, alpha=0.25)
    tensor([0.2000])
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    pull = 2 * torch.sigmoid(-beta * gap(chosen, rejected, ref_chosen, ref_rejected).detach())
    return alpha / (alpha + pull) if _acts(alpha) else torch.zeros_like(pull)


def _acts(alpha: float) -> bool:
    """Whether there is a term at all. NaN and negative weights, which would be pessimism, are refused."""
    if not alpha >= 0:
        raise ValueError(f"alpha must be 0 or more, got {alpha}")
    return alpha > 0


def _check(pairs: Tensor, **answers: Tensor) -> None:
    for name, value in answers.items():
        if value.shape != pairs.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}; it must be ({len(pairs)},), one answer per pair")
