"""Advantages by hand, what may not carry across a mask's edge, the value loss, and whitening over parts."""

from __future__ import annotations

import pytest
import torch

from prefkit.objectives.value import (
    clipped_value_loss,
    explained_variance,
    gae,
    mean_and_variance,
    moments,
    unit_scale,
    whiten,
)

YES, NO = True, False


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_three_tokens_by_hand():
    """V = (1, 2, 3), r = (0, 0, 4), γ = 0.5, λ = 0.5: δ = (0, -0.5, 1)."""
    rewards, values = torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-0.0625, -0.25, 1.0]]
    assert returns.tolist() == [[0.9375, 1.75, 4.0]]


def test_each_run_of_the_mask_stands_alone():
    rewards, values = normal(1, 7), normal(1, 7, seed=1)
    mask = torch.tensor([[NO, YES, YES, NO, YES, YES, NO]])
    advantages, returns = gae(rewards, values, mask)
    for part in (slice(1, 3), slice(4, 6)):
        alone = gae(rewards[:, part], values[:, part], mask[:, part])
        torch.testing.assert_close((advantages[:, part], returns[:, part]), alone)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_a_forced_prefix_changes_nothing_behind_it():
    rewards, values = normal(2, 6), normal(2, 6, seed=1)
    everything = torch.ones(2, 6, dtype=torch.bool)
    behind = torch.arange(6) >= torch.tensor([[2], [5]])
    masked, whole = gae(rewards, values, behind)[0], gae(rewards, values, everything)[0]
    torch.testing.assert_close(masked[behind], whole[behind])
    assert not masked[~behind].any()


def test_advantages_carry_no_gradient_and_are_wide():
    values = normal(1, 3).bfloat16().requires_grad_()
    advantages, returns = gae(normal(1, 3).bfloat16(), values, torch.ones(1, 3, dtype=torch.bool))
    assert advantages.dtype == torch.float32 and not advantages.requires_grad and not returns.requires_grad


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (1.1, 0.5 * 0.9**2, -0.9),  # inside the band
        (1.5, 0.5 * 0.8**2, 0.0),  # beyond it towards the return: held at 1.2
        (0.5, 0.5 * 1.5**2, -1.5),  # beyond it away from the return: pulled back
    ],
)
def test_the_clipped_value_loss_by_hand(value, loss, slope):
    now = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    old, target, mask = torch.ones(1, 1), torch.full((1, 1), 2.0), torch.tensor([[YES]])
    got = clipped_value_loss(now, old.double(), target.double(), mask)
    assert got.item() == pytest.approx(loss)
    assert torch.autograd.grad(got.sum(), now)[0].item() == pytest.approx(slope)


def test_without_a_clip_it_is_half_the_squared_error():
    values, old, returns = normal(3, 2, 4)
    mask = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    expected = torch.where(mask, (values - returns) ** 2, 0.0).sum(-1) / 2
    torch.testing.assert_close(clipped_value_loss(values, old, returns, mask, clip=None), expected)
    torch.testing.assert_close(clipped_value_loss(values, old, returns, mask, clip=1e9), expected)


def test_whitening_of_little_and_of_nothing():
    x = torch.tensor([[5.0, 7.0], [torch.nan, 1e6]])
    one = torch.tensor([[YES, NO], [NO, NO]])
    assert whiten(x, one).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert whiten(x, one, keep_mean=True).tolist() == [[5.0, 0.0], [0.0, 0.0]]
    assert whiten(x, one & False).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    same = torch.full((4, 5), 100.1)
    assert not whiten(same, torch.ones(4, 5, dtype=torch.bool)).any()
    with pytest.raises(ValueError, match="go together"):
        whiten(x, one, mean=0.0)


def test_parts_whiten_as_one_through_their_moments():
    x, mask = normal(6, 5), torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[4:] = False
    whole = whiten(x, mask, keep_mean=True)
    parts = [(x[:1], mask[:1]), (x[1:4], mask[1:4]), (x[4:], mask[4:])]
    mean, var = mean_and_variance(torch.stack([moments(*part) for part in parts]).sum(0))
    torch.testing.assert_close(mean, x[mask].mean())
    torch.testing.assert_close(var, x[mask].var(correction=0))
    pieces = [whiten(*part, keep_mean=True, mean=mean, var=var) for part in parts]
    torch.testing.assert_close(torch.cat(pieces), whole)
    narrow = whiten(x.float(), mask, mean=float(mean), var=float(var))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), whiten(x, mask), atol=1e-5, rtol=0)


def test_running_scale():
    seen = moments(torch.tensor([2.0]), torch.tensor([YES]))
    assert unit_scale(torch.tensor([2.0]), seen).tolist() == [2.0], "one score has no spread"
    seen = seen + moments(torch.tensor([6.0]), torch.tensor([YES]))
    assert unit_scale(torch.tensor([2.0, 6.0]), seen).tolist() == [1.0, 3.0]
    assert unit_scale(torch.tensor([0.1]), moments(torch.full((7,), 0.1), torch.ones(7))).item() == pytest.approx(0.1)


def test_explained_variance():
    returns, mask = normal(2, 4), torch.tensor([[YES, YES, YES, NO], [YES, YES, NO, NO]])
    spoilt = torch.where(mask, returns, torch.nan)
    assert explained_variance(spoilt, spoilt, mask).item() == 1
    assert explained_variance(torch.full_like(returns, 3.0), spoilt, mask).item() == pytest.approx(0)
    assert explained_variance(returns / 2, spoilt, mask).item() == pytest.approx(0.75)
    assert explained_variance(-returns, spoilt, mask).item() == pytest.approx(-3)
    assert explained_variance(returns, torch.full_like(returns, 0.1), mask).isnan()


def test_refusals():
    two, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for wrong in ({"gamma": 1.1}, {"gamma": -0.1}, {"lam": 1.1}, {"lam": float("nan")}):
        with pytest.raises(ValueError, match="gamma and lam"):
            gae(two, two, mask, **wrong)
    with pytest.raises(ValueError, match="values is"):
        gae(two, two[0], mask)
    with pytest.raises(ValueError, match="returns is"):
        clipped_value_loss(two, two, two[:, :1], mask)
    with pytest.raises(ValueError, match="above 0"):
        clipped_value_loss(two, two, two, mask, clip=0.0)
    with pytest.raises(ValueError, match="one shape"):
        whiten(two, mask[0])
