"""SELM's and XPO's losses: sign and size of each coefficient, reductions, and the mathematics they rest on, exact.

"Tabular" is one prompt, a handful of answers and free logits, in float64: every expectation is a sum.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from prefkit.objectives.optimism import bounded_log_ratio, optimism_share, selm_loss, xpo_loss
from prefkit.objectives.preference import dpo_loss, gap

BETA, ALPHA = 0.1, 0.3


def batch(b: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """chosen, rejected, own with gradient, then the reference's three: the order of `selm_loss`."""
    draw = torch.Generator().manual_seed(0)
    values = -30 * torch.rand(6, b, generator=draw, dtype=dtype)
    return [*(value.requires_grad_() for value in values[:3]), *values[3:]]


def without_own(six: list[Tensor]) -> list[Tensor]:
    return [six[0], six[1], six[3], six[4]]


def gradients(loss: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), of, retain_graph=True)


def arms(num: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Policy logits (with gradient) and the reference's log-probabilities, both (num,)."""
    draw = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn(2, num, generator=draw, dtype=torch.float64)
    return policy.requires_grad_(), reference.log_softmax(-1)


def term(log_policy: Tensor, log_ref: Tensor) -> Tensor:
    """The optimism term of every answer as ŷ, (num,): what α adds to the loss, here with α 1."""
    start = torch.zeros_like(log_policy)
    whole = selm_loss(start, start, log_policy, start, start, log_ref, beta=BETA, alpha=1.0)
    return whole - dpo_loss(start, start, start, start, beta=BETA)


def expected(weights: Tensor, log_policy: Tensor, log_ref: Tensor) -> Tensor:
    return (weights * term(log_policy, log_ref)).sum()


# Reductions.


def test_the_order_of_arguments_is_published():
    names = list(inspect.signature(selm_loss).parameters)
    assert names[:8] == ["chosen", "rejected", "own", "ref_chosen", "ref_rejected", "ref_own", "beta", "alpha"]
    assert list(inspect.signature(xpo_loss).parameters)[:5] == [*names[:2], "ref_sample", *names[3:5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_0_is_dpo_bit_for_bit(dtype):
    six = batch(dtype=dtype)
    four = without_own(six)
    dpo = dpo_loss(*four, beta=BETA)
    chosen, rejected, _, ref_chosen, ref_rejected, _ = six
    for loss in (
        selm_loss(*six, beta=BETA, alpha=0),
        selm_loss(chosen, rejected, None, ref_chosen, ref_rejected, None, beta=BETA, alpha=0.0, max_log_ratio=5.0),
        xpo_loss(chosen, rejected, None, ref_chosen, ref_rejected, beta=BETA, alpha=0),
    ):
        assert torch.equal(loss, dpo)
        assert all(map(torch.equal, gradients(loss, six[:2]), gradients(dpo, six[:2])))


def test_alpha_0_gives_the_parameters_of_dpo_after_many_steps():
    """Bit for bit, with momentum and decay in the way: nothing of the own answer reaches the weights."""

    def train(with_own: bool) -> Tensor:
        policy, log_ref = arms()
        solver = torch.optim.AdamW([policy], lr=0.1)
        for step in range(20):
            log_p, places = policy.log_softmax(-1), torch.tensor([step % 6, (step + 1) % 6])
            pair = [log_p[places[:1]], log_p[places[1:]], log_ref[places[:1]], log_ref[places[1:]]]
            own = (log_p[2:3], log_ref[2:3])
            loss = (
                selm_loss(*pair[:2], own[0], *pair[2:], own[1], beta=BETA, alpha=0)
                if with_own
                else dpo_loss(*pair, beta=BETA)
            )
            solver.zero_grad()
            loss.mean().backward()
            solver.step()
        return policy.detach()

    assert torch.equal(train(True), train(False))


def test_with_the_same_answer_xpo_is_selm_at_alpha_times_beta():
    six = batch()
    chosen, rejected, own, ref_chosen, ref_rejected, ref_own = six
    selm = selm_loss(*six, beta=BETA, alpha=ALPHA)
    xpo = xpo_loss(chosen, rejected, own, ref_chosen, ref_rejected, beta=BETA, alpha=ALPHA * BETA)
    for one, other in zip(gradients(selm, six[:3]), gradients(xpo, six[:3]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    torch.testing.assert_close(xpo - selm, ALPHA * BETA * ref_own)


def test_xpo_does_not_multiply_alpha_by_beta():
    chosen, rejected, own, ref_chosen, ref_rejected, _ = batch()
    for beta in (0.01, 1.0):
        loss = xpo_loss(chosen, rejected, own, ref_chosen, ref_rejected, beta=beta, alpha=ALPHA)
        (slope,) = gradients(loss, [own])
        torch.testing.assert_close(slope, torch.full_like(own, ALPHA))


# Sign and size of each coefficient.


def test_at_the_start_the_loss_is_log_2_and_the_optimism_0_exactly():
    start, own = torch.tensor([-12.5, -80.25]), torch.tensor([-7.0, -300.125])
    loss = selm_loss(start, start - 9, own, start, start - 9, own, beta=BETA, alpha=ALPHA)
    assert torch.equal(loss, dpo_loss(start, start - 9, start, start - 9, beta=BETA))
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    assert gap(start, start - 9, start, start - 9).tolist() == [0, 0]
    assert bounded_log_ratio(own, own, max_log_ratio=1.0).tolist() == [0, 0]


@pytest.mark.parametrize("shift", [-40.0, 0.0, 40.0])
def test_the_own_answer_is_pushed_down_by_alpha_beta_whatever_the_margin(shift):
    six = batch()
    six[0] = (six[0].detach() + shift).requires_grad_()
    (slope,) = torch.autograd.grad(selm_loss(*six, beta=BETA, alpha=ALPHA).mean(), six[2])
    torch.testing.assert_close(slope, torch.full((4,), ALPHA * BETA / 4, dtype=torch.float64))


def test_the_loss_is_affine_in_alpha_with_slope_beta_times_the_log_ratio():
    six = batch()
    values = [selm_loss(*six, beta=BETA, alpha=alpha) for alpha in (0.0, 0.1, 0.2, 0.7)]
    slope = BETA * (six[2] - six[5])
    for alpha, value in zip((0.0, 0.1, 0.2, 0.7), values, strict=True):
        torch.testing.assert_close(value, values[0] + alpha * slope)


@pytest.mark.parametrize("rank", ["chosen", "rejected", "neither"])
def test_coefficients_by_the_rank_of_the_own_answer(rank):
    """Chosen: -β(s - α); rejected: β(s + α); neither leaves the pair's alone. s = σ(-m)."""
    chosen, rejected, own, ref_chosen, ref_rejected, ref_own = batch()
    if rank != "neither":
        own, ref_own = (chosen, ref_chosen) if rank == "chosen" else (rejected, ref_rejected)
    s = torch.sigmoid(-BETA * gap(chosen, rejected, ref_chosen, ref_rejected)).detach()
    loss = selm_loss(chosen, rejected, own, ref_chosen, ref_rejected, ref_own, beta=BETA, alpha=ALPHA)
    up, down = gradients(loss, [chosen, rejected])
    torch.testing.assert_close(up, -BETA * (s - ALPHA * (rank == "chosen")))
    torch.testing.assert_close(down, BETA * (s + ALPHA * (rank == "rejected")))


@pytest.mark.parametrize("alpha", [1e-3, 1e-4, 0.3])
def test_a_chosen_own_answer_stops_at_the_stationary_margin(alpha):
    margin = math.log((1 - alpha) / alpha)
    below, at, above = (torch.tensor([m / BETA], dtype=torch.float64, requires_grad=True) for m in (-1, margin, 99))
    zero = torch.zeros(1, dtype=torch.float64)
    slopes = [
        gradients(selm_loss(chosen, zero, chosen, zero, zero, zero, beta=BETA, alpha=alpha), [chosen])[0].item()
        for chosen in (below, at, above)
    ]
    assert slopes[0] < 0 < slopes[2]
    assert slopes[1] == pytest.approx(0, abs=1e-15)
    if alpha != 0.3:
        assert margin == pytest.approx({1e-3: 6.91, 1e-4: 9.21}[alpha], abs=5e-3)


def test_an_own_answer_that_is_in_the_pair_may_share_its_tensor():
    """Reusing the score of the chosen answer gives loss and gradient of scoring it a third time."""
    policy, log_ref = arms()

    def loss(again: Tensor) -> Tensor:
        log_p = policy.log_softmax(-1)
        own = again.log_softmax(-1)[:1]
        return selm_loss(log_p[:1], log_p[1:2], own, log_ref[:1], log_ref[1:2], log_ref[:1], beta=BETA, alpha=ALPHA)

    copy = policy.detach().clone().requires_grad_()
    (shared,) = gradients(loss(policy), [policy])
    apart = gradients(loss(copy), [policy, copy])
    assert torch.equal(loss(policy), loss(copy))
    torch.testing.assert_close(shared, apart[0] + apart[1], rtol=1e-12, atol=1e-15)


def test_gradients_pass_the_numerical_check():
    six = batch(b=2)
    own, ref_own = six[2], six[5]
    with_bound = (own.detach() - 60).requires_grad_()  # far below the bound, away from the kink
    assert torch.autograd.gradcheck(lambda c, r, o: selm_loss(c, r, o, *six[3:], beta=BETA, alpha=ALPHA), six[:3])
    assert torch.autograd.gradcheck(
        lambda c, r, o: selm_loss(c, r, o, *six[3:5], ref_own, beta=BETA, alpha=ALPHA, max_log_ratio=10.0),
        [*six[:2], with_bound],
    )


def test_no_gradient_reaches_the_reference():
    six = [x.detach().clone().requires_grad_() for x in batch()]
    loss = selm_loss(*six, beta=BETA, alpha=ALPHA, max_log_ratio=100.0).sum()
    assert torch.autograd.grad(loss, six[5], allow_unused=True)[0] is None


# What the term does to a policy.


def test_one_step_on_the_term_lowers_the_own_answer():
    for place in range(6):
        policy, log_ref = arms()
        log_p = policy.log_softmax(-1)
        (slope,) = torch.autograd.grad(term(log_p, log_ref)[place], policy)
        moved = (policy - slope).log_softmax(-1)
        assert moved[place] < log_p[place]


def test_many_steps_on_sampled_answers_raise_the_forward_kl():
    policy, log_ref = arms()
    draw = torch.Generator().manual_seed(2)
    kls = []
    for _ in range(300):
        log_p = policy.log_softmax(-1)
        kls.append((log_ref.exp() * (log_ref - log_p)).sum().item())
        own = torch.multinomial(log_ref.exp(), 8, replacement=True, generator=draw)
        (slope,) = torch.autograd.grad(term(log_p, log_ref)[own].mean(), policy)
        policy = (policy - 0.5 * slope).detach().requires_grad_()
    assert kls[-1] > 1.5 * kls[0]


def test_summed_over_the_reference_the_term_is_minus_its_kl():
    policy, log_ref = arms()
    log_p = policy.log_softmax(-1)
    kl = (log_ref.exp() * (log_ref - log_p)).sum()
    torch.testing.assert_close(expected(log_ref.exp(), log_p, log_ref), -BETA * kl)


def test_the_exact_term_has_no_gradient_at_the_reference_and_the_greedy_one_has():
    """At the start the exact expectation pushes nothing; the mode alone is pushed down, and the rest goes up."""
    _, log_ref = arms()
    policy = log_ref.clone().requires_grad_()
    log_p = policy.log_softmax(-1)
    (exact,) = torch.autograd.grad(expected(log_ref.exp(), log_p, log_ref), policy, retain_graph=True)
    torch.testing.assert_close(exact, torch.zeros_like(exact), rtol=0, atol=1e-16)
    mode = int(log_ref.argmax())
    (greedy,) = torch.autograd.grad(term(log_p, log_ref)[mode], policy)
    torch.testing.assert_close(greedy, BETA * (torch.eye(6, dtype=torch.float64)[mode] - log_ref.exp()))
    assert greedy.abs().max() > 1e-2


def test_sampled_gradients_have_the_exact_mean_and_greedy_has_not():
    policy, log_ref = arms()
    log_p = policy.log_softmax(-1)
    each = torch.stack([torch.autograd.grad(t, policy, retain_graph=True)[0] for t in term(log_p, log_ref)])
    (exact,) = torch.autograd.grad(expected(log_ref.exp(), log_p, log_ref), policy)
    torch.testing.assert_close(log_ref.exp() @ each, exact)  # by enumeration
    num = 20_000
    drawn = torch.multinomial(log_ref.exp(), num, replacement=True, generator=torch.Generator().manual_seed(3))
    spread = (log_ref.exp() @ (each - exact) ** 2).sqrt()
    assert ((each[drawn].mean(0) - exact).abs() < 4 * spread / math.sqrt(num)).all()
    assert ((each[log_ref.argmax()] - exact).abs() > 4 * spread / math.sqrt(num)).any()


def test_the_gradient_in_terms_of_rewards_is_alpha_times_policy_minus_reference():
    """With π = π_ref exp(r/β)/Z the exact bonus has slope α(π - π_ref): none for an answer rare in both."""
    policy, log_ref = arms()
    reward = (0.1 * policy.detach()).requires_grad_()
    log_p = (log_ref + reward / BETA).log_softmax(-1)
    (slope,) = torch.autograd.grad(ALPHA * expected(log_ref.exp(), log_p, log_ref), reward)
    torch.testing.assert_close(-slope, ALPHA * (log_p.exp() - log_ref.exp()).detach())


def test_pushing_down_what_the_reference_says_is_pushing_down_low_reward():
    """E_ref[∇ log π] = E_π[exp(-r/β) ∇ log π], r = β (log π - log π_ref); the left by finite differences."""
    policy, log_ref = arms()
    log_p = policy.log_softmax(-1)
    weights = (log_p - (log_p - log_ref)).exp().detach()  # π exp(-r/β)
    (right,) = torch.autograd.grad((weights * log_p).sum(), policy)
    step = 1e-6 * torch.eye(6, dtype=torch.float64)
    value = lambda logits: logits.log_softmax(-1) @ log_ref.exp()  # noqa: E731
    left = (value(policy.detach() + step) - value(policy.detach() - step)) / 2e-6
    torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


# The derivation.


def inner(log_policy: Tensor, reward: Tensor, log_ref: Tensor) -> Tensor:
    """F(π; r) = E_π r - E_ref r - β KL(π‖π_ref); (..., num) -> (...)."""
    policy = log_policy.exp()
    return (policy * (reward - BETA * (log_policy - log_ref))).sum(-1) - (log_ref.exp() * reward).sum(-1)


def test_the_inner_problem_is_solved_by_the_tilted_reference():
    """Brute force over a grid of the simplex: none above β log Z - E_ref r, which π_r attains."""
    _, log_ref = arms(3)
    for seed in range(5):
        reward = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        log_z = torch.logsumexp(log_ref + reward / BETA, -1)
        most = BETA * log_z - log_ref.exp() @ reward
        tilted = log_ref + reward / BETA - log_z
        torch.testing.assert_close(inner(tilted, reward, log_ref), most)
        torch.testing.assert_close(most, BETA * (log_ref.exp() * (log_ref - tilted)).sum())
        grid = torch.linspace(0, 1, 401, dtype=torch.float64)
        one, two = torch.meshgrid(grid, grid, indexing="ij")
        simplex = torch.stack([one, two, 1 - one - two], -1)[one + two <= 1].clamp(min=1e-12)
        values = inner(simplex.log(), reward, log_ref)
        assert most >= 0
        assert values.max() <= most + 1e-9
        assert values.max() > most - 5e-3
        best = simplex[values.argmax()]
        torch.testing.assert_close(best, tilted.exp(), rtol=0, atol=5e-3)


# The bound.


def descend(max_log_ratio: float | None, steps: int) -> tuple[Tensor, float]:
    """Tabular SELM; answers 0 and 1 are tied, the others in no pair and each ŷ in turn. Log-ratios and last loss."""
    _, log_ref = arms()
    policy, loss = log_ref.clone().requires_grad_(), torch.zeros(2)
    for step in range(steps):
        log_p = policy.log_softmax(-1)
        pair, own = torch.tensor([0, 1]), torch.full((2,), 2 + step % 4)
        six = (log_p[pair], log_p[pair.flip(0)], log_p[own], log_ref[pair], log_ref[pair.flip(0)], log_ref[own])
        loss = selm_loss(*six, beta=BETA, alpha=2.0, max_log_ratio=max_log_ratio).mean()
        (slope,) = torch.autograd.grad(loss, policy)
        policy = (policy - 5 * slope).detach().requires_grad_()
    return policy.detach().log_softmax(-1) - log_ref, loss.item()


def test_without_the_bound_the_loss_falls_below_any_number():
    losses = [descend(None, steps)[1] for steps in (200, 400, 800)]
    assert losses[0] - losses[1] > 9 and losses[1] - losses[2] > 18, "it falls as the number of steps"


def test_with_the_bound_it_stops():
    for steps in (200, 800):
        ratio, loss = descend(20.0, steps)
        assert loss == pytest.approx(math.log(2) - 2.0 * BETA * 20, abs=0.01)
        assert ratio[2:].min() > -22 and ratio[2:].max() <= -20, "at the bound, or past it by the last push"


def test_the_bound_takes_the_push_and_leaves_the_rest():
    six = batch()
    six[2] = (six[5] + torch.tensor([5.0, -9.9, -10.1, -500.0])).requires_grad_()
    bounded = selm_loss(*six, beta=BETA, alpha=ALPHA, max_log_ratio=10.0)
    free = selm_loss(*six, beta=BETA, alpha=ALPHA)
    assert torch.equal(bounded[:2], free[:2])
    torch.testing.assert_close(bounded[2:], dpo_loss(*without_own(six), beta=BETA)[2:] - ALPHA * BETA * 10)
    up, down, own = gradients(bounded, six[:3])
    free_up, free_down, _ = gradients(free, six[:3])
    assert torch.equal(up, free_up) and torch.equal(down, free_down)
    torch.testing.assert_close(own, ALPHA * BETA * torch.tensor([1, 1, 0, 0], dtype=torch.float64))


def test_the_bound_of_xpo_is_on_the_same_ratio():
    chosen, rejected, own, ref_chosen, ref_rejected, ref_own = batch()
    own = (ref_own + torch.tensor([5.0, -9.9, -10.1, -500.0])).requires_grad_()
    loss = xpo_loss(
        chosen,
        rejected,
        own,
        ref_chosen,
        ref_rejected,
        beta=BETA,
        alpha=ALPHA,
        reference_of_sample=ref_own,
        max_log_ratio=10.0,
    )
    free = xpo_loss(chosen, rejected, own, ref_chosen, ref_rejected, beta=BETA, alpha=ALPHA)
    torch.testing.assert_close(loss[:2], free[:2])
    (slope,) = gradients(loss, [own])
    torch.testing.assert_close(slope, ALPHA * torch.tensor([1, 1, 0, 0], dtype=torch.float64))


def test_a_nan_is_not_hidden_by_the_bound():
    six = batch()
    broken = torch.full((4,), math.nan, dtype=torch.float64)
    loss = selm_loss(*six[:2], broken, *six[3:], beta=BETA, alpha=ALPHA, max_log_ratio=10.0)
    assert loss.isnan().all()


# The share.


def test_the_share_is_that_of_the_coefficients():
    six = batch()
    slopes = gradients(selm_loss(*six, beta=BETA, alpha=ALPHA), six[:3])
    sizes = torch.stack([slope.abs() for slope in slopes])
    share = optimism_share(*without_own(six), beta=BETA, alpha=ALPHA)
    torch.testing.assert_close(share, sizes[2] / sizes.sum(0))
    assert not share.requires_grad


@pytest.mark.parametrize(("alpha", "percent"), [(1e-4, 0.01), (1e-3, 0.1), (0.1, 9.09)])
def test_the_share_at_the_start_of_the_published_settings(alpha, percent):
    start = torch.tensor([-100.0], dtype=torch.float64)
    share = optimism_share(start, start, start, start, beta=0.01, alpha=alpha)
    assert 100 * share.item() == pytest.approx(percent, rel=2e-3)
    pair = optimism_share(start + 1e5, start, start, start, beta=1.0, alpha=0.0)
    assert pair.item() == 0  # even where nothing pulls any more


# Wrong arguments.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"alpha": -0.1}, "alpha must be 0 or more"),
        ({"alpha": math.nan}, "alpha must be 0 or more"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"max_log_ratio": 0.0}, "max_log_ratio must be above 0"),
        ({"own": None}, "own answer"),
        ({"ref_own": None}, "own answer"),
        ({"own": torch.zeros(3)}, r"own is \(3,\)"),
        ({"ref_own": torch.zeros(4, 2)}, r"ref_own is \(4, 2\)"),
        ({"chosen": torch.zeros(4, 1)}, r"chosen is \(4, 1\)"),
    ],
    ids=str,
)
def test_selm_refuses(change, match):
    names = ("chosen", "rejected", "own", "ref_chosen", "ref_rejected", "ref_own")
    arguments = dict(zip(names, batch(), strict=True)) | {"beta": BETA, "alpha": ALPHA} | change
    with pytest.raises(ValueError, match=match):
        selm_loss(**arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"alpha": -1.0}, "alpha must be 0 or more"),
        ({"ref_sample": None}, "needs ref_sample"),
        ({"ref_sample": torch.zeros(())}, "ref_sample is"),
        ({"max_log_ratio": 5.0}, "needs reference_of_sample"),
        ({"max_log_ratio": 5.0, "reference_of_sample": torch.zeros(2)}, r"reference_of_sample is \(2,\)"),
        ({"max_log_ratio": -5.0, "reference_of_sample": torch.zeros(4)}, "above 0"),
    ],
    ids=str,
)
def test_xpo_refuses(change, match):
    names = ("chosen", "rejected", "ref_sample", "ref_chosen", "ref_rejected")
    arguments = dict(zip(names, batch(), strict=False)) | {"beta": BETA, "alpha": ALPHA} | change
    with pytest.raises(ValueError, match=match):
        xpo_loss(**arguments)


def test_the_share_refuses():
    four = without_own(batch())
    with pytest.raises(ValueError, match="beta must be positive"):
        optimism_share(*four, beta=-1.0, alpha=0.1)
    with pytest.raises(ValueError, match="alpha must be"):
        optimism_share(*four, beta=0.1, alpha=-0.1)
    with pytest.raises(ValueError, match="chosen is"):
        optimism_share(four[0][:, None], *four[1:], beta=0.1, alpha=0.1)
