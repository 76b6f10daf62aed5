"""What the loop adds to credit and losses: the KL coefficient's way, masks' means, options that cannot work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from prefkit.domains.text.credit import critic_credit, critic_loss
from prefkit.domains.text.episodes import EpisodeData
from prefkit.domains.text.rollouts import Rollout
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.loops import stages
from prefkit.loops.policy_optimization import (
    PolicyOptimization,
    check_groups,
    check_options,
    joined,
    optimization,
    resets_of,
)
from prefkit.methods import drpo, rloo


def task(*, paper: bool = False, **options: Any) -> PolicyOptimization:
    """DR-PO on a tiny model, as its method makes it, with a run that keeps no files."""
    config = drpo.Config(
        **{
            "dtype": "float32",
            "max_new_tokens": 6,
            "per_device_train_batch_size": 4,
            "num_mini_batches": 2,
            "num_eval_prompts": 1,
            "temperature": 0.7,
        }
        | options
    )
    model = tiny.model()
    data = stages.prepare(config, model=model, tokenizer=tiny.tokenizer(), train=tiny.pairs(), evaluation=tiny.pairs(4))
    silent: Any = SimpleNamespace(
        world=World.start(),
        directory="run",
        say=lambda line: None,
        log=lambda values: None,
        fingerprint=lambda **parts: None,
    )
    return optimization(
        config,
        EpisodeData.of(data),
        silent,
        reward=lambda prompts, texts: [float(len(text)) for text in texts],
        reward_name="",
        give_credit=critic_credit(config, by_episode=paper),
        take_loss=critic_loss(config),
        judges={},
        critic="policy",
        accounting="episode" if paper else "continuation",
        mean_per_pass=paper,
        model=model,
    )


def computed(made: PolicyOptimization, step: int = 1) -> tuple[float, dict[str, float]]:
    """The step's loss and its metrics, as `Learner` takes them."""
    learner: Any = None
    made.before(step, learner)
    places, first = made.data.rows(step, 0, 1)
    batches = made.batches(step, places, first)
    found = [made.compute(batch) for batch in batches]
    total = sum(float(losses.detach().sum()) for losses, _ in found) / sum(map(made.weight, batches))
    names = [name for name in found[0][1] if name != "objective/entropy"]
    return total, {name: float(torch.cat([metrics[name] for _, metrics in found]).mean()) for name in names}


@pytest.mark.parametrize("paper", [False, True])
def test_a_batch_is_passed_over_at_ratio_1_first(paper: bool) -> None:
    """New log-probs are the old ones: the same temperature, prefix and engine."""
    made = task(paper=paper)
    for step in (1, 2):
        _, metrics = computed(made, step)
        assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-8)
        assert metrics["policy/clip_fraction"] == 0
    assert any(rollout.prefix for rollout in made.store.rollouts)
    assert all(r.ref_log_probs == r.log_probs for r in made.store.rollouts)


@pytest.mark.parametrize(
    "options", [{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, {"tokens_per_batch": 64}]
)
def test_passes_do_not_change_the_loss(options: dict[str, Any]) -> None:
    """Normalised over the whole minibatch: a token weighs the same whatever stands beside it."""
    whole = task()
    few = task(**options)
    one, other = computed(whole), computed(few)
    places, first = few.data.rows(1, 0, 1)
    assert len(few.batches(1, places, first)) > 1 == len(whole.batches(1, places, first))
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    for name, value in one[1].items():
        assert other[1][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_by_episode_every_pass_is_a_mean_of_its_own() -> None:
    """The released code's quirk: a token's weight depends on the answers beside it."""
    losses = [
        computed(task(paper=True, **options))[0]
        for options in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def answers(each: float, tokens: int, count: int, prefix: int = 0) -> list[Rollout]:
    """Answers whose every chosen token has a log-ratio of `each` to the reference."""
    return [
        Rollout(
            place=i,
            row=i,
            index=0,
            prompt=(5,),
            tokens=(9,) * (prefix + tokens),
            prefix=prefix,
            end=prefix + tokens,
            finished=True,
            text="",
            log_probs=(-1.0,) * tokens,
            ref_log_probs=(-1.0 - each,) * tokens,
        )
        for i in range(count)
    ]


def next_coefficient(rollouts: list[Rollout], **options: Any) -> float:
    config = SimpleNamespace(**{"kl_target": 6.0, "kl_horizon": 10_000} | options)
    store = SimpleNamespace(rollouts=rollouts, about={"kl_coef": 0.15})
    task: Any = SimpleNamespace(config=config, store=store, accounting="continuation")
    return PolicyOptimization._next_coefficient(task)


@pytest.mark.parametrize(("tokens", "expected"), [(24, 0.151536), (6, 0.148464), (12, 0.15)])
def test_the_adaptive_coefficient_follows_the_sum_over_an_answer(tokens: int, expected: float) -> None:
    """Half a nat a token: 12, 3 and 6 nats an answer; the mean over tokens would be 0.5 in all three."""
    for prefix in (0, 5):
        assert next_coefficient(answers(0.5, tokens, 512, prefix)) == pytest.approx(expected, abs=1e-9)


def test_without_a_target_the_coefficient_stays() -> None:
    assert next_coefficient(answers(0.5, 24, 8), kl_target=0.0) == 0.15


def test_rows_of_several_widths_are_joined() -> None:
    rows = [torch.ones(2, 4), torch.full((1, 2), 2.0)]
    assert joined(rows, 3).tolist() == [[1, 1, 1], [1, 1, 1], [2, 2, 0]]
    assert joined(rows).shape == (3, 4)
    assert joined([torch.ones(2), torch.zeros(1)]).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"temperature": 0.0},
        {"dual_clip": 0.5},
        {"kl_target": 6.0, "kl_coef": 0.0},
        {"reset_prob": 1.5},
        {"cliprange": 1.0},
        {"num_ppo_epochs": 0},
        {"k_min": -1},
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    check_options(drpo.Config())
    with pytest.raises(InputError):
        check_options(drpo.Config(**options))


def test_answers_need_others() -> None:
    check_groups(rloo.Config())
    with pytest.raises(InputError, match="there are none"):
        check_groups(rloo.Config(num_generations=1))


def test_resets_are_what_the_options_say() -> None:
    config = drpo.Config(reset_prob=0.3, reset_source="both", k_min=2, reset_law="fixed", reset_cut=3.0, seed=4)
    found = resets_of(config, writes=False)
    assert (found.prob, found.source, found.k_min, found.law, found.cut, found.seed) == (
        0.3,
        "both",
        2,
        "fixed",
        3.0,
        4,
    )
    assert found.filter is None and not found.writes
    assert resets_of(drpo.Config(reset_filter="finished"), writes=True).filter is not None
