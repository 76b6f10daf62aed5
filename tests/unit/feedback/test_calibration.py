from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkit.feedback.calibration import (
    HIGHEST,
    LOWEST,
    calibrate,
    fit_temperature,
    logit,
    mean_nll,
    reliability,
    tempered,
)


def judged(num: int, *, sharp: float, seed: int = 0) -> tuple[list[float], list[float]]:
    """A judge whose logits are `sharp` times the true ones: (probabilities, labels drawn from the true ones)."""
    rng = random.Random(seed)
    truth = [rng.gauss(0, 1.5) for _ in range(num)]
    labels = [float(rng.random() < 1 / (1 + math.exp(-x))) for x in truth]
    return [1 / (1 + math.exp(-sharp * x)) for x in truth], labels


@pytest.mark.parametrize("sharp", [0.5, 1.0, 3.0, 6.0])
def test_the_temperature_of_an_over_or_under_confident_judge_is_found(sharp: float):
    probs, labels = judged(20_000, sharp=sharp)
    assert fit_temperature(probs, labels) == pytest.approx(sharp, rel=0.05)


def test_calibration_mends_an_over_confident_judge():
    found = calibrate(*judged(5_000, sharp=4.0))
    assert found.ece_before > 0.08 and found.ece_after < 0.03
    assert found.nll_after < found.nll_before - 0.2
    assert not found.bounded and found.to_json()["bounded"] is False
    assert sum(one.num for one in found.bins_after) == found.num == 5_000


def test_it_is_the_minimum():
    probs, labels = judged(300, sharp=2.5)
    best = fit_temperature(probs, labels)

    def nll(temperature: float) -> float:
        return mean_nll([tempered(p, temperature) for p in probs], labels)

    assert all(nll(best) <= nll(best * factor) for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2))
    slope = sum(logit(p) * (tempered(p, best) - y) for p, y in zip(probs, labels, strict=True))
    assert slope == pytest.approx(0, abs=1e-9)


def test_the_worked_case():
    """0.9 said, 3 of 4 right: σ(logit 0.9 / T) = 0.75 gives T = 2 exactly."""
    assert fit_temperature([0.9] * 4, [1, 1, 1, 0]) == pytest.approx(2, abs=1e-9)
    error, _ = reliability([0.9] * 4, [1, 1, 1, 0])
    assert error == pytest.approx(0.15)
    assert mean_nll([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_a_judge_that_is_right_on_a_few_pairs_is_not_taken_for_certain():
    """All of n labels agree: the strength they earn is (n + 1) / (n + 2), and more of them earn more."""
    for num in (4, 40, 400):
        found = calibrate([0.8] * num, [1.0] * num)
        assert tempered(0.8, found.temperature) == pytest.approx((num + 1) / (num + 2), abs=1e-9)
        assert not found.bounded


def test_labels_that_always_or_never_agree_reach_the_bounds():
    assert fit_temperature([0.8, 0.7, 0.1], [1, 1, 0]) == LOWEST
    assert fit_temperature([0.8, 0.7, 0.1], [0, 0, 1]) == HIGHEST
    assert fit_temperature([0.5, 0.5], [1, 0]) == 1
    assert calibrate([0.99, 0.01] * 20, [0, 1] * 20).bounded


def test_bins_count_a_pair_by_the_answer_the_judge_prefers():
    error, bins = reliability([0.95, 0.05, 0.62, 0.5], [1, 1, 1, 0])
    assert [(one.num, one.confidence, one.accuracy) for one in bins] == [
        (1, 0.5, 0.5),
        (1, 0.62, 1.0),
        (2, pytest.approx(0.95), 0.5),
    ]
    assert error == pytest.approx((0 + 0.38 + 2 * 0.45) / 4)


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0])), min_size=1, max_size=30))
def test_swapping_answers_and_labels_changes_nothing(pairs: list[tuple[float, float]]):
    probs, labels = [p for p, _ in pairs], [y for _, y in pairs]
    other = [1 - p for p in probs], [1 - y for y in labels]
    assert fit_temperature(*other) == pytest.approx(fit_temperature(probs, labels), rel=1e-5)
    assert mean_nll(*other) == pytest.approx(mean_nll(probs, labels), rel=1e-3, abs=1e-9)
    assert LOWEST <= fit_temperature(probs, labels) <= HIGHEST


@given(st.floats(0, 1), st.floats(LOWEST, HIGHEST))
def test_tempering_keeps_sides_and_ends_in_probabilities(p: float, temperature: float):
    after = tempered(p, temperature)
    assert 0 <= after <= 1
    assert (after > 0.5) <= (p > 0.5) and (after < 0.5) <= (p < 0.5)
    assert tempered(p, 1.0) == p


def test_bad_arguments():
    for probs, labels in (([], []), ([0.5], [1, 0]), ([1.5], [1]), ([0.5], [2]), ([math.nan], [1])):
        with pytest.raises(ValueError):
            fit_temperature(probs, labels)
