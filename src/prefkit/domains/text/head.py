"""Log-probabilities of given tokens from hidden states, without the whole (tokens x vocabulary) matrix.

For a token t predicted from a hidden state h, with logits z = f(W h + b), f the model's own scale and soft cap:

    log p(t) = z_t - log Σ_j exp z_j

    ∂ log p(t) / ∂h = f'_t W_t - Σ_j p_j f'_j W_j            ∂ log p(t) / ∂W_j = (1[j = t] - p_j) f'_j h

Both gradients of a token are linear in what arrives for its log-prob, and depend on no other token. So the gradient for
h is computed beside the log-prob, while the chunk's probabilities exist, and the backward pass only scales it. A frozen
head needs nothing else. For a trained head the probabilities are kept where they fit one chunk, else computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefkit.engine.environment import memory_bytes

SHARE = 32
"""a chunk takes at most this fraction (1/SHARE) of the device's memory"""


class TokenScores(NamedTuple):
    """Per predicted token, (m,) each, float32; the last two without gradient, and None unless asked for."""

    log_probs: Tensor
    entropy: Tensor | None = None
    """of the next-token distribution, in nats"""
    top1: Tensor | None = None
    """1 where the token was the likeliest one"""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head: scale, soft cap c·tanh(z / c), then our temperature."""

    scale: float = 1.0
    soft_cap: float = 0.0
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """f(z), float32 (or float64), in place where `logits` has that dtype already; no gradient through it."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.soft_cap:
            logits = logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        if self.temperature != 1.0:
            logits = logits.div_(self.temperature)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """f'(z) at the transformed logits: a number where it is the same everywhere."""
        factor = self.scale / self.temperature
        if not self.soft_cap:
            return factor
        return (1 - (logits * (self.temperature / self.soft_cap)).square()) * factor


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens whose float32 logits take 1/SHARE of the device's memory. Fixed for a machine: chunks change last bits."""
    return max(1, memory_bytes(device) // SHARE // (4 * vocabulary))


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    transform: LogitTransform,
    chunk: int = 0,
    details: bool = False,
) -> TokenScores:
    """Log-probs (m,) of `targets` (m,) given hidden (m, d), head weight (v, d) and bias (v,).

    The product is taken in hidden's dtype, or autocast's; log-softmax and sums in float32 (float64 for float64). At
    most `chunk` tokens x v logits exist at a time (0: by the device's memory). `details` adds entropy and top-1 hits
    from the same logits. Gradients reach hidden, weight and bias, each only where it requires one.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    chunk = chunk or chunk_tokens(len(weight), hidden.device)
    with torch.autocast(kind, enabled=False):
        scores: Any = _TokenScores.apply(hidden, weight, bias, targets, transform, chunk, details)
    log_probs, entropy, top1 = scores
    return TokenScores(log_probs, entropy, top1) if details else TokenScores(log_probs)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk: int,
        details: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        head = weight.to(hidden.dtype)
        shift = None if bias is None else bias.to(hidden.dtype)
        whole = len(targets) <= chunk
        found: list[Tensor] = []
        entropies: list[Tensor] = []
        hits: list[Tensor] = []
        directions: list[Tensor] = []
        slopes = None  # of the only chunk, kept for the head's gradient
        for part in _parts(len(targets), chunk):
            logits = _logits(hidden[part], head, shift, transform)
            log_softmax = _log_softmax(logits, keep=details or bool(transform.soft_cap))
            places = targets[part, None]
            found.append(log_softmax.gather(-1, places)[:, 0])
            if details:
                hits.append((logits.argmax(-1) == targets[part]).float())
                entropies.append(-torch.einsum("mv,mv->m", log_softmax.exp(), log_softmax))
            if for_hidden or for_weight or for_bias:
                slopes = _slopes(logits, log_softmax, places, transform, hidden.dtype)
                if for_hidden:
                    directions.append(head[targets[part]] * slopes[1] - slopes[0] @ head)
            del logits, log_softmax
        keep = slopes if whole and (for_weight or for_bias) else None
        direction = torch.cat(directions) if directions else None
        ctx.transform, ctx.chunk = transform, chunk
        ctx.save_for_backward(hidden, weight, bias, targets, direction, *(keep or (None, None)))
        log_probs = torch.cat(found)
        if not details:
            return log_probs, None, None
        entropy, top1 = torch.cat(entropies), torch.cat(hits)
        ctx.mark_non_differentiable(entropy, top1)
        return log_probs, entropy, top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets, direction, kept, kept_slope = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = (direction * grad[:, None].to(direction.dtype)) if for_hidden else None
        grad_weight = grad_bias = None
        if for_weight or for_bias:
            grad_weight = torch.zeros_like(weight) if for_weight else None
            grad_bias = torch.zeros_like(bias) if for_bias else None
            head = weight.to(hidden.dtype)
            shift = None if bias is None else bias.to(hidden.dtype)
            for part in _parts(len(targets), ctx.chunk):
                if kept is not None:
                    weighted, slope = kept, kept_slope
                else:
                    logits = _logits(hidden[part], head, shift, ctx.transform)
                    places = targets[part, None]
                    log_softmax = _log_softmax(logits, keep=bool(ctx.transform.soft_cap))
                    weighted, slope = _slopes(logits, log_softmax, places, ctx.transform, hidden.dtype)
                    del logits, log_softmax
                share = grad[part, None].to(hidden.dtype)
                if grad_weight is not None:
                    moved = hidden[part] * share
                    _subtract_product(grad_weight, weighted, moved)
                    grad_weight.index_add_(0, targets[part], (moved * slope).to(grad_weight.dtype))
                if grad_bias is not None:
                    grad_bias -= (weighted.T @ share)[:, 0].to(grad_bias.dtype)
                    grad_bias.index_add_(0, targets[part], (share * slope)[:, 0].to(grad_bias.dtype))
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _parts(count: int, chunk: int) -> Iterator[slice]:
    for start in range(0, count, chunk):
        yield slice(start, min(count, start + chunk))


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    return transform(hidden @ head.T if bias is None else torch.addmm(bias, hidden, head.T))


def _log_softmax(logits: Tensor, *, keep: bool) -> Tensor:
    """On a CPU in the logits' own memory, unless they are read again: fresh pages cost as much as the sums."""
    in_place = not keep and logits.device.type == "cpu"
    return torch.log_softmax(logits, -1, out=logits) if in_place else logits.log_softmax(-1)


def _slopes(
    logits: Tensor, log_softmax: Tensor, places: Tensor, transform: LogitTransform, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """p_j f'_j for every token of the vocabulary (m, v), and f'_t (m, 1); `log_softmax` is used up."""
    weighted = log_softmax.exp_()
    slope = transform.slope(logits)
    if isinstance(slope, Tensor):
        weighted.mul_(slope)
        return weighted.to(dtype), slope.gather(-1, places).to(dtype)
    if slope != 1.0:
        weighted.mul_(slope)
    return weighted.to(dtype), torch.full((len(logits), 1), slope, dtype=dtype, device=logits.device)


def _subtract_product(total: Tensor, weighted: Tensor, moved: Tensor) -> None:
    """total -= weightedᵀ moved, in the dtype of the factors."""
    if total.dtype == moved.dtype:
        total.addmm_(weighted.T, moved, alpha=-1)
    else:
        total -= weighted.T @ moved
