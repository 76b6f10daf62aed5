"""The KL as reward and as loss: values, which gradients are right, and where the score falls."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prefkit.objectives.divergence import state_kl
from prefkit.objectives.kl_penalty import (
    adaptive_coefficient,
    kl_loss,
    kl_reward,
    last_action,
    log_ratio,
    token_rewards,
)

YES, NO = True, False


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    """Policy logits with gradient, the logits of an older policy and of the reference: one state, five tokens."""
    draw = torch.Generator().manual_seed(0)
    policy, old, reference = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    return policy.requires_grad_(), old, reference


def column(log_probs: Tensor) -> Tensor:
    return log_probs.unsqueeze(-1)


def mean_gradient(kind: str, *, sampler: str, weighted: bool) -> Tensor:
    """Exact mean of the loss's gradient, each token in proportion to the sampler's probability."""
    policy, old, reference = distributions()
    drawn = {"policy": policy.detach(), "old": old}[sampler].log_softmax(-1)
    every = torch.ones(5, 1, dtype=torch.bool)
    log_probs = (column(policy.log_softmax(-1)), column(reference.log_softmax(-1)))
    loss = kl_loss(*log_probs, every, kind=kind, old_log_probs=column(drawn) if weighted else None)
    return torch.autograd.grad((drawn.exp() * loss).sum(), policy)[0]


def true_gradient(*, forward: bool = False) -> Tensor:
    policy, _, reference = distributions()
    kl = state_kl(reference, policy) if forward else state_kl(policy, reference)
    return torch.autograd.grad(kl, policy)[0]


@pytest.mark.parametrize("sampler", ["policy", "old"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_weighted_by_the_ratio_every_kind_has_the_gradient_of_the_kl(kind, sampler):
    torch.testing.assert_close(mean_gradient(kind, sampler=sampler, weighted=True), true_gradient())


def test_unweighted_only_k2_has_it_and_only_for_fresh_samples():
    torch.testing.assert_close(mean_gradient("k2", sampler="policy", weighted=False), true_gradient())
    assert not torch.allclose(mean_gradient("k2", sampler="old", weighted=False), true_gradient(), rtol=0.05)
    torch.testing.assert_close(mean_gradient("k3", sampler="policy", weighted=False), true_gradient(forward=True))
    with pytest.raises(ValueError, match="mean zero"):
        mean_gradient("k1", sampler="policy", weighted=False)


def test_the_means_of_k1_and_k3_are_the_kl():
    policy, _, reference = distributions()
    new, ref = column(policy.log_softmax(-1)), column(reference.log_softmax(-1))
    every = torch.ones(5, 1, dtype=torch.bool)
    probs = policy.softmax(-1)
    for kind in ("k1", "k3"):
        mean = (probs * kl_loss(new, ref, every, kind=kind, old_log_probs=new)).sum()
        torch.testing.assert_close(mean, state_kl(policy, reference))
    assert kl_loss(new, ref, every).min() >= 0


def test_k3_stays_finite_and_off_the_mask_nothing_counts():
    new = torch.tensor([[-500.0, -1.0, torch.nan]], requires_grad=True)
    ref = torch.tensor([[-1.0, -1.0, torch.inf]])
    loss = kl_loss(new, ref, torch.tensor([[YES, YES, NO]]))
    assert loss.item() == pytest.approx(math.exp(20) - 21)
    assert torch.autograd.grad(loss.sum(), new)[0].tolist() == [[0.0, 0.0, 0.0]]


def test_the_reward_is_zero_before_the_first_update():
    draw = torch.Generator().manual_seed(1)
    log_probs = torch.randn(3, 4, generator=draw).requires_grad_()
    reward = kl_reward(log_probs, log_probs.detach(), torch.rand(3, 4, generator=draw) < 0.5, coefficient=0.05)
    assert not reward.any() and not reward.requires_grad


def test_where_the_score_falls():
    """Rows: ended early, used up all tokens, the end alone, behind a forced prefix, no action at all."""
    mask = torch.tensor([[YES, YES, NO], [YES, YES, YES], [YES, NO, NO], [NO, NO, YES], [NO, NO, NO]])
    ends = last_action(mask)
    assert ends.tolist() == [1, 2, 0, 2, 0]
    kl = torch.full((5, 3), 0.5)
    kl[4] = torch.nan
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, torch.nan])
    assert token_rewards(kl, scores, ends, mask).tolist() == [
        [0.5, 1.5, 0.0],
        [0.5, 0.5, 2.5],
        [3.5, 0.0, 0.0],
        [0.0, 0.0, 4.5],
        [0.0, 0.0, 0.0],
    ]
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    assert token_rewards(kl[:1], scores[:1], torch.tensor([1]), everywhere).tolist() == [[0.5, 1.5, 0.5]]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(12.0, 0.151536), (3.0, 0.148464), (6.0, 0.15), (6.6, 0.150768), (100.0, 0.151536), (0.0, 0.148464)],
)
def test_the_adaptive_coefficient_table(kl, expected):
    assert adaptive_coefficient(0.15, kl, target=6.0, horizon=10_000, episodes=512) == pytest.approx(expected, rel=1e-9)


def test_refusals():
    two = torch.zeros(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="other is"):
        log_ratio(two, two[:, :2], mask)
    with pytest.raises(ValueError, match="above 0"):
        log_ratio(two, two, mask, bound=0.0)
    with pytest.raises(ValueError, match="one of k1, k2, k3"):
        kl_loss(two, two, mask, kind="k4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no action"):
        token_rewards(two, two[:, 0], torch.tensor([2, 3]), mask)
    with pytest.raises(ValueError, match="no action"):
        token_rewards(two, two[:, 0], torch.tensor([2, 2]), torch.tensor([[YES, YES, NO], [YES, YES, YES]]))
    with pytest.raises(ValueError, match="scores"):
        token_rewards(two, two, torch.tensor([2, 2]), mask)
    for wrong in ({"target": 0.0}, {"horizon": 0.0}, {"kl": math.nan}, {"coefficient": -1.0}):
        settings = {"coefficient": 0.1, "kl": 1.0, "target": 6.0, "horizon": 1e4, "episodes": 1, **wrong}
        with pytest.raises(ValueError, match="must be above 0"):
            adaptive_coefficient(settings.pop("coefficient"), settings.pop("kl"), **settings)
