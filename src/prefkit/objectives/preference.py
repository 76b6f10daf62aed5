"""Losses over stored preference pairs, for any trainer: summed log-probabilities in, one loss per pair out.

Each argument is log π(answer | prompt), summed over the answer's tokens (end-of-sequence included), in nats.
`chosen`, `rejected` and `own` carry the gradient; what begins with `ref_` comes from the frozen reference.
All losses are to be minimised; the mean over pairs is the caller's.
"""

from __future__ import annotations

from torch import Tensor

from prefkit.objectives.divergence import kl_estimate, reverse_kl
from prefkit.objectives.margin import Kind, Logistic, pairwise, soft_logistic

__all__ = ["dpo_loss", "gap", "hypo_kl", "hypo_loss", "nll", "offline_kl_loss", "osp_loss"]


def gap(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Log-ratio of the chosen answer minus that of the rejected one, (b,) in nats.

    β times it is the margin of implicit rewards. Exactly 0 where the policy equals the reference.
    """
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    for name, value in zip(names, (chosen, rejected, ref_chosen, ref_rejected), strict=True):
        if value.dim() != 1 or value.shape != chosen.shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)}; all four must be (b,), one summed log-probability per pair"
            )
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    kind: Kind = Logistic(),  # noqa: B008 - frozen and without fields
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO (`Logistic`), IPO (`Ipo`) or hinge (`Hinge`) loss of each pair, four times (b,) -> (b,).

    Raises:
        ValueError: a shape that is not (b,), beta ≤ 0, or label smoothing out of range or with another kind.

    >>> import torch
    >>> start = torch.tensor([-10.0])
    >>> dpo_loss(start, start - 5, start, start - 5, beta=0.1)
    tensor([0.6931])
    """
    difference = gap(chosen, rejected, ref_chosen, ref_rejected)
    return pairwise(difference, kind=kind, beta=beta, label_smoothing=label_smoothing)


def osp_loss(
    first: Tensor,
    second: Tensor,
    ref_first: Tensor,
    ref_second: Tensor,
    *,
    beta: float,
    strength: Tensor | float,
) -> Tensor:
    """OSP's soft-preference cross-entropy of each pair, four times (b,) -> (b,).

        -p log σ(h) - (1-p) log σ(-h),   h = β [(first - ref_first) - (second - ref_second)],   p = strength

    Its gradient in h is σ(h) - p: the margin is drawn to logit(p)/β, which is finite for p in (0, 1). Strength 1 is
    `dpo_loss` bit for bit; a constant 1 - ε is `dpo_loss` with label smoothing ε.

    Args:
        strength: judged probability in [0, 1] that the first answer is better, a number or (b,); no gradient enters it.

    Raises:
        ValueError: a shape that is not (b,), beta ≤ 0, a strength outside [0, 1] or not a number.

    >>> import torch
    >>> start = torch.tensor([-10.0])
    >>> osp_loss(start + 20, start, start, start, beta=0.1, strength=0.9)
    tensor([0.3269])
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    difference = gap(first, second, ref_first, ref_second)
    if isinstance(strength, Tensor):
        if strength.shape != difference.shape:
            raise ValueError(f"strength is {tuple(strength.shape)}; it must be (b,), one probability per pair")
        strength = strength.detach().to(difference)
        if not bool(((strength >= 0) & (strength <= 1)).all()):
            raise ValueError("strength is a probability: every value must lie in [0, 1]")
    elif not 0 <= strength <= 1:
        raise ValueError(f"strength is a probability in [0, 1], got {strength}")
    return soft_logistic(beta * difference, strength)


def hypo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    own: Tensor | None,
    ref_own: Tensor | None,
    *,
    beta: float,
    kl_weight: float,
    estimator: str = "rloo",
    kind: Kind = Logistic(),  # noqa: B008 - frozen and without fields
    label_smoothing: float = 0.0,
    state_kl: Tensor | None = None,
) -> Tensor:
    """HyPO: DPO on stored pairs plus kl_weight · KL(π‖π_ref) on the policy's own fresh samples, -> (b,).

    The gradient is that of DPO plus an unbiased estimate of kl_weight · ∇KL; the value of the second part is
    a surrogate's, so log `hypo_kl` beside it. With kl_weight 0 this *is* `dpo_loss`, and `own` may be None.

    Args:
        own, ref_own: (b, k), or (b, k, t) for estimators rtg and rb: see `divergence.reverse_kl`.
        kl_weight: λ ≥ 0, per nat of the whole answer's KL.

    Raises:
        ValueError: as `dpo_loss` and `reverse_kl`; a negative kl_weight; own missing or of another b.

    >>> import torch
    >>> pair = [torch.tensor([x]) for x in (-9.0, -16.0, -10.0, -15.0)]
    >>> hypo_loss(*pair, torch.tensor([[-3.0, -1.0]]), torch.tensor([[-4.0, -1.0]]), beta=0.5, kl_weight=0.1)
    tensor([0.2133])
    """
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight must be 0 or more, got {kl_weight}")
    offline = dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=beta, kind=kind, label_smoothing=label_smoothing
    )
    if kl_weight == 0:
        return offline
    if own is None or ref_own is None:
        raise ValueError("kl_weight above 0 needs own and ref_own: the KL is taken on own samples")
    online = reverse_kl(own, ref_own, estimator=estimator, state_kl=state_kl)
    if online.shape != offline.shape:
        raise ValueError(
            f"own has samples of {len(online)} prompts beside {len(offline)} pairs: one prompt per pair is "
            "needed (for other numbers, average dpo_loss and reverse_kl apart)"
        )
    return offline + kl_weight * online


def hypo_kl(own: Tensor, ref_own: Tensor) -> Tensor:
    """Estimate (b,) of KL(π‖π_ref) in nats from own samples, (b, k) or (b, k, t), without gradient.

    >>> import torch
    >>> hypo_kl(torch.tensor([[-3.0, -1.0]]), torch.tensor([[-4.0, -1.0]]))
    tensor([0.5000])
    """
    return kl_estimate(own, ref_own)


def offline_kl_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    state_kl: Tensor,
    *,
    beta: float,
    kl_weight: float,
    kind: Kind = Logistic(),  # noqa: B008 - frozen and without fields
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO plus kl_weight · the KL of each next-token distribution along the *stored* answers, -> (b,).

    A baseline for HyPO, not its equal: this KL is never taken where the policy itself goes.

    Args:
        state_kl: `divergence.state_kl` before each token of the chosen and rejected answer, zero on padding,
            (b, 2, t), or already summed over tokens, (b, 2).

    Raises:
        ValueError: as `dpo_loss`; a negative kl_weight; another shape of state_kl.
    """
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight must be 0 or more, got {kl_weight}")
    offline = dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=beta, kind=kind, label_smoothing=label_smoothing
    )
    if state_kl.dim() not in (2, 3) or state_kl.shape[:2] != (len(offline), 2):
        raise ValueError(f"state_kl must be (b, 2) or (b, 2, t), b = {len(offline)}; got {tuple(state_kl.shape)}")
    per_answer = state_kl.sum(-1) if state_kl.dim() == 3 else state_kl
    return offline + kl_weight * per_answer.mean(-1)


def nll(log_prob: Tensor, num_tokens: Tensor | None = None) -> Tensor:
    """-log π of each answer, (b,) -> (b,), in nats; per token where `num_tokens` (b,) is given.

    DPO with an SFT term is `dpo_loss(...) + weight * nll(chosen, num_tokens)`.

    >>> import torch
    >>> nll(torch.tensor([-6.0]), torch.tensor([4]))
    tensor([1.5000])
    """
    if log_prob.dim() != 1 or (num_tokens is not None and num_tokens.shape != log_prob.shape):
        raise ValueError(f"log_prob and num_tokens must be (b,); log_prob is {tuple(log_prob.shape)}")
    return -log_prob if num_tokens is None else -log_prob / num_tokens
