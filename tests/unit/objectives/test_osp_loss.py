"""OSP's loss: its reductions, its fixed point, and what goes wrong with hard labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prefkit.methods import osp
from prefkit.objectives.preference import dpo_loss, osp_loss


def batch(b: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    first, second, ref_first, ref_second = -50 * torch.rand(4, b, generator=draw, dtype=dtype)
    return [first.requires_grad_(), second.requires_grad_(), ref_first, ref_second]


def gradients(loss: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), of)


def test_the_method_exports_the_loss():
    assert osp.loss is osp_loss


@pytest.mark.parametrize("strength", [1.0, torch.ones(64)], ids=["number", "tensor"])
def test_strength_1_is_dpo_bit_for_bit(strength):
    pairs = batch()
    soft, hard = (
        osp_loss(*pairs, beta=0.1, strength=strength),
        dpo_loss(*pairs, beta=0.1),
    )
    assert torch.equal(soft, hard)
    assert all(map(torch.equal, gradients(soft, pairs[:2]), gradients(hard, pairs[:2])))


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.499])
def test_a_constant_strength_is_conservative_dpo(epsilon):
    pairs = batch()
    soft = osp_loss(*pairs, beta=0.3, strength=1 - epsilon)
    smoothed = dpo_loss(*pairs, beta=0.3, label_smoothing=epsilon)
    assert torch.equal(soft, smoothed)
    assert all(map(torch.equal, gradients(soft, pairs[:2]), gradients(smoothed, pairs[:2])))


def test_swapping_the_answers_and_the_strength_changes_nothing():
    first, second, ref_first, ref_second = batch(dtype=torch.float64)
    p = torch.rand(64, dtype=torch.float64)
    one = osp_loss(first, second, ref_first, ref_second, beta=0.2, strength=p)
    other = osp_loss(second, first, ref_second, ref_first, beta=0.2, strength=1 - p)
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_the_gradient_is_beta_times_the_difference_of_probabilities():
    pairs = batch(dtype=torch.float64)
    p, beta = torch.rand(64, dtype=torch.float64), 0.2
    slopes = gradients(osp_loss(*pairs, beta=beta, strength=p), pairs[:2])
    h = beta * ((pairs[0] - pairs[2]) - (pairs[1] - pairs[3]))
    expected = (beta * (torch.sigmoid(h) - p)).detach()
    torch.testing.assert_close(slopes[0], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slopes[1], -expected, rtol=1e-10, atol=1e-12)


def test_an_even_pair_pulls_nowhere_at_the_reference_and_pulls_back_elsewhere():
    start = torch.tensor([-30.0, -4.0], requires_grad=True)
    other = torch.tensor([-9.0, -9.0])
    (slope,) = gradients(osp_loss(start, other, start.detach(), other, beta=0.1, strength=0.5), [start])
    assert slope.tolist() == [0.0, 0.0]
    (slope,) = gradients(osp_loss(start, other, start.detach() - 1, other, beta=0.1, strength=0.5), [start])
    assert (slope > 0).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.73])
def test_the_least_value_is_the_entropy_of_the_strength(p):
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    best = math.log(p / (1 - p)) / 0.1
    zero = torch.zeros(3, dtype=torch.float64)
    at = torch.tensor([best - 1, best, best + 1], dtype=torch.float64)
    values = osp_loss(at, zero, zero, zero, beta=0.1, strength=p)
    assert values[1].tolist() == pytest.approx(entropy, abs=1e-12)
    assert values[0] > values[1] < values[2]


def test_no_gradient_reaches_the_judge():
    pairs = batch(3)
    judge = torch.zeros(3, requires_grad=True)
    loss = osp_loss(*pairs, beta=0.1, strength=torch.sigmoid(judge)).sum()
    loss.backward()
    assert judge.grad is None and pairs[0].grad is not None


@pytest.mark.parametrize(
    "strength", [1.1, -0.1, math.nan, torch.tensor([0.5, 1.5, 0.2]), torch.tensor([0.5, math.nan, 1])]
)
def test_a_strength_that_is_no_probability_is_refused(strength):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        osp_loss(*batch(3), beta=0.1, strength=strength)


def test_shapes_and_beta_are_checked():
    with pytest.raises(ValueError, match="one probability per pair"):
        osp_loss(*batch(3), beta=0.1, strength=torch.full((3, 1), 0.5))
    with pytest.raises(ValueError, match="beta"):
        osp_loss(*batch(3), beta=0.0, strength=0.5)


def test_sampled_labels_have_the_mean_gradient_of_the_strength():
    """Over both labels, weighed by their probabilities, the hard gradient is the soft one."""
    pairs = batch(5, torch.float64)
    p = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    soft = gradients(osp_loss(*pairs, beta=0.3, strength=p), pairs[:2])
    one = gradients(osp_loss(*pairs, beta=0.3, strength=1.0), pairs[:2])
    other = gradients(osp_loss(*pairs, beta=0.3, strength=0.0), pairs[:2])
    for mean, first, second in zip(soft, one, other, strict=True):
        torch.testing.assert_close(p * first + (1 - p) * second, mean, rtol=1e-12, atol=1e-14)


def fitted(strengths: Tensor, beta: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(policy, reference, loss) of a tabular policy fitted by LBFGS to all pairs of its answers."""
    num = len(strengths)
    reference = torch.log_softmax(torch.linspace(-1, 1, num, dtype=torch.float64), 0)
    logits = reference.clone().requires_grad_()
    i, j = torch.triu_indices(num, num, offset=1)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=steps, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_probs = torch.log_softmax(logits, 0)
        loss = osp_loss(
            log_probs[i], log_probs[j], reference[i], reference[j], beta=beta, strength=strengths[i, j]
        ).mean()
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    return torch.log_softmax(logits, 0).detach(), reference, closure().detach()


def test_the_fixed_point_is_the_gibbs_policy():
    """With Bradley-Terry strengths the optimum is π_ref exp(r/β)/Z, its loss the strengths' mean entropy."""
    rewards, beta = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.7], dtype=torch.float64), 0.5
    strengths = torch.sigmoid(rewards[:, None] - rewards[None])
    policy, reference, loss = fitted(strengths, beta, 200)
    gibbs = torch.log_softmax(reference + rewards / beta, 0)
    torch.testing.assert_close(policy.exp(), gibbs.exp(), rtol=0, atol=1e-6)
    i, j = torch.triu_indices(5, 5, offset=1)
    p = strengths[i, j]
    assert loss.tolist() == pytest.approx((-(p * p.log() + (1 - p) * (1 - p).log())).mean().tolist(), abs=1e-9)


def test_a_cycle_of_strengths_leaves_the_reference():
    cycle = torch.tensor([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
    policy, reference, _ = fitted(cycle, 0.5, 200)
    torch.testing.assert_close(policy, reference, rtol=0, atol=1e-6)


def test_hard_labels_have_no_finite_optimum():
    """The margin of hard labels grows with every further step; that of soft ones has settled."""

    def margin(strength: float, steps: int) -> float:
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        zero = torch.full((1,), -math.log(2), dtype=torch.float64)
        optimizer = torch.optim.SGD([logits], lr=5.0)
        for _ in range(steps):
            optimizer.zero_grad()
            log_probs = torch.log_softmax(logits, 0)
            osp_loss(log_probs[:1], log_probs[1:], zero, zero, beta=1.0, strength=strength).sum().backward()
            optimizer.step()
        return float(logits.detach()[0] - logits.detach()[1])

    hard = [margin(1.0, steps) for steps in (30, 300, 3_000)]
    assert hard[1] - hard[0] > 1.5 and hard[2] - hard[1] > 1.5
    soft = [margin(0.9, steps) for steps in (100, 400)]
    assert soft == pytest.approx([math.log(9)] * 2, abs=1e-6)
