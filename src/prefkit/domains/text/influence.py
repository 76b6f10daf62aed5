"""How much of a step's gradient a term of the loss makes, measured where it costs little."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LAYER = re.compile(r"\.(\d+)\.")


def last_layer_weights(module: nn.Module) -> list[nn.Parameter]:
    """The trained weights of the last decoder layer that has any; all trained weights where none is numbered."""
    trained = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    numbers = {name: int(found.group(1)) for name, _ in trained if (found := _LAYER.search(name))}
    if not numbers:
        return [weight for _, weight in trained]
    last = max(numbers.values())
    return [weight for name, weight in trained if numbers.get(name) == last]


def gradient_share(term: Tensor, rest: Tensor, weights: Sequence[nn.Parameter]) -> Tensor:
    """‖∇ term‖ / (‖∇ term‖ + ‖∇ rest‖) over `weights`, 0-dim, without gradient; both are scalars of one graph.

    Over the last layer's weights the backward pass stops below that layer: a share of a second pass, not a whole one.
    """
    norms = [_norm(value, weights) for value in (term, rest)]
    return norms[0] / (norms[0] + norms[1]).clamp_(min=torch.finfo(norms[0].dtype).tiny)


def _norm(value: Tensor, weights: Sequence[nn.Parameter]) -> Tensor:
    found: Any = torch.autograd.grad(value, list(weights), retain_graph=True, allow_unused=True)
    squares: list[Tensor] = [gradient.float().square().sum() for gradient in found if gradient is not None]
    return torch.stack(squares).sum().sqrt() if squares else value.new_zeros(())
