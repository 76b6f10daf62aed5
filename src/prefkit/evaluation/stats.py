"""Means with honest intervals: bootstrap over groups, paired differences, sign-flip test, t interval.

Held-out rows that share a source (reviews of one film, answers to one prompt) are not independent. Every
function takes `groups`, one label per value, and treats the *group* as the unit that could have been drawn
otherwise.

Shapes: n values in G groups. The mean is always over values, sum(values) / n, so large groups weigh more; a
resample draws G groups with replacement and divides its sum by its own count (ratio of sums).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]

CELLS_AT_ONCE = 4_000_000
"""resamples x groups drawn in one go: bounds memory near 100 MB whatever the data size"""
EXACT_GROUPS = 14
"""up to so many groups the sign-flip test visits all 2^G flips"""


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it. A single group says nothing about spread: low, high are -inf, inf."""

    mean: float
    low: float
    high: float
    n: int
    groups: int
    level: float
    method: str

    def excludes(self, value: float) -> bool:
        """True when the value lies strictly outside [low, high]."""
        return value < self.low or value > self.high

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; an unbounded end is null."""
        fields = asdict(self)
        return fields | {end: fields[end] if math.isfinite(fields[end]) else None for end in ("low", "high")}


def bootstrap(
    values: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the mean of `values` (n,), resampling whole groups.

    Without `groups` every value is its own group. Deterministic for a seed. Raises ValueError for no values,
    NaN or infinite values, a wrong number of groups, or a level outside (0, 1).
    """
    array, sums, counts = _grouped(values, groups)
    _check_level(level)
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    mean, n, num_groups = float(array.mean()), len(array), len(sums)
    if num_groups == 1:
        return Interval(mean, -math.inf, math.inf, n, 1, level, "bootstrap")
    means = _resampled_means(sums, counts, num_resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # Rounding in the sums must not push an interval of equal values off their mean.
    return Interval(mean, min(float(low), mean), max(float(high), mean), n, num_groups, level, "bootstrap")


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Bootstrap interval of mean(a - b), where a[i] and b[i] (n,) are measured on the same row."""
    differences = _differences(a, b)
    interval = bootstrap(differences, groups, num_resamples=num_resamples, seed=seed, level=level)
    return replace(interval, method="paired bootstrap")


def sign_flip_p(
    a: ArrayLike,
    b: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p of 'swapping a and b within a group changes nothing', by flipping the groups' signs.

    Exact up to EXACT_GROUPS groups, else a Monte Carlo estimate that counts the observed flip, so never 0.
    """
    _, sums, _ = _grouped(_differences(a, b), groups)
    observed = abs(float(sums.sum()))
    slack = 1e-12 * float(np.abs(sums).sum())  # flips equal in exact arithmetic must count as ties
    if len(sums) <= EXACT_GROUPS:
        flips = np.array(list(product((1.0, -1.0), repeat=len(sums))))
        return float(np.mean(np.abs(flips @ sums) >= observed - slack))
    rng = np.random.default_rng(seed)
    extreme = 0
    for size in _chunks(num_resamples, len(sums)):
        flips = rng.integers(0, 2, size=(size, len(sums))) * 2.0 - 1.0
        extreme += int(np.count_nonzero(np.abs(flips @ sums) >= observed - slack))
    return (1 + extreme) / (1 + num_resamples)


def t_interval(values: ArrayLike, groups: Sequence[Hashable] | None = None, *, level: float = 0.95) -> Interval:
    """Student t interval of the mean (n,), its standard error summed over groups, with G - 1 degrees of
    freedom.
    """
    array, sums, counts = _grouped(values, groups)
    _check_level(level)
    mean, n, num_groups = float(array.mean()), len(array), len(sums)
    if num_groups == 1:
        return Interval(mean, -math.inf, math.inf, n, 1, level, "t")
    residuals = sums - counts * mean
    error = math.sqrt(num_groups / (num_groups - 1) * float(residuals @ residuals)) / n
    reach = float(stdtrit(num_groups - 1, (1 + level) / 2)) * error
    return Interval(mean, mean - reach, mean + reach, n, num_groups, level, "t")


def _resampled_means(sums: Floats, counts: Floats, num_resamples: int, seed: int) -> Floats:
    """(num_resamples,) means of bootstrap samples of the groups."""
    rng = np.random.default_rng(seed)
    means: list[Floats] = []
    for size in _chunks(num_resamples, len(sums)):
        drawn = rng.integers(0, len(sums), size=(size, len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


def _chunks(num_resamples: int, num_groups: int) -> list[int]:
    size = max(1, CELLS_AT_ONCE // num_groups)
    whole, rest = divmod(num_resamples, size)
    return [size] * whole + ([rest] if rest else [])


def _grouped(values: ArrayLike, groups: Sequence[Hashable] | None) -> tuple[Floats, Floats, Floats]:
    """values (n,), sums (G,), counts (G,); groups in order of first appearance."""
    array = _vector(values, "values")
    if groups is None:
        return array, array, np.ones_like(array)
    if len(groups) != len(array):
        raise ValueError(f"{len(array)} values but {len(groups)} groups: each value needs one group")
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(group, len(places)) for group in groups])
    sums = np.bincount(index, weights=array).astype(np.float64)
    return array, sums, np.bincount(index).astype(np.float64)


def _differences(a: ArrayLike, b: ArrayLike) -> Floats:
    first, second = _vector(a, "a"), _vector(b, "b")
    if len(first) != len(second):
        raise ValueError(f"paired values need equal lengths, got {len(first)} and {len(second)}")
    return first - second


def _vector(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if not len(array):
        raise ValueError(f"{name} is empty: there is nothing to average")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(
            f"{name}[{bad[0]}] is {array[bad[0]]} ({len(bad)} of {len(array)} are not finite): "
            "find out why before averaging"
        )
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
