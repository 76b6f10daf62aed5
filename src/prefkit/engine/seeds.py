"""Random streams named by a path, so that a draw depends on what it is for and not on what was drawn before.

`generator(seed, "sample", step, row)` is the same stream in a fresh run, a resumed one, and on any process.
"""

from __future__ import annotations

import hashlib
import random

import numpy
import torch


def number(seed: int, *path: int | str) -> int:
    """A 63-bit number that depends on the seed and every part of the path (1 and "1" differ)."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *path: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator on `device` seeded by the path."""
    return torch.Generator(device=device).manual_seed(number(seed, *path))


def seed_everything(seed: int, *path: int | str) -> None:
    """Seed the global generators of torch, numpy and `random` by the path."""
    value = number(seed, *path)
    torch.manual_seed(value)
    numpy.random.seed(value % 2**32)
    random.seed(value)
