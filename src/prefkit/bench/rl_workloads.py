"""What a bench of reinforcement learning trains on: prompts of random tokens, answers of a forced length, a reward."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefkit.bench.workloads import FIRST, Workload, word
from prefkit.errors import InputError
from prefkit.records import Completion, Example

METHODS = ("ppo", "drpo", "rloo", "grpo")
SHAPE = "64-128/64"


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """What both sides train on."""

    method: str
    workload: Workload
    """its batch counts prompts, its steps batches of episodes; the shape is PROMPT/ANSWER or LEAST-MOST/ANSWER"""
    num_generations: int = 4
    epochs: int = 1
    """passes over a batch of episodes, an optimizer step each"""

    def __post_init__(self) -> None:
        if self.workload.use_peft:
            raise InputError("only all weights are measured here", where="--use_peft")
        self.lengths()

    @property
    def per_batch(self) -> int:
        """Episodes of a batch."""
        return self.workload.batch * self.num_generations

    def lengths(self) -> tuple[list[int], int]:
        """Tokens of each prompt of a block, and of every answer. Raises InputError."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?/(\d+)", self.workload.shape)
        least, most, answer = (int(part or found[1]) for part in found.groups()) if found else (0, 0, 0)
        if not 1 <= least <= most or answer < 1:
            mend = f"prompt/answer tokens, for instance {SHAPE}"
            raise InputError(f"{self.workload.shape!r} has no forced length", where="--shape", mend=mend)
        draw = random.Random(self.workload.seed)
        return [draw.randint(least, most) for _ in range(self.workload.steps * self.workload.batch)], answer

    def rows(self, vocabulary: int) -> list[Example]:
        """Prompts of random tokens, each with an answer of random tokens that `drpo` resets to."""
        draw = random.Random(self.workload.seed + 1)
        prompts, answer = self.lengths()
        found: list[Example] = []
        for row, length in enumerate(prompts):
            prompt, completion = ([draw.randrange(FIRST, vocabulary) for _ in range(n)] for n in (length, answer))
            source = Completion(prompt=text(prompt), completion=text(completion), row=row)
            found.append(Example(prompt=prompt, completion=completion, source=source))
        return found


def text(ids: Sequence[int]) -> str:
    """Token ids as the words of `word_tokenizer`."""
    return " ".join(word(token) for token in ids)


def even(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """The reward: how many of an answer's words are even numbers."""
    return [float(sum(part[-1] in "02468" for part in answer.split())) for answer in completions]
