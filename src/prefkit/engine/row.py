"""The values of the step under way, left on the device until someone needs to read them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

CHECKED = ("loss", "grad_norm")
"""values that must be finite at every step"""


class Row:
    """What was logged in this step, and the losses and gradient norms of all steps since the last look."""

    def __init__(self) -> None:
        self.values: dict[str, float | Tensor] = {}
        self.evaluated = False
        """an evaluation belongs to this row, so it is written whatever the cadence"""
        self._unchecked: list[tuple[int, str, float | Tensor]] = []

    def clear(self) -> None:
        """Start the next row; what was not looked at yet is kept for the next look."""
        self.values, self.evaluated = {}, False

    def add(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        self.values.update(values)
        self._unchecked += [(step, name, values[name]) for name in CHECKED if name in values]

    def first_bad(self) -> str:
        """The first loss or gradient norm since the last look that is not finite, in words; empty if none."""
        entries, self._unchecked = self._unchecked, []
        numbers = read({str(index): value for index, (_, _, value) in enumerate(entries)}).values()
        for (step, name, _), number in zip(entries, numbers, strict=True):
            if not math.isfinite(number):
                return f"{name} is {number} at step {step}"
        return ""


def read(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """All values as floats; the tensors among them come over in one transfer."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers: list[float] = []
    if tensors:
        numbers = torch.stack([value.detach().double() for value in tensors.values()]).tolist()
    found = dict(zip(tensors, numbers, strict=True))
    return {name: found[name] if name in found else float(value) for name, value in values.items()}
