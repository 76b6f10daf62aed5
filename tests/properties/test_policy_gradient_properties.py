"""What holds for every mask, ratio and advantage: nothing leaks, sums agree, gradients are those of the return."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefkit.objectives.kl_penalty import kl_loss, kl_reward, last_action, token_rewards
from prefkit.objectives.policy_gradient import (
    clipped_surrogate,
    group_normalised,
    leave_one_out,
    ratio_sums,
    sequence_surrogate,
)
from prefkit.objectives.reduce import sum_tokens
from prefkit.objectives.value import clipped_value_loss, explained_variance, gae, moments, whiten
from token_mdp import END, Paths, TokenMdp, every_path

JUNK = (1e6, -1e6, float("nan"), float("inf"), float("-inf"))


@dataclass(frozen=True)
class Batch:
    """Five (b, t) tensors of normal numbers, a mask, and scores (b,)."""

    tensors: Tensor
    mask: Tensor
    scores: Tensor

    def spoilt(self, junk: float) -> Batch:
        scores = torch.where(self.mask.any(-1), self.scores, junk)
        return Batch(torch.where(self.mask, self.tensors, junk), self.mask, scores)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    b, t = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=b * t, max_size=b * t))).reshape(b, t)
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = torch.randn(5, b, t, generator=numbers, dtype=torch.float64)
    return Batch(tensors, mask, torch.randn(b, generator=numbers, dtype=torch.float64))


def every_loss(batch: Batch) -> tuple[list[Tensor], Tensor]:
    """All per-row losses and statistics, and the gradient of the losses in log π and V, (2, b, t)."""
    leaves = batch.tensors[:2].clone().requires_grad_()
    (new, value), (old, ref, reward), mask = leaves, batch.tensors[2:], batch.mask
    scores = batch.scores
    rewards = token_rewards(kl_reward(new, ref, mask, coefficient=0.1), scores, last_action(mask), mask)
    advantages, returns = gae(rewards + reward, value, mask)
    white = whiten(advantages, mask)
    losses = [
        clipped_surrogate(new, old, white, mask),
        clipped_surrogate(new, old, advantages, mask, clip_high=0.3, dual_clip=3.0),
        sequence_surrogate(new, old, torch.where(mask.any(-1), scores, 0.0), mask),
        kl_loss(new, ref, mask),
        kl_loss(new, ref, mask, kind="k2"),
        kl_loss(new, ref, mask, kind="k1", old_log_probs=old),
        clipped_value_loss(value, old, returns, mask),
    ]
    sums = ratio_sums(new, old, advantages, mask)
    said = [sums.ratio, sums.approx_kl, sums.clipped.double(), sums.largest, rewards.sum(-1), returns.sum(-1)]
    explained = explained_variance(value, returns, mask).nan_to_num().reshape(1)
    (slope,) = torch.autograd.grad(torch.stack(losses).sum(), leaves)
    return [*(loss.detach() for loss in losses), *said, explained, moments(value, mask)], slope


@given(batches(), st.sampled_from(JUNK))
def test_what_stands_off_the_mask_enters_neither_value_nor_gradient(batch, junk):
    values, slope = every_loss(batch)
    again, same_slope = every_loss(batch.spoilt(junk))
    assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True))
    assert all(bool(torch.isfinite(value).all()) for value in values)
    assert torch.equal(slope, same_slope)
    assert bool((slope[:, ~batch.mask] == 0).all())


@given(batches(), st.integers(0, 3), st.integers(0, 3), st.sampled_from(JUNK))
def test_padding_on_either_side_and_more_rows_change_nothing(batch, left, right, junk):
    def wide(x: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(x.double(), (left, right, 0, 1), value=fill)

    scores = torch.cat([batch.scores, torch.tensor([junk], dtype=torch.float64)])
    tensors = torch.stack([wide(x, junk) for x in batch.tensors])
    more = Batch(tensors, wide(batch.mask, 0.0).bool(), scores)
    values, slope = every_loss(batch)
    again, wide_slope = every_loss(more)
    b, t = batch.mask.shape
    for one, other in zip(values, again, strict=True):
        other = other[:b] if len(other) == b + 1 and len(one) == b else other
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(wide_slope[:, :b, left : left + t], slope, rtol=1e-9, atol=1e-9)


def slow_gae(batch: Batch, gamma: float, lam: float) -> Tensor:
    """Σ over u ≥ t of (γλ)^(u-t) δ_u, as long as every token from t to u is an action."""
    rewards, values = batch.tensors[0], batch.tensors[1]
    b, t = batch.mask.shape
    acts = [[bool(batch.mask[i, u]) if u < t else False for u in range(t + 1)] for i in range(b)]
    out = torch.zeros(b, t, dtype=torch.float64)
    for i in range(b):
        for start in range(t):
            for u in range(start, t):
                if not all(acts[i][start : u + 1]):
                    break
                ahead = values[i, u + 1] if acts[i][u + 1] else 0.0
                out[i, start] += (gamma * lam) ** (u - start) * (rewards[i, u] + gamma * ahead - values[i, u])
    return out


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
@settings(max_examples=25)
@given(batches())
def test_gae_is_the_double_sum(gamma, lam, batch):
    advantages, returns = gae(batch.tensors[0], batch.tensors[1], batch.mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, slow_gae(batch, gamma, lam), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(returns, torch.where(batch.mask, advantages + batch.tensors[1], 0.0))


@given(batches(), st.integers(0, 6))
def test_without_discount_gae_is_the_reward_to_go_minus_the_value(batch, begin):
    """On masks without gaps: from a cut to the end of the row's answer."""
    b, t = batch.mask.shape
    place, cut = torch.arange(t), min(begin, t - 1)
    mask = (place >= cut) & (place <= cut + batch.mask.sum(-1, keepdim=True))
    rewards, values = (torch.where(mask, x, 0.0) for x in batch.tensors[:2])
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    advantages, returns = gae(*batch.tensors[:2], mask, lam=1.0)
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0.0))
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0))
    assert advantages.shape == (b, t)


@given(batches())
def test_a_ratio_of_one_clips_nothing(batch):
    new, advantages, mask = batch.tensors[0], batch.tensors[1], batch.mask
    torch.testing.assert_close(clipped_surrogate(new, new, advantages, mask), -sum_tokens(advantages, mask))
    sums = ratio_sums(new, new, advantages, mask)
    assert not sums.clipped.any() and not sums.approx_kl.any()
    assert torch.equal(sums.ratio, sums.tokens.double())


@given(batches(), st.floats(0.01, 0.9), st.floats(0.01, 3))
def test_clipping_never_makes_an_update_look_better(batch, clip, clip_high):
    new, old, advantages = batch.tensors[:3]
    ratio = (new - old).exp()
    free = -sum_tokens(ratio * advantages, batch.mask)
    clipped = clipped_surrogate(new, old, advantages, batch.mask, clip=clip, clip_high=clip_high)
    capped = clipped_surrogate(new, old, advantages, batch.mask, clip=clip, clip_high=clip_high, dual_clip=1.5)
    assert bool((clipped >= free - 1e-9).all()) and bool((capped <= clipped + 1e-9).all())


@given(batches(), st.integers(1, 4), st.data())
def test_micro_batches_over_the_global_count_are_one_batch(batch, parts, data):
    order = torch.tensor(data.draw(st.permutations(range(len(batch.mask)))))
    count = batch.mask.sum().clamp(min=1)

    def step(rows: Tensor, leaves: Tensor) -> Tensor:
        (new, value), (old, advantages, returns), mask = leaves[:, rows], batch.tensors[2:, rows], batch.mask[rows]
        policy = clipped_surrogate(new, old, advantages, mask)
        return ((policy + 0.1 * clipped_value_loss(value, old, returns, mask)) / count).sum()

    together, apart = (batch.tensors[:2].clone().requires_grad_() for _ in range(2))
    step(torch.arange(len(order)), together).backward()
    for rows in order.chunk(parts):
        step(rows, apart).backward()
    assert together.grad is not None and apart.grad is not None
    torch.testing.assert_close(apart.grad, together.grad, rtol=1e-12, atol=1e-12)


@given(batches(), st.floats(-10, 10), st.floats(0.1, 10))
def test_whitened_numbers_have_mean_0_and_variance_1(batch, shift, scale):
    x, mask = batch.tensors[0] * scale + shift, batch.mask
    white, kept = whiten(x, mask), whiten(x, mask, keep_mean=True)
    inside = white[mask]
    assert not white[~mask].any() and not kept[~mask].any()
    if mask.sum() > 1 and x[mask].var(correction=0) > 1e-3:
        assert inside.mean().item() == pytest.approx(0, abs=1e-9)
        assert inside.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    if mask.any():
        assert kept[mask].mean().item() == pytest.approx(x[mask].mean().item(), abs=1e-9)
        torch.testing.assert_close(inside, whiten(batch.tensors[0], mask)[mask], atol=1e-3, rtol=1e-3)
    half = len(mask) // 2
    both = moments(x[:half], mask[:half]) + moments(x[half:], mask[half:])
    torch.testing.assert_close(both, moments(x, mask))


@given(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=5), min_size=1, max_size=4), st.floats(-5, 5))
def test_advantages_of_a_group_sum_to_zero_and_ignore_a_constant(lists, shift):
    scores = torch.tensor([x for group in lists for x in group], dtype=torch.float64)
    groups = torch.tensor([i for i, group in enumerate(lists) for _ in group])
    advantages = leave_one_out(scores, groups)
    totals = torch.zeros(len(lists), dtype=torch.float64).index_add(0, groups, advantages)
    torch.testing.assert_close(totals, torch.zeros_like(totals), rtol=0, atol=1e-9)
    torch.testing.assert_close(leave_one_out(scores + shift, groups), advantages, rtol=1e-9, atol=1e-9)
    row = torch.tensor([lists[0]], dtype=torch.float64)
    k = row.shape[1]
    centred = group_normalised(row, scale=False)
    torch.testing.assert_close(centred * k / (k - 1), leave_one_out(row), rtol=1e-9, atol=1e-9)
    assert group_normalised(row, scale=True).abs().max() <= k**0.5


# ---- U19: two states, two tokens, three steps, the first token forced


def two_states(reward: Tensor) -> tuple[TokenMdp, Paths]:
    """Token 0 leads to state 0, token 1 to state 1, where a second 1 ends; of three tokens the first is forced: 1."""
    next_state = torch.tensor([[0, 1], [0, END]])
    mdp = TokenMdp(next_state=next_state, reward=reward, log_reference=torch.zeros(2, 2).double(), horizon=3)
    paths = every_path(mdp)
    kept = paths.tokens[:, 0] == 1
    return mdp, Paths(states=paths.states[kept], tokens=paths.tokens[kept], mask=paths.mask[kept])


def differences(function, at: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a function of (2, 2) logits."""
    slopes = []
    for i in range(at.numel()):
        off = torch.zeros(at.numel(), dtype=torch.float64)
        off[i] = step
        off = off.reshape(at.shape)
        slopes.append((function(at + off) - function(at - off)) / (2 * step))
    return torch.stack(slopes).reshape(at.shape)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_at_a_ratio_of_one_the_surrogate_has_the_gradient_of_the_exact_return(seed, lam):
    """With λ = 1 under any critic, and with any λ under the exact one; the prefix is fixed and has no share."""
    numbers = torch.Generator().manual_seed(seed)
    logits, reward, noise = torch.randn(3, 2, 2, generator=numbers, dtype=torch.float64)
    _, paths = two_states(reward)
    act = paths.mask & (torch.arange(3) >= 1)
    rewards = paths.per_token(reward)

    def of_paths(at: Tensor) -> Tensor:
        return torch.where(act, paths.per_token(at.log_softmax(-1)), 0.0)

    old = of_paths(logits)
    probs = old.sum(-1).exp()
    torch.testing.assert_close(probs.sum(), torch.ones((), dtype=torch.float64))

    def exact_return(at: Tensor) -> Tensor:
        return (of_paths(at).sum(-1).exp() * rewards.sum(-1)).sum()

    last = (logits.softmax(-1) * reward).sum(-1)  # value of each state with one token to go
    ahead = torch.where(torch.tensor([[True, True], [True, False]]), last[torch.tensor([[0, 1], [0, 0]])], 0.0)
    two_to_go = (logits.softmax(-1) * (reward + ahead)).sum(-1)
    exact = torch.stack([torch.zeros_like(last), two_to_go, last])[torch.arange(3), paths.states]
    wrong = exact + noise[0][paths.states]
    advantages = gae(rewards, wrong if lam == 1 else exact, act, lam=lam)[0]

    def objective(at: Tensor) -> Tensor:
        return (probs * clipped_surrogate(of_paths(at), old, advantages, act)).sum()

    leaf = logits.clone().requires_grad_()
    (analytic,) = torch.autograd.grad(objective(leaf), leaf)
    torch.testing.assert_close(differences(objective, logits), analytic, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(-differences(exact_return, logits), analytic, atol=1e-7, rtol=1e-5)
