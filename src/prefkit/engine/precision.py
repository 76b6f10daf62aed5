"""Which number format the forward pass computes in."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from prefkit.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str, device: str | torch.device, *, training: bool = True) -> torch.dtype:
    """The dtype of the forward pass; `auto` is bfloat16 where the device does it well and float32 elsewhere.

    What trains, optimizer state, log-softmax and sums stay float32 whatever this returns. Raises InputError
    for an unknown name, and for float16 in training: its gradients underflow without loss scaling, which the
    engine does not do.
    """
    if name == "auto":
        return torch.bfloat16 if _does_bfloat16_well(torch.device(device)) else torch.float32
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}", where="--dtype", mend=f"choose auto, {', '.join(DTYPES)}")
    if name == "float16" and training:
        raise InputError(
            "float16 cannot train here: small gradients become 0 without loss scaling",
            where="--dtype",
            mend="use bfloat16 (same memory) or float32",
        )
    return DTYPES[name]


def autocast(dtype: torch.dtype, device: str | torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products run in `dtype`; float32 changes nothing."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


def _does_bfloat16_well(device: torch.device) -> bool:
    if device.type == "cuda":
        # emulated bfloat16 (before Ampere) is slower than float32, so it does not count
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """The processor's feature names as Linux lists them; empty on other systems."""
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return frozenset()
    for line in listing.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()
