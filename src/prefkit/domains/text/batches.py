"""Which rows a step sees: pure functions of (seed, step), so a resumed run needs no loader state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    permutation = np.random.default_rng([seed, epoch, num_rows]).permutation(num_rows)
    permutation.setflags(write=False)  # shared by every caller through the cache
    return permutation


def order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch: a permutation of range(num_rows), another for every epoch and seed."""
    return _permutation(num_rows, seed, epoch).tolist()


def step_batches(num_rows: int, *, step: int, global_batch: int, seed: int) -> list[int]:
    """The rows of optimizer step `step` (1-based), over all processes and micro-batches.

    Batches run across the borders of epochs, so every one is full and every row comes once per epoch; with
    fewer rows than `global_batch` a batch holds a row more than once.
    """
    if num_rows < 1 or step < 1 or global_batch < 1:
        raise ValueError(f"need rows, step and batch >= 1, got {num_rows}, {step}, {global_batch}")
    first = (step - 1) * global_batch
    rows: list[int] = []
    while len(rows) < global_batch:
        epoch, place = divmod(first + len(rows), num_rows)
        take = min(num_rows - place, global_batch - len(rows))
        rows += _permutation(num_rows, seed, epoch)[place : place + take].tolist()
    return rows


def process_slice(rows: Sequence[int], *, rank: int, size: int) -> list[int]:
    """The contiguous share of one process; joined in rank order the shares are `rows` again."""
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} processes")
    return list(rows[len(rows) * rank // size : len(rows) * (rank + 1) // size])


def micro_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """Cut a process's rows into forward passes of `size` rows; the last may be shorter."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def num_steps(num_rows: int, *, epochs: float, global_batch: int) -> int:
    """Optimizer steps that show every row `epochs` times (rounded up), at least 1."""
    return max(1, ceil(num_rows * epochs / global_batch - 1e-9))


def hold_out(
    rows: Sequence[T], key: Callable[[T], str], *, share: float = 0.05, seed: int = 0
) -> tuple[list[T], list[T]]:
    """Split into (training, held out) so that no key (prompt, film, ...) stands on both sides.

    Whole keys are held out, in the order of a seeded hash, until at least `share` of the rows and one row
    are; the choice does not depend on the order of the rows. With a single key nothing can be held out and
    a ValueError says so.
    """
    keys = [key(row) for row in rows]
    counts: dict[str, int] = {}
    for name in keys:
        counts[name] = counts.get(name, 0) + 1
    if len(counts) < 2:
        raise ValueError("all rows share one prompt, so none can be held out")
    held: set[str] = set()
    taken = 0
    for name in sorted(counts, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest()):
        if taken >= max(1, share * len(rows)) or len(held) == len(counts) - 1:
            break
        held.add(name)
        taken += counts[name]
    train = [row for row, name in zip(rows, keys, strict=True) if name not in held]
    return train, [row for row, name in zip(rows, keys, strict=True) if name in held]
