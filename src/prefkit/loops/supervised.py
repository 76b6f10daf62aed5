"""Maximum likelihood on stored answers: the task behind SFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.domains.text.metrics import SampleEvaluation, agreed, in_order, spread, summarize_samples
from prefkit.domains.text.packing import num_tokens, passes, scoring_passes
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.prompts import group_of, plain
from prefkit.domains.text.sampler import Decoding, Sampler
from prefkit.engine.seeds import number
from prefkit.protocols import Gold, Metrics, Trackable
from prefkit.records import Example, HeldOut


@dataclass(kw_only=True)
class SupervisedTask:
    """Prompt/completion rows and the negative log-likelihood of their answer tokens. See `protocols.Task`."""

    policy: TextPolicy
    sampler: Sampler
    examples: Sequence[Example]
    test: Sequence[Example]
    selection: Sequence[Example]
    config: Any
    judges: Mapping[str, Gold] = field(default_factory=dict[str, Gold])

    def __post_init__(self) -> None:
        self.num_rows = len(self.examples)
        self.module: nn.Module = self.policy.module
        self.micro = self.config.per_device_train_batch_size

    def tracked(self) -> Mapping[str, Trackable]:
        return {"policy": self.policy}

    def batches(self, step: int, rows: Sequence[int], first: int) -> Sequence[Sequence[Example]]:
        examples = [self.examples[row] for row in rows]
        agree = self.policy.world.most if self.policy.world.in_step else None
        sizes = [num_tokens(example.group) for example in examples]
        places = passes(sizes, rows=self.micro, budget=self.config.tokens_per_batch, agree=agree)
        return [[examples[i] for i in piece] for piece in places]

    def compute(self, batch: Sequence[Example]) -> tuple[Tensor, Metrics]:
        groups = [example.group for example in batch]
        if not self.config.log_token_metrics:
            log_probs = self.policy.log_probs(groups)[:, 0]
            return -log_probs, {"logps/completion": log_probs.detach()}
        tokens, entropy, top1 = self.policy.token_details(groups)
        lengths = torch.tensor([len(example.completion) for example in batch], device=tokens.device)
        log_probs = tokens.sum(-1)
        return -log_probs, {
            "logps/completion": log_probs.detach(),
            "entropy": entropy.sum(-1) / lengths,
            "mean_token_accuracy": top1.sum(-1) / lengths,
        }

    def weight(self, batch: Sequence[Example]) -> float:
        return float(sum(len(example.completion) for example in batch))

    def evaluate(self, *, selecting: bool = False) -> HeldOut:
        examples = self.selection if selecting and self.selection else self.test
        rows = self._likelihoods(examples)
        samples = self._sampled(examples)()
        metrics = summarize_samples(samples, tuple(self.judges))
        if rows:
            metrics["eval_loss"] = sum(row["nll"] for row in rows) / len(rows)
        return HeldOut(metrics=metrics, pairs=rows, samples=samples)

    @torch.no_grad()
    def _likelihoods(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """One row per held-out completion: its mean negative log-likelihood per token, in nats."""
        mine = spread(self.policy.world, len(examples)) if examples else []
        rows: list[dict[str, Any]] = []
        sizes, budget = [num_tokens(examples[i].group) for i in mine], self.config.tokens_per_batch
        for piece in scoring_passes(sizes, rows=2 * self.micro, budget=budget, agree=agreed(self.policy.world)):
            indices = [mine[place] for place in piece]
            log_probs = self.policy.log_probs([examples[i].group for i in indices])[:, 0].tolist()
            for i, log_prob in zip(indices, log_probs, strict=True):
                source, tokens = examples[i].source, len(examples[i].completion)
                rows.append(
                    {
                        "index": i,
                        "row": source.row,
                        "group": group_of(source),
                        "prompt": plain(source.prompt),
                        "nll": -log_prob / tokens,
                        "tokens": tokens,
                    }
                )
        return in_order(self.policy.world, rows)

    def _sampled(self, examples: Sequence[Example]) -> SampleEvaluation:
        return SampleEvaluation(
            self.policy,
            self.sampler,
            examples,
            decoding=Decoding.of(self.config),
            seed=number(self.config.seed, "evaluation"),
            judges=self.judges,
            batch_size=2 * self.micro,
            tokens_per_batch=self.config.tokens_per_batch,
            most=self.config.num_eval_prompts,
        )

    def finish(self) -> None:
        """Nothing: the last step's weights are final."""

    def save_final(self, directory: Path) -> Mapping[str, str | None]:
        return self.policy.save_final(directory)
