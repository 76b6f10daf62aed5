"""An exponential moving average of a policy's trained weights, to be read in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.scoring import LanguageModel
from prefkit.errors import InputError

FILE = "average.safetensors"


class AverageWeights:
    """avg ← decay · avg + (1 - decay) · weights after every step; with LoRA of the adapter alone.

    A checkpoint holds it: it is a `Trackable`.
    """

    def __init__(self, policy: TextPolicy, *, decay: float) -> None:
        """The average begins as the policy now is. Raises InputError for sharded weights or a decay outside [0, 1)."""
        if policy.world.sharded:
            raise InputError(
                "an average of sharded weights is not kept",
                where="--self_judge ema",
                mend="take --self_judge frozen or policy, or launch without FSDP",
            )
        if not 0 <= decay < 1:
            raise InputError(f"decay is {decay}", where="--ema_decay", mend="give 0 or more and below 1")
        self.policy, self.decay = policy, decay
        self._weights = {name: weight for name, weight in policy.module.named_parameters() if weight.requires_grad}
        self._average: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take up the policy's weights after an optimizer step."""
        for name, weight in self._weights.items():
            self._average[name].lerp_(weight.detach(), 1 - self.decay)

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """The policy's module with the averages in place of its trained weights, which come back bit for bit."""
        own = {name: weight.data for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                weight.data = self._average[name]
            yield self.policy.module
        finally:
            for name, weight in self._weights.items():
                weight.data = own[name]

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        if self.policy.world.is_main:
            save_file({name: value.cpu().contiguous() for name, value in self._average.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Raises InputError for a checkpoint of other weights."""
        from safetensors.torch import load_file

        stored = load_file(folder / FILE)
        if set(stored) != set(self._average):
            raise InputError("holds the average of other weights", where=str(folder / FILE))
        for name, value in stored.items():
            self._average[name].copy_(value)
