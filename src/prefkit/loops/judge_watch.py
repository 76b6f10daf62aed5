"""What becomes of a judge while the policy it judges moves: measured on the policy's own answers, round by round.

A judge that was right on stored pairs may be wrong on what the policy learns to write, and may like length for its own
sake. With a gold reward its accuracy and calibration on each round's answers are logged; without, how often it prefers
the longer of two answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from prefkit.domains.text.average import AverageWeights
from prefkit.domains.text.contests import Contest
from prefkit.domains.text.round_plan import RoundData
from prefkit.domains.text.round_store import RoundStore
from prefkit.engine.run import Run
from prefkit.feedback.calibration import reliability
from prefkit.protocols import Gold, Metrics, Staged, Task, Trackable
from prefkit.records import HeldOut, Pair


@runtime_checkable
class RoundsTask(Task, Staged, Protocol):
    """A task that trains in rounds."""


def watched(items: Sequence[Contest], pairs: Sequence[Pair], gold: Gold | None) -> dict[str, float]:
    """Means over the comparisons of a round in which the judge prefers one of two drawn answers; stored ones are left
    out, for the judge may be right on them and wrong on the policy's own.

    judge/prefers_longer   share in which it prefers the one of more tokens; equal lengths are left out
    judge/gold_accuracy    share in which the gold reward says the same; equal rewards are left out
    judge/gold_calibration_error   of its probabilities, with the gold reward's preference as label
    judge/gold_pairs       comparisons these two rest on
    """
    found = [
        (item, comparison.first, comparison.second, comparison.prob_first)
        for item in items
        for verdict in item.verdicts
        for comparison in verdict.comparisons
        if comparison.prob_first not in (None, 0.5)
        and item.answers[comparison.first].log_prob is not None
        and item.answers[comparison.second].log_prob is not None
    ]
    lengths = [(len(item.answers[i].tokens) - len(item.answers[j].tokens), p) for item, i, j, p in found]
    longer = [(difference > 0) == (p > 0.5) for difference, p in lengths if difference]
    values = {"judge/prefers_longer": sum(longer) / len(longer)} if longer else {}
    if gold is None or not found:
        return values
    scored = _scores(items, pairs, gold)
    labelled = [
        (p, float(one > other))
        for item, i, j, p in found
        if (one := scored[item.position, item.answers[i].text])
        != (other := scored[item.position, item.answers[j].text])
    ]
    values["judge/gold_pairs"] = float(len(labelled))
    if labelled:
        probs, labels = [p for p, _ in labelled], [label for _, label in labelled]
        right = [(p > 0.5) == (label > 0.5) for p, label in labelled]
        values["judge/gold_accuracy"] = sum(right) / len(right)
        values["judge/gold_calibration_error"] = reliability(probs, labels)[0]
    return values


def _scores(items: Sequence[Contest], pairs: Sequence[Pair], gold: Gold) -> dict[tuple[int, str], float]:
    """The gold reward of every distinct answer, by (position, text)."""
    keys = list(dict.fromkeys((item.position, answer.text) for item in items for answer in item.answers))
    rows = {item.position: item.row for item in items}
    prompts = [pairs[rows[position]].source.prompt for position, _ in keys]
    scores = gold(prompts, [text for _, text in keys]) if keys else []
    return dict(zip(keys, map(float, scores), strict=True))


@dataclass(kw_only=True)
class Watched:
    """A task in rounds whose judge is watched, and whose average weights, where it has some, follow every step."""

    task: RoundsTask
    run: Run
    rounds: RoundData
    store: RoundStore
    gold: Gold | None = None
    average: AverageWeights | None = None

    def __post_init__(self) -> None:
        self.num_rows = self.task.num_rows
        self.module: nn.Module = self.task.module

    def before(self, step: int, learner: Any) -> None:
        self.task.before(step, learner)
        one = self.rounds.round_of(step)
        if step == one.first_step and not one.offline:
            pairs = self.rounds.data.train
            self.run.log(self.run.world.on_main(lambda: watched(self.store.items(one.number) or (), pairs, self.gold)))

    def after(self, step: int, values: Mapping[str, Tensor]) -> None:
        if self.average is not None:
            self.average.update()
        self.task.after(step, values)

    def ends_round(self, step: int) -> bool:
        return self.task.ends_round(step)

    def tracked(self) -> Mapping[str, Trackable]:
        found = dict(self.task.tracked())
        return found if self.average is None else {**found, "average": self.average}

    def batches(self, step: int, rows: Sequence[int], first: int) -> Sequence[Sequence[Any]]:
        return self.task.batches(step, rows, first)

    def compute(self, batch: Sequence[Any]) -> tuple[Tensor, Metrics]:
        return self.task.compute(batch)

    def weight(self, batch: Sequence[Any]) -> float:
        return self.task.weight(batch)

    def evaluate(self, *, selecting: bool = False) -> HeldOut:
        return self.task.evaluate(selecting=selecting)

    def finish(self) -> None:
        self.task.finish()

    def save_final(self, directory: Path) -> Mapping[str, str | None]:
        return self.task.save_final(directory)
