"""Adafactor (Shazeer and Stern, 2018, arXiv 1804.04235) with the learning rate given from outside.

The second moment of a matrix is kept as one row and one column of averages instead of a number per weight.
Neither the paper's relative step size nor its parameter scaling is used, so `learning_rate` means what it
means for AdamW; there is no first moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Adafactor(torch.optim.Optimizer):
    """Algorithm 4 with update clipping at root mean square 1 and second-moment decay 1 - t^-0.8.

    State per weight: `step` (0-dim), and `row` and `column` averages over the last two dimensions, or
    `second` of the weight's own shape for vectors.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.0, tiny: float = 1e-30) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "tiny": tiny})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every weight that has a gradient."""
        assert closure is None, "Adafactor evaluates no closure"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad.float(), group)

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state.update(_empty_moments(gradient))
        state["step"] += 1
        decay = 1 - state["step"] ** -0.8
        square = gradient.square() + group["tiny"]
        if "row" in state:
            state["row"].lerp_(square.mean(-1), 1 - decay)
            state["column"].lerp_(square.mean(-2), 1 - decay)
            # row and column share their overall mean, which is divided out once
            row = (state["row"] / state["row"].mean(-1, keepdim=True)).rsqrt_()
            update = gradient * row.unsqueeze(-1) * state["column"].rsqrt().unsqueeze(-2)
        else:
            state["second"].lerp_(square, 1 - decay)
            update = gradient * state["second"].rsqrt()
        update /= update.square().mean().sqrt().clamp(min=1.0)
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update.to(weight.dtype), alpha=-group["lr"])


def _empty_moments(gradient: Tensor) -> dict[str, Tensor]:
    if gradient.ndim < 2:
        return {"second": torch.zeros_like(gradient)}
    return {"row": torch.zeros_like(gradient[..., 0]), "column": torch.zeros_like(gradient[..., 0, :])}
