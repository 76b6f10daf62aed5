from __future__ import annotations

import math

import pytest
import torch

from prefkit.objectives.margin import (
    Hinge,
    Ipo,
    Logistic,
    bradley_terry,
    hinge,
    logistic,
    pairwise,
    soft_logistic,
    squared,
)

H = torch.tensor([-30.0, -2.0, -0.5, 0.0, 0.7, 3.0, 30.0], dtype=torch.float64)


def test_worked_by_hand():
    assert logistic(torch.tensor(math.log(3.0))).item() == pytest.approx(math.log(4 / 3))
    assert hinge(torch.tensor([-1.0, 0.25, 1.0, 5.0])).tolist() == [2.0, 0.75, 0.0, 0.0]
    # β = 0.25 sets IPO's target at 2 nats.
    assert squared(torch.tensor([0.0, 2.0, 5.0]), beta=0.25).tolist() == [4.0, 0.0, 9.0]
    # σ(log 3) = 3/4: cDPO with ε = 0.1 is 0.9 log(4/3) + 0.1 log 4.
    smoothed = pairwise(torch.tensor(math.log(9.0)), kind=Logistic(), beta=0.5, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


def test_soft_label_one_is_the_logistic_loss_bit_for_bit():
    h = H.clone().requires_grad_()
    soft, hard = soft_logistic(h, torch.ones_like(h)), logistic(h)
    assert torch.equal(soft, hard)
    gradients = [torch.autograd.grad(value.sum(), h, retain_graph=True)[0] for value in (soft, hard)]
    assert torch.equal(*gradients)


def test_soft_label_gradient_is_prediction_minus_label():
    h, p = H.clone().requires_grad_(), torch.linspace(0, 1, len(H), dtype=torch.float64)
    (slope,) = torch.autograd.grad(soft_logistic(h, p).sum(), h)
    torch.testing.assert_close(slope, torch.sigmoid(H) - p)


def test_soft_label_minimum_is_the_labels_entropy():
    p = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    entropy = torch.distributions.Bernoulli(p).entropy()
    torch.testing.assert_close(soft_logistic(torch.logit(p), p), entropy)
    assert (soft_logistic(torch.logit(p) + 0.1, p) > entropy).all()


def test_no_gradient_enters_the_label():
    p = torch.tensor([0.3], requires_grad=True)
    h = torch.tensor([1.0], requires_grad=True)
    soft_logistic(h, p).sum().backward()
    assert p.grad is None and h.grad is not None


def test_a_sampled_label_has_the_soft_labels_mean_gradient():
    h, p = torch.tensor(0.4, dtype=torch.float64, requires_grad=True), 0.7
    soft, won, lost = (torch.autograd.grad(v, h)[0] for v in (soft_logistic(h, p), logistic(h), logistic(-h)))
    torch.testing.assert_close(p * won - (1 - p) * -lost, soft)


@pytest.mark.parametrize("kind", [Logistic(), Ipo(), Hinge()])
def test_gradcheck(kind):
    gap = torch.tensor([-7.0, -0.3, 0.2, 4.0, 25.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda gap: pairwise(gap, kind=kind, beta=0.3), gap)


def test_gradcheck_smoothed_and_rewards():
    gap = torch.tensor([-7.0, 0.2, 4.0], dtype=torch.float64, requires_grad=True)
    smoothed = lambda gap: pairwise(gap, kind=Logistic(), beta=0.3, label_smoothing=0.2)  # noqa: E731
    assert torch.autograd.gradcheck(smoothed, gap)
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry(a, b, 0.5), (gap, gap.detach().flip(0).requires_grad_()))


def test_extreme_margins_stay_finite():
    for kind in (Logistic(), Ipo(), Hinge()):
        gap = torch.tensor([-1e4, 1e4], requires_grad=True)
        loss = pairwise(gap, kind=kind, beta=0.1)
        loss.sum().backward()
        assert loss.isfinite().all() and gap.grad is not None and gap.grad.isfinite().all()


def test_bradley_terry_margin():
    chosen, rejected = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 3.0])
    torch.testing.assert_close(bradley_terry(chosen, rejected), logistic(chosen - rejected))
    torch.testing.assert_close(bradley_terry(chosen, rejected, 1.0), bradley_terry(chosen - 1, rejected))
    per_pair = bradley_terry(chosen, rejected, torch.tensor([0.0, 2.0]))
    assert per_pair[0] == bradley_terry(chosen, rejected)[0] and per_pair[1] > bradley_terry(chosen, rejected)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": float("nan")}, "beta must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": 0.1, "kind": Ipo()}, r"needs Logistic\(\), got Ipo\(\)"),
        ({"label_smoothing": 0.1, "kind": Hinge()}, r"needs Logistic\(\), got Hinge\(\)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        pairwise(torch.zeros(2), **{"kind": Logistic(), "beta": 0.1, **options})
