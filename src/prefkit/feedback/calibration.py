"""How far a judge's probabilities can be believed: one temperature fitted on labelled pairs, and what it changes.

    p_T = σ(logit(p) / T)        T = argmin  mean[ -y log p_T - (1-y) log(1 - p_T) ]

An over-confident judge gets T > 1. Order, accuracy and p = 1/2 stay what they are. In a = 1/T the objective is convex,
so its minimum is where the slope is 0, found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "Bin",
    "Calibration",
    "calibrate",
    "fit_temperature",
    "logit",
    "mean_nll",
    "reliability",
    "sigmoid",
    "tempered",
]

CLIP = 1e-12
"""probabilities are taken as at least this far from 0 and 1, so that logits are finite"""
LOWEST, HIGHEST = 0.01, 100.0
"""temperatures: labels that agree with the judge on every pair ask for 0, labels that contradict it for infinity"""
BINS = 10


def logit(p: float) -> float:
    """log p/(1-p), finite at 0 and 1.

    >>> logit(0.5)
    0.0
    """
    p = min(max(p, CLIP), 1 - CLIP)
    return math.log(p) - math.log1p(-p)


def tempered(p: float, temperature: float) -> float:
    """σ(logit(p) / temperature); temperature 1 gives p back.

    >>> round(tempered(0.9, 2.0), 6)
    0.75
    """
    if temperature == 1:
        return p
    return sigmoid(logit(p) / temperature)


def fit_temperature(probs: Sequence[float], labels: Sequence[float]) -> float:
    """The temperature with the least negative log-likelihood, within [0.01, 100].

    Args:
        probs: (n,) judged probabilities that the first answer of each pair is better.
        labels: (n,) 1 where it is, 0 where the second is, between for labels that are themselves unsure.

    Raises:
        ValueError: no pairs, different lengths, values outside [0, 1].

    >>> round(fit_temperature([0.9] * 4, [1, 1, 1, 0]), 6)
    2.0
    """
    _check(probs, labels)
    logits = [logit(p) for p in probs]

    def slope(a: float) -> float:
        return math.fsum(x * (sigmoid(a * x) - y) for x, y in zip(logits, labels, strict=True))

    if slope(1 / HIGHEST) >= 0:  # no positive 1/T beats knowing nothing, or only a smaller one than the bound
        return 1.0 if not any(logits) else HIGHEST
    if slope(1 / LOWEST) <= 0:
        return LOWEST
    low, high = 1 / HIGHEST, 1 / LOWEST
    while low < (middle := (low + high) / 2) < high:  # bisection down to neighbouring numbers: the slope only rises
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / high


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs of which the judge was about equally sure."""

    low: float
    high: float
    num: int
    confidence: float
    """mean probability the judge gave to the answer it preferred"""
    accuracy: float
    """share of these pairs where the label says the same"""


def reliability(probs: Sequence[float], labels: Sequence[float], *, bins: int = BINS) -> tuple[float, list[Bin]]:
    """Expected calibration error and the bins behind it, which are not empty and equally wide over [1/2, 1].

        ECE = Σ_bins (n_bin / n) |accuracy - confidence|

    A pair counts by the answer the judge prefers, so that swapping answers and label changes nothing; p = 1/2 prefers
    neither and is right half the time. Raises ValueError as `fit_temperature`.
    """
    _check(probs, labels)
    inside: dict[int, list[tuple[float, float]]] = {}
    for p, y in zip(probs, labels, strict=True):
        sure, right = (p, y) if p > 0.5 else (1 - p, 1 - y) if p < 0.5 else (0.5, 0.5)
        inside.setdefault(min(int((sure - 0.5) * 2 * bins), bins - 1), []).append((sure, right))
    found = [
        Bin(
            low=0.5 + place / (2 * bins),
            high=0.5 + (place + 1) / (2 * bins),
            num=len(members),
            confidence=math.fsum(sure for sure, _ in members) / len(members),
            accuracy=math.fsum(right for _, right in members) / len(members),
        )
        for place, members in sorted(inside.items())
    ]
    return math.fsum(one.num * abs(one.accuracy - one.confidence) for one in found) / len(probs), found


def mean_nll(probs: Sequence[float], labels: Sequence[float]) -> float:
    """Mean negative log-likelihood of the labels, in nats; log 2 is that of knowing nothing."""
    _check(probs, labels)
    logits = [logit(p) for p in probs]
    return math.fsum(_softplus(-x) * y + _softplus(x) * (1 - y) for x, y in zip(logits, labels, strict=True)) / len(
        probs
    )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A temperature and how well the probabilities fit the labels before and after it; nll in nats."""

    temperature: float
    num: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    bins_before: Sequence[Bin]
    bins_after: Sequence[Bin]

    @property
    def bounded(self) -> bool:
        """Whether the labels ask for a temperature beyond the range."""
        return self.temperature in (LOWEST, HIGHEST)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"bounded": self.bounded}


def calibrate(probs: Sequence[float], labels: Sequence[float]) -> Calibration:
    """Fit the temperature and measure it on the same pairs: one number fitted, so the gain is hardly flattered.

    It is fitted to labels drawn in by one pair of each kind, (n y + 1) / (n + 2), as Platt proposed: a judge that is
    right on all of a few pairs has not earned certainty. Raises ValueError as `fit_temperature`.
    """
    num = len(probs)
    temperature = fit_temperature(probs, [(num * y + 1) / (num + 2) for y in labels])
    after = [tempered(p, temperature) for p in probs]
    ece_before, bins_before = reliability(probs, labels)
    ece_after, bins_after = reliability(after, labels)
    return Calibration(
        temperature=temperature,
        num=num,
        nll_before=mean_nll(probs, labels),
        nll_after=mean_nll(after, labels),
        ece_before=ece_before,
        ece_after=ece_after,
        bins_before=bins_before,
        bins_after=bins_after,
    )


def _check(probs: Sequence[float], labels: Sequence[float]) -> None:
    if not probs or len(probs) != len(labels):
        raise ValueError(
            f"{len(probs)} probabilities and {len(labels)} labels: as many of both are needed, one or more"
        )
    if not all(0 <= value <= 1 for value in (*probs, *labels)):
        raise ValueError("probabilities and labels must lie in [0, 1]")


def sigmoid(x: float) -> float:
    """1/(1 + e^-x), for any x.

    >>> sigmoid(0.0)
    0.5
    """
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
