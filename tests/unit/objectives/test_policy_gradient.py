"""The surrogates and their statistics by hand, and what masks and micro-batches must not change."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prefkit.objectives import divergence
from prefkit.objectives.kl_penalty import kl_reward, token_rewards
from prefkit.objectives.policy_gradient import (
    clipped_surrogate,
    group_normalised,
    leave_one_out,
    ratio_sums,
    sequence_surrogate,
)
from prefkit.objectives.reduce import sum_tokens
from prefkit.objectives.value import clipped_value_loss, gae, whiten

ONE = torch.tensor([[True]])


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(b: int = 5, t: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_probs with gradient, old ones, advantages and a mask whose last row is empty."""
    draw = torch.Generator().manual_seed(seed)
    old, shift, advantages = torch.randn(3, b, t, generator=draw, dtype=torch.float64)
    mask = torch.rand(b, t, generator=draw) < 0.7
    mask[0, 0], mask[-1] = True, False
    return (old + 0.3 * shift).requires_grad_(), old, advantages, mask


def single(ratio: float, advantage: float, **settings: float) -> tuple[float, float]:
    """Loss of one token and its slope in log π."""
    log_prob = tensor(math.log(ratio)).unsqueeze(0).requires_grad_()
    loss = clipped_surrogate(log_prob, torch.zeros_like(log_prob), tensor(advantage).unsqueeze(0), ONE, **settings)
    return loss.item(), torch.autograd.grad(loss.sum(), log_prob)[0].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # good and already likelier: held at 1.2
        (0.5, 2.0, -1.0, -1.0),  # good and less likely: free to come back
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),  # bad and already rarer: held at 0.8
        (1.5, -2.0, 3.0, 3.0),  # bad and likelier: free to go down
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_one_token_by_hand(ratio, advantage, loss, slope):
    assert single(ratio, advantage) == (pytest.approx(loss), pytest.approx(slope))


def test_the_other_bounds_by_hand():
    assert single(1.25, 2.0, clip_high=0.28) == (pytest.approx(-2.5), pytest.approx(-2.5))
    assert single(1.5, 2.0, clip_high=0.28) == (pytest.approx(-2.56), 0.0)
    assert single(0.7, -2.0, clip_high=0.28) == (pytest.approx(1.6), 0.0)  # the lower bound stays
    assert single(2.0, -2.0, dual_clip=3.0) == (pytest.approx(4.0), pytest.approx(4.0))
    assert single(5.0, -2.0, dual_clip=3.0) == (pytest.approx(6.0), 0.0)
    assert single(5.0, -2.0) == (pytest.approx(10.0), pytest.approx(10.0))
    assert single(5.0, 2.0, dual_clip=3.0) == single(5.0, 2.0)


def test_an_exploding_ratio_is_cut_and_seen():
    loss, slope = single(math.exp(200), -2.0)
    assert loss == pytest.approx(2 * math.exp(20)) and slope == 0.0
    away = tensor(200.0).unsqueeze(0)
    sums = ratio_sums(away, torch.zeros_like(away), -torch.ones_like(away), ONE)
    assert sums.largest.tolist() == [200.0] and sums.ratio.item() == pytest.approx(math.exp(20))
    low, high = (-torch.inf * torch.ones(1, 1), torch.zeros(1, 1))
    assert torch.isfinite(clipped_surrogate(high, low, -torch.ones(1, 1), ONE)).all()


def test_a_ratio_of_one_gives_the_sum_of_advantages_and_nothing_clipped():
    log_probs, _, advantages, mask = batch()
    loss = clipped_surrogate(log_probs, log_probs, advantages, mask)
    torch.testing.assert_close(loss, -sum_tokens(advantages, mask))
    slope = torch.autograd.grad(loss.sum(), log_probs)[0]
    torch.testing.assert_close(slope, torch.where(mask, -advantages, 0.0))
    sums = ratio_sums(log_probs, log_probs, advantages, mask)
    assert not sums.clipped.any() and not sums.approx_kl.any() and not sums.largest.any()
    assert torch.equal(sums.ratio, mask.sum(-1).double()) and torch.equal(sums.tokens, mask.sum(-1))
    assert not sums.ratio.requires_grad


def test_statistics_agree_with_the_loss():
    """Clipped tokens are those whose gradient is gone; the KL is the estimate that is never negative."""
    log_probs, old, advantages, mask = batch(40, 9, seed=1)
    slope = torch.autograd.grad(clipped_surrogate(log_probs, old, advantages, mask).sum(), log_probs)[0]
    sums = ratio_sums(log_probs, old, advantages, mask)
    assert torch.equal(sums.clipped, ((slope == 0) & mask).sum(-1)) and sums.clipped.sum() > 20
    difference = (log_probs - old).detach()
    torch.testing.assert_close(sums.approx_kl, sum_tokens(difference.exp() - 1 - difference, mask))
    torch.testing.assert_close(sums.ratio, sum_tokens(difference.exp(), mask))
    assert torch.equal(sums.largest, torch.where(mask, difference.abs(), 0.0).amax(-1))


def test_a_sequence_is_one_action():
    log_probs, old, _, mask = batch()
    advantages = tensor(1.0, -1.0, 0.5, -2.0, 7.0)
    loss = sequence_surrogate(log_probs, old, advantages, mask)
    ratio = sum_tokens(log_probs - old, mask).exp()
    torch.testing.assert_close(loss[:4], torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)[:4])
    assert loss[4] == 0, "a row without actions"
    slope = torch.autograd.grad(loss.sum(), log_probs)[0]
    assert bool((slope[~mask] == 0).all())
    for row, used in zip(slope[:4], mask[:4], strict=True):
        assert len(set(row[used].tolist())) == 1, "every token of an answer has the same coefficient"

    whole = [sum_tokens(x, mask).unsqueeze(-1) for x in (log_probs, old)]
    sums = ratio_sums(*whole, advantages.unsqueeze(-1), mask.any(-1, keepdim=True))
    torch.testing.assert_close(sums.ratio[:4], ratio[:4].detach())
    start = sequence_surrogate(old, old, advantages, mask)
    torch.testing.assert_close(start, -torch.where(mask.any(-1), advantages, 0.0))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_not_a_number_at_an_action_is_not_hidden(which):
    *tensors, mask = (x.detach().clone() for x in batch())
    tensors[which][0, 0] = torch.nan
    for dual_clip in (None, 3.0):
        loss = clipped_surrogate(*tensors, mask, dual_clip=dual_clip)
        assert loss[0].isnan() and torch.isfinite(loss[1:]).all()
    if which < 2:
        assert ratio_sums(*tensors, mask).largest[0].isnan()


@pytest.mark.parametrize("loss", [clipped_surrogate, sequence_surrogate])
def test_micro_batches_over_the_global_count_are_one_batch(loss):
    """Also where one micro-batch has no action at all."""
    log_probs, old, advantages, mask = batch()
    if loss is sequence_surrogate:
        advantages = advantages[:, 0]
    count = mask.sum()
    whole = loss(log_probs, old, advantages, mask).sum() / count
    expected = torch.autograd.grad(whole, log_probs)[0]
    parts = [slice(0, 1), slice(1, 4), slice(4, 5)]
    pieces = [loss(log_probs[part], old[part], advantages[part], mask[part]).sum() / count for part in parts]
    assert pieces[2] == 0
    torch.testing.assert_close(torch.stack(pieces).sum(), whole)
    slopes = [torch.autograd.grad(piece, log_probs)[0] for piece in pieces]
    assert bool(torch.isfinite(slopes[2]).all())
    torch.testing.assert_close(torch.stack(slopes).sum(0), expected)


def test_half_precision_is_widened():
    log_probs, old, advantages, mask = (x.bfloat16() if x.is_floating_point() else x for x in batch())
    assert clipped_surrogate(log_probs, old, advantages, mask).dtype == torch.float32


def test_leaving_one_out():
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 6.0]])
    expected = torch.tensor([[1.5, -1.5, 0.0], [-3.0, -3.0, 6.0]])
    torch.testing.assert_close(leave_one_out(scores), expected)
    mixed = torch.tensor([4, 0, 1, 3, 5, 2])
    groups = torch.tensor([8, 8, 8, 1, 1, 1])
    torch.testing.assert_close(leave_one_out(scores.flatten()[mixed], groups[mixed]), expected.flatten()[mixed])
    torch.testing.assert_close(leave_one_out(scores), divergence.leave_one_out(scores))
    uneven = leave_one_out(torch.tensor([1.0, 5.0, 5.0, 5.0, 2.0]), torch.tensor([0, 1, 1, 1, 0]))
    assert uneven.tolist() == [-1.0, 0.0, 0.0, 0.0, 1.0]


def test_normalising_in_the_group():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1e6 + 0.1, 1e6 + 0.1, 1e6 + 0.1]])
    assert group_normalised(scores, scale=False).tolist() == [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]
    scaled = group_normalised(scores, scale=True)
    torch.testing.assert_close(scaled[0], torch.tensor([1.0, -1.0, 0.0]) / (1 + 1e-4))
    assert scaled[1].tolist() == [0.0, 0.0, 0.0]
    near = torch.tensor([[0.0, 1e-9]])
    assert group_normalised(near, scale=True).abs().max() < 1e-4, "noise is not blown up"


def test_the_paper_profile_is_other_masks():
    """The released DR-PO: KL, whitening and value loss on every position, policy loss off the prefix alone."""
    draw = torch.Generator().manual_seed(3)
    b, t, cuts, eos = 2, 7, torch.tensor([3, 0]), torch.tensor([4, 2])
    log_probs, ref, values = torch.randn(3, b, t, generator=draw, dtype=torch.float64)
    scores = torch.where(torch.tensor([False, True]), -1.0, tensor(0.7, 0.4))  # no EOS: replaced, not reduced
    everywhere = torch.ones(b, t, dtype=torch.bool)
    chosen = torch.arange(t) >= cuts.unsqueeze(-1)

    rewards = token_rewards(kl_reward(log_probs, ref, everywhere, coefficient=0.05), scores, eos, everywhere)
    rewards = whiten(rewards, everywhere, keep_mean=True)
    advantages, returns = gae(rewards, values, everywhere)
    advantages = whiten(advantages, everywhere)
    policy = clipped_surrogate(log_probs + 0.1, log_probs, advantages, chosen)
    value = clipped_value_loss(values + 0.3, values, returns, everywhere)

    r = -0.05 * (log_probs - ref)
    r[0, 4] += 0.7
    r[1, 2] -= 1.0
    r = (r - r.mean()) / (r.var(correction=0) + 1e-8).sqrt() + r.mean()
    raw, ahead = torch.zeros(b, t, dtype=torch.float64), torch.zeros(b, dtype=torch.float64)
    for i in reversed(range(t)):
        following = values[:, i + 1] if i + 1 < t else torch.zeros_like(ahead)
        ahead = r[:, i] + following - values[:, i] + 0.95 * ahead
        raw[:, i] = ahead
    a = (raw - raw.mean()) / (raw.var(correction=0) + 1e-8).sqrt()
    grown = math.exp(0.1)
    torch.testing.assert_close(policy, torch.where(chosen, -grown * a, 0.0).sum(-1))
    far = torch.maximum((0.3 - raw) ** 2, (0.2 - raw) ** 2)
    torch.testing.assert_close(value, far.sum(-1) / 2)


def test_refusals():
    log_probs, old, advantages, mask = batch()
    with pytest.raises(ValueError, match="advantages is"):
        clipped_surrogate(log_probs, old, advantages[:, 0], mask)
    with pytest.raises(ValueError, match=r"one \(b, t\)"):
        clipped_surrogate(log_probs, old, advantages, mask[:, :2])
    with pytest.raises(ValueError, match="one per row"):
        sequence_surrogate(log_probs, old, advantages, mask)
    for wrong in ({"clip": 0.0}, {"clip": 1.0}, {"clip": math.nan}, {"clip_high": 0.0}, {"dual_clip": 1.0}):
        with pytest.raises(ValueError, match="clip"):
            clipped_surrogate(log_probs, old, advantages, mask, **wrong)
    with pytest.raises(ValueError, match="above 0"):
        clipped_surrogate(log_probs, old, advantages, mask, max_log_ratio=0.0)
    with pytest.raises(ValueError, match="2 or more"):
        leave_one_out(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="one answer"):
        leave_one_out(torch.zeros(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="with groups"):
        leave_one_out(torch.zeros(3))
    with pytest.raises(ValueError, match="must be one"):
        leave_one_out(torch.zeros(3), torch.zeros(2))
    for shape in ((3,), (3, 1)):
        with pytest.raises(ValueError, match="2 or more"):
            group_normalised(torch.zeros(shape), scale=True)
