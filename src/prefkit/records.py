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
    Where the answer's first tokens were given, `tokens` and `text` hold them too, and their log-probs are 0.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    log_probs: Sequence[float]
    finished: bool
    text: str
    row: int
    index: int
    prefix: int = 0
    """first tokens of the answer that were given and not drawn"""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and the candidate answers that a judge is asked about."""

    prompt: Text
    answers: Sequence[str]
    row: int = 0
    pairs: Sequence[tuple[int, int]] = ()
    """comparisons wanted, as places (first, second) in `answers`; empty means every pair first < second"""

    def wanted(self) -> Sequence[tuple[int, int]]:
        """The comparisons to make."""
        count = len(self.answers)
        return self.pairs or [(i, j) for i in range(count) for j in range(i + 1, count)]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a judge holds of two answers of a question, whichever was shown first."""

    first: int
    second: int
    prob_first: float | None
    """probability in [0, 1] that `first` is the better one; 0.5 is a tie, None means unsure or no usable reply"""
    orders: tuple[float | None, float | None] | None = None
    """the same with `first` shown first, and with it shown second, for judges that are asked both ways"""
    reason: str = ""
    """why there is no probability: unsure | unparsable | refused | failed | absent"""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A judge's reply to one question. Ties and "unsure" are comparisons; scores are there where the judge has them."""

    judge: str
    """who judged: kind, name and version, enough to tell two judges apart"""
    comparisons: Sequence[Comparison]
    scores: Sequence[float] | None = None
    """one number per answer, higher is better"""
    calls: int = 0
    """requests or forward passes made for it now; replies found in a cache are not counted"""
    cached: int = 0
    """replies taken from a cache"""
    tokens: int = 0
    """tokens read and written by the judge now"""

    def prob(self, first: int, second: int) -> float | None:
        """Probability that answer `first` beats `second`; None where it was not asked or the judge is unsure."""
        for comparison in self.comparisons:
            if comparison.prob_first is None:
                continue
            if (comparison.first, comparison.second) == (first, second):
                return comparison.prob_first
            if (comparison.first, comparison.second) == (second, first):
                return 1 - comparison.prob_first
        return None


@dataclass(frozen=True, kw_only=True)
class Match:
    """Two answers that meet in the loss, as places in the question's answers."""

    chosen: int
    rejected: int
    strength: float = 1.0
    """the judge's probability that `chosen` beats `rejected`; only losses with soft labels use it"""
    weight: float = 1.0
    """its share in the loss of its prompt: the weights of a prompt's matches sum to 1"""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A question's answers in order, and the matches made of them."""

    order: tuple[int, ...] = ()
    """places of the distinct answers, best first"""
    matches: tuple[Match, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    """what the judge said, on the question's own places"""
    dropped: str = ""
    """why there is no match: identical | alone (fewer than two answers) | tie | unsure; empty where there is one"""


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
