"""Blocks of timed steps, and what they say: pairs per second, and ratios of blocks that ran one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

import torch

SPLIT = {
    "trl/engine": "everything",
    "trl/naive": "trainer, metrics and tiled head of the peer",
    "naive/padded": "head and last layer on answer tokens only",
    "padded/packed": "no padding",
    "packed/engine": "prompt computed once",
    "padded/engine": "layout: padding and prompt",
}
"""what each ratio of two arms measures; the middle four multiply to the first"""


class Watch(Protocol):
    """Someone who looks on at steps, 1-based."""

    def begin(self, step: int) -> None: ...

    def end(self, step: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some steps of one arm in a row. The first is warm-up, and no result contains its time."""

    seconds: list[float]
    """of each step: batch, forward, backward, clipping, optimizer, logging"""
    losses: list[float] = field(default_factory=list[float])
    """before each step"""
    log_probs: list[float] = field(default_factory=list[float])
    """mean log-prob of the chosen answers, before each step"""
    grad_norms: list[float] = field(default_factory=list[float])

    @property
    def timed(self) -> list[float]:
        return self.seconds[1:]


Arms = Mapping[str, Callable[[], Block]]


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(arms: Arms, repeats: int) -> dict[str, list[Block]]:
    """A block of every arm in turn, `repeats` times: A B A B, so that a slow hour slows all."""
    found: dict[str, list[Block]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, block in arms.items():
            found[name].append(block())
    return found


def seconds_per_step(blocks: Sequence[Block]) -> float:
    """Mean over a block's batches of each one's median over the blocks: batches differ in length, blocks in noise."""
    per_batch = [median(times) for times in zip(*(block.timed for block in blocks), strict=True)]
    return sum(per_batch) / len(per_batch)


def summary(found: Mapping[str, Sequence[Block]], batch: int) -> dict[str, Any]:
    """Per arm: seconds per step, pairs per second and every block."""
    return {
        name: {
            "pairs_per_second": batch / seconds_per_step(blocks),
            "seconds_per_step": seconds_per_step(blocks),
            "blocks": [asdict(block) for block in blocks],
        }
        for name, blocks in found.items()
    }


def ratios(found: Mapping[str, Sequence[Block]]) -> dict[str, Any]:
    """How many times slower the first arm of each pair of SPLIT is than the second, where both ran.

    One ratio of timed seconds for each round of blocks; their median, least and greatest.
    """
    result: dict[str, Any] = {}
    for name, meaning in SPLIT.items():
        slow, fast = name.split("/")
        if slow not in found or fast not in found:
            continue
        each = [sum(a.timed) / sum(b.timed) for a, b in zip(found[slow], found[fast], strict=True)]
        result[name] = {"meaning": meaning, "median": median(each), "low": min(each), "high": max(each), "each": each}
    return result


def agreement(found: Mapping[str, Sequence[Block]]) -> dict[str, Any]:
    """Largest relative distance of every arm's losses, log-probs and gradient norms to the first arm's."""
    names = list(found)
    kinds = ("losses", "log_probs", "grad_norms")
    return {
        name: {
            kind: max(
                abs(a - b) / max(abs(a), 1e-12)
                for one, other in zip(found[names[0]], found[name], strict=True)
                for a, b in zip(getattr(one, kind), getattr(other, kind), strict=True)
            )
            for kind in kinds
        }
        for name in names[1:]
    }
