"""Win rates by hand, ties, judges' probabilities, and length beside the outcome."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkit.evaluation import winrate


def test_by_hand_with_a_tie():
    result = winrate.from_scores([3, 1, 2, 5], [1, 2, 2, 0])
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.rate.mean == 2.5 / 4
    assert result.rate.n == 4


def test_tie_width_widens_ties():
    assert winrate.outcomes([1.0, 1.0, 1.0], [0.9, 0.5, 1.05], tie_width=0.1).tolist() == [0.5, 1.0, 0.5]
    with pytest.raises(ValueError, match="tie_width"):
        winrate.outcomes([1], [1], tie_width=-1)


def test_a_missing_score_is_no_tie():
    with pytest.raises(ValueError, match="missing score"):
        winrate.from_scores([1.0, math.nan], [1.0, 1.0])
    with pytest.raises(ValueError, match="equal length"):
        winrate.outcomes([1.0], [1.0, 2.0])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=20))
@settings(max_examples=30, deadline=None)
def test_the_two_sides_sum_to_one(rows):
    a, b, groups = map(list, zip(*rows, strict=True))
    forth = winrate.from_scores(a, b, groups, num_resamples=50)
    back = winrate.from_scores(b, a, groups, num_resamples=50)
    assert forth.rate.mean + back.rate.mean == pytest.approx(1)
    assert (forth.wins, forth.ties) == (back.losses, back.ties)
    assert forth.p == back.p


def test_groups_widen_the_interval():
    a, b, films = [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], ["x", "x", "x", "y", "y", "y"]
    assert (winrate.from_scores(a, b, films).rate.low, winrate.from_scores(a, b, films).rate.high) == (0, 1)
    assert winrate.from_scores(a, b).rate.low > 0


def test_probabilities_are_averaged_and_counted():
    result = winrate.from_probabilities([0.9, 0.5, 0.2])
    assert result.rate.mean == pytest.approx(1.6 / 3)
    assert (result.wins, result.ties, result.losses) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        winrate.from_probabilities([1.2])


def test_exact_p_of_eight_straight_wins():
    assert winrate.from_scores([1] * 8, [0] * 8).p == 2 / 2**8


def test_lengths_by_hand():
    found = winrate.lengths([10, 20, 30], [10, 10, 10], [0.5, 0.0, 1.0])
    assert (found.mean_a, found.mean_b, found.difference.mean) == (20, 10, 10)
    assert found.share_longer == pytest.approx(2.5 / 3)
    assert found.slope == pytest.approx(0.025)  # gaps 0, 10, 20 against 0.5, 0, 1: cov 5/3, var 200/3
    assert (found.rate_when_longer, found.rate_when_shorter) == (0.5, None)
    assert winrate.lengths([5, 5], [4, 4], [1, 0]).slope is None
    with pytest.raises(ValueError, match="outcomes"):
        winrate.lengths([5, 5], [4, 4], [1])
