"""What a judge has done so far: calls, tokens, agreement between orders, ties, and replies that said nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from prefkit.records import Comparison, Verdict


@dataclass
class Tally:
    """Counts of one judge. Rates are None where there is nothing to take them of."""

    calls: int = 0
    """requests, or rows of forward passes, made now"""
    cached: int = 0
    """replies taken from disk"""
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    comparisons: int = 0
    decided: int = 0
    """comparisons with a probability"""
    ties: int = 0
    """comparisons at exactly one half, orders that contradict each other included"""
    both_orders: int = 0
    """comparisons with a usable reply in both orders"""
    agreed: int = 0
    """of these, those in which both orders prefer the same answer, or both neither"""
    replies: Counter[str] = field(default_factory=Counter[str])
    """single replies by what they say: A, B, tie, unsure, or why they say nothing"""
    reasons: Counter[str] = field(default_factory=Counter[str])
    """comparisons without a probability, by reason"""
    mass: float = 0.0
    """sum over replies of the probability on the letters asked for, for judges whose next token is read"""

    def add(self, verdicts: Iterable[Verdict]) -> None:
        """Count the comparisons of verdicts, by any judge; calls and tokens are the judge's own to count."""
        for verdict in verdicts:
            for comparison in verdict.comparisons:
                self._add(comparison)

    def _add(self, comparison: Comparison) -> None:
        self.comparisons += 1
        if comparison.prob_first is None:
            self.reasons[comparison.reason] += 1
        else:
            self.decided += 1
            self.ties += comparison.prob_first == 0.5
        first, second = comparison.orders or (None, None)
        if first is not None and second is not None:
            self.both_orders += 1
            self.agreed += _side(first) == _side(second)

    @property
    def agreement(self) -> float | None:
        """Share of comparisons in which the two orders agree."""
        return self.agreed / self.both_orders if self.both_orders else None

    @property
    def tie_rate(self) -> float | None:
        return self.ties / self.decided if self.decided else None

    def cost(self, price_in: float, price_out: float) -> float:
        """What the calls made now cost, at prices per million tokens."""
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6

    def row(self) -> dict[str, float]:
        """The numbers for a log, under flat names."""
        names = ("calls", "cached", "retries", "tokens_in", "tokens_out", "seconds", "comparisons", "decided", "ties")
        values: dict[str, float] = {name: getattr(self, name) for name in names}
        rates = {"order_agreement": self.agreement, "tie_rate": self.tie_rate}
        if self.mass:
            rates["letter_mass"] = self.mass / max(1, sum(self.replies.values()))
        values |= {name: rate for name, rate in rates.items() if rate is not None}
        values |= {f"replies_{word}": count for word, count in sorted(self.replies.items())}
        return values | {f"no_preference_{reason}": count for reason, count in sorted(self.reasons.items())}

    def text(self, price_in: float = 0.0, price_out: float = 0.0) -> str:
        """The same in words, one line."""
        parts = [f"{self.decided} of {self.comparisons} comparisons decided"]
        if self.agreement is not None:
            parts.append(f"orders agree in {self.agreement:.1%}")
        if self.tie_rate is not None:
            parts.append(f"ties {self.tie_rate:.1%}")
        parts += [f"{reason} {count}" for reason, count in sorted(self.reasons.items())]
        parts.append(f"{self.calls} calls, {self.cached} cached, {self.retries} sent again")
        parts.append(f"{self.tokens_in} tokens read, {self.tokens_out} written")
        if price_in or price_out:
            parts.append(f"cost {self.cost(price_in, price_out):.4f}")
        return "; ".join([*parts, f"{self.seconds:.1f} s"])


def _side(probability: float) -> int:
    return (probability > 0.5) - (probability < 0.5)
