"""What holds for every margin and every group of samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prefkit.objectives.divergence import kl_estimate, kl_estimate_k3, leave_one_out, reverse_kl
from prefkit.objectives.margin import Hinge, Ipo, Logistic, hinge, logistic, pairwise, soft_logistic
from prefkit.objectives.preference import dpo_loss

margins = st.floats(-50, 50)
betas = st.floats(0.01, 5)
log_probs = st.floats(-200, 0)
fours = st.tuples(log_probs, log_probs, log_probs, log_probs)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def groups(k_min: int = 2) -> st.SearchStrategy[Tensor]:
    return st.integers(k_min, 6).flatmap(
        lambda k: st.lists(log_probs, min_size=2 * k, max_size=2 * k).map(lambda v: tensor(*v).reshape(2, 1, k))
    )


@given(margins, st.floats(0, 1))
def test_swapping_pair_and_label_changes_nothing(h, p):
    torch.testing.assert_close(soft_logistic(tensor(h), p), soft_logistic(tensor(-h), 1 - p))


@given(margins)
def test_the_two_orders_differ_by_the_margin(h):
    torch.testing.assert_close(logistic(tensor(-h)) - logistic(tensor(h)), tensor(h))


@given(margins)
def test_hinge_bounds_the_zero_one_loss_and_so_does_the_logistic_in_bits(h):
    wrong = float(h <= 0)
    assert hinge(tensor(h)).item() >= wrong
    assert logistic(tensor(h)).item() / math.log(2) >= wrong
    assert hinge(tensor(h)).item() <= 1 + abs(h)


@pytest.mark.parametrize("kind", [Logistic(), Hinge()])
@given(margins, st.floats(0.001, 10), betas)
def test_a_wider_margin_never_costs_more(kind, gap, more, beta):
    near, far = pairwise(tensor(gap, gap + more), kind=kind, beta=beta)
    assert far <= near


@given(st.floats(0, 50), st.floats(0.001, 10), betas)
def test_ipo_grows_with_the_distance_from_its_target_on_either_side(off, more, beta):
    target = 1 / (2 * beta)
    near, far = pairwise(tensor(target + off, target + off + more), kind=Ipo(), beta=beta)
    below = pairwise(tensor(target - off), kind=Ipo(), beta=beta)
    assert near < far
    torch.testing.assert_close(below, near[None], atol=1e-9, rtol=1e-9)


@given(margins, betas, st.floats(0.01, 0.49))
def test_smoothing_is_the_soft_label(gap, beta, eps):
    smoothed = pairwise(tensor(gap), kind=Logistic(), beta=beta, label_smoothing=eps)
    torch.testing.assert_close(smoothed, soft_logistic(beta * tensor(gap), 1 - eps))
    assert smoothed.item() >= -eps * math.log(eps) - (1 - eps) * math.log(1 - eps) - 1e-12


@pytest.mark.parametrize("kind", [Logistic(), Ipo(), Hinge()])
@given(fours, st.floats(-100, 100), st.floats(-100, 100))
def test_only_differences_of_log_ratios_count(kind, four, shift, other):
    """A normaliser common to both answers, and one common to policy and reference, drop out."""
    chosen, rejected, ref_chosen, ref_rejected = (tensor(x) for x in four)
    plain = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, kind=kind)
    both = dpo_loss(chosen + shift, rejected + shift, ref_chosen, ref_rejected, beta=0.1, kind=kind)
    same = dpo_loss(chosen + other, rejected, ref_chosen + other, ref_rejected, beta=0.1, kind=kind)
    torch.testing.assert_close(both, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(same, plain, rtol=1e-9, atol=1e-9)


@given(margins)
def test_a_vanishing_beta_forgets_the_pair(gap):
    assert pairwise(tensor(gap), kind=Logistic(), beta=1e-9).item() == pytest.approx(math.log(2), abs=1e-7)


@given(groups())
def test_leave_one_out_is_what_it_says(values):
    d = values[0]
    k = d.shape[-1]
    expected = torch.stack([d[0, j] - (d[0].sum() - d[0, j]) / (k - 1) for j in range(k)])
    torch.testing.assert_close(leave_one_out(d)[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(leave_one_out(d).sum(-1), tensor(0.0), rtol=0, atol=1e-9)


@given(groups(), st.floats(-50, 50))
def test_rloo_ignores_a_constant_in_the_log_ratio(values, shift):
    """A wrong normaliser of the reference changes the estimate of the KL, and no gradient."""
    own, ref = values[0].clone().requires_grad_(), values[1]
    slopes = [torch.autograd.grad(reverse_kl(own, r).sum(), own)[0] for r in (ref, ref + shift)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kl_estimate(own, ref + shift), kl_estimate(own, ref) - shift, rtol=1e-9, atol=1e-9)


@given(groups(1))
def test_k3_is_never_negative_and_at_most_1_below_k1(values):
    own, ref = values
    ref = own + (ref - own).clamp(-50, 50)
    assert kl_estimate_k3(own, ref).item() >= 0
    assert kl_estimate_k3(own, ref).item() >= kl_estimate(own, ref).item() - 1 - 1e-9
