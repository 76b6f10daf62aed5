"""What HyPO's optimum must satisfy, and counterexamples that part it from DPO: one prompt, a few arms, exact.

No sampling: the loss is `dpo_loss` averaged over the true preference, the KL is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prefkit.objectives.divergence import state_kl
from prefkit.objectives.margin import bradley_terry
from prefkit.objectives.preference import dpo_loss

REFERENCE = torch.tensor([0.3, 0.3, 0.25, 0.15], dtype=torch.float64).log()


def population_loss(log_p: Tensor, log_ref: Tensor, pairs: list[tuple[int, int, float]], beta: float) -> Tensor:
    """DPO over (first, second, probability that first is preferred)."""
    first, second = (torch.tensor(column) for column in list(zip(*pairs, strict=True))[:2])
    prob = torch.tensor([pair[2] for pair in pairs], dtype=torch.float64)
    arguments = (log_p[first], log_p[second], log_ref[first], log_ref[second])
    swapped = (log_p[second], log_p[first], log_ref[second], log_ref[first])
    return (prob * dpo_loss(*arguments, beta=beta) + (1 - prob) * dpo_loss(*swapped, beta=beta)).mean()


def minimise(value: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    logits = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [logits], max_iter=1000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = value(logits)
        loss.backward()
        return loss

    solver.step(closure)
    solver.step(closure)
    return logits.detach()


def hypo_optimum(
    pairs: list[tuple[int, int, float]],
    *,
    beta: float,
    kl_weight: float,
    log_ref: Tensor = REFERENCE,
    start: Tensor | None = None,
) -> Tensor:
    def value(logits: Tensor) -> Tensor:
        offline = population_loss(logits.log_softmax(-1), log_ref, pairs, beta)
        return offline + kl_weight * state_kl(logits, log_ref)

    return minimise(value, log_ref if start is None else start).log_softmax(-1)


def far_starts(num_arms: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [2 * torch.randn(num_arms, generator=draw, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize(("kl_weight", "kl"), [(1, 0.0445), (0.1, 0.2386), (0.01, 0.2532)])
def test_unseen_log_ratio_is_the_kl(kl_weight, kl):
    for start in (REFERENCE, *far_starts(4)):
        log_p = hypo_optimum([(0, 1, 0.8)], beta=0.5, kl_weight=kl_weight, start=start)
        ratio = log_p - REFERENCE
        assert state_kl(log_p, REFERENCE).item() == pytest.approx(kl, abs=5e-5)
        torch.testing.assert_close(ratio[2:], state_kl(log_p, REFERENCE).expand(2), rtol=0, atol=1e-6)
        assert ratio[0] > ratio[2] > ratio[1]


@pytest.mark.parametrize("kl_weight", [1, 0.1, 0.01])
@pytest.mark.parametrize("prob", [0.6, 0.8, 0.95])
def test_kl_is_bounded_by_log2_over_kl_weight(kl_weight, prob):
    log_p = hypo_optimum([(0, 1, prob), (2, 1, prob)], beta=0.5, kl_weight=kl_weight)
    gained = math.log(2) - population_loss(log_p, REFERENCE, [(0, 1, prob), (2, 1, prob)], 0.5).item()
    assert 0 < state_kl(log_p, REFERENCE).item() <= gained / kl_weight + 1e-9
    assert gained <= math.log(2)


def test_soft_label_optimum():
    """As kl_weight vanishes the margin tends to the label's log-odds."""
    log_p = hypo_optimum([(0, 1, 0.8)], beta=0.5, kl_weight=1e-5)
    ratio = log_p - REFERENCE
    assert 0.5 * (ratio[0] - ratio[1]).item() == pytest.approx(math.log(0.8 / 0.2), abs=1e-3)


def test_first_order_condition():
    """kl_weight π(y)(log-ratio - KL) is β(q - σ(βd)) for the chosen arm, minus that for the other, else 0."""
    beta, kl_weight, q = 0.5, 0.1, 0.8
    log_p = hypo_optimum([(0, 1, q)], beta=beta, kl_weight=kl_weight)
    ratio = log_p - REFERENCE
    pull = beta * (q - torch.sigmoid(beta * (ratio[0] - ratio[1])))
    left = kl_weight * log_p.exp() * (ratio - state_kl(log_p, REFERENCE))
    right = pull * torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-7)


def test_reverse_kl_does_not_save_the_rejected_answer():
    """One hard label, β < 1: the rejected answer may still vanish, at a KL of -log(1 - π_ref(rejected))."""
    vanished = hypo_optimum([(0, 1, 1.0)], beta=0.5, kl_weight=1)
    assert vanished[1] < -30
    assert state_kl(vanished, REFERENCE).item() == pytest.approx(-math.log(0.7), abs=1e-6)
    anchored = hypo_optimum([(0, 1, 1.0)], beta=0.5, kl_weight=10)
    assert state_kl(anchored, REFERENCE).item() == pytest.approx(0.0019, abs=5e-5)
    finite = hypo_optimum([(0, 1, 1.0)], beta=1.5, kl_weight=1)
    ratio = finite - REFERENCE
    assert 1.5 * (ratio[0] - ratio[1]).item() == pytest.approx(2.44, abs=5e-3)
    assert state_kl(finite, REFERENCE).item() == pytest.approx(0.140, abs=5e-4)


# T1: DPO's loss does not see where the mass on unseen answers went.
REWARD = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
COVERED = [(0, 1, 1 / (1 + math.exp(-1)))]  # Bradley-Terry on the two covered arms


def partly_covered(eps: float) -> Tensor:
    return torch.tensor([(1 - eps) / 2, (1 - eps) / 2, eps], dtype=torch.float64).log()


def with_unseen_mass(q: float) -> Tensor:
    e = math.e
    return torch.tensor([(1 - q) * e / (1 + e), (1 - q) / (1 + e), q], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("eps", "half", "most", "least"),
    [
        (1e-2, (1.670, -1.304), (4.504, None), (0.110, 0.614)),
        (1e-4, (3.968, -3.602), (9.063, None), (0.111, 0.620)),
        (1e-8, (8.573, -8.207), (18.182, None), (0.111, 0.620)),
    ],
)
def test_t1_dpo_is_blind_to_unseen_mass(eps, half, most, least):
    log_ref = partly_covered(eps)
    for q, (kl, value) in ((0.5, half), (0.99, most), (eps, least)):
        log_p = with_unseen_mass(q)
        assert population_loss(log_p, log_ref, COVERED, 1.0).item() == pytest.approx(0.582203, abs=1e-6)
        assert state_kl(log_p, log_ref).item() == pytest.approx(kl, abs=6e-4)
        if value is not None:
            assert (log_p.exp() @ REWARD - state_kl(log_p, log_ref)).item() == pytest.approx(value, abs=6e-4)


@pytest.mark.parametrize("eps", [1e-2, 1e-4, 1e-8])
def test_t1_the_kl_picks_one_of_those_policies(eps):
    """Whatever kl_weight > 0: the one with log(q / eps) = KL, which stays small however small eps is."""
    log_ref, low, high = partly_covered(eps), math.log(eps) - 5, math.log(0.9)
    for _ in range(60):
        log_q = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        q = log_q.exp()
        kl = state_kl(torch.stack([1 + torch.log1p(-q), torch.log1p(-q), log_q + math.log1p(math.e)]), log_ref)
        (slope,) = torch.autograd.grad(kl, log_q)
        low, high = (low, log_q.item()) if slope > 0 else (log_q.item(), high)
    assert low - math.log(eps) == pytest.approx(kl.item(), abs=1e-6)
    assert kl.item() == pytest.approx(0.11, abs=2e-3)


@pytest.mark.parametrize("eps", [1e-2, 1e-4])
@pytest.mark.parametrize("kl_weight", [1, 0.01])
def test_t1_hypo_holds_unseen_mass(eps, kl_weight):
    log_ref = partly_covered(eps)
    log_p = hypo_optimum(COVERED, beta=1.0, kl_weight=kl_weight, log_ref=log_ref)
    kl = state_kl(log_p, log_ref).item()
    assert kl < 0.12
    assert (log_p - log_ref)[2].item() == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("eps", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_t1_bounded_rewards_bound_the_kl_of_rlhf(eps, beta):
    log_p = (partly_covered(eps) + REWARD / beta).log_softmax(-1)
    assert 0 < state_kl(log_p, partly_covered(eps)).item() <= 1 / beta


# T2: tabular DPO from the reference can raise the mass of answers in no pair.
@pytest.mark.parametrize(("chosen", "rejected", "unseen", "peak"), [(0.05, 0.75, 0.2, 0.3405), (0.2, 0.6, 0.2, 0.2240)])
def test_t2_unseen_mass_rises_when_the_rejected_answer_is_likelier(chosen, rejected, unseen, peak):
    path = unseen_mass_under_dpo(chosen, rejected, unseen)
    assert path.max().item() == pytest.approx(peak, abs=1e-4)
    assert peak == pytest.approx(unseen / (unseen + 2 * math.sqrt(chosen * rejected)), abs=6e-5)
    assert path[-1] < peak


def test_t2_unseen_mass_never_rises_from_a_uniform_reference():
    path = unseen_mass_under_dpo(1 / 3, 1 / 3, 1 / 3)
    assert (path.diff() < 0).all()


def unseen_mass_under_dpo(chosen: float, rejected: float, unseen: float) -> Tensor:
    log_ref = torch.tensor([chosen, rejected, unseen], dtype=torch.float64).log()
    path = descend(lambda z: z.log_softmax(-1), log_ref, log_ref, pair=(0, 1), steps=400, rate=0.02)
    return path[:, 2]


def descend(
    policy: Callable[[Tensor], Tensor],
    start: Tensor,
    log_ref: Tensor,
    *,
    pair: tuple[int, int],
    steps: int,
    rate: float,
) -> Tensor:
    """Probabilities (steps + 1, arms) along gradient descent on DPO with one hard-labelled pair."""
    parameters, path = start.clone().requires_grad_(), [log_ref.exp()]
    for _ in range(steps):
        loss = population_loss(policy(parameters), log_ref, [(*pair, 1.0)], 1.0)
        (slope,) = torch.autograd.grad(loss, parameters)
        parameters = (parameters - rate * slope).detach().requires_grad_()
        path.append(policy(parameters).detach().exp())
    return torch.stack(path)


# T3: with shared parameters DPO extrapolates.
FEATURES = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
PATH = [(0.649, 0.253, 0.099), (0.852, 0.129, 0.019), (0.986, 0.014, 0.0002)]


def test_t3_dpo_extrapolates_with_shared_features():
    """Only y2 > y3 is seen: unseen y1 rises and y2, the preferred answer, falls from the first step."""
    log_ref = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    start = torch.ones(2, dtype=torch.float64)
    path = descend(lambda theta: (FEATURES @ theta).log_softmax(-1), start, log_ref, pair=(1, 2), steps=1000, rate=0.2)
    step = path.diff(dim=0)
    assert (step[:, 0] > 0).all() and (step[:, 1] < 0).all() and (step[:, 2] < 0).all()
    for point in PATH:
        after = int((path[:, 0] > point[0]).nonzero()[0])
        between = torch.lerp(path[after - 1], path[after], (point[0] - path[after - 1, 0]) / step[after - 1, 0])
        torch.testing.assert_close(between, torch.tensor(point, dtype=torch.float64), rtol=0, atol=1e-3)


def test_t3_a_linear_reward_extrapolates_alike():
    """A Bradley-Terry reward w·φ fit to that pair, then the exact KL-regularised optimum: the same path."""
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(bradley_terry(FEATURES[1] @ weights, FEATURES[2] @ weights), weights)
    for first, second, third in PATH:
        reward = FEATURES @ -slope
        reward = reward * math.log(first / second) / (reward[0] - reward[1])
        expected = torch.tensor([first, second, third], dtype=torch.float64)
        torch.testing.assert_close(reward.softmax(-1), expected, rtol=0, atol=2e-3)


def test_t3_tabular_control():
    """Without shared parameters the unseen answer falls and the preferred one rises."""
    log_ref = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    path = descend(lambda z: z.log_softmax(-1), log_ref, log_ref, pair=(1, 2), steps=300, rate=0.1)
    assert (path.diff(dim=0)[:, 0] < 0).all() and (path.diff(dim=0)[:, 1] > 0).all()


# T4: partial coverage, six arms.
SIX_REWARDS = torch.tensor([1.0, 0.6, 0.2, -0.2, -0.6, -1.0], dtype=torch.float64)
SIX = torch.full((6,), 1 / 6, dtype=torch.float64).log()


def covering(num_arms: int) -> list[tuple[int, int, float]]:
    """All pairs of the first arms, with their true Bradley-Terry preferences."""
    return [
        (i, j, torch.sigmoid(SIX_REWARDS[i] - SIX_REWARDS[j]).item())
        for i in range(num_arms)
        for j in range(i + 1, num_arms)
    ]


def gap_to_best(log_p: Tensor, beta: float) -> float:
    """How far E r - β KL lies below its maximum, at π_ref exp(r / β)."""

    def worth(log_p: Tensor) -> Tensor:
        return log_p.exp() @ SIX_REWARDS - beta * state_kl(log_p, SIX)

    return (worth((SIX + SIX_REWARDS / beta).log_softmax(-1)) - worth(log_p)).item()


@pytest.mark.parametrize("num_arms", [2, 3, 4, 5])
def test_t4_under_partial_coverage_dpo_has_many_optima_and_hypo_one(num_arms):
    """From mass on an uncovered arm DPO may leave it there; HyPO ends at one policy from anywhere."""
    pairs, beta = covering(num_arms), 0.5
    astray = SIX + torch.tensor([0, 0, 0, 0, 0, 4.0], dtype=torch.float64)
    near, far = (hypo_optimum(pairs, beta=beta, kl_weight=0, log_ref=SIX, start=s) for s in (SIX, astray))
    losses = [population_loss(log_p, SIX, pairs, beta).item() for log_p in (near, far)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    assert gap_to_best(near, beta) < 0.4 and gap_to_best(far, beta) > 1.7

    first, second = (hypo_optimum(pairs, beta=beta, kl_weight=1e-2, log_ref=SIX, start=s) for s in (SIX, astray))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert gap_to_best(first, beta) < 0.42


def test_t4_under_full_coverage_all_agree():
    """Negative control: DPO finds the best policy from anywhere, and a small KL weight costs little."""
    beta = 0.5
    for start in far_starts(6):
        log_p = hypo_optimum(covering(6), beta=beta, kl_weight=0, log_ref=SIX, start=start)
        assert gap_to_best(log_p, beta) == pytest.approx(0, abs=1e-8)
    log_p = hypo_optimum(covering(6), beta=beta, kl_weight=1e-2, log_ref=SIX)
    assert 0 < gap_to_best(log_p, beta) < 3e-3
