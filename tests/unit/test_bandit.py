"""Where optimism explores and where it does not: the hard-exploration bandit, found as asserted.

With the objective really maximised a moderate α draws the rare best answer in most seeds, and neither α = 0 nor a
large α does. With plain gradient ascent, which is what training a network is, no α does: the term's gradient on an
answer is α (π - π_ref), nothing for an answer that both leave alone.
"""

from __future__ import annotations

import functools

import pytest
import torch

import bandit
from bandit import BEST, BETA, GOLD, REFERENCE, Outcome

ALPHAS = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0)


@functools.cache
def played(alpha: float, optimiser: str) -> Outcome:
    return bandit.play(alpha, optimiser)  # pyright: ignore[reportArgumentType]


def share(outcome: Outcome) -> float:
    return outcome.found.double().mean().item()


def test_the_optimum_is_the_rare_answer():
    best = bandit.optimal_log_policy(GOLD).exp()
    assert REFERENCE.sum().item() == pytest.approx(1) and REFERENCE.argmin() == BEST == GOLD.argmax()
    assert (best @ GOLD).item() == pytest.approx(0.994, abs=1e-3)
    assert best[BEST] > 0.98


def test_the_oracle_finds_the_rare_answer_with_moderate_optimism_and_not_without():
    with_optimism, without = played(0.1, "oracle"), played(0.0, "oracle")
    assert share(without) == 0
    assert share(with_optimism) > 0.7
    assert with_optimism.gold.mean() > 0.8 > 0.4 > without.gold.mean()
    assert with_optimism.gap.mean() < without.gap.mean() / 3
    assert int((with_optimism.found & ~without.found).sum()) >= 17  # of 24 seeds; a sign test needs 6


def test_more_optimism_is_not_better_without_end():
    found = [share(played(alpha, "oracle")) for alpha in ALPHAS]
    assert min(found[2:4]) > 0.7  # 0.1 and 0.3
    assert max(found[0], found[1], found[4], found[5]) < 0.2
    gaps = [played(alpha, "oracle").gap.mean().item() for alpha in ALPHAS]
    assert min(range(len(ALPHAS)), key=gaps.__getitem__) == ALPHAS.index(0.1)
    assert gaps[4] > gaps[0] and gaps[5] > gaps[0], "too much optimism ends worse than none"


@pytest.mark.parametrize("alpha", ALPHAS)
def test_plain_gradient_ascent_finds_it_at_no_alpha(alpha):
    outcome = played(alpha, "local")
    assert share(outcome) == 0
    assert outcome.gold.max() < 0.7
    assert (outcome.gap > 0.15).all()


def test_the_same_holds_when_the_likelihood_has_the_slope_of_the_labels():
    oracle, local = (bandit.play(0.1, optimiser, fit_slope=bandit.LABEL_SLOPE) for optimiser in ("oracle", "local"))
    assert share(oracle) > 0.9 and oracle.gap.mean() < 0.03
    assert share(local) == 0 and local.gap.mean() > 0.2


def test_ascent_never_descends_and_the_oracle_is_never_worse():
    draws = torch.Generator().manual_seed(3)
    start = 2 * torch.rand(5, 9, bandit.NUM_ARMS, generator=draws, dtype=torch.float64) - 1
    total = torch.rand(5, 1, len(bandit.FIRST), generator=draws, dtype=torch.float64)
    total /= total.sum(-1, keepdim=True)
    ahead = total * torch.rand(total.shape, generator=draws, dtype=torch.float64)
    for alpha in (0.0, 0.1, 3.0):
        values = [bandit.objective(start, ahead, total, alpha=alpha, slope=1.0)]
        reward = start
        for _ in range(10):
            reward, value = bandit.climb(reward, ahead, total, alpha=alpha, slope=1.0, num_steps=1)
            values.append(value)
        assert (torch.stack(values).diff(dim=0) >= -1e-12).all()
        assert reward.abs().max() <= 1


def test_the_objective_is_the_likelihood_plus_alpha_times_the_inner_maximum():
    """β log Z - E_ref r = max over π of E_π r - E_ref r - β KL(π‖π_ref), reached by π_r."""
    draws = torch.Generator().manual_seed(4)
    reward = 2 * torch.rand(3, 1, bandit.NUM_ARMS, generator=draws, dtype=torch.float64) - 1
    nothing = torch.zeros(3, 1, len(bandit.FIRST), dtype=torch.float64)
    log_policy = bandit.optimal_log_policy(reward)
    kl = (log_policy.exp() * (log_policy - bandit.LOG_REFERENCE)).sum(-1)
    inner = (log_policy.exp() * reward).sum(-1) - reward @ REFERENCE - BETA * kl
    torch.testing.assert_close(bandit.objective(reward, nothing, nothing, alpha=1.0, slope=1.0), inner)
    one = torch.zeros_like(nothing)
    one[..., bandit.PLACE[2, 5]] = 1
    value = bandit.objective(reward, one, one, alpha=0.0, slope=1.0)
    torch.testing.assert_close(value, torch.nn.functional.logsigmoid(reward[..., 2] - reward[..., 5]))
