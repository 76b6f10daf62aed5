"""KL(π‖π_ref) from the policy's own samples: surrogates with its gradient, estimates with its value.

For one prompt let y₁..y_k ~ π be fresh samples at temperature 1 and d = log π(y) - log π_ref(y), summed over
tokens (the end-of-sequence token included). Because E[∇ log π] = 0,

    ∇ KL(π‖π_ref) = E[ d ∇ log π(y) ]

and each estimator below is a surrogate to minimise whose *gradient* has that mean (sg = no gradient):

    reinforce   mean_j  sg(d_j) log π(y_j)
    rloo        mean_j  sg(d_j - mean of the other d) log π(y_j)                         leave one out; k ≥ 2
    rtg         mean_j  Σ_t sg(Σ_{u≥t} d_{j,u}) log π(y_{j,t})                           reward to go
    rb          mean_j  Σ_t [ κ_{j,t} + sg(Σ_{u>t} κ_{j,u}) log π(y_{j,t}) ]             Rao-Blackwellised

where κ_t is the exact KL between the two next-token distributions in the state before token t. A surrogate's
*value* means nothing: `kl_estimate` is the number to log.

Shapes: b prompts, k samples of each, t tokens, v entries of the vocabulary. Per-token tensors are zero on
padding.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["rloo", "reinforce", "rtg", "rb"]

# Refused. The relative bias is that of the mean gradient in one small policy whose answers can all be counted
# (tests/unit/objectives/test_enumeration.py); its size differs from policy to policy.
BIASED = {
    "k1": "the gradient of the log-ratio itself has mean zero; relative bias 1.00",
    "k3": "the gradient of e^-d - 1 + d has the mean of the *forward* KL's; relative bias 0.93",
    "token_local": "a token's score must carry all later log-ratios too; relative bias 0.55",
    "group_mean": "a mean that holds the sample scales the gradient by (k-1)/k; relative bias 0.50 at k = 2",
    "clipped": "a clipped log-ratio does not see the answers that drift most; relative bias 0.64 at ±1",
    "length_normalised": "a log-ratio divided by length is not that of the answer; relative bias 0.67",
}


def reverse_kl(own: Tensor, ref_own: Tensor, *, estimator: str = "rloo", state_kl: Tensor | None = None) -> Tensor:
    """Surrogate (b,) to minimise; its gradient is an unbiased estimate of ∇ KL(π‖π_ref) for each prompt.

    Args:
        own: log π of the policy's own fresh samples, with gradient: (b, k), summed over tokens, for rloo and
            reinforce; (b, k, t) for rtg and rb.
        ref_own: log π_ref of the same samples, same shape.
        estimator: rloo | reinforce | rtg | rb, see the module's docstring.
        state_kl: (b, k, t), with gradient, for rb alone: see `state_kl` below.

    Raises:
        ValueError: a wrong shape, k = 1 for rloo, or an estimator that is biased (says why) or unknown.

    >>> reverse_kl(torch.tensor([[-3.0, -1.0]]), torch.tensor([[-4.0, -1.0]]))
    tensor([-1.])
    """
    if estimator in BIASED:
        raise ValueError(f"estimator {estimator!r} is refused, it is biased: {BIASED[estimator]}")
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}; got {estimator!r}")
    if (estimator == "rb") != (state_kl is not None):
        raise ValueError(f"state_kl goes with estimator 'rb' and no other; got estimator {estimator!r}")
    _check(own, ref_own, state_kl, per_token=estimator in ("rtg", "rb"))

    if state_kl is not None:
        future = _to_go(state_kl) - state_kl
        return (state_kl + future.detach() * own).sum(-1).mean(-1)
    ratio = (own - ref_own).detach()
    if estimator == "rtg":
        return (_to_go(ratio) * own).sum(-1).mean(-1)
    if estimator == "rloo":
        ratio = leave_one_out(ratio)
    return (ratio * own).mean(-1)


def leave_one_out(values: Tensor) -> Tensor:
    """Each value minus the mean of the others in its row, (b, k) -> (b, k); rows sum to zero.

    Raises:
        ValueError: k < 2, where there are no others.

    >>> leave_one_out(torch.tensor([[3.0, 1.0, 2.0]]))
    tensor([[ 1.5000, -1.5000,  0.0000]])
    """
    k = values.shape[-1]
    if k < 2:
        raise ValueError(f"rloo leaves one out: it needs 2 or more samples per prompt, got {k}; or take 'reinforce'")
    return (values - values.mean(-1, keepdim=True)) * (k / (k - 1))


def kl_estimate(own: Tensor, ref_own: Tensor) -> Tensor:
    """Unbiased estimate (b,) of KL(π‖π_ref) in nats, without gradient: the mean log-ratio. May be negative.

    Takes (b, k) or, zero on padding, (b, k, t).

    >>> kl_estimate(torch.tensor([[-3.0, -1.0]]), torch.tensor([[-4.0, -1.0]]))
    tensor([0.5000])
    """
    return _ratio(own, ref_own).mean(-1)


def kl_estimate_k3(own: Tensor, ref_own: Tensor) -> Tensor:
    """Like `kl_estimate` from e^-d - 1 + d, never negative: less noise near π_ref, heavy tails far from it.

    >>> kl_estimate_k3(torch.tensor([[-3.0, -1.0]]), torch.tensor([[-4.0, -1.0]]))
    tensor([0.1839])
    """
    ratio = _ratio(own, ref_own)
    return (torch.expm1(-ratio) + ratio).mean(-1)


def state_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL between next-token distributions given by finite logits, (..., v) -> (...), in float32 or better.

    >>> state_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(0.1201)
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_q = logits.log_softmax(-1, dtype=dtype), ref_logits.log_softmax(-1, dtype=dtype)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _to_go(values: Tensor) -> Tensor:
    """Sum from each token to the last: (..., t) -> (..., t)."""
    return values.flip(-1).cumsum(-1).flip(-1)


def _ratio(own: Tensor, ref_own: Tensor) -> Tensor:
    _check(own, ref_own, None, per_token=own.dim() == 3)
    ratio = (own - ref_own).detach()
    return ratio.sum(-1) if own.dim() == 3 else ratio


def _check(own: Tensor, ref_own: Tensor, state_kl: Tensor | None, *, per_token: bool) -> None:
    if per_token and own.dim() != 3:
        raise ValueError(f"own must be (b, k, t), log-probabilities of single tokens; got {tuple(own.shape)}")
    if not per_token and own.dim() != 2:
        raise ValueError(f"own must be (b, k), log-probabilities summed over tokens; got {tuple(own.shape)}")
    for name, other in (("ref_own", ref_own), ("state_kl", state_kl)):
        if other is not None and other.shape != own.shape:
            raise ValueError(f"{name} is {tuple(other.shape)}, own is {tuple(own.shape)}: shapes must agree")
