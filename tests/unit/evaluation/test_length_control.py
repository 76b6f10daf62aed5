"""Win rates at equal length: what length explains is taken out, what it does not explain stays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from prefkit.evaluation.length_control import RIDGE, length_controlled


def drawn(n: int, theta: float, phi: float, *, longer: float = 0.0, seed: int = 0):
    """Outcomes of the model itself; A's answers are `longer` characters longer on average."""
    rng = np.random.default_rng(seed)
    b = rng.integers(50, 150, n).astype(float)
    a = b + rng.normal(longer, 40, n)
    scale = np.sqrt(np.mean((a - b) ** 2))
    p = 1 / (1 + np.exp(-(theta + phi * np.tanh((a - b) / scale))))
    return (rng.random(n) < p).astype(float), a, b


def test_where_length_explains_everything_the_rate_is_one_half() -> None:
    won, a, b = drawn(6000, theta=0.0, phi=3.0, longer=40)
    found = length_controlled(won, a, b, num_resamples=300)
    assert won.mean() > 0.75, "A wins by its length"
    assert found.rate.mean == pytest.approx(0.5, abs=0.03)
    assert found.rate.low < 0.5 < found.rate.high


def test_the_longer_answer_always_wins() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 250, 400).astype(float), rng.integers(1, 160, 400).astype(float)
    won = (a > b).astype(float) + 0.5 * (a == b)
    found = length_controlled(won, a, b, num_resamples=300)
    assert won.mean() > 0.65 and found.slope > 5
    assert found.rate.low < 0.5 < found.rate.high, "a step at 0 says nothing about which side of it 0 is on"


def test_quality_stays_and_length_goes() -> None:
    won, a, b = drawn(4000, theta=0.4, phi=1.5, longer=40)
    found = length_controlled(won, a, b, num_resamples=200)
    assert won.mean() > 0.72
    assert found.rate.mean == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.04)
    assert found.slope == pytest.approx(1.5, abs=0.25)


def test_the_fit_is_the_maximum_of_the_stated_objective() -> None:
    won, a, b = drawn(60, theta=-0.3, phi=0.8, seed=3)
    x = np.tanh((a - b) / np.sqrt(np.mean((a - b) ** 2)))

    def objective(w):
        z = w[0] + w[1] * x
        return np.sum(np.logaddexp(0, z) - won * z) + 0.5 * RIDGE * (w @ w)

    best = minimize(objective, [0.0, 0.0], tol=1e-12).x
    found = length_controlled(won, a, b, num_resamples=10)
    assert found.rate.mean == pytest.approx(1 / (1 + math.exp(-best[0])), abs=1e-6)
    assert found.slope == pytest.approx(best[1], abs=1e-5)


def test_swapping_the_sides_mirrors_the_rate() -> None:
    won, a, b = drawn(80, theta=0.5, phi=1.0, longer=30, seed=1)
    one, other = length_controlled(won, a, b, num_resamples=50), length_controlled(1 - won, b, a, num_resamples=50)
    assert one.rate.mean == pytest.approx(1 - other.rate.mean, abs=1e-9)
    assert one.slope == pytest.approx(other.slope, abs=1e-9)


def test_equal_lengths_leave_the_plain_rate() -> None:
    found = length_controlled([1, 1, 1, 0], [5, 6, 7, 8], [5, 6, 7, 8], num_resamples=50)
    assert found.rate.mean == pytest.approx(0.75, abs=1e-3)
    assert (found.slope, found.scale) == (0.0, 0.0)


@pytest.mark.parametrize("won", [[1.0] * 6, [0.0] * 6])
def test_one_sided_outcomes_stay_finite(won: list[float]) -> None:
    found = length_controlled(won, [9, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 6], num_resamples=100)
    assert math.isfinite(found.slope) and 0 < found.rate.low <= found.rate.mean <= found.rate.high < 1
    assert abs(found.rate.mean - won[0]) < 0.2


def test_groups_are_what_is_resampled() -> None:
    won, a, b = drawn(60, theta=0.5, phi=1.0)
    alone = length_controlled(won, a, b, num_resamples=400)
    twice = length_controlled(
        np.repeat(won, 2), np.repeat(a, 2), np.repeat(b, 2), np.repeat(np.arange(60), 2), num_resamples=400
    )
    assert twice.rate.groups == 60 and twice.rate.n == 120
    assert twice.rate.high - twice.rate.low == pytest.approx(alone.rate.high - alone.rate.low, rel=0.25)
    assert length_controlled(won, a, b, ["x"] * 60).rate.high == math.inf
    assert length_controlled(won, a, b, seed=1) == length_controlled(won, a, b, seed=1)


@pytest.mark.parametrize(
    ("won", "a", "b"), [([], [], []), ([1.0], [1, 2], [1, 2]), ([2.0], [1], [2]), ([1.0], [math.nan], [1])]
)
def test_what_is_no_outcome_is_refused(won, a, b) -> None:
    with pytest.raises(ValueError):
        length_controlled(won, a, b)
