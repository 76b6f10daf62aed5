"""prefkit's own arms: the same training step with its savings left out one by one.

    naive    padded rows, logits at every position
    padded   padded rows, head and last layer only where an answer token is predicted
    packed   packed rows, the prompt once for each answer
    engine   packed rows, the prompt once for each pair: what a run does

All are real runs: pairs, learner, metrics and the journal of a run directory, with the reference cached.
"""

from __future__ import annotations

import gc
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefkit.bench.blocks import Block, Watch, now
from prefkit.bench.workloads import PAD, Lengths, Workload, build_model, token_pairs, word_tokenizer
from prefkit.domains.text import attention
from prefkit.domains.text.generators import sampler_for
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.scoring import causal_lm
from prefkit.engine.learner import Learner
from prefkit.engine.precision import autocast
from prefkit.engine.run import Run
from prefkit.engine.world import World
from prefkit.loops.pairs import KINDS, Item, PairScores, PairTask
from prefkit.protocols import Metrics
from prefkit.records import Group, Pair

OURS = ("naive", "padded", "packed", "engine")


class NaivePolicy(TextPolicy):
    """Scores padded rows with logits at every position, prompt and padding included."""

    def log_probs(self, groups: Sequence[Group], *, temperature: float = 1.0) -> Tensor:
        rows = [(group.prompt, answer) for group in groups for answer in group.answers]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), length), PAD)
        answers = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(rows):
            ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            answers[i, len(prompt) : len(prompt) + len(answer)] = True
        ids, answers = ids.to(self.world.device), answers.to(self.world.device)
        model = causal_lm(self.model)
        with autocast(self.dtype, self.world.device):
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(hidden[:, :-1]).float() * self.module.logit_scale
        if self.module.soft_cap:
            logits = torch.tanh(logits / self.module.soft_cap) * self.module.soft_cap
        tokens = (logits / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (tokens * answers[:, 1:]).sum(-1).view(len(groups), -1)


class UnsharedPolicy(TextPolicy):
    """Scores packed rows in which every answer brings a prompt of its own."""

    def log_probs(self, groups: Sequence[Group], *, temperature: float = 1.0) -> Tensor:
        return super().log_probs(unshared(groups), temperature=temperature).view(len(groups), -1)


def unshared(groups: Sequence[Group]) -> list[Group]:
    """Each answer as a group with its own copy of the prompt."""
    return [Group(group.prompt, (answer,)) for group in groups for answer in group.answers]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A policy, its pairs in the order of training and their cached reference: what all arms share."""

    workload: Workload
    config: Any
    """of `prefkit dpo`"""
    policy: TextPolicy
    pairs: list[Pair]
    reference: Tensor
    """(rows, 2) log-probs under the start weights"""
    start: dict[str, Tensor]
    """copies of the trained weights before any step"""

    @property
    def device(self) -> torch.device:
        return self.policy.world.device

    def rows(self, step: int) -> list[int]:
        """The rows of a 1-based step."""
        return list(range((step - 1) * self.workload.batch, step * self.workload.batch))


def prepare(workload: Workload, lengths: Sequence[Lengths] | None = None) -> Setup:
    """Build model and pairs (of `lengths`, where they are not the workload's own) and score the reference."""
    config = dpo().Config(
        model_name_or_path=workload.model,
        dtype=workload.dtype,
        use_peft=workload.use_peft,
        per_device_train_batch_size=workload.batch,
        max_steps=workload.steps,
        precompute_ref_log_probs=True,
        save_steps=0,
        seed=workload.seed,
    )
    world = World.start()
    model = build_model(workload, config, world.device)
    vocabulary = model.config.get_text_config().vocab_size
    policy = TextPolicy.create(config, world, model=model, tokenizer=word_tokenizer(vocabulary))
    pairs = token_pairs(list(lengths or workload.lengths()), vocabulary, workload.seed)
    groups = [pair.group for pair in pairs]
    pieces = [policy.reference_log_probs(groups[i : i + workload.batch]) for i in range(0, len(groups), workload.batch)]
    return Setup(
        workload=workload,
        config=config,
        policy=policy,
        pairs=pairs,
        reference=torch.cat(pieces).cpu(),
        start={name: weight.detach().clone() for name, weight in trained(policy.model)},
    )


def dpo() -> Any:
    """The method that is measured, found as the command line finds it."""
    return importlib.import_module("prefkit.methods.dpo")


def trained(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights that train, by name."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


@torch.no_grad()
def restore(model: Any, start: dict[str, Tensor]) -> None:
    """Put the start weights back."""
    for name, weight in trained(model):
        weight.copy_(start[name])


@contextmanager
def scoring(setup: Setup, arm: str) -> Iterator[TextPolicy]:
    """The policy as an arm scores with it; the module is the same for all."""
    module = setup.policy.module
    chosen = module.backend
    if arm in ("naive", "padded"):
        module.backend = "padded"
    kind = {"naive": NaivePolicy, "packed": UnsharedPolicy}.get(arm, TextPolicy)
    policy = setup.policy
    try:
        yield kind(module, policy.tokenizer, reference=policy.reference, world=policy.world, source="")
    finally:
        module.backend = chosen


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """The model with the attention it came with: nothing of ours is in the way of a peer."""
    config = causal_lm(model).config
    parts = list({id(part): part for part in (config, config.get_text_config())}.values())
    names = [part._attn_implementation for part in parts]
    for part in parts:
        part._attn_implementation = attention.own_attention(config)
    try:
        yield
    finally:
        for part, name in zip(parts, names, strict=True):
            part._attn_implementation = name


def block(setup: Setup, arm: str, watch: Watch | None = None) -> Block:
    """A block of one arm from the start weights: the steps of `loops.training.train` in a run directory."""
    restore(setup.policy.model, setup.start)
    gc.collect()
    steps = setup.workload.steps
    stamps: list[float] = []
    logged: list[dict[str, Tensor]] = []
    with tempfile.TemporaryDirectory() as folder, scoring(setup, arm) as policy:
        config = replace(setup.config, output_dir=str(Path(folder) / "run"))
        with Run(config, method="dpo") as run:
            task = _task(setup, policy, config)
            learner = Learner(task.module, config, total_steps=steps, world=run.world)
            tokens = 0
            # One step more, empty: a run's last step writes a checkpoint, which the peer's does not.
            for step in run.steps(steps + 1, per_epoch=float(steps)):
                stamps.append(now(setup.device))
                if step > steps:
                    continue
                if watch is not None:
                    watch.begin(step)
                rows = setup.rows(step)
                tokens += sum(_num_tokens(setup.pairs[row]) for row in rows)
                run.log({"num_tokens": float(tokens)})
                values = learner.update(task.batches(step, rows, 0), task.compute, weight=task.weight)
                run.log(values)
                logged.append(values)
                if watch is not None:
                    watch.end(step)
    return Block(
        seconds=[after - before for before, after in pairwise(stamps)],
        losses=[float(row["loss"]) for row in logged],
        log_probs=[float(row["logps/chosen"]) for row in logged],
        grad_norms=[float(row["grad_norm"]) for row in logged],
    )


def _task(setup: Setup, policy: TextPolicy, config: Any) -> PairTask:
    def objective(scores: PairScores, _items: Sequence[Item], _policy: TextPolicy) -> tuple[Tensor, Metrics]:
        losses = dpo().loss(
            scores.chosen,
            scores.rejected,
            scores.ref_chosen,
            scores.ref_rejected,
            beta=config.beta,
            kind=KINDS[config.loss_type],
            label_smoothing=config.label_smoothing,
        )
        return losses, {}

    return PairTask(
        policy=policy,
        sampler=sampler_for(policy, config),
        pairs=setup.pairs,
        test=(),
        objective=objective,
        config=config,
        reference=setup.reference,
    )


def _num_tokens(pair: Pair) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
