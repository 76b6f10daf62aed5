"""Training on stored pairs, with or without fresh samples of the policy: the task the training loop runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.domains.text.attention import own_attention
from prefkit.domains.text.batches import step_batches
from prefkit.domains.text.cache import Key, reference_table, tokens_fingerprint
from prefkit.domains.text.datasets import TextData
from prefkit.domains.text.generators import sampler_for
from prefkit.domains.text.metrics import (
    PairEvaluation,
    SampleEvaluation,
    pair_metrics,
    summarize_pairs,
    summarize_samples,
)
from prefkit.domains.text.packing import num_tokens, passes
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.sampler import Decoding, Sampler, check_prompts
from prefkit.domains.text.scoring import causal_lm
from prefkit.engine import limits
from prefkit.engine.run import Run
from prefkit.engine.seeds import number
from prefkit.errors import InputError
from prefkit.objectives.margin import Hinge, Ipo, Kind, Logistic
from prefkit.objectives.preference import nll
from prefkit.protocols import Gold, Metrics, Trackable
from prefkit.records import Group, HeldOut, Pair, Sample


@dataclass(frozen=True)
class Item:
    """A stored pair of a batch and, for online methods, fresh answers to its online prompt."""

    index: int
    pair: Pair
    samples: Sequence[Sample] = ()


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """Summed log-probs of a batch of pairs, (b,) each; `reference` is without gradient."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    num_chosen_tokens: Tensor
    state_kl: Tensor | None = None
    """(b, 2, t): exact KL of each next-token distribution along the stored answers, where asked for"""
    token_metrics: Metrics = field(default_factory=dict[str, Tensor])
    """entropy and accuracy of the stored answers' tokens, where asked for"""
    own: tuple[Tensor, Tensor] | None = None
    """(b, k, t) token log-probs of the fresh answers under policy and reference, where they came from the same pass"""


Objective = Callable[[PairScores, Sequence[Item], TextPolicy], tuple[Tensor, Metrics]]
"""losses (b,) and further per-example metrics of one micro-batch"""


KINDS: dict[str, Kind] = {"sigmoid": Logistic(), "ipo": Ipo(), "hinge": Hinge()}
"""loss on the margin by the name `--loss_type` takes"""


REFERENCE_ROWS = 4
"""rows of a reference pass for each row of a training pass"""

LIMITS = {
    "beta": limits.ABOVE_0,
    "label_smoothing": limits.Limit(0, 0.5, below=True),
    "sft_weight": limits.NOT_BELOW_0,
    "offline_kl_weight": limits.NOT_BELOW_0,
    "kl_weight": limits.NOT_BELOW_0,
    "num_generations": limits.AT_LEAST_1,
}


def check_options(config: Any) -> None:
    """InputError for options of the objective that are out of range or do not go together."""
    limits.check(config, LIMITS)
    if config.label_smoothing and config.loss_type != "sigmoid":
        raise InputError(
            f"a smoothed label is a probability, and loss_type {config.loss_type} has no use for one",
            where="--label_smoothing",
            mend="leave it at 0, or --loss_type sigmoid",
        )


def extra_terms(config: Any, scores: PairScores) -> Tensor | float:
    """What a Config adds to the loss on stored pairs for fair comparison: an SFT term, an offline KL; (b,) or 0."""
    extra: Tensor | float = 0.0
    if config.sft_weight:
        extra = extra + config.sft_weight * nll(scores.chosen, scores.num_chosen_tokens)
    if scores.state_kl is not None:
        extra = extra + config.offline_kl_weight * scores.state_kl.sum(-1).mean(-1)
    return extra


@dataclass(frozen=True, kw_only=True)
class OwnSamples:
    """Fresh answers drawn at every step: `num` to each online prompt, one prompt beside each stored pair."""

    num: int
    decoding: Decoding
    seed: int
    prompts: Sequence[Sequence[int]] = ()
    """token ids of a separate prompt set; empty uses the prompts of the batch's pairs"""

    def choose(self, step: int, pairs: Sequence[Pair], first: int, global_batch: int) -> list[Sequence[int]]:
        """The online prompt of each of this process's pairs."""
        if not self.prompts:
            return [pair.prompt for pair in pairs]
        seed = number(self.seed, "online prompts") % 2**31
        rows = step_batches(len(self.prompts), step=step, global_batch=global_batch, seed=seed)
        return [self.prompts[row] for row in rows[first : first + len(pairs)]]


@dataclass(kw_only=True)
class PairTask:
    """Stored pairs, an objective on their scores, and optional fresh samples. See `protocols.Task`."""

    policy: TextPolicy
    sampler: Sampler
    pairs: Sequence[Pair]
    test: Sequence[Pair]
    """held-out pairs that are reported"""
    selection: Sequence[Pair] = ()
    """held-out pairs that choose checkpoints; empty where nothing is chosen"""
    objective: Objective
    config: Any
    """a Config with the groups of every text method and `beta`"""
    own: OwnSamples | None = None
    judges: Mapping[str, Gold] = field(default_factory=dict[str, Gold])
    reference: Tensor | None = None
    """(rows, 2) cached reference log-probs"""
    with_state_kl: bool = False
    token_sums: bool = True
    """whether token log-probs are all that the objective needs of fresh answers, not whole distributions"""

    def __post_init__(self) -> None:
        self.num_rows = len(self.pairs)
        self.module: nn.Module = self.policy.module
        self.micro = self.config.per_device_train_batch_size
        world = self.policy.world
        self.global_batch = self.micro * self.config.gradient_accumulation_steps * world.size
        if self.own is not None:  # at the start, not at the step that comes upon the prompt
            check_prompts(self.policy, self.own.prompts or [pair.prompt for pair in self.pairs], self.own.decoding)
        self._evaluations = {
            False: self._evaluation(self.test, "test"),
            True: self._evaluation(self.selection, "selection"),
        }

    def _evaluation(self, pairs: Sequence[Pair], name: str) -> tuple[PairEvaluation, SampleEvaluation]:
        settings = {"batch_size": 2 * self.micro, "tokens_per_batch": self.config.tokens_per_batch}
        scored = PairEvaluation(self.policy, pairs, **settings, beta=self.config.beta)
        sampled = SampleEvaluation(
            self.policy,
            self.sampler,
            pairs,
            decoding=Decoding.of(self.config),
            seed=number(self.config.seed, name),
            judges=dict(self.judges),
            **settings,
            most=self.config.num_eval_prompts,
        )
        return scored, sampled

    def tracked(self) -> Mapping[str, Trackable]:
        return {"policy": self.policy}

    def batches(self, step: int, rows: Sequence[int], first: int) -> Sequence[Sequence[Item]]:
        pairs = [self.pairs[row] for row in rows]
        samples: Sequence[Sequence[Sample]] = [()] * len(pairs)
        if self.own is not None:
            self.sampler.refresh()
            samples = self.sampler.sample(
                self.own.choose(step, pairs, first, self.global_batch),
                num=self.own.num,
                decoding=self.own.decoding,
                seed=self.own.seed,
                path=("own", step),
                rows=range(first, first + len(pairs)),
            )
        items = [Item(row, pair, own) for row, pair, own in zip(rows, pairs, samples, strict=True)]
        sizes = [num_tokens(item.pair.group) + _own_tokens(item) for item in items]
        agree = self.policy.world.most if self.policy.world.in_step else None
        places = passes(sizes, rows=self.micro, budget=self.config.tokens_per_batch, agree=agree)
        return [[items[i] for i in piece] for piece in places]

    def compute(self, batch: Sequence[Item]) -> tuple[Tensor, Metrics]:
        scores = self.score(batch)
        losses, metrics = self.objective(scores, batch, self.policy)
        log_probs = torch.stack([scores.chosen, scores.rejected], dim=1)
        reference = torch.stack([scores.ref_chosen, scores.ref_rejected], dim=1)
        rewards = pair_metrics(log_probs, reference, self.config.beta)
        return losses, {**rewards, **scores.token_metrics, **metrics}

    def score(self, batch: Sequence[Item]) -> PairScores:
        """Policy and reference log-probs of a micro-batch's stored pairs."""
        groups = [item.pair.group for item in batch]
        state_kl, token_metrics, own = None, {}, None
        if self._share_prompts(batch):
            log_probs, reference, own = self._together(batch)
        elif self.with_state_kl:
            tokens, reference_tokens, kl = self.policy.state_kl(groups)
            log_probs = tokens.sum(-1).view(len(groups), 2)
            reference = reference_tokens.sum(-1).view(len(groups), 2)
            state_kl = kl.view(len(groups), 2, -1)
        else:
            log_probs, token_metrics = self._log_probs(groups)
            if self.reference is not None:
                reference = self.reference[[item.index for item in batch]].to(log_probs.device)
            else:
                reference = self.policy.reference_log_probs(groups)
        return PairScores(
            chosen=log_probs[:, 0],
            rejected=log_probs[:, 1],
            ref_chosen=reference[:, 0],
            ref_rejected=reference[:, 1],
            num_chosen_tokens=torch.tensor([len(item.pair.chosen) for item in batch], device=log_probs.device),
            state_kl=state_kl,
            token_metrics=token_metrics,
            own=own,
        )

    def _share_prompts(self, batch: Sequence[Item]) -> bool:
        """Whether stored and fresh answers of this batch continue the same prompts, and sums over tokens suffice."""
        if self.with_state_kl or self.config.log_token_metrics or not self.token_sums:
            return False
        return bool(batch[0].samples) and all(
            tuple(item.samples[0].prompt) == tuple(item.pair.prompt) for item in batch
        )

    def _together(self, batch: Sequence[Item]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Stored and fresh answers in one group, so that their prompt is computed once: log-probs (b, 2) under policy
        and reference, and (b, k, t) of the fresh ones.
        """
        groups = [
            Group(item.pair.prompt, [item.pair.chosen, item.pair.rejected, *(s.tokens for s in item.samples)])
            for item in batch
        ]
        longest = max(len(sample.tokens) for item in batch for sample in item.samples)

        def parted(tokens: Tensor) -> tuple[Tensor, Tensor]:
            rows = tokens.view(len(batch), len(groups[0].answers), -1)
            return rows[:, :2].sum(-1), rows[:, 2:, :longest]

        log_probs, own = parted(self.policy.token_log_probs(groups))
        if self.reference is None:
            reference, ref_own = parted(self.policy.reference_token_log_probs(groups))
        else:
            reference = self.reference[[item.index for item in batch]].to(log_probs.device)
            tokens = self.policy.reference_token_log_probs(own_groups(batch))
            ref_own = tokens.view(len(batch), -1, longest)
        return log_probs, reference, (own, ref_own)

    def _log_probs(self, groups: Sequence[Group]) -> tuple[Tensor, Metrics]:
        """(b, 2) log-probs of stored answers and, where they are logged, the means over each pair's tokens."""
        if not self.config.log_token_metrics:
            return self.policy.log_probs(groups), {}
        log_probs, *details = (each.view(len(groups), 2, -1) for each in self.policy.token_details(groups))
        lengths = torch.tensor([num_tokens(group) - len(group.prompt) for group in groups], device=log_probs.device)
        entropy, top1 = (each.sum((1, 2)) / lengths for each in details)
        return log_probs.sum(-1), {"entropy": entropy, "mean_token_accuracy": top1}

    def weight(self, batch: Sequence[Item]) -> float:
        return float(len(batch))

    def evaluate(self, *, selecting: bool = False) -> HeldOut:
        scored, sampled = self._evaluations[selecting and bool(self.selection)]
        pairs, samples = scored(), sampled()
        metrics = summarize_pairs(pairs) | summarize_samples(samples, tuple(self.judges))
        return HeldOut(metrics=metrics, pairs=pairs, samples=samples)

    def finish(self) -> None:
        """Nothing: the last step's weights are final."""

    def save_final(self, directory: Path) -> Mapping[str, str | None]:
        return self.policy.save_final(directory)


def cached_reference(policy: TextPolicy, pairs: Sequence[Pair], path: Path, *, batch_size: int, say: Any) -> Tensor:
    """(rows, 2) reference log-probs of the training pairs, from the run's cache or computed now."""
    groups = [pair.group for pair in pairs]
    key: Key = {
        "model": policy.fingerprint,
        "reference": policy.reference.name,
        "data, tokenizer or template": tokens_fingerprint(groups),
        "attention": own_attention(causal_lm(policy.model).config),
        "scoring backend": policy.module.backend,
        "dtype": str(policy.dtype),
        "batch size": str(batch_size),
    }
    return reference_table(
        path,
        groups,
        key,
        score=policy.reference_log_probs,
        batch_size=batch_size,
        say=say,
        world=policy.world,
    )


def _own_tokens(item: Item) -> int:
    """Tokens that scoring an item's fresh answers adds to a forward pass."""
    return num_tokens(own_groups([item])[0]) if item.samples else 0


def own_groups(items: Sequence[Item]) -> list[Group]:
    """The fresh answers of a micro-batch as scoring groups of k answers each."""
    return [Group(item.samples[0].prompt, [sample.tokens for sample in item.samples]) for item in items]


def pair_task(
    config: Any,
    data: TextData[Pair],
    run: Run,
    objective: Objective,
    *,
    model: Any = None,
    judges: Mapping[str, Gold],
    own: OwnSamples | None = None,
    token_sums: bool = True,
) -> PairTask:
    """Load the policy and its reference, and join them with the data and the objective."""
    policy = TextPolicy.create(config, run.world, model=model, tokenizer=data.tokenizer)
    run.fingerprint(model=policy.fingerprint)
    run.say(f"policy {policy.describe()}; the reference is {policy.reference.name}")
    reference = None
    # With an offline KL the reference's whole distributions are needed, which no cache holds.
    if config.precompute_ref_log_probs and not config.offline_kl_weight:
        path = run.directory / "reference.safetensors"
        # Without gradients a forward pass holds far less, so that more rows share one.
        rows = REFERENCE_ROWS * config.per_device_train_batch_size
        reference = cached_reference(policy, data.train, path, batch_size=rows, say=run.say)
    return PairTask(
        policy=policy,
        sampler=sampler_for(policy, config),
        pairs=data.train,
        test=data.test,
        selection=data.selection,
        objective=objective,
        config=config,
        own=own,
        judges=judges,
        reference=reference,
        with_state_kl=config.offline_kl_weight > 0,
        token_sums=token_sums,
    )
