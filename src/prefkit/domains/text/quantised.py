"""4- and 8-bit base weights (bitsandbytes): what can be combined with them, and how they compute the same every time.

bitsandbytes picks another kernel for a layer in evaluation mode: on processors with AVX512-BF16 its 4-bit layers
repack their weights with less precision and lose their gradient, its 8-bit layers quantise activations too, by
statistics of the whole batch. A policy's log-probs must not depend on either, so quantised layers stay in training
mode, in which they dequantise and multiply; they have nothing else (no dropout) that training mode would change.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prefkit.domains.text.config import Model
from prefkit.errors import InputError

# peft imports bitsandbytes wherever it is installed, which then warns of optional kernels that nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

LAYERS = ("Linear4bit", "Linear8bitLt")


def is_quantised(model: Any) -> bool:
    """Whether a model's base weights are stored in fewer bits than they compute in."""
    return any(_is_quantised_layer(part) for part in model.modules())


def _is_quantised_layer(part: nn.Module) -> bool:
    return type(part).__name__ in LAYERS and type(part).__module__.startswith("bitsandbytes")


def evaluation_mode(model: nn.Module) -> None:
    """Evaluation mode for all layers but the quantised ones (see above)."""
    model.eval()
    for part in model.modules():
        if _is_quantised_layer(part):
            part.train()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`evaluation_mode` inside the block, every layer's own mode again after it."""
    modes = [(part, part.training) for part in model.modules()]
    evaluation_mode(model)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def check(options: Any) -> None:
    """Raises InputError for options (a Config with Model and Lora) that cannot be combined, or without bitsandbytes."""
    if not (options.load_in_4bit or options.load_in_8bit):
        return
    if options.load_in_4bit and options.load_in_8bit:
        raise InputError(
            "load_in_4bit and load_in_8bit exclude each other",
            where="--load_in_4bit --load_in_8bit",
            mend="choose one",
        )
    where = "--load_in_8bit" if options.load_in_8bit else "--load_in_4bit"
    if not options.use_peft:
        raise InputError(
            "quantised weights are whole numbers and cannot be trained",
            where=where,
            mend="add --use_peft, which trains an adapter on top of them",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("quantised base weights need bitsandbytes", where=where, mend="pip install 'prefkit[quant]'")


def settings(options: Model, dtype: torch.dtype) -> Any:
    """transformers' quantisation config for the options; None where no bits are asked for."""
    from transformers import BitsAndBytesConfig

    if options.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not options.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def refuse_given_model(options: Model) -> None:
    """InputError where bits are asked for a model that is in memory already."""
    if options.load_in_4bit or options.load_in_8bit:
        raise InputError(
            "a model given in memory keeps the weights it has",
            where="load_in_4bit/load_in_8bit",
            mend="give model_name_or_path, or load the model quantised yourself and leave these options off",
        )
