"""What is measured on held-out data: implicit rewards of stored pairs, and what the policy answers itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prefkit.domains.text.packing import num_tokens, scoring_passes
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.prompts import group_of, last_content, plain
from prefkit.domains.text.sampler import Decoding, Sampler, context_of, fits
from prefkit.engine.world import World
from prefkit.protocols import Gold
from prefkit.records import Example, Group, Pair, Preference, Sample


def pair_metrics(log_probs: Tensor, reference: Tensor, beta: float) -> dict[str, Tensor]:
    """Per-pair training metrics, without gradient: log-probs and reference log-probs (b, 2) -> {name: (b,)}.

    rewards/* are implicit rewards, β times the log-ratio to the reference; an accuracy of 0.5 is a tie.
    """
    log_probs = log_probs.detach()
    rewards = beta * (log_probs - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    return {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).float() + 0.5 * (margin == 0),
        "logps/chosen": log_probs[:, 0],
        "logps/rejected": log_probs[:, 1],
    }


def spread(world: World, num: int) -> list[int]:
    """This process's share of `num` rows: equal counts everywhere (rows repeat), so sharded models stay in step."""
    per_process = -(-num // world.size)
    return [min(world.rank * per_process + i, num - 1) for i in range(per_process)]


def agreed(world: World) -> Callable[[int], int] | None:
    """What makes the processes' numbers of passes one, where all must run as many."""
    return world.most if world.in_step else None


def in_order(world: World, rows: Sequence[dict[str, Any]], key: str = "index") -> list[dict[str, Any]]:
    """All processes' rows once each, by index."""
    gathered = {row[key]: row for row in world.gather_objects(list(rows))}
    return [gathered[index] for index in sorted(gathered)]


class PairEvaluation:
    """Implicit rewards on held-out pairs. The reference is frozen, so it is scored once and remembered."""

    def __init__(
        self, policy: TextPolicy, pairs: Sequence[Pair], *, beta: float, batch_size: int, tokens_per_batch: int = 0
    ) -> None:
        self.policy = policy
        self.pairs = pairs
        self.beta = beta
        self.batch_size = batch_size
        self.tokens_per_batch = tokens_per_batch
        self._reference: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> list[dict[str, Any]]:
        """One row per pair, in order: index, row, group, prompt, rewards, margin, accuracy."""
        mine = spread(self.policy.world, len(self.pairs))
        # Neighbours of similar length share a batch, so that little of it is padding.
        mine.sort(key=lambda i: (len(self.pairs[i].prompt) + len(self.pairs[i].chosen), i))
        rows: list[dict[str, Any]] = []
        sizes = [num_tokens(self.pairs[i].group) for i in mine]
        agree = agreed(self.policy.world)
        cut = scoring_passes(sizes, rows=self.batch_size, budget=self.tokens_per_batch, agree=agree)
        for place, piece in enumerate(cut):
            indices = [mine[i] for i in piece]
            groups = [self.pairs[i].group for i in indices]
            if place not in self._reference:
                self._reference[place] = self.policy.reference_log_probs(groups)
            metrics = pair_metrics(self.policy.log_probs(groups), self._reference[place], self.beta)
            columns = {name: values.tolist() for name, values in metrics.items()}
            rows += [self._row(i, {name: column[j] for name, column in columns.items()}) for j, i in enumerate(indices)]
        return in_order(self.policy.world, rows)

    def _row(self, index: int, values: dict[str, float]) -> dict[str, Any]:
        source = self.pairs[index].source
        return {
            "index": index,
            "row": source.row,
            "group": group_of(source),
            "prompt": plain(source.prompt),
            "reward_chosen": values["rewards/chosen"],
            "reward_rejected": values["rewards/rejected"],
            "margin": values["rewards/margins"],
            "accuracy": values["rewards/accuracies"],
        }


def summarize_pairs(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over held-out pairs, under TRL's names."""
    names = {
        "reward_chosen": "eval_rewards/chosen",
        "reward_rejected": "eval_rewards/rejected",
        "margin": "eval_rewards/margins",
        "accuracy": "eval_rewards/accuracies",
    }
    return {name: sum(row[key] for row in rows) / len(rows) for key, name in names.items()} if rows else {}


class SampleEvaluation:
    """The policy's own answers to held-out prompts: log-ratio to the reference, length, gold reward.

    The same prompts and seeds are used at every evaluation, so answers before and after differ by the policy alone.
    """

    def __init__(
        self,
        policy: TextPolicy,
        sampler: Sampler,
        prompts: Sequence[Pair] | Sequence[Example],
        *,
        decoding: Decoding,
        seed: int,
        judges: Mapping[str, Gold],
        batch_size: int,
        tokens_per_batch: int = 0,
        most: int | None = None,
    ) -> None:
        """Of `prompts`, one row for each prompt that fits the context is answered, `most` at most."""
        self.policy = policy
        self.sampler = sampler
        self.prompts = answerable(prompts, decoding, context_of(policy))[:most]
        self.decoding = decoding
        self.seed = seed
        self.judges = judges
        self.batch_size = batch_size
        self.tokens_per_batch = tokens_per_batch
        self._references: dict[str, list[float]] = {}

    @torch.no_grad()
    def __call__(self) -> list[dict[str, Any]]:
        """One row per prompt: index, row, group, prompt, answer, log_ratio, length, finished, every judge's score."""
        if not self.prompts:
            return []
        mine = spread(self.policy.world, len(self.prompts))
        self.sampler.refresh()
        answers = self._draw(mine, self.decoding)
        rows = [self._row(i, sample) for i, sample in zip(mine, answers, strict=True)]
        if self.policy.has_reference:
            # The KL is an expectation under the policy itself, which tempered or cut-off samples do not come from.
            untempered = Decoding(max_new_tokens=self.decoding.max_new_tokens)
            own = answers if self.decoding == untempered else self._draw(mine, untempered)
            for row, ratio in zip(rows, self._log_ratios(own), strict=True):
                row["log_ratio"] = ratio
        rows = in_order(self.policy.world, rows)
        for name, judge in self.judges.items():
            prompts = [self.prompts[row["index"]].source.prompt for row in rows]
            scores = judge(prompts, [row["answer"] for row in rows])
            for row, score in zip(rows, scores, strict=True):
                row[name] = float(score)
            for row, score in zip(rows, self._reference_scores(name, judge), strict=True):
                row[f"{name}_reference"] = score
        return rows

    def _reference_scores(self, name: str, judge: Gold) -> list[float]:
        """The judge's scores of the data set's own answers to the same prompts; they never change."""
        if name not in self._references:
            sources = [row.source for row in self.prompts]
            scores = judge([row.prompt for row in sources], [_stored_answer(row) for row in sources])
            self._references[name] = [float(score) for score in scores]
        return self._references[name]

    def _draw(self, rows: Sequence[int], decoding: Decoding) -> list[Sample]:
        """One answer to each of these prompts; the same rows and decoding give the same random numbers."""
        prompts = [self.prompts[i].prompt for i in rows]
        drawn = self.sampler.sample(prompts, num=1, decoding=decoding, seed=self.seed, path=("evaluation",), rows=rows)
        return [unbegun(answers[0]) for answers in drawn]

    def _log_ratios(self, samples: Sequence[Sample]) -> list[float]:
        """log π - log π_ref of each whole answer, in nats."""
        ratios = [0.0] * len(samples)
        groups = [Group(sample.prompt, [sample.tokens]) for sample in samples]
        sizes, agree = list(map(num_tokens, groups)), agreed(self.policy.world)
        for piece in scoring_passes(sizes, rows=self.batch_size, budget=self.tokens_per_batch, agree=agree):
            part = [groups[i] for i in piece]
            ratio = self.policy.log_probs(part) - self.policy.reference_log_probs(part)
            for i, value in zip(piece, ratio[:, 0].tolist(), strict=True):
                ratios[i] = value
        return ratios

    def _row(self, index: int, sample: Sample) -> dict[str, Any]:
        source = self.prompts[index].source
        return {
            "index": index,
            "row": source.row,
            "group": group_of(source),
            # As in the data, not in words: a judge that is asked later puts it into its own template.
            "prompt": source.prompt if isinstance(source.prompt, str) else [dict(turn) for turn in source.prompt],
            "answer": sample.text,
            "answer_reference": _stored_answer(source),
            "length": len(sample.tokens),
            "finished": sample.finished,
        }


def unbegun(sample: Sample) -> Sample:
    """The sample, if the policy wrote all of it. ValueError for one that was begun for it: its score is not its own."""
    if sample.prefix:
        raise ValueError(f"an answer begun with {sample.prefix} forced tokens cannot be evaluated")
    return sample


def _stored_answer(source: Any) -> str:
    """The data set's own answer to a prompt: of a preference, the chosen one."""
    return last_content(source.chosen if isinstance(source, Preference) else source.completion)


def answerable(rows: Sequence[Pair] | Sequence[Example], decoding: Decoding, context: int) -> list[Pair | Example]:
    """One row for each prompt that a longest answer fits behind, in order: evaluation does without the others."""
    one_per_prompt = {tuple(row.prompt): row for row in rows}.values()
    return [row for row in one_per_prompt if fits(len(row.prompt), decoding, context)]


def summarize_samples(rows: Sequence[dict[str, Any]], judges: Sequence[str] = ()) -> dict[str, float]:
    """Means over own samples: KL estimate in nats per answer, length in tokens, share that ended, judges' scores."""
    if not rows:
        return {}

    def mean(key: str) -> float:
        return sum(float(row[key]) for row in rows) / len(rows)

    summary = {
        "eval_completions/mean_length": mean("length"),
        "eval_val/contain_eos_token": mean("finished"),
    }
    if "log_ratio" in rows[0]:
        summary["eval_objective/kl"] = mean("log_ratio")
    names = {"gold": "eval_gold", "reward_model": "eval_objective/scores"}
    return summary | {names.get(name, f"eval_{name}"): mean(name) for name in judges}
