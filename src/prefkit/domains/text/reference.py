"""The reference policy: a frozen copy, the adapters switched off, or a frozen copy of the starting adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from prefkit.domains.text.scoring import LanguageModel


class FrozenCopy:
    """The start policy as a second model: full fine-tuning has no other way."""

    name = "a frozen copy of the start model"

    def __init__(self, module: LanguageModel) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        yield self.module


class AdaptersOff:
    """The base model under the trained adapter: exact, because a stage starts from a merged model."""

    name = "the base model, adapters off"

    def __init__(self, module: LanguageModel) -> None:
        self.module = module

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        model: Any = self.module.model
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        try:
            with model.disable_adapter():
                yield self.module
        finally:  # peft unfreezes the active adapter alone, and there may be another (`value.SharedValue`)
            for weight in trained:
                weight.requires_grad_(True)


class FrozenAdapter:
    """A frozen copy of the adapter that training started from; the base model is shared."""

    name = "a frozen copy of the starting adapter"
    ADAPTER = "reference"

    def __init__(self, module: LanguageModel, adapter: Path) -> None:
        self.module = module
        model: Any = module.model
        modes = [(part, part.training) for part in model.modules()]
        model.load_adapter(str(adapter), adapter_name=self.ADAPTER, is_trainable=False)
        # Loading brings the adapter's own dropout along and ends training mode, which checkpointing needs.
        without_dropout(model)
        for part, training in modes:
            part.training = training

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        model: Any = self.module.model
        model.set_adapter(self.ADAPTER, inference_mode=True)
        try:
            yield self.module
        finally:
            model.set_adapter("default")


Reference = FrozenCopy | AdaptersOff | FrozenAdapter


def without_dropout(model: nn.Module) -> None:
    """Dropout off, everywhere: with it the policy is not the distribution it samples from, nor its own reference."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "attn_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
