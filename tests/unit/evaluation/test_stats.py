"""Intervals: hand-worked numbers, full enumeration, simulated coverage, properties, refusals."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit.evaluation.stats import bootstrap, paired_bootstrap, sign_flip_p, t_interval

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


def every_resample(values, groups):
    """Means of all G^G bootstrap samples of the groups, each equally likely."""
    members = {group: [v for v, g in zip(values, groups, strict=True) if g == group] for group in dict.fromkeys(groups)}
    drawn = product(members, repeat=len(members))
    return [np.mean([value for group in sample for value in members[group]]) for sample in drawn]


def test_two_values_have_three_possible_means():
    # {0,0}, {0,1} twice, {1,1}: the 2.5 % and 97.5 % points are the ends, the quartiles lie at 0 and 1 or 0.5.
    interval = bootstrap([0.0, 1.0])
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.0, 1.0)
    assert (interval.n, interval.groups, interval.level, interval.method) == (2, 2, 0.95, "bootstrap")
    narrow = bootstrap([0.0, 1.0], level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_groups_are_resampled_as_ratio_of_sums():
    values, groups = [1.0, 1.0, 1.0, 4.0, 0.0], ["a", "a", "a", "b", "c"]
    means = every_resample(values, groups)
    interval = bootstrap(values, groups, num_resamples=60_000, level=0.8)
    assert interval.mean == pytest.approx(7 / 5)  # over values, not over group means
    assert interval.low == pytest.approx(np.quantile(means, 0.1))
    assert interval.high == pytest.approx(np.quantile(means, 0.9))
    # one plain bootstrap over the values would not give this
    assert bootstrap(values, num_resamples=60_000, level=0.8).high != pytest.approx(interval.high)


@pytest.mark.parametrize("low_share", [0.05, 0.3, 0.45])
def test_quantiles_equal_full_enumeration(low_share):
    values, groups = [0.3, 1.7, 2.2, -1.0, 0.9, 5.0], [1, 1, 2, 3, 3, 4]
    means = np.sort(every_resample(values, groups))
    interval = bootstrap(values, groups, num_resamples=50_000, level=1 - 2 * low_share)
    # the Monte Carlo quantile must lie between the exact quantiles a little to either side
    assert np.quantile(means, max(low_share - 0.01, 0)) <= interval.low <= np.quantile(means, low_share + 0.01)


def test_coverage_with_clusters():
    """About 95 % of grouped intervals hold the truth; treating rows as independent covers far less."""
    rng = np.random.default_rng(7)
    grouped = flat = 0
    trials, groups = 200, np.repeat(np.arange(40), 5)
    for trial in range(trials):
        values = np.repeat(rng.normal(size=40), 5) + 0.3 * rng.normal(size=200)
        grouped += not bootstrap(values, groups.tolist(), num_resamples=400, seed=trial).excludes(0)
        flat += not bootstrap(values, num_resamples=400, seed=trial).excludes(0)
    assert 0.88 <= grouped / trials <= 0.99
    assert flat / trials < 0.75


def test_t_interval_by_hand():
    # values 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2; 0.975) = 4.302653
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.high - 2 == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert interval.low == pytest.approx(4 - interval.high)


def test_t_interval_of_equal_groups_is_that_of_group_means():
    values, groups = [1.0, 3.0, 4.0, 4.0, 0.0, 1.0], [1, 1, 2, 2, 3, 3]
    grouped, means = t_interval(values, groups), t_interval([2.0, 4.0, 0.5])
    assert (grouped.low, grouped.high) == pytest.approx((means.low, means.high))


def test_sign_flip_by_hand():
    # differences 1, 2, 3: of 8 flips only +++ and --- reach |6|
    assert sign_flip_p([1, 2, 3], [0, 0, 0]) == 2 / 8
    # groups {1, 2} and {3}: sums 3 and 3, of 4 flips two reach 6
    assert sign_flip_p([1, 2, 3], [0, 0, 0], ["a", "a", "b"]) == 2 / 4
    assert sign_flip_p([1, -1], [0, 0]) == 1.0


def test_sign_flip_monte_carlo_agrees_with_the_normal_limit():
    rng = np.random.default_rng(0)
    difference = rng.normal(0.2, 1, size=100)
    z = abs(difference.sum()) / math.sqrt((difference**2).sum())
    assert sign_flip_p(difference, np.zeros(100)) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
    assert sign_flip_p(np.ones(100), np.zeros(100)) == pytest.approx(1 / 10_001)  # never 0


def test_paired_is_the_bootstrap_of_differences():
    a, b, groups = [1.0, 2.0, 4.0, 3.0], [0.5, 2.5, 1.0, 3.0], ["x", "x", "y", "z"]
    paired, plain = paired_bootstrap(a, b, groups), bootstrap(np.subtract(a, b), groups)
    assert (paired.mean, paired.low, paired.high) == (plain.mean, plain.low, plain.high)
    assert paired.method == "paired bootstrap"


def test_same_seed_same_interval_in_any_memory_budget(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    first = bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) == first != bootstrap(values, seed=4)
    monkeypatch.setattr("prefkit.evaluation.stats.CELLS_AT_ONCE", 1000)
    assert bootstrap(values, seed=3) == first


@given(VALUES, st.floats(-50, 50))
@settings(max_examples=40, deadline=None)
def test_shifting_the_values_shifts_the_interval(values, shift):
    plain, moved = bootstrap(values, num_resamples=200), bootstrap([v + shift for v in values], num_resamples=200)
    assert plain.low <= plain.mean <= plain.high
    assert (moved.low, moved.high) == pytest.approx((plain.low + shift, plain.high + shift), abs=1e-8)


@given(VALUES)
@settings(max_examples=40, deadline=None)
def test_swapping_the_sides_mirrors_the_difference(values):
    other = values[::-1]
    forth, back = paired_bootstrap(values, other, num_resamples=101), paired_bootstrap(other, values, num_resamples=101)
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low), abs=1e-8)
    assert sign_flip_p(values, other) == sign_flip_p(other, values)


@given(VALUES, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_order_inside_groups_does_not_matter(values, random):
    groups = [place % 3 for place in range(len(values))]
    members = {group: [v for v, g in zip(values, groups, strict=True) if g == group] for group in groups}
    for group in members.values():
        random.shuffle(group)
    shuffled = [members[group].pop() for group in groups]
    first, second = bootstrap(values, groups, num_resamples=100), bootstrap(shuffled, groups, num_resamples=100)
    assert (first.low, first.high) == pytest.approx((second.low, second.high), abs=1e-8)


@pytest.mark.parametrize("function", [bootstrap, t_interval])
def test_one_group_bounds_nothing(function):
    for interval in (function([0.9]), function([0.9, 0.8], ["film", "film"])):
        assert (interval.low, interval.high, interval.groups) == (-math.inf, math.inf, 1)
        assert not interval.excludes(0.5)
        assert interval.to_json()["low"] is None and interval.to_json()["high"] is None


def test_equal_values_give_a_point():
    interval = bootstrap([0.1] * 7, ["a", "a", "a", "b", "b", "c", "c"])
    assert interval.high - interval.low < 1e-15
    assert interval.low <= interval.mean <= interval.high
    assert not interval.excludes(0.1) and interval.excludes(0.2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap([1.0, math.nan]), r"values\[1\] is nan \(1 of 2"),
        (lambda: bootstrap([math.inf]), "not finite"),
        (lambda: bootstrap([]), "empty"),
        (lambda: bootstrap([[1.0], [2.0]]), "one-dimensional"),
        (lambda: bootstrap([1.0, 2.0], ["a"]), "2 values but 1 groups"),
        (lambda: bootstrap([1.0], level=95), "level"),
        (lambda: bootstrap([1.0, 2.0], num_resamples=0), "num_resamples"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0]), "equal lengths, got 2 and 1"),
        (lambda: sign_flip_p([1.0], [math.nan]), r"b\[0\]"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
