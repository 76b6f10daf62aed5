"""Where a rollout starts: after the prompt, or after the prompt and the first k tokens of an offline answer.

    reset ~ Bernoulli(prob)        k ~ law on {k_min, ..., L - 1}        L: tokens of the answer, its end token included

The end token is never forced (k <= L - 1), so a reset leaves at least one decision to the policy. A cut is drawn anew
at every visit of a prompt, in token ids: a decoded prefix that is encoded again need not be the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from prefkit.engine.files import read_json, write_json
from prefkit.engine.seeds import generator
from prefkit.errors import InputError

Law = Literal["uniform", "fixed", "curriculum"]
Source = Literal["reference", "chosen", "rejected", "both", "policy"]
"""whose answers prefixes are cut from: demonstrations, a side of the pairs, or the start model's own samples"""
STATE = "resets.json"


@dataclass(frozen=True)
class Offline:
    """An offline answer to a prompt, in token ids."""

    tokens: Sequence[int]
    finished: bool = True
    """whether its last token ends it: an answer that was cut has none"""
    row: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(kw_only=True)
class ResetSampler:
    """Draws the number of forced tokens of each rollout. Its random numbers are its own: with prob 0, or without it,
    everything else of a run draws the same ones.
    """

    source: Source = "chosen"
    prob: float = 1.0
    """share of rollouts that are reset, drawn for each"""
    k_min: int = 0
    """fewest forced tokens of a reset rollout; with 0 the empty prefix is one of the cuts, as in the paper's theory"""
    law: Law = "uniform"
    """uniform over the cuts; fixed: always `cut`; curriculum: only late cuts at first, all of them in the end"""
    cut: float = 0.5
    """of `fixed`: below 1 a share of the answer, else a number of tokens"""
    filter: Callable[[Offline], bool] | None = None
    """which answers may be reset to; None: all"""
    seed: int = 0
    visit: int = 0
    """draws made so far; stands in checkpoints"""
    writes: bool = True
    """whether `save` writes: one process of a launch does"""

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise ValueError(f"source is {self.source!r}, not one of {', '.join(get_args(Source))}")
        if self.law not in get_args(Law):
            raise ValueError(f"law is {self.law!r}, not one of {', '.join(get_args(Law))}")
        if not 0 <= self.prob <= 1:
            raise ValueError(f"prob is a probability in [0, 1], got {self.prob}")
        if self.k_min < 0 or not self.cut > 0:
            raise ValueError(f"k_min must not be negative and cut positive, got {self.k_min} and {self.cut}")

    @property
    def starves_first_token(self) -> bool:
        """Whether the first token of an answer is forced wherever it can be, so that next to nothing trains it."""
        first = self.k_min if self.law == "uniform" else max(self.k_min, 1)
        return self.prob == 1 and first >= 1

    def warning(self) -> str:
        """A line for the log where a setting starves the first token; else empty."""
        if not self.starves_first_token:
            return ""
        mend = "--k_min 0 or --reset_prob below 1 gives" if self.law == "uniform" else "--reset_prob below 1 gives"
        return (
            "every rollout is reset and at least one token is forced: the first token of an answer gets no gradient of "
            f"its own ({mend} it some)"
        )

    def draw(self, answers: Sequence[Offline | None], *, progress: float = 0.0, limit: int | None = None) -> list[int]:
        """The forced tokens of one visit's rollouts, one number each; 0 is a rollout from the prompt alone.

        Args:
            answers: for each rollout the offline answer of its own prompt, None where there is none.
            progress: share of training done, in [0, 1]; only `curriculum` uses it.
            limit: the response budget: an answer counts as no longer than this.

        The draw of place i in visit v depends on (seed, v, i) alone, not on the other rollouts.
        """
        self.visit += 1
        return [
            0 if answer is None else self._cut(answer, torch.rand(2, generator=self._generator(place)), progress, limit)
            for place, answer in enumerate(answers)
        ]

    def _generator(self, place: int) -> torch.Generator:
        return generator(self.seed, "reset", self.visit, place)

    def _cut(self, answer: Offline, uniforms: torch.Tensor, progress: float, limit: int | None) -> int:
        length = len(answer.tokens) if limit is None else min(len(answer.tokens), limit)
        low, high = self.k_min, length - 1
        if high < 1 or low > high or not float(uniforms[0]) < self.prob:
            return 0
        if self.filter is not None and not self.filter(answer):
            return 0
        if self.law == "fixed":
            asked = self.cut * length if self.cut < 1 else self.cut
            return max(low, min(high, int(asked)))
        if self.law == "curriculum":
            low = max(low, math.ceil((1 - min(1.0, max(0.0, progress))) * high))
        return min(high, low + int(float(uniforms[1]) * (high - low + 1)))

    def save(self, folder: Path) -> None:
        """Write resets.json: how many draws were made, and with which seed."""
        if self.writes:
            write_json(folder / STATE, {"seed": self.seed, "visit": self.visit})

    def load(self, folder: Path) -> None:
        """Go on after the draws that `save` noted. Raises InputError for those of another seed."""
        state = read_json(folder / STATE)
        if state["seed"] != self.seed:
            raise InputError(
                f"the resets were drawn with seed {state['seed']}, this run has {self.seed}", where=str(folder / STATE)
            )
        self.visit = int(state["visit"])


def finished_only(answer: Offline) -> bool:
    """A filter: answers that end by themselves."""
    return answer.finished
