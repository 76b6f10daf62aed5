"""Win rates of A over B on the same prompts, and what answer length has to do with them.

Pure functions over lists: the scores may come from a gold reward, a reward model or a judge.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from prefkit.evaluation.stats import Floats, Interval, bootstrap, paired_bootstrap, sign_flip_p


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often A beats B. `rate.mean` counts a tie as half a win; `p` tests 'A and B are exchangeable'."""

    rate: Interval
    wins: int
    ties: int
    losses: int
    p: float


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Answer lengths (tokens or words, as given) of A and B and their tie to winning.

    `slope` is the change of the outcome per unit of length difference (least squares), None when all
    differences are equal. `rate_when_longer` and `rate_when_shorter` are A's mean outcomes where its answer
    is the longer or the shorter one, None where there is no such prompt.
    """

    mean_a: float
    mean_b: float
    difference: Interval
    share_longer: float
    slope: float | None
    rate_when_longer: float | None
    rate_when_shorter: float | None


def outcomes(scores_a: ArrayLike, scores_b: ArrayLike, *, tie_width: float = 0.0) -> Floats:
    """1 where A scores higher, 0 where B does, 0.5 where they differ by `tie_width` or less. (n,), (n,) ->
    (n,)
    """
    if tie_width < 0:
        raise ValueError(f"tie_width must not be negative, got {tie_width}")
    first, second = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"scores must be two lists of equal length, got shapes {first.shape}, {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("scores must be finite; a missing score is not a tie")
    gap = first - second
    return np.where(np.abs(gap) <= tie_width, 0.5, (gap > 0).astype(np.float64))


def from_scores(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    tie_width: float = 0.0,
    num_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> WinRate:
    """Win rate of A over B from one score per prompt and side."""
    won = outcomes(scores_a, scores_b, tie_width=tie_width)
    return _win_rate(won, won, groups, num_resamples, seed, level)


def from_probabilities(
    prob_a: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> WinRate:
    """Win rate from a judge's probabilities (n,) that A's answer is the better one.

    `rate` averages the probabilities themselves; wins, ties and losses count above, at and below 0.5.
    """
    probabilities = np.asarray(prob_a, dtype=np.float64)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("a judge's probabilities must lie in [0, 1]")
    won = outcomes(probabilities, np.full_like(probabilities, 0.5))
    return _win_rate(probabilities, won, groups, num_resamples, seed, level)


def _win_rate(
    credit: Floats,
    won: Floats,
    groups: Sequence[Hashable] | None,
    num_resamples: int,
    seed: int,
    level: float,
) -> WinRate:
    rate = bootstrap(credit, groups, num_resamples=num_resamples, seed=seed, level=level)
    return WinRate(
        rate=rate,
        wins=int((won == 1).sum()),
        ties=int((won == 0.5).sum()),
        losses=int((won == 0).sum()),
        p=sign_flip_p(credit, 1 - credit, groups, num_resamples=num_resamples, seed=seed),
    )


def lengths(
    lengths_a: ArrayLike,
    lengths_b: ArrayLike,
    won: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Lengths:
    """Length statistics beside the outcomes `won` (n,) of A over B (1, 0.5 or 0, or probabilities)."""
    difference = paired_bootstrap(lengths_a, lengths_b, groups, num_resamples=num_resamples, seed=seed, level=level)
    first, second = np.asarray(lengths_a, dtype=np.float64), np.asarray(lengths_b, dtype=np.float64)
    outcome, gap = np.asarray(won, dtype=np.float64), first - second
    if outcome.shape != gap.shape:
        raise ValueError(f"{len(gap)} lengths but outcomes of shape {outcome.shape}")
    centred = gap - gap.mean()
    spread = float(centred @ centred)
    return Lengths(
        mean_a=float(first.mean()),
        mean_b=float(second.mean()),
        difference=difference,
        share_longer=float(outcomes(first, second).mean()),
        slope=float(centred @ outcome) / spread if spread > 0 else None,
        rate_when_longer=_mean_or_none(outcome[gap > 0]),
        rate_when_shorter=_mean_or_none(outcome[gap < 0]),
    )


def _mean_or_none(values: Floats) -> float | None:
    return float(math.fsum(values) / len(values)) if len(values) else None
