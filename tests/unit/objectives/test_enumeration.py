"""Over *all* groups of samples each estimator's mean gradient is that of the KL; a refused form's is not."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

from prefkit.objectives import divergence
from prefkit.objectives.divergence import BIASED, kl_estimate, kl_estimate_k3, reverse_kl


class Enumeration:
    """All 15^k groups of k samples, their probabilities, and gradients averaged over them."""

    def __init__(self, tree, logits: tuple[Tensor, Tensor], k: int) -> None:
        self.policy, self.reference = logits
        group = torch.tensor(list(itertools.product(range(15), repeat=k)))
        every = tree.log_probs(self.policy)
        self.prob = every.sum(-1).exp().detach()[group].prod(-1)
        self.tokens, self.ref_tokens = every[group], tree.log_probs(self.reference)[group]
        self.own, self.ref_own = self.tokens.sum(-1), self.ref_tokens.sum(-1)
        self.lengths = tree.lengths[group]
        self.state_kl = tree.per_state(divergence.state_kl(self.policy, self.reference))[group]
        probs = every.sum(-1).exp()
        self.kl = (probs * (every - tree.log_probs(self.reference)).sum(-1)).sum()
        self.forward_kl = -(
            tree.log_probs(self.reference).sum(-1).exp() * (every - tree.log_probs(self.reference)).sum(-1)
        ).sum()

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.policy, retain_graph=True)[0]

    def mean_gradient(self, surrogate: Tensor) -> Tensor:
        return self.gradient((self.prob * surrogate).sum())

    def relative_bias(self, surrogate: Tensor) -> float:
        exact = self.gradient(self.kl)
        return ((self.mean_gradient(surrogate) - exact).norm() / exact.norm()).item()

    def variance(self, surrogate: Tensor) -> float:
        """Of the gradient, summed over parameters."""
        (each,) = torch.autograd.grad(
            surrogate,
            self.policy,
            torch.eye(len(surrogate), dtype=surrogate.dtype),
            is_grads_batched=True,
            retain_graph=True,
        )
        mean = torch.einsum("n,n...->...", self.prob, each)
        return torch.einsum("n,n...->", self.prob, (each - mean) ** 2).item()

    def surrogate(self, estimator: str) -> Tensor:
        if estimator in ("rtg", "rb"):
            state_kl = self.state_kl if estimator == "rb" else None
            return reverse_kl(self.tokens, self.ref_tokens, estimator=estimator, state_kl=state_kl)
        return reverse_kl(self.own, self.ref_own, estimator=estimator)

    def refused(self, name: str) -> Tensor:
        """The biased forms, which the library does not offer."""
        own, d = self.own, self.own - self.ref_own
        weight = d.detach()
        match name:
            case "k1":
                return d.mean(-1)
            case "k3":
                return (torch.exp(-d) - 1 + d).mean(-1)
            case "token_local":
                return ((self.tokens - self.ref_tokens).detach() * self.tokens).sum(-1).mean(-1)
            case "group_mean":
                return ((weight - weight.mean(-1, keepdim=True)) * own).mean(-1)
            case "clipped":
                return (weight.clamp(-1, 1) * own).mean(-1)
            case "length_normalised":
                return (weight / self.lengths * own).mean(-1)
        raise AssertionError(name)


UNBIASED = [
    ("reinforce", 1),
    ("rtg", 1),
    ("rb", 1),
    ("rloo", 2),
    ("reinforce", 2),
    ("rtg", 2),
    ("rb", 2),
    ("rloo", 3),
]


@pytest.mark.parametrize(("estimator", "k"), UNBIASED)
def test_unbiased(tree, logits, estimator, k):
    count = Enumeration(tree, logits, k)
    assert count.prob.sum().item() == pytest.approx(1, abs=1e-12)
    exact, mean = count.gradient(count.kl), count.mean_gradient(count.surrogate(estimator))
    assert exact.norm() > 0.1
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-8)


def test_enumerated_gradient_is_that_of_finite_differences(tree, logits):
    policy, reference = logits

    def kl(policy: Tensor) -> Tensor:
        log_p, log_q = tree.log_probs(policy).sum(-1), tree.log_probs(reference).sum(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    assert torch.autograd.gradcheck(kl, policy)
    assert kl(policy).item() == pytest.approx(0.777, abs=5e-4)


@pytest.mark.parametrize("name", BIASED)
def test_refused_forms_are_biased_as_their_messages_say(tree, logits, name):
    count = Enumeration(tree, logits, 2)
    stated = float(re.search(r"relative bias (\d\.\d\d)", BIASED[name])[1])
    assert count.relative_bias(count.refused(name)) == pytest.approx(stated, abs=0.005)


@pytest.mark.parametrize("k", [2, 3])
def test_group_mean_shrinks_the_gradient(tree, logits, k):
    count = Enumeration(tree, logits, k)
    mean = count.mean_gradient(count.refused("group_mean"))
    torch.testing.assert_close(mean, count.gradient(count.kl) * (k - 1) / k, rtol=0, atol=1e-8)


def test_k3_differentiated_is_the_forward_kl(tree, logits):
    count = Enumeration(tree, logits, 1)
    mean = count.mean_gradient(count.refused("k3"))
    torch.testing.assert_close(mean, count.gradient(count.forward_kl), rtol=0, atol=1e-8)


def test_half_the_squared_log_ratio_is_reinforce_sample_by_sample(tree, logits):
    count = Enumeration(tree, logits, 1)
    k2 = 0.5 * (count.own - count.ref_own).square().mean(-1)
    weights = torch.rand(15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        count.gradient((weights * k2).sum()), count.gradient((weights * count.surrogate("reinforce")).sum())
    )


def test_cold_samples_bias_the_gradient(tree, logits):
    count = Enumeration(tree, logits, 1)
    count.prob = tree.log_probs(count.policy.detach() / 0.7).sum(-1).exp()
    assert count.relative_bias(count.surrogate("reinforce")) == pytest.approx(0.13, abs=0.01)


def test_variances(tree, logits):
    one, two, three = (Enumeration(tree, logits, k) for k in (1, 2, 3))
    reinforce, rtg, rb = (one.variance(one.surrogate(name)) for name in ("reinforce", "rtg", "rb"))
    assert rb < 0.5 * rtg < 0.5 * reinforce
    assert two.variance(two.surrogate("reinforce")) == pytest.approx(reinforce / 2)
    # Near the reference the baseline costs more than it saves; far from it the constant part of d dominates.
    assert two.variance(two.surrogate("rloo")) > two.variance(two.surrogate("reinforce"))
    assert three.variance(three.surrogate("rloo")) < two.variance(two.surrogate("rloo"))
    two.ref_own = two.ref_own - 20
    assert two.variance(two.surrogate("rloo")) < 0.1 * two.variance(two.surrogate("reinforce"))


def test_estimates_have_the_kl_as_mean(tree, logits):
    count = Enumeration(tree, logits, 2)
    for estimate in (kl_estimate, kl_estimate_k3):
        value = estimate(count.own, count.ref_own)
        assert not value.requires_grad
        torch.testing.assert_close((count.prob * value).sum(), count.kl.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(estimate(count.tokens, count.ref_tokens), value)
    assert kl_estimate_k3(count.own, count.ref_own).min() >= 0
    # Summed over the states an answer visits, the exact state KLs have that mean too.
    torch.testing.assert_close((count.prob * count.state_kl.sum(-1).mean(-1)).sum(), count.kl)


@pytest.mark.parametrize(("estimator", "k"), UNBIASED[:4])
def test_surrogate_is_zero_at_the_reference(tree, logits, estimator, k):
    policy, _ = logits
    count = Enumeration(tree, (policy, policy.detach().clone()), k)
    surrogate = count.surrogate(estimator)
    assert surrogate.abs().max() == 0
    assert count.mean_gradient(surrogate).abs().max() < 1e-15
