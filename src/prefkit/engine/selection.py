"""Which step a run keeps, and when an evaluation ends it: rules over the values of held-out metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefkit.errors import InputError

KL = "eval_objective/kl"


@dataclass
class Selection:
    """The state of the rules: what was best, and how long ago. Saved in every checkpoint."""

    keep_best: str = ""
    """metric, with a leading - when lower is better; empty keeps the last step"""
    patience: int = 0
    stop_at_kl: float = 0.0
    best: dict[str, Any] | None = field(default=None)
    """{"step", "value"} of the best evaluation so far"""
    since_best: int = 0
    evaluations: int = 0

    def __post_init__(self) -> None:
        if self.patience > 0 and not self.keep_best:
            raise InputError(
                "patience counts evaluations without a better metric, and no metric is named",
                where="--patience",
                mend="name one: --keep_best eval_rewards/margins",
            )

    @property
    def kept(self) -> list[int]:
        """The step whose checkpoint stays, whatever comes after; none where nothing is chosen."""
        return [] if self.best is None else [int(self.best["step"])]

    def metric(self, values: Mapping[str, float]) -> str:
        """The full name of the metric that selects.

        Raises InputError, listing what there is, when it is not among `values`.
        """
        wanted = self.keep_best.removeprefix("-")
        for name in (wanted, f"eval_{wanted}"):
            if name in values:
                return name
        raise InputError(
            f"no evaluation metric is called {wanted!r}",
            where="--keep_best",
            mend=f"choose one of {', '.join(sorted(values))} (a leading - means lower is better)",
        )

    def check(self, values: Mapping[str, float]) -> None:
        """InputError when a rule needs a metric that is not among `values`."""
        if self.keep_best:
            self.metric(values)
        if self.stop_at_kl > 0 and KL not in values:
            raise InputError(
                f"this run's evaluation measures no {KL}",
                where="--stop_at_kl",
                mend="leave it at 0, or evaluate own samples (--num_eval_prompts)",
            )

    def evaluated(self, step: int, values: Mapping[str, float]) -> tuple[bool, str]:
        """Take in one evaluation; gives whether it is the best so far, and a reason to stop or nothing."""
        self.check(values)
        improved, reason = False, ""
        if self.keep_best:
            self.evaluations += 1
            name = self.metric(values)
            value = float(values[name])
            improved = self._better(value)
            if improved:
                self.best, self.since_best = {"step": step, "value": value}, 0
            else:
                self.since_best += 1
            if 0 < self.patience <= self.since_best:
                reason = f"no better {name} in {self.since_best} evaluations"
        if 0 < self.stop_at_kl < values.get(KL, 0.0):
            reason = f"{KL} {values[KL]:.4g} passed {self.stop_at_kl:g}"
        return improved, reason

    def rule(self) -> str:
        """How the selected step was chosen, in words."""
        if not self.keep_best:
            return "last step"
        if self.best is None:
            return f"last step (keep_best {self.keep_best}: no evaluation had a finite value)"
        name = self.keep_best.removeprefix("-").removeprefix("eval_")
        direction = ", lower is better" if self.keep_best.startswith("-") else ""
        return f"best eval_{name} over {self.evaluations} evaluations{direction}"

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "since_best": self.since_best, "evaluations": self.evaluations}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best, self.since_best = state["best"], int(state["since_best"])
        self.evaluations = int(state["evaluations"])

    def _better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        best = float(self.best["value"])
        return value < best if self.keep_best.startswith("-") else value > best
