"""The optimizers a run may use, their learning-rate schedules, and their state as plain tensors.

A schedule is a function of the step alone, so that nothing of it needs saving.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prefkit.engine.adafactor import Adafactor
from prefkit.engine.config import Optimisation
from prefkit.errors import InputError

NAMES = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adafactor": "adafactor",
}
"""every accepted spelling of --optim"""

STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 1}
"""about how many bytes of optimizer state a trained weight costs"""

SHARED = ("qmap1", "qmap2")


def canonical(name: str) -> str:
    """The optimizer's own name; InputError listing the names for an unknown one."""
    if name not in NAMES:
        raise InputError(f"unknown optimizer {name!r}", where="--optim", mend=f"choose {', '.join(NAMES)}")
    return NAMES[name]


def build(config: Optimisation, weights: Mapping[str, nn.Parameter], *, sharded: bool) -> torch.optim.Optimizer:
    """The optimizer of `config.optim` over named weights; vectors (biases, norms) get no weight decay.

    Raises InputError when bitsandbytes is missing, and for optimizers that cannot work on sharded weights.
    """
    name = canonical(config.optim)
    matrices = [weight for weight in weights.values() if weight.ndim >= 2]
    vectors = [weight for weight in weights.values() if weight.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas, epsilon = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    if name == "adamw":
        how: dict[str, Any] = {"foreach": True} if sharded else {"fused": True}
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=epsilon, **how)
    if sharded:
        raise InputError(
            f"{name} keeps statistics that cross the pieces of a sharded weight",
            where="--optim",
            mend="use --optim adamw with FSDP2 and DeepSpeed",
        )
    if name == "adafactor":
        return Adafactor(groups, lr=config.learning_rate)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise InputError(
            "adamw_8bit needs bitsandbytes", where="--optim", mend="pip install 'prefkit[quant]'"
        ) from error
    return bitsandbytes.optim.AdamW8bit(groups, lr=config.learning_rate, betas=betas, eps=epsilon)


def learning_rate(config: Optimisation, step: int, total: int) -> float:
    """The learning rate of 1-based `step` of `total`.

    It rises linearly over the first `warmup_ratio` of the steps (step 1 of w already trains, at 1/w of the
    peak), then falls to 0 after the last step (linear), along half a cosine, or stays.
    """
    warmup = math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.lr_scheduler_type in ("constant", "constant_with_warmup"):
        return config.learning_rate
    done = (step - 1 - warmup) / max(1, total - warmup)
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (1 - done)


def state_of(optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """The optimizer's state by weight name: tensors, and numbers as Python values.

    bitsandbytes shares its two tables of 256 values between all weights; files do not take shared tensors, so each
    weight gets its own.
    """
    return {
        name: {key: value.clone() if key in SHARED else value for key, value in optimizer.state[weight].items()}
        for name, weight in weights.items()
        if optimizer.state.get(weight)
    }


def check_state(weights: Mapping[str, nn.Parameter], state: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises InputError when a state read from a checkpoint belongs to other weights."""
    strange = sorted(set(state) - set(weights))
    if strange:
        raise InputError(
            f"the optimizer state is of other weights ({strange[0]}, {len(strange)} in all)",
            mend="continue with the model and LoRA options the run was started with",
        )
    for name, weight in weights.items():
        for key, value in state.get(name, {}).items():
            if key in ("exp_avg", "exp_avg_sq", "second") and tuple(value.shape) != tuple(weight.shape):
                raise InputError(
                    f"the optimizer state of {name} has shape {tuple(value.shape)}, not {tuple(weight.shape)}"
                )


def restore(
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, nn.Parameter],
    state: Mapping[str, Mapping[str, Any]],
) -> None:
    """Give the optimizer a state read from a checkpoint that `check_state` accepts."""
    for name, weight in weights.items():
        optimizer.state[weight] = dict(state.get(name, {}))
