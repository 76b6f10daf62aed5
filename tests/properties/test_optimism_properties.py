"""What holds for optimism at every α, β and policy: the identities SELM is derived from, and the bounds of its loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prefkit.objectives.optimism import bounded_log_ratio, optimism_share, selm_loss, xpo_loss
from prefkit.objectives.preference import dpo_loss

betas = st.floats(0.01, 2)
alphas = st.floats(0, 5)
log_probs = st.floats(-200, 0)
sixes = st.lists(log_probs, min_size=6, max_size=6).map(lambda values: [tensor(x) for x in values])


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def per_arm(num: int, size: float = 5) -> st.SearchStrategy[Tensor]:
    return st.lists(st.floats(-size, size), min_size=num, max_size=num).map(lambda values: tensor(*values))


def rewards_and_policies(count: int) -> st.SearchStrategy[list[Tensor]]:
    """`count` vectors over one set of 2 to 6 answers."""
    return st.integers(2, 6).flatmap(lambda num: st.tuples(*[per_arm(num)] * count).map(list))


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def tilted(log_ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    return (log_ref + reward / beta).log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def inner(log_p: Tensor, reward: Tensor, log_ref: Tensor, beta: float) -> Tensor:
    """F(π; r) = E_π r - E_ref r - β KL(π‖π_ref)."""
    return log_p.exp() @ reward - log_ref.exp() @ reward - beta * kl(log_p, log_ref)


@given(sixes, betas, alphas)
def test_the_loss_is_dpo_plus_alpha_beta_times_the_log_ratio(six, beta, alpha):
    chosen, rejected, own, ref_chosen, ref_rejected, ref_own = six
    pair = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    same(selm_loss(*six, beta=beta, alpha=alpha), pair + alpha * beta * (own - ref_own))
    same(xpo_loss(*six[:5], beta=beta, alpha=alpha), pair + alpha * own)


@given(sixes, betas, st.floats(0, 2), st.floats(0, 2))
def test_the_loss_is_affine_in_alpha(six, beta, one, other):
    ends = [selm_loss(*six, beta=beta, alpha=alpha) for alpha in (2 * one, 2 * other)]
    same(selm_loss(*six, beta=beta, alpha=one + other), (ends[0] + ends[1]) / 2)


@given(sixes, betas, st.floats(0.001, 5), st.floats(0.1, 50))
def test_the_bound_bounds_the_loss_below_and_never_lowers_it(six, beta, alpha, most):
    bounded = selm_loss(*six, beta=beta, alpha=alpha, max_log_ratio=most)
    assert bounded >= -alpha * beta * most - 1e-9
    assert bounded >= selm_loss(*six, beta=beta, alpha=alpha) - 1e-9
    ratio = bounded_log_ratio(six[2], six[5], max_log_ratio=most)
    assert ratio >= -most and (ratio == -most or torch.equal(ratio, six[2] - six[5]))


@given(sixes, betas, st.floats(0, 5), st.floats(-100, 100))
def test_the_pair_sees_differences_and_the_own_answer_sees_its_ratio(six, beta, alpha, shift):
    """A normaliser common to the pair drops out; one that policy and reference share drops out everywhere."""
    chosen, rejected, own, ref_chosen, ref_rejected, ref_own = six
    plain = selm_loss(*six, beta=beta, alpha=alpha)
    pair = (chosen + shift, rejected + shift, own, ref_chosen, ref_rejected, ref_own)
    same(selm_loss(*pair, beta=beta, alpha=alpha), plain)
    both = (chosen, rejected, own + shift, ref_chosen, ref_rejected, ref_own + shift)
    same(selm_loss(*both, beta=beta, alpha=alpha), plain)


@given(sixes, betas, st.floats(0.001, 5), st.floats(0.1, 5))
def test_the_share_lies_in_0_1_and_grows_with_alpha_and_with_the_margin(six, beta, alpha, more):
    chosen, rejected, _, *refs, _ = six
    share = optimism_share(chosen, rejected, *refs, beta=beta, alpha=alpha)
    assert 0 < share <= 1
    assert optimism_share(chosen, rejected, *refs, beta=beta, alpha=alpha + more) >= share
    assert optimism_share(chosen + more, rejected, *refs, beta=beta, alpha=alpha) >= share


@given(rewards_and_policies(3), st.floats(0.2, 2), st.floats(-10, 10))
def test_no_policy_beats_the_tilted_reference_and_constants_do_not_count(three, beta, shift):
    reward, policy, reference = three
    log_p, log_ref = policy.log_softmax(-1), reference.log_softmax(-1)
    log_z = torch.logsumexp(log_ref + reward / beta, -1)
    most = beta * log_z - log_ref.exp() @ reward
    assert most >= -1e-9
    assert inner(log_p, reward, log_ref, beta) <= most + 1e-9
    best = tilted(log_ref, reward, beta)
    same(inner(best, reward, log_ref, beta), most)
    same(beta * kl(log_ref, best), most)  # the bonus is a KL, hence the sign of the term
    same(inner(log_p, reward + shift, log_ref, beta), inner(log_p, reward, log_ref, beta))


@given(rewards_and_policies(3), st.floats(0.2, 2))
def test_what_a_policy_lacks_is_beta_times_its_kl_to_the_optimum(three, beta):
    reward, policy, reference = three
    log_p, log_ref = policy.log_softmax(-1), reference.log_softmax(-1)
    best = tilted(log_ref, reward, beta)
    lacking = inner(best, reward, log_ref, beta) - inner(log_p, reward, log_ref, beta)
    same(lacking, beta * kl(log_p, best))


@given(rewards_and_policies(2), st.floats(0.2, 2))
def test_tilting_a_policy_by_minus_its_implicit_reward_gives_the_reference(two, beta):
    """SELM's theorem 5.1: argmin E_π r + β KL(π‖π_ρ) is π_ref for every ρ, a good one or an absurd one."""
    log_rho, log_ref = (x.log_softmax(-1) for x in two)
    implicit = beta * (log_rho - log_ref)
    same((log_rho - implicit / beta).log_softmax(-1), log_ref)
    value = log_ref.exp() @ implicit + beta * kl(log_ref, log_rho)
    for other in (log_rho, torch.full_like(log_rho, -1.0).log_softmax(-1), implicit.log_softmax(-1)):
        assert other.exp() @ implicit + beta * kl(other, log_rho) >= value - 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(sixes, betas)
def test_alpha_0_is_dpo_in_every_dtype(dtype, six, beta):
    chosen, rejected, own, ref_chosen, ref_rejected, ref_own = (x.to(dtype) for x in six)
    plain = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    loss = selm_loss(chosen, rejected, own, ref_chosen, ref_rejected, ref_own, beta=beta, alpha=0.0)
    assert torch.equal(loss, plain)
