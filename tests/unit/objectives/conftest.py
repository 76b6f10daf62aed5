"""A policy small enough to count: vocabulary {a, b, EOS}, at most 3 tokens, hence 7 states and 15 answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

EOS, MAX_LENGTH = 2, 3


def _answers(prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    if prefix and (prefix[-1] == EOS or len(prefix) == MAX_LENGTH):
        return [prefix]
    return [answer for token in (0, 1, EOS) for answer in _answers((*prefix, token))]


class Tree:
    """All answers of a tabular autoregressive policy whose logits, one row a state, are (7, 3)."""

    def __init__(self) -> None:
        answers = _answers()
        states = sorted({a[:t] for a in answers for t in range(len(a))}, key=lambda state: (len(state), state))
        row = {state: i for i, state in enumerate(states)}

        def pad(values: list[int]) -> list[int]:
            return values + [0] * (MAX_LENGTH - len(values))

        self.lengths = torch.tensor([len(answer) for answer in answers])
        self.mask = torch.arange(MAX_LENGTH) < self.lengths[:, None]
        self.tokens = torch.tensor([pad(list(answer)) for answer in answers])
        self.states = torch.tensor([pad([row[a[:t]] for t in range(len(a))]) for a in answers])
        self.num_states = len(states)

    def log_probs(self, logits: Tensor) -> Tensor:
        """(15, 3): log-probability of each token of each answer, zero on padding."""
        return torch.where(self.mask, logits.log_softmax(-1)[self.states, self.tokens], 0.0)

    def per_state(self, values: Tensor) -> Tensor:
        """(7,) -> (15, 3): a state's value before each token of each answer, zero on padding."""
        return torch.where(self.mask, values[self.states], 0.0)


@pytest.fixture(scope="session")
def tree() -> Tree:
    return Tree()


@pytest.fixture
def logits(tree: Tree) -> tuple[Tensor, Tensor]:
    """Policy and reference, KL 0.777 nats."""
    draw = np.random.default_rng(2749).normal(size=(2, tree.num_states, 3))
    policy, reference = torch.tensor(draw)
    return policy.requires_grad_(), reference
