"""The win rate at equal length: a logistic regression of the outcome on the difference in length.

    P(A beats B) = σ(θ + φ tanh(Δ / s)),    Δ = length of A's answer - length of B's

with s the root mean square of Δ, and the rate is σ(θ), what the model predicts at Δ = 0. The form of the length term is
AlpacaEval 2's (Dubois et al. 2024, arXiv 2404.04475, equation 1), without its terms for the model pair's strength on
each instruction, which need many models. Both parameters have a wide normal prior, a ridge of RIDGE/2 (θ² + φ²), and so
stay finite where length, or one side, explains every outcome.

Where one side's answers are always the longer ones, Δ = 0 lies outside the data, and the rate is an extrapolation.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from prefkit.evaluation.stats import Floats, Interval

RIDGE = 1e-3
"""precision of the prior: a standard deviation of 32, felt only where the data would send a parameter to infinity"""
STEPS = 40
"""Newton steps; the fit has two parameters and a concave objective"""
CELLS_AT_ONCE = 2_000_000
"""resamples x rows fitted in one go"""


@dataclass(frozen=True, kw_only=True)
class LengthControlled:
    """`rate` is the win rate predicted at equal length; `slope` is φ, above 0 where longer answers win."""

    rate: Interval
    slope: float
    scale: float
    """s, in the unit of the lengths; 0 where all differences are 0"""


def length_controlled(
    won: ArrayLike,
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    num_resamples: int = 2_000,
    seed: int = 0,
    level: float = 0.95,
) -> LengthControlled:
    """Length-controlled win rate of A over B from outcomes (n,) in [0, 1] and both answers' lengths (n,).

    The interval is a percentile bootstrap over groups; s stays as in the data. One group leaves it unbounded. Raises
    ValueError for no rows, unequal lengths, or outcomes outside [0, 1].
    """
    y = np.asarray(won, dtype=np.float64)
    gap = np.asarray(lengths_a, dtype=np.float64) - np.asarray(lengths_b, dtype=np.float64)
    if y.ndim != 1 or not len(y) or y.shape != gap.shape:
        raise ValueError(f"{y.shape} outcomes and {gap.shape} lengths: one of each per row is needed")
    if not ((y >= 0) & (y <= 1)).all() or not np.isfinite(gap).all():
        raise ValueError("outcomes must lie in [0, 1], and lengths must be finite")
    scale = float(np.sqrt(np.mean(gap**2)))
    x = np.tanh(gap / scale) if scale else np.zeros_like(gap)
    counts = _counts(len(y), groups)
    theta, phi = _fit(x, y, np.ones((1, len(y))))
    mean = float(_sigmoid(theta)[0])
    low, high = -math.inf, math.inf
    if len(counts) > 1:
        rates = _sigmoid(_resampled(x, y, counts, num_resamples, seed))
        ends = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
        low, high = min(float(ends[0]), mean), max(float(ends[1]), mean)
    rate = Interval(mean, low, high, len(y), len(counts), level, "bootstrap, length-controlled")
    return LengthControlled(rate=rate, slope=float(phi[0]), scale=scale)


def _counts(n: int, groups: Sequence[Hashable] | None) -> Floats:
    """(G, n) membership of rows in groups, in order of first appearance."""
    labels = range(n) if groups is None else groups
    if len(labels) != n:
        raise ValueError(f"{n} rows but {len(labels)} groups")
    places: dict[Hashable, int] = {}
    index = [places.setdefault(label, len(places)) for label in labels]
    member = np.zeros((len(places), n))
    member[index, np.arange(n)] = 1.0
    return member


def _resampled(x: Floats, y: Floats, member: Floats, num_resamples: int, seed: int) -> Floats:
    """(num_resamples,) θ of bootstrap samples of the groups."""
    rng = np.random.default_rng(seed)
    num_groups = len(member)
    size = max(1, CELLS_AT_ONCE // max(len(y), num_groups))
    found: list[Floats] = []
    for start in range(0, num_resamples, size):
        rows = min(size, num_resamples - start)
        drawn = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=rows).astype(np.float64)
        found.append(_fit(x, y, drawn @ member)[0])
    return np.concatenate(found)


def _fit(x: Floats, y: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """θ and φ (r,) that maximise the weighted log-likelihood plus the priors, for weights (r, n), by Newton's method.

    Steps are cut to length 2: the objective is concave, and far out its curvature vanishes.
    """
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(STEPS):
        p = _sigmoid(theta[:, None] + phi[:, None] * x)
        error, curve = weights * (y - p), weights * p * (1 - p)
        g0, g1 = error.sum(1) - RIDGE * theta, error @ x - RIDGE * phi
        h00, h01, h11 = curve.sum(1) + RIDGE, curve @ x, curve @ (x * x) + RIDGE
        det = h00 * h11 - h01 * h01
        d0, d1 = (h11 * g0 - h01 * g1) / det, (h00 * g1 - h01 * g0) / det
        cut = np.minimum(1.0, 2.0 / np.maximum(np.hypot(d0, d1), 1e-300))
        theta, phi = theta + cut * d0, phi + cut * d1
    return theta, phi


def _sigmoid(values: Floats) -> Floats:
    return 0.5 * (1.0 + np.tanh(0.5 * values))
