"""Shapes, refusals and algebra; that the estimators are unbiased is in test_enumeration.py."""

from __future__ import annotations

import pytest
import torch

from prefkit.objectives.divergence import (
    BIASED,
    kl_estimate,
    kl_estimate_k3,
    leave_one_out,
    reverse_kl,
    state_kl,
)

OWN = torch.tensor([[-3.0, -1.0, -2.0], [-8.0, -4.0, -6.0]], dtype=torch.float64)
REF = torch.tensor([[-4.0, -1.0, -4.0], [-8.5, -7.0, -3.0]], dtype=torch.float64)


def random_tokens(b: int = 2, k: int = 3, t: int = 4) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    own, ref, kl = (-torch.rand(b, k, t, generator=draw, dtype=torch.float64) for _ in range(3))
    return own, ref, -kl


def test_rloo_worked_by_hand():
    """d = (1, 0, 2): advantages d_j minus the mean of the other two are 0, -1.5, 1.5."""
    own = OWN[:1].clone().requires_grad_()
    value = reverse_kl(own, REF[:1])
    assert value.tolist() == [(0 * -3 - 1.5 * -1 + 1.5 * -2) / 3]
    (slope,) = torch.autograd.grad(value.sum(), own)
    assert slope.tolist() == [[0.0, -0.5, 0.5]]
    assert kl_estimate(OWN, REF).tolist() == [1.0, pytest.approx(0.5 / 3)]


def test_rtg_and_rb_worked_by_hand():
    """One sample of two tokens, d = (1, 2), κ = (0.5, 0.25): to go (3, 2), future κ (0.25, 0)."""
    own = torch.tensor([[[-1.0, -2.0]]], requires_grad=True)
    ref, kl = torch.tensor([[[-2.0, -4.0]]]), torch.tensor([[[0.5, 0.25]]], requires_grad=True)
    rtg = reverse_kl(own, ref, estimator="rtg")
    assert rtg.item() == 3 * -1 + 2 * -2
    assert torch.autograd.grad(rtg.sum(), own)[0].tolist() == [[[3.0, 2.0]]]
    rb = reverse_kl(own, ref, estimator="rb", state_kl=kl)
    assert rb.item() == 0.75 + 0.25 * -1
    slopes = torch.autograd.grad(rb.sum(), (own, kl))
    assert [slope.tolist() for slope in slopes] == [[[[0.25, 0.0]]], [[[1.0, 1.0]]]]


def test_advantages_sum_to_zero_and_follow_their_samples():
    advantages = leave_one_out(OWN - REF)
    torch.testing.assert_close(advantages.sum(-1), torch.zeros(2, dtype=torch.float64))
    others = torch.tensor([2, 0, 1])
    torch.testing.assert_close(leave_one_out((OWN - REF)[:, others]), advantages[:, others])


@pytest.mark.parametrize("estimator", ["rloo", "reinforce", "rtg", "rb"])
def test_order_of_samples_and_prompts_does_not_matter(estimator):
    own, ref, kl = random_tokens()
    if estimator in ("rloo", "reinforce"):
        own, ref = own.sum(-1), ref.sum(-1)

    def value(pick) -> torch.Tensor:
        extra = kl[pick] if estimator == "rb" else None
        return reverse_kl(own[pick], ref[pick], estimator=estimator, state_kl=extra)

    everything = value((slice(None), slice(None)))
    torch.testing.assert_close(value((slice(None), [2, 0, 1])), everything)
    torch.testing.assert_close(value(([1, 0], slice(None))), everything.flip(0))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("estimator", ["rtg", "rb"])
def test_padding_changes_nothing(estimator, side):
    own, ref, kl = random_tokens()
    wide = [torch.cat([x, torch.zeros(2, 3, 2)] if side else [torch.zeros(2, 3, 2), x], -1) for x in (own, ref, kl)]
    extra, wide_extra = (kl, wide[2]) if estimator == "rb" else (None, None)
    torch.testing.assert_close(
        reverse_kl(wide[0], wide[1], estimator=estimator, state_kl=wide_extra),
        reverse_kl(own, ref, estimator=estimator, state_kl=extra),
    )
    torch.testing.assert_close(kl_estimate(wide[0], wide[1]), kl_estimate(own, ref))


def test_gradient_of_reward_to_go_is_reinforce_for_answers_of_one_token():
    own, ref, _ = random_tokens(t=1)
    value = reverse_kl(own, ref, estimator="rtg")
    torch.testing.assert_close(value, reverse_kl(own[..., 0], ref[..., 0], estimator="reinforce"))


def test_estimates_carry_no_gradient():
    own = OWN.clone().requires_grad_()
    assert not kl_estimate(own, REF).requires_grad
    assert not kl_estimate_k3(own, REF).requires_grad


def test_no_gradient_enters_the_reference():
    ref = REF.clone().requires_grad_()
    assert torch.autograd.grad(reverse_kl(OWN.clone().requires_grad_(), ref).sum(), ref, allow_unused=True) == (None,)


def test_state_kl():
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    q = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    value = state_kl(p.log() + 3, q.log() - 1)
    assert value.item() == pytest.approx(0.25 * torch.tensor(2.0).log().item())
    assert state_kl(p, p).item() == 0
    assert state_kl(torch.zeros(2, 5, 7, dtype=torch.bfloat16), torch.ones(2, 5, 7)).dtype == torch.float32
    draw = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=draw)
    assert torch.autograd.gradcheck(lambda x: state_kl(x, ref_logits), logits.requires_grad_())


@pytest.mark.parametrize("name", BIASED)
def test_biased_forms_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"'{name}' is refused, it is biased: .*relative bias"):
        reverse_kl(OWN, REF, estimator=name)


@pytest.mark.parametrize(
    ("own", "options", "message"),
    [
        ((2, 1), {}, "needs 2 or more samples"),
        ((2, 3), {"estimator": "typo"}, "must be one of rloo, reinforce, rtg, rb"),
        ((2, 3), {"estimator": "rtg"}, r"own must be \(b, k, t\)"),
        ((2, 3, 4), {"estimator": "rloo"}, r"own must be \(b, k\), .* got \(2, 3, 4\)"),
        ((2, 3, 4), {"estimator": "rb"}, "state_kl goes with estimator 'rb'"),
        ((2, 3), {"state_kl": torch.zeros(2, 3)}, "state_kl goes with estimator 'rb'"),
        ((2, 3, 4), {"estimator": "rb", "state_kl": torch.zeros(2, 3, 5)}, r"state_kl is \(2, 3, 5\)"),
    ],
)
def test_refusals(own, options, message):
    with pytest.raises(ValueError, match=message):
        reverse_kl(torch.zeros(own), torch.zeros(own), **options)


def test_reference_of_another_shape_is_refused():
    for function in (reverse_kl, kl_estimate, kl_estimate_k3):
        with pytest.raises(ValueError, match=r"ref_own is \(3, 2\), own is \(2, 3\)"):
            function(OWN, REF.T)
    with pytest.raises(ValueError, match=r"own must be \(b, k\)"):
        kl_estimate(torch.zeros(3), torch.zeros(3))
