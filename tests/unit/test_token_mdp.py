"""Reinforcement learning with the library's losses where the right answer is known: locks, optima, natural gradients.

That PPO gives the lock up and DR-PO opens it is the argument of coverage, not a claim about language models.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import token_mdp
from token_mdp import DECOY, END, LOCK, Chance, TokenMdp, Training, decoy_and_lock, every_answer, every_path

Q = 0.35
COEFFICIENT = 0.5


@functools.cache
def values(reset_prob: float, k_min: int = 1, *, all_enter: bool = False, num_seeds: int = 16) -> Tensor:
    """Exact values of policies trained in the lock."""
    mdp = decoy_and_lock(Q)
    data = mdp.log_reference.clone()
    if all_enter:
        data[0] = torch.tensor([0.0, -math.inf, -math.inf, -math.inf])
    setting = Training(reset_prob=reset_prob, k_min=k_min)
    return mdp.value(token_mdp.train(mdp, setting, num_seeds=num_seeds, log_data=data))


def solved(of: Tensor) -> float:
    return (of > 0.5).double().mean().item()


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the processes themselves


@pytest.mark.parametrize("mdp", [decoy_and_lock(Q), every_answer(0)])
def test_dynamic_programming_agrees_with_counting(mdp: TokenMdp):
    paths = every_path(mdp)
    policy = torch.randn(mdp.reward.shape, generator=draws(), dtype=torch.float64).log_softmax(-1)
    log_probs, of_reference = (paths.per_token(table).sum(-1) for table in (policy, mdp.log_reference))
    reward = paths.per_token(mdp.reward).sum(-1)
    probs = log_probs.exp()
    torch.testing.assert_close(probs.sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(mdp.value(policy), probs @ reward)
    torch.testing.assert_close(mdp.regularised(policy, 0.3), probs @ (reward - 0.3 * (log_probs - of_reference)))


def test_the_lock_is_the_one_of_the_experiment():
    for q, expected in ((0.35, 0.151), (0.5, 0.158)):
        mdp = decoy_and_lock(q)
        assert mdp.value(mdp.log_reference).item() == pytest.approx(0.5 * DECOY + 0.5 * q**LOCK)
        assert mdp.value(mdp.log_reference).item() == pytest.approx(expected, abs=5e-4)


def test_rollouts_follow_the_policy_and_the_forced_tokens():
    mdp = every_answer(0)
    policy = torch.randn(1, *mdp.reward.shape, generator=draws(1), dtype=torch.float64).log_softmax(-1)
    nothing = torch.zeros(1, 20_000, mdp.horizon, dtype=torch.long)
    paths = token_mdp.roll_out(mdp, policy, nothing, nothing[..., 0], draws(2))
    everything = every_path(mdp)
    same = (paths.tokens[0].unsqueeze(1) == everything.tokens) & (paths.mask[0].unsqueeze(1) == everything.mask)
    shares = same.all(-1).double().mean(0)
    assert shares.sum().item() == pytest.approx(1)
    torch.testing.assert_close(shares, everything.per_token(policy[0]).sum(-1).exp(), atol=0.015, rtol=0)

    lengths = paths.mask.sum(-1)
    cuts = token_mdp.draw_cuts(lengths, 1.0, 1, draws(3))
    assert bool((cuts[lengths == 1] == 0).all()) and bool((cuts[lengths > 1] >= 1).all())
    assert bool((cuts < lengths).all()) and set(cuts[lengths == 4].tolist()) == {1, 2, 3}
    again = token_mdp.roll_out(mdp, policy, paths.tokens, cuts, draws(4))
    forced = torch.arange(mdp.horizon) < cuts.unsqueeze(-1)
    assert torch.equal(again.tokens[forced], paths.tokens[forced]) and bool(again.mask[forced].all())
    assert not torch.equal(again.tokens, paths.tokens)


# ---- U20: the decoy and the lock


def test_ppo_takes_the_decoy_and_resets_open_the_lock():
    assert solved(values(0.0)) <= 3 / 8
    assert solved(values(1.0)) >= 7 / 8
    assert values(1.0).median() > 0.98


def test_resets_that_never_start_at_the_prompt_starve_the_first_token():
    """All answers of the data enter the lock. Cuts of one token or more with probability 1 leave the first alone."""
    starved, mixed, with_zero = (
        values(*setting, all_enter=True, num_seeds=8) for setting in ((1.0, 1), (0.5, 1), (1.0, 0))
    )
    torch.testing.assert_close(starved, torch.full_like(starved, 0.65), atol=0.01, rtol=0)
    assert solved(mixed) >= 7 / 8 and mixed.median() > 0.98
    assert solved(with_zero) >= 7 / 8 and with_zero.median() > 0.98


@pytest.mark.parametrize(("k_min", "moves"), [(1, False), (0, True)])
def test_the_starved_token_has_no_gradient_at_all(k_min, moves):
    mdp = decoy_and_lock(Q)
    data = mdp.log_reference.clone()
    data[0] = torch.tensor([0.0, -math.inf, -math.inf, -math.inf])
    setting = Training(reset_prob=1.0, k_min=k_min, num_updates=3)
    trained = token_mdp.train(mdp, setting, num_seeds=2, log_data=data)
    start = mdp.log_reference.log_softmax(-1)
    assert torch.equal(trained[:, 0], start[0].expand(2, -1)) != moves
    assert not torch.equal(trained[:, 1], start[1].expand(2, -1))


# ---- U17: the optimum that can be written down


@pytest.mark.parametrize("reset_prob", [0.0, 0.5])
@pytest.mark.parametrize("instance", [0, 2])
def test_ppo_and_drpo_reach_the_regularised_optimum(instance, reset_prob):
    """π*(y) ∝ π_ref(y) exp(r(y)/c) is worth c log E_ref exp(r/c), and resets from all answers do not move it."""
    mdp = every_answer(instance)
    paths = every_path(mdp)
    assert mdp.reward.shape[1] == 3 and mdp.horizon == 4 and len(paths.tokens) == 31
    reference, reward = (paths.per_token(table).sum(-1) for table in (mdp.log_reference, mdp.reward))
    best = COEFFICIENT * torch.logsumexp(reference + reward / COEFFICIENT, -1)
    optimum = (reference + reward / COEFFICIENT).log_softmax(-1)

    def distances(policies: Tensor) -> tuple[Tensor, Tensor]:
        answers = torch.stack([paths.per_token(policy).sum(-1) for policy in policies])
        return best - mdp.regularised(policies, COEFFICIENT), (answers.exp() * (answers - optimum)).sum(-1)

    short, kl = distances(mdp.log_reference.unsqueeze(0))
    torch.testing.assert_close(short, COEFFICIENT * kl)
    assert short > 0.5 * best.abs() and kl > 1

    setting = Training(
        reset_prob=reset_prob,
        k_min=0,
        kl_coefficient=COEFFICIENT,
        num_updates=150,
        num_episodes=256,
        decay=True,
        whitened=True,
    )
    short, kl = distances(token_mdp.train(mdp, setting, num_seeds=4, seed=instance))
    assert bool((short <= 0.01 * best.abs()).all()), short
    assert bool((kl < 0.02).all()), kl


# ---- U18: the natural policy gradient of the theory


def test_the_closed_form_step_is_the_numeric_argmin():
    draw = draws(5)
    policy, reference, q = torch.randn(3, 6, 4, generator=draw, dtype=torch.float64)
    policy, reference = policy.log_softmax(-1), reference.log_softmax(-1)
    lam, eta = 0.7, 1.3
    logits = torch.zeros_like(q, requires_grad=True)
    limits = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 0}
    solver = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **limits)

    def objective(log_p: Tensor) -> Tensor:
        return (log_p.exp() * (-q + lam * (log_p - reference) + (log_p - policy) / eta)).sum()

    def closure() -> Tensor:
        solver.zero_grad()
        loss = objective(logits.log_softmax(-1))
        loss.backward()
        return loss

    solver.step(closure)
    solver.step(closure)
    step = token_mdp.npg_step(policy, reference, q, lam=lam, eta=eta)
    torch.testing.assert_close(logits.detach().log_softmax(-1), step, atol=1e-6, rtol=0)
    for _ in range(20):
        elsewhere = (step + 0.1 * torch.randn(step.shape, generator=draw, dtype=torch.float64)).log_softmax(-1)
        assert objective(elsewhere) > objective(step)


@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
def test_the_iterates_stay_near_the_reference_in_every_state(lam):
    """Lemma B.11: KL(π_t(s)‖π_ref(s)) ≤ (t - 1) r_max / λ."""
    process = token_mdp.chance(1)
    for t, policy in enumerate(token_mdp.npg_iterates(process, num=100, lam=lam), start=1):
        kl = (policy.exp() * (policy - process.log_reference)).sum(-1)
        assert bool((kl <= (t - 1) / lam + 1e-12).all())
    assert kl.max() > 1e-4


def best_policy(process: Chance) -> Tensor:
    best = process.q(None).argmax(-1)
    return torch.nn.functional.one_hot(best, process.reward.shape[-1]).double()


@pytest.mark.parametrize("seed", [0, 1])
def test_suboptimality_is_below_the_bound_and_falls_like_one_over_root_t(seed):
    """Mixture of iterates, exact Q, λ = 1/√T; against the best policy, covered: λ H log C + 2 H^1.5 log C / √T."""
    process = token_mdp.chance(seed)
    comparator, horizon = best_policy(process), process.horizon
    coverage = process.occupancy(comparator) / process.occupancy(process.log_reference.exp())
    log_c = coverage.amax((1, 2, 3)).log()
    gaps: dict[int, float] = {}
    for num in (16, 64, 256, 1024):
        lam = 1 / math.sqrt(num)
        iterates = token_mdp.npg_iterates(process, num=num, lam=lam)
        mixture = torch.stack([process.value(policy.exp()) for policy in iterates]).mean(0)
        gap = process.value(comparator) - mixture
        assert bool((gap >= 0).all())
        assert bool((gap <= (lam * horizon + 2 * horizon**1.5 / math.sqrt(num)) * log_c).all())
        gaps[num] = gap.mean().item()
    slope = math.log(gaps[1024] / gaps[256]) / math.log(4)
    assert -0.6 < slope < -0.4, gaps
    assert gaps[16] > gaps[64] > gaps[256]


def test_a_token_of_no_state_ends_the_answer():
    assert (decoy_and_lock(Q).next_state[0, 1:] == END).all()
