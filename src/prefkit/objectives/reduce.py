"""From logits to one number per answer: what stands between a language model and the losses of this package.

Shapes: any leading ..., t tokens, v entries of the vocabulary. A mask is true on the tokens that count.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log π of each given token, (..., v) and (...) -> (...), normalised in float32 or better.

    >>> token_log_probs(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0]))
    tensor([-0.6931, -0.3133])
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} need one row for each of tokens {tuple(tokens.shape)}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)


def sum_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the tokens that count, (..., t) -> (...).

    What padding holds, even NaN, enters neither value nor gradient.

    >>> sum_tokens(torch.tensor([-1.0, -2.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(-3.)
    """
    return _masked(values, mask).sum(-1)


def mean_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that count, (..., t) -> (...).

    Raises:
        ValueError: shapes differ, or a row has no token that counts.

    >>> mean_tokens(torch.tensor([-1.0, -2.0, 9.0]), torch.tensor([True, True, False]))
    tensor(-1.5000)
    """
    counts = mask.bool().sum(-1)
    if bool((counts == 0).any()):
        raise ValueError("a row has no token to average over")
    return _masked(values, mask).sum(-1) / counts


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    if values.shape != mask.shape:
        raise ValueError(f"values {tuple(values.shape)} and mask {tuple(mask.shape)} must have one shape")
    return torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))
