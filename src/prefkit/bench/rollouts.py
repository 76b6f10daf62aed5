"""prefkit's side of a bench of reinforcement learning: batches of episodes drawn, scored and trained on, as a run does.

Every answer has the same length: neither the tokenizer nor the model names an end token, so nothing ends an answer and
nobody pays for suppressing one. The reward is a function of the text. The value function of `ppo` and `drpo` begins as
the policy.
"""

from __future__ import annotations

import gc
import importlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefkit.bench.arms import restore, trained
from prefkit.bench.blocks import now
from prefkit.bench.rl_workloads import Episodes, even
from prefkit.bench.workloads import build_model, word_tokenizer
from prefkit.domains.text.credit import critic_credit, critic_loss, grpo_credit, grpo_loss, rloo_credit, rloo_loss
from prefkit.domains.text.datasets import TextData
from prefkit.domains.text.episodes import EpisodeData
from prefkit.domains.text.generators import sampler_for
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.rollout_maker import RolloutMaker, TextReward
from prefkit.domains.text.sampler import Sampler
from prefkit.domains.text.value import value_of
from prefkit.engine.learner import Learner
from prefkit.engine.run import Run
from prefkit.engine.world import World
from prefkit.loops.policy_optimization import PolicyOptimization, resets_of
from prefkit.records import Example, Sample


@dataclass(frozen=True, kw_only=True)
class RolloutBlock:
    """Some batches of episodes of one side in a row. The first is warm-up, and no result contains its time."""

    seconds: list[float]
    """of each batch: sampling, scoring, all its optimizer steps, logging"""
    processor: list[float]
    """processor time of the same, over all threads: other work on the machine is not in it"""
    sampling: list[float]
    """of the seconds: drawing answers"""
    scoring: list[float]
    """of the seconds: reward, log-probs under policy and reference, values, advantages"""
    tokens: list[int]
    """drawn for each batch"""
    scores: list[float]
    """mean reward of each batch"""
    losses: list[float]
    """of each optimizer step, before it"""
    grad_norms: list[float]
    """of each optimizer step"""


@dataclass
class Spent:
    """Seconds spent in parts of a batch, between two calls of `take`."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time is counted under `name`."""

        def call(*args: Any, **settings: Any) -> Any:
            start = now(self.device)
            try:
                return function(*args, **settings)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + now(self.device) - start

        return call

    def take(self, name: str) -> float:
        return self.seconds.pop(name, 0.0)


class TimedSampler:
    """A sampler whose time is counted."""

    def __init__(self, sampler: Sampler, spent: Spent) -> None:
        self._refresh = sampler.refresh
        self._sample = spent.timed("sampling", sampler.sample)

    def refresh(self) -> None:
        self._refresh()

    def sample(self, *args: Any, **settings: Any) -> list[list[Sample]]:
        return self._sample(*args, **settings)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A policy, its prompts and its reference: what both sides share."""

    episodes: Episodes
    config: Any
    policy: TextPolicy
    data: EpisodeData
    start: dict[str, Tensor]
    """copies of the trained weights before any step"""

    @property
    def device(self) -> torch.device:
        return self.policy.world.device

    @property
    def batches(self) -> range:
        return range(1, self.episodes.workload.steps + 1)


def prepare(episodes: Episodes) -> Setup:
    """Build model, reference and prompts."""
    work, world = episodes.workload, World.start()
    prompts, answer = episodes.lengths()
    config = importlib.import_module(f"prefkit.methods.{episodes.method}").Config(
        model_name_or_path=work.model,
        dtype=work.dtype,
        per_device_train_batch_size=work.batch,
        num_generations=episodes.num_generations,
        num_ppo_epochs=episodes.epochs,
        max_steps=work.steps * episodes.epochs,
        max_new_tokens=answer,
        max_length=max(prompts) + answer,
        append_eos=False,
        missing_eos="keep",
        save_steps=0,
        seed=work.seed,
    )
    model = build_model(work, config, world.device)
    model.generation_config.eos_token_id = None
    vocabulary = model.config.get_text_config().vocab_size
    tokenizer = word_tokenizer(vocabulary)
    tokenizer.eos_token = None
    policy = TextPolicy.create(config, world, model=model, tokenizer=tokenizer)
    data = TextData[Example](
        config=config,
        tokenizer=tokenizer,
        train=episodes.rows(vocabulary),
        test=(),
        selection=(),
        checks={},
        fingerprint="",
        context=0,
        where=str,
    )
    return Setup(
        episodes=episodes,
        config=config,
        policy=policy,
        data=EpisodeData.of(data),
        start={name: weight.detach().clone() for name, weight in trained(policy.model)},
    )


def block(setup: Setup, drawn: Callable[[list[list[int]]], None] | None = None) -> RolloutBlock:
    """A block from the start weights: the steps of `loops.training.train` in a run directory.

    `drawn` is told each batch's answers in token ids, in order of prompts.
    """
    restore(setup.policy.model, setup.start)
    gc.collect()
    episodes, data = setup.episodes, setup.data
    spent = Spent(setup.device)
    stamps: list[float] = []
    processor: list[float] = []
    found = RolloutBlock(
        seconds=[], processor=[], sampling=[], scoring=[], tokens=[], scores=[], losses=[], grad_norms=[]
    )
    logged: list[dict[str, Tensor]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = replace(setup.config, output_dir=str(Path(folder) / "run"))
        with Run(config, method=episodes.method) as run:
            task = _task(setup, config, run, spent)
            total = data.total_steps(1)
            learner = Learner(task.module, config, total_steps=total, world=run.world)
            before = spent.timed("making", task.before)
            tokens = 0
            # One step more, empty: a run's last step writes a checkpoint, which the peer's does not.
            for step in run.steps(total + 1, per_epoch=data.steps_per_epoch(1)):
                first = (step - 1) % episodes.epochs == 0
                if first:
                    stamps.append(now(setup.device))
                    processor.append(time.process_time())
                if step > total:
                    continue
                tokens += data.num_tokens(step, 1)
                run.log({"num_tokens": float(tokens)})
                before(step, learner)
                if first:
                    found.sampling.append(spent.take("sampling"))
                    found.scoring.append(spent.take("making") - found.sampling[-1])
                    rollouts = task.store.rollouts
                    found.tokens.append(sum(len(rollout.tokens) - rollout.prefix for rollout in rollouts))
                    found.scores.append(sum(rollout.score for rollout in rollouts) / len(rollouts))
                    if drawn is not None:
                        drawn([list(rollout.tokens) for rollout in rollouts])
                rows, place = data.rows(step, 0, 1)
                values = learner.update(task.batches(step, rows, place), task.compute, weight=task.weight)
                run.log(values)
                task.after(step, values)
                logged.append(values)
    found.seconds.extend(after - before for before, after in pairwise(stamps))
    found.processor.extend(after - before for before, after in pairwise(processor))
    found.losses.extend(float(row["loss"]) for row in logged)
    found.grad_norms.extend(float(row["grad_norm"]) for row in logged)
    return found


def _task(setup: Setup, config: Any, run: Run, spent: Spent) -> PolicyOptimization:
    """The task that `run` of the method makes, around the policy there is."""
    policy, method = setup.policy, setup.episodes.method
    critic = method in ("ppo", "drpo")
    give, take = {"rloo": (rloo_credit, rloo_loss), "grpo": (grpo_credit, grpo_loss)}.get(
        method, (critic_credit, critic_loss)
    )
    value = value_of(config, policy, reward="", keeping=config.value_model) if critic else None
    sampler = TimedSampler(sampler_for(policy, config), spent)
    maker = RolloutMaker(
        policy=policy,
        sampler=sampler,
        data=setup.data,
        score=TextReward(score=even, rows=setup.data.data.train),
        resets=resets_of(config, writes=run.world.is_main),
        value=value,
        accounting="continuation",
        config=config,
    )
    return PolicyOptimization(
        policy=policy,
        sampler=sampler,
        value=value,
        data=setup.data,
        run=run,
        maker=maker,
        give_credit=give(config),
        take_loss=take(config),
        config=config,
        by_answer=not critic and (method == "rloo" or config.loss_mean == "answers"),
    )
