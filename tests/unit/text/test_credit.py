"""Credit and losses on whole batches: what is masked enters nothing, and every mean is over what it says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefkit.domains.text.credit import (
    Credit,
    Losses,
    Step,
    critic_credit,
    critic_loss,
    grpo_credit,
    grpo_loss,
    rloo_credit,
    rloo_loss,
)
from prefkit.domains.text.rollout_metrics import penalised, sequence_kl, summary
from prefkit.domains.text.rollouts import Columns, Rollout

BUDGET = 6
END = 2


def config(**options: Any) -> Any:
    return SimpleNamespace(
        **{
            "kl_in": "reward",
            "kl_estimator": "k3",
            "whiten_rewards": False,
            "scale_advantages": "whiten",
            "gamma": 1.0,
            "lam": 0.95,
            "cliprange": 0.2,
            "cliprange_high": 0.0,
            "cliprange_value": 0.2,
            "dual_clip": 0.0,
            "vf_coef": 0.1,
            "num_generations": 2,
            "scale_rewards": True,
            "loss_mean": "tokens",
            "missing_eos": "replace",
            "missing_eos_penalty": 1.0,
            "reward_clip": 0.0,
        }
        | options
    )


def rollouts() -> list[Rollout]:
    """Four answers to two prompts, budget 6: ended early, at the last position, not at all, and at once.

    Numbers stand at all six positions, as `episode` has them.
    """
    draws = torch.Generator().manual_seed(0)
    shapes = [(2, 4, True), (3, 6, True), (0, 6, False), (0, 1, True)]  # prefix, end, finished
    found: list[Rollout] = []
    for i, (prefix, end, finished) in enumerate(shapes):
        tokens = [9] * BUDGET
        if finished:
            tokens[end - 1] = END
        numbers = [tuple(torch.randn(BUDGET, generator=draws).tolist()) for _ in range(3)]
        found.append(
            Rollout(
                place=i // 2,
                row=i // 2,
                index=i % 2,
                prompt=(5,),
                tokens=tuple(tokens),
                prefix=prefix,
                end=end,
                finished=finished,
                text="",
                score=float(i) - 1.5,
                log_probs=numbers[0],
                ref_log_probs=numbers[1],
                values=numbers[2],
            )
        )
    return found


def continuation(rows: list[Rollout]) -> list[Rollout]:
    """The same answers with numbers at what the policy chose alone."""
    names = ("log_probs", "ref_log_probs", "values")
    return [replace(r, **{name: getattr(r, name)[r.prefix : r.end] for name in names}) for r in rows]


def columns(accounting: Any) -> Columns:
    rows = rollouts()
    return Columns.of(rows if accounting == "episode" else continuation(rows), accounting)


def step(accounting: Any, credit: Credit, *, shift: float = 0.1, **more: Any) -> tuple[Step, Tensor, Tensor]:
    """A pass a little away from the rollouts' policy; log-probs and values are leaves."""
    found = columns(accounting)
    draws = torch.Generator().manual_seed(1)
    log_probs = found.log_probs + shift * torch.randn(found.log_probs.shape, generator=draws)
    values = found.values + shift * torch.randn(found.values.shape, generator=draws)
    log_probs.requires_grad_(True)
    values.requires_grad_(True)
    given: dict[str, Any] = {
        "log_probs": log_probs,
        "values": values,
        "columns": found,
        "credit": credit,
        "kl_coef": 0.1,
        "value_scale": 1.0,
    }
    return Step(**{**given, **more}), log_probs, values


def poisoned(tensor: Tensor, mask: Tensor, value: float) -> Tensor:
    return torch.where(mask, tensor, torch.full_like(tensor, value))


KINDS = {
    "critic": (critic_credit, critic_loss, {}),
    "critic, KL as a loss": (critic_credit, critic_loss, {"kl_in": "loss"}),
    "rloo": (rloo_credit, rloo_loss, {}),
    "rloo, KL as a loss": (rloo_credit, rloo_loss, {"kl_in": "loss", "kl_estimator": "k2"}),
    "grpo": (grpo_credit, grpo_loss, {"kl_in": "loss"}),
    "grpo by answer": (grpo_credit, grpo_loss, {"kl_in": "loss", "loss_mean": "answers"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_is_masked_changes_nothing(kind: str, value: float) -> None:
    give, take, options = KINDS[kind]
    how = config(**options)
    clean = columns("continuation")
    mask = clean.actions
    dirty = replace(
        clean,
        **{name: poisoned(getattr(clean, name), mask, value) for name in ("log_probs", "ref_log_probs", "values")},
    )
    credits = [give(how)(found, clean.scores, 0.1) for found in (clean, dirty)]
    results: list[tuple[Losses, Tensor, Tensor]] = []
    for found, credit in zip((clean, dirty), credits, strict=True):
        if found is dirty and credit.advantages.ndim == 2:
            credit = replace(credit, advantages=poisoned(credit.advantages, mask, value))
        if found is dirty and credit.returns is not None:
            credit = replace(credit, returns=poisoned(credit.returns, mask, value))
        one, log_probs, values = step("continuation", credit, columns=found)
        losses = take(how)(one)
        losses.total.sum().backward()
        assert log_probs.grad is not None
        assert bool((log_probs.grad[~mask] == 0).all()) and bool((log_probs.grad[mask] != 0).any())
        results.append((losses, log_probs.grad, log_probs.grad if values.grad is None else values.grad))
        assert bool((results[-1][2][~mask] == 0).all())
    (one, *grads), (two, *others) = results
    assert torch.equal(one.total, two.total)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    for name in ("ratio", "approx_kl", "clipped"):
        assert torch.equal(getattr(one.ratios, name), getattr(two.ratios, name))


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_by_episode_a_forced_prefix_has_no_policy_gradient_and_what_follows_the_end_has(value: float) -> None:
    how = config(whiten_rewards=True)
    clean = columns("episode")
    credit = critic_credit(how, by_episode=True)(clean, clean.scores, 0.05)
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    for dirty in (False, True):
        found = clean
        if dirty:  # the prefix's own numbers, once credit is given
            prefix = ~clean.actions
            old = torch.where(prefix, torch.full_like(clean.log_probs, value), clean.log_probs)
            found = replace(clean, log_probs=old)
            credit = replace(credit, advantages=poisoned(credit.advantages, clean.actions, value))
        one, log_probs, values = step("episode", credit, columns=found)
        losses = critic_loss(how)(one)
        losses.total.sum().backward()
        assert log_probs.grad is not None and values.grad is not None
        results.append((losses.total.detach(), log_probs.grad, values.grad))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    gradient, of_values = results[0][1:]
    forced = torch.zeros_like(clean.actions)
    forced[0, :2] = forced[1, :3] = True
    assert torch.equal(~clean.actions, forced)
    assert bool((gradient[forced] == 0).all())
    behind = torch.zeros_like(forced)
    behind[0, 4:] = behind[3, 1:] = True
    assert bool((gradient[behind] != 0).any())  # a quirk: the released code trains on what follows the end
    assert bool((of_values[forced] != 0).any()) and bool((of_values[behind] != 0).any())


def reference_gae(rewards: list[float], values: list[float], lam: float) -> list[float]:
    found, running = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        after = values[t + 1] if t + 1 < len(values) else 0.0
        running = rewards[t] + after - values[t] + lam * running
        found[t] = running
    return found


def test_by_episode_credit_is_what_the_released_code_gives() -> None:
    """Spec by hand: all B x R positions are rewarded, whitened and regressed; the score falls on the end token."""
    rows, how, coefficient = rollouts(), config(whiten_rewards=True), 0.05
    found = Columns.of(rows, "episode")
    scores = penalised(found, how)
    assert scores.tolist() == [-1.5, -1.0, -1.0, 1.5]  # an end token at the very last position counts as missing
    rewards = [[-coefficient * (a - b) for a, b in zip(r.log_probs, r.ref_log_probs, strict=True)] for r in rows]
    for line, r, score in zip(rewards, rows, scores.tolist(), strict=True):
        line[r.end - 1] += score
    flat = torch.tensor(rewards, dtype=torch.float64)
    white = (flat - flat.mean()) / (flat.var(unbiased=False) + 1e-8).sqrt() + flat.mean()
    raw = [reference_gae(line, list(r.values), 0.95) for line, r in zip(white.tolist(), rows, strict=True)]
    advantages = torch.tensor(raw, dtype=torch.float64)
    returns = advantages + torch.tensor([r.values for r in rows], dtype=torch.float64)
    advantages = (advantages - advantages.mean()) / (advantages.var(unbiased=False) + 1e-8).sqrt()
    credit = critic_credit(how, by_episode=True)(found, scores, coefficient)
    assert credit.returns is not None
    torch.testing.assert_close(credit.returns.double(), returns, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(credit.advantages.double(), advantages, rtol=1e-5, atol=1e-5)


def test_by_episode_the_loss_is_what_the_released_code_takes() -> None:
    """Policy loss over what is not forced, value loss over every position, each a mean of the pass."""
    how = config()
    found = columns("episode")
    credit = critic_credit(how, by_episode=True)(found, found.scores, 0.05)
    share = found.actions.sum() / found.counted.sum()
    one, log_probs, values = step("episode", credit, shift=0.4, value_scale=share)
    total = critic_loss(how)(one).total.sum() / found.actions.sum()
    assert credit.returns is not None
    ratio = (log_probs - found.log_probs).exp()
    policy = torch.maximum(-ratio * credit.advantages, -ratio.clamp(0.8, 1.2) * credit.advantages)
    clipped = found.values + (values - found.values).clamp(-0.2, 0.2)
    value = 0.5 * torch.maximum((values - credit.returns) ** 2, (clipped - credit.returns) ** 2)
    expected = policy[found.actions].sum() / found.actions.sum() + 0.1 * value.mean()
    torch.testing.assert_close(total, expected)


def test_raw_advantages_of_a_continuation_do_not_depend_on_the_accounting() -> None:
    """A forced prefix lies before what is sampled, and credit flows backwards: for answers that fill their budget."""
    rows = [r for r in rollouts() if r.end == BUDGET]
    how = config(scale_advantages="none")
    episode, chosen = Columns.of(rows, "episode"), Columns.of(continuation(rows), "continuation")
    whole = critic_credit(how, by_episode=True)(episode, episode.scores, 0.05)
    part = critic_credit(how)(chosen, chosen.scores, 0.05)
    assert whole.returns is not None and part.returns is not None
    for i, r in enumerate(rows):
        for one, other in ((whole.advantages, part.advantages), (whole.returns, part.returns)):
            assert torch.equal(one[i, r.prefix :], other[i, : BUDGET - r.prefix])


def test_advantages_are_whitened_over_what_the_policy_chose() -> None:
    found = columns("continuation")
    credit = critic_credit(config())(found, found.scores, 0.05)
    chosen = credit.advantages[found.actions]
    assert float(chosen.mean()) == pytest.approx(0, abs=1e-6)
    assert float(chosen.var(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert bool((credit.advantages[~found.actions] == 0).all())
    wide = replace(
        found,
        **{
            name: torch.nn.functional.pad(getattr(found, name), (0, 3))
            for name in ("log_probs", "ref_log_probs", "values", "counted", "actions")
        },
    )
    padded = critic_credit(config())(wide, found.scores, 0.05)
    assert torch.equal(padded.advantages[:, :BUDGET], credit.advantages)


def test_scaled_advantages_keep_their_mean() -> None:
    found = columns("continuation")
    raw = critic_credit(config(scale_advantages="none"))(found, found.scores, 0.05).advantages
    chosen = raw[found.actions]
    scaled = critic_credit(config(scale_advantages="scale"))(found, found.scores, 0.05).advantages
    torch.testing.assert_close(scaled[found.actions], chosen / chosen.std(unbiased=False), rtol=1e-5, atol=1e-5)


def test_whitened_rewards_keep_their_mean() -> None:
    found = columns("continuation")
    plain, white = (
        critic_credit(config(whiten_rewards=w, lam=1.0, scale_advantages="none"))(found, found.scores, 0.05)
        for w in (False, True)
    )
    assert plain.returns is not None and white.returns is not None

    def rewards(returns: Tensor) -> Tensor:  # with λ = γ = 1 a return is the sum of what is to come
        after = torch.nn.functional.pad(returns[:, 1:], (0, 1))
        return (returns - after)[found.actions]

    one, other = rewards(plain.returns), rewards(white.returns)
    expected = (one - one.mean()) / one.std(unbiased=False) + one.mean()
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_pass_has_ratio_1_and_no_kl_to_the_rollouts_policy(kind: str) -> None:
    give, take, options = KINDS[kind]
    found = columns("continuation")
    one, _, _ = step("continuation", give(config(**options))(found, found.scores, 0.1), shift=0.0)
    ratios = take(config(**options))(one).ratios
    assert float(ratios.clipped.sum()) == 0 and float(ratios.approx_kl.sum()) == 0
    actions = found.actions.sum(-1)
    expected = torch.ones(4) if "rloo" in kind or "answer" in kind else actions.float()
    torch.testing.assert_close(ratios.ratio.float(), expected)


def test_at_the_first_update_the_kl_is_no_reward() -> None:
    found = columns("continuation")
    same = replace(found, ref_log_probs=found.log_probs)
    with_kl, without = (critic_credit(config())(same, same.scores, c) for c in (0.5, 0.0))
    assert torch.equal(with_kl.advantages, without.advantages)
    assert torch.equal(sequence_kl(same), torch.zeros(4))


def test_the_kl_of_an_answer_is_summed_over_what_is_counted() -> None:
    rows = rollouts()
    expected = [
        sum(a - b for a, b in zip(r.log_probs[r.prefix : r.end], r.ref_log_probs[r.prefix : r.end], strict=True))
        for r in rows
    ]
    found = columns("continuation")
    assert sequence_kl(found).tolist() == pytest.approx(expected, abs=1e-5)
    logged = summary(found, found.scores, kl_coef=0.05, resets=True)
    assert logged["objective/kl"] == pytest.approx(sum(expected) / 4, abs=1e-5)
    assert logged["rollout/reset/kl"] == pytest.approx(sum(expected[:2]) / 2, abs=1e-5)
    assert logged["rollout/plain/kl"] == pytest.approx(sum(expected[2:]) / 2, abs=1e-5)
    assert logged["objective/rlhf_reward"] == pytest.approx(0.0 - 0.05 * sum(expected) / 4, abs=1e-5)
    assert logged["rollout/reset_share"] == 0.5
    assert logged["rollout/cut_50_75/scores"] == pytest.approx(-1.0)  # 2 of 4 and 3 of 6 forced
    assert "rollout/cut_0_25/scores" not in logged


def test_rloo_advantages_by_hand() -> None:
    found = columns("continuation")
    how = config(scale_advantages="none")
    rewards = found.scores - 0.1 * sequence_kl(found)
    gap = rewards[0::2] - rewards[1::2]
    credit = rloo_credit(how)(found, found.scores, 0.1)
    assert credit.returns is None
    torch.testing.assert_close(credit.advantages, torch.stack([gap, -gap], 1).flatten())
    as_loss = rloo_credit(config(scale_advantages="none", kl_in="loss"))(found, found.scores, 0.1)
    torch.testing.assert_close(as_loss.advantages, torch.tensor([-1.0, 1.0, -1.0, 1.0]))


def test_grpo_advantages_by_hand() -> None:
    found = columns("continuation")
    credit = grpo_credit(config(scale_rewards=False, kl_in="loss", scale_advantages="none"))(found, found.scores, 0.1)
    assert credit.advantages.shape == found.log_probs.shape
    torch.testing.assert_close(credit.advantages[:, 0], torch.tensor([-0.5, 0.5, -0.5, 0.5]))
    assert bool((credit.advantages == credit.advantages[:, :1]).all())


def test_a_mean_over_answers_weighs_every_answer_alike() -> None:
    found = columns("continuation")
    credit = grpo_credit(config(kl_in="loss"))(found, found.scores, 0.1)
    sums, means = (
        grpo_loss(config(kl_in="loss", loss_mean=how))(step("continuation", credit)[0]) for how in ("tokens", "answers")
    )
    torch.testing.assert_close(means.total, sums.total / found.actions.sum(-1))


def test_losses_of_parts_add_up_to_the_whole() -> None:
    """A sum per answer, which nothing but the caller divides: micro-batches cannot change it."""
    found = columns("continuation")
    credit = critic_credit(config())(found, found.scores, 0.1)
    whole, _, _ = step("continuation", credit)
    totals: list[Tensor] = []
    for i in range(4):
        line = slice(i, i + 1)
        cut = replace(found, **{name: value[line] for name, value in vars(found).items()})
        assert whole.values is not None and credit.returns is not None
        part = Credit(advantages=credit.advantages[line], returns=credit.returns[line])
        alone = replace(whole, log_probs=whole.log_probs[line], values=whole.values[line], columns=cut, credit=part)
        totals.append(critic_loss(config())(alone).total)
    torch.testing.assert_close(torch.cat(totals), critic_loss(config())(whole).total)


def test_the_value_loss_counts_with_its_weight_and_can_go_unclipped() -> None:
    found = columns("continuation")
    credit = critic_credit(config())(found, found.scores, 0.1)
    one, _, values = step("continuation", credit, shift=0.5)
    assert credit.returns is not None
    plain = critic_loss(config(vf_coef=2.0, cliprange_value=0.0))(one)
    squares = torch.where(found.actions, (values - credit.returns) ** 2, 0.0).sum(-1) / 2
    torch.testing.assert_close(plain.terms["loss/value"], squares)
    torch.testing.assert_close(plain.total, plain.terms["loss/policy"] + 2.0 * squares)
