"""The nouns that travel between packages: frozen, small, without behaviour that needs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]
Text = str | Sequence[Message]
"""A string, or a conversation as a list of {"role", "content"} messages."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """One row of preference data before tokenization.

    `row` is the 0-based place in the source it was read from, used in every message about it.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    row: int = 0
    score_chosen: float | None = None
    score_rejected: float | None = None
    strength: float | None = None
    """probability in [0, 1] that chosen beats rejected, where a judge gave one"""
    margin: float | None = None
    """how much better chosen is, in reward units (reward models)"""
    source: str = ""
    judge: str = ""
    policy_version: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """every other column of the row (a `group` column, e.g. a film, is used for grouped intervals)"""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One row of prompt/completion data (SFT), or of unpaired feedback when `label` is set."""

    prompt: Text
    completion: Text
    row: int = 0
    label: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Group:
    """A prompt and its K >= 1 answers in token ids: the unit every scorer takes."""

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A tokenized preference. The answers end in EOS exactly where the source answer ended."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    chosen_truncated: bool = False
    rejected_truncated: bool = False
    source: Preference

    @property
    def group(self) -> Group:
        return Group(self.prompt, (self.chosen, self.rejected))


@dataclass(frozen=True, kw_only=True)
class Example:
    """A tokenized prompt/completion row."""

    prompt: Sequence[int]
    completion: Sequence[int]
    truncated: bool = False
    source: Completion

    @property
    def group(self) -> Group:
        return Group(self.prompt, (self.completion,))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer drawn from a policy.

    `log_probs` holds the log-probability of each sampled token under the *sampling* distribution
    (temperature and top-p applied); `finished` is False when the token budget ended the answer.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    log_probs: Sequence[float]
    finished: bool
    text: str
    row: int
    index: int


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What an evaluation found: means, and the rows behind them."""

    metrics: Mapping[str, float]
    pairs: Sequence[Mapping[str, Any]] = ()
    """one row per held-out pair (or completion)"""
    samples: Sequence[Mapping[str, Any]] = ()
    """one row per held-out prompt answered"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training method returns to Python."""

    directory: Path
    metrics: Mapping[str, float]
    """final held-out metrics"""
    model: Any
    """the trained model in memory"""
    tokenizer: Any
