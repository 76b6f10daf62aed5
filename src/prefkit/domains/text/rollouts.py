"""A rollout: a prompt, the forced beginning of an answer, what the policy went on with, and what was thought of it.

Two ways to count it. By `continuation`, the forced prefix belongs to the prompt and the answer ends with its first
end-of-sequence token: what is counted is what the policy chose. By `episode`, as DR-PO's released code does, every
position of the answer's budget is counted, forced ones and those behind the end included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from prefkit.engine.files import write_text
from prefkit.errors import InputError
from prefkit.records import Group, Sample

Accounting = Literal["continuation", "episode"]
FILE = "rollouts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer to train on. Numbers per token stand at the positions that `accounting` counts."""

    place: int
    """of its prompt in the batch of episodes"""
    row: int
    """of its prompt among the training rows"""
    index: int
    """among the answers to this prompt"""
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """the whole answer: forced tokens, then chosen ones"""
    prefix: int
    """forced tokens"""
    end: int
    """tokens up to the first end token and with it; all where there is none"""
    finished: bool
    """whether it has an end token (or stop string)"""
    text: str
    """up to the end, without special tokens"""
    score: float = 0.0
    """by the reward, before any penalty"""
    log_probs: tuple[float, ...] = ()
    """under the policy that drew it, by the engine that trains, at the sampling temperature"""
    ref_log_probs: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        sample: Sample,
        *,
        place: int,
        row: int,
        prefix: int,
        ends: Sequence[int],
        decode: Callable[[Sequence[int]], str],
    ) -> Self:
        """From what a sampler drew; `ends` are the end tokens, which the sampler may have gone on after.

        `decode` writes out tokens as the sampler does.
        """
        tokens = tuple(sample.tokens)
        first = next((i + 1 for i, token in enumerate(tokens) if i >= prefix and token in ends), 0)
        behind = 0 < first < len(tokens)
        return cls(
            place=place,
            row=row,
            index=sample.index,
            prompt=tuple(sample.prompt),
            tokens=tokens,
            prefix=prefix,
            end=first or len(tokens),
            finished=bool(first) or sample.finished,
            text=decode(tokens[:first]) if behind else sample.text,
        )

    def start(self, accounting: Accounting) -> int:
        """First counted position of the answer."""
        return self.prefix if accounting == "continuation" else 0

    def counted(self, accounting: Accounting) -> tuple[int, ...]:
        """The tokens that are counted."""
        return self.tokens[self.prefix : self.end] if accounting == "continuation" else self.tokens

    def ended(self, accounting: Accounting) -> bool:
        """Whether the answer counts as finished. DR-PO's released code looks for padding behind the end token, so that
        one at the very last position of the budget counts as missing.
        """
        return self.finished and (accounting == "continuation" or self.end < len(self.tokens))

    def scored_by(self, *, log_probs: Sequence[float], reference: Sequence[float], values: Sequence[float]) -> Rollout:
        return replace(self, log_probs=tuple(log_probs), ref_log_probs=tuple(reference), values=tuple(values))


def group_of(rollouts: Sequence[Rollout], accounting: Accounting) -> Group:
    """Rollouts of one prompt as a group: what they all begin with is computed once."""
    first = rollouts[0]
    start = first.start(accounting)
    return Group([*first.prompt, *first.tokens[:start]], [rollout.counted(accounting) for rollout in rollouts])


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Rollouts side by side, n rows of t counted positions; zero where an answer has ended."""

    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    counted: Tensor
    """(n, t) positions that there are"""
    actions: Tensor
    """(n, t) those the policy chose"""
    ends: Tensor
    """(n,) position where the score falls: the end token, or the last one"""
    lengths: Tensor
    """(n,) tokens up to the end, forced ones included"""
    finished: Tensor
    """(n,) see `Rollout.ended`"""
    scores: Tensor
    """(n,) by the reward"""
    resets: Tensor
    """(n,) forced tokens"""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], accounting: Accounting, device: torch.device | str = "cpu") -> Self:
        width = max(len(rollout.counted(accounting)) for rollout in rollouts)
        n = len(rollouts)
        number = {name: torch.zeros(n, width) for name in ("log_probs", "ref_log_probs", "values")}
        counted = torch.zeros(n, width, dtype=torch.bool)
        actions = torch.zeros(n, width, dtype=torch.bool)
        for i, rollout in enumerate(rollouts):
            length = len(rollout.counted(accounting))
            counted[i, :length] = True
            actions[i, rollout.prefix - rollout.start(accounting) : length] = True
            for name, column in number.items():
                if found := getattr(rollout, name):
                    column[i, :length] = torch.tensor(found)
        columns = {
            "counted": counted,
            "actions": actions,
            "ends": torch.tensor([r.end - 1 - r.start(accounting) for r in rollouts]),
            "lengths": torch.tensor([float(r.end) for r in rollouts]),
            "finished": torch.tensor([r.ended(accounting) for r in rollouts]),
            "scores": torch.tensor([r.score for r in rollouts]),
            "resets": torch.tensor([r.prefix for r in rollouts]),
        }
        return cls(**{name: column.to(device) for name, column in (number | columns).items()})


class RolloutStore:
    """The batch of episodes in training, as checkpoints hold it: a run may be stopped between two of its steps."""

    def __init__(self, *, is_main: Callable[[], bool]) -> None:
        self.rollouts: list[Rollout] = []
        self.about: dict[str, Any] = {}
        """the batch's number, and what training on it needs besides (the KL coefficient)"""
        self._is_main = is_main

    def save(self, folder: Path) -> None:
        if self._is_main():
            lines = [self.about, *(asdict(rollout) for rollout in self.rollouts)]
            write_text(folder / FILE, "".join(json.dumps(line) + "\n" for line in lines))

    def load(self, folder: Path) -> None:
        about, *rows = [json.loads(line) for line in (folder / FILE).read_text().split("\n")[:-1]]
        self.about = about
        self.rollouts = [rollout_of(row, str(folder / FILE)) for row in rows]


def rollout_of(row: Mapping[str, Any], where: str) -> Rollout:
    """What a line of rollouts.jsonl holds; InputError for anything else."""
    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
        }
        return Rollout(**values)
    except TypeError as error:
        raise InputError(f"is no rollout: {error}", where=where) from error
