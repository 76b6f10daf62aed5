"""Both orders of a comparison: what a judge is shown, and one probability from its two replies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefkit.records import Comparison, Question

RANKS = ("failed", "refused", "unparsable", "unsure")
"""reasons, the one told first when the two orders give different ones"""


def in_both_orders(question: Question) -> Iterator[tuple[str, str]]:
    """The answers of each comparison as (A, B), then as (B, A); equal answers are not shown."""
    for i, j in question.wanted():
        first, second = question.answers[i], question.answers[j]
        if first != second:
            yield first, second
            yield second, first


def comparisons(question: Question, values: Sequence[float | str]) -> list[Comparison]:
    """Means of the two orders. values: P(shown as A is better) or a reason, in the order of `in_both_orders`.

    Equal answers tie without being asked about; `orders` is None there. One usable order is not enough: it may be the
    place that speaks, and not the answer.
    """
    made: list[Comparison] = []
    left = iter(values)
    for i, j in question.wanted():
        if question.answers[i] == question.answers[j]:
            made.append(Comparison(first=i, second=j, prob_first=0.5))
            continue
        forward, backward = next(left), next(left)
        first = None if isinstance(forward, str) else forward
        second = None if isinstance(backward, str) else 1 - backward
        if first is not None and second is not None:
            made.append(Comparison(first=i, second=j, prob_first=(first + second) / 2, orders=(first, second)))
            continue
        reasons = {value for value in (forward, backward) if isinstance(value, str)}
        reason = min(reasons, key=RANKS.index)
        made.append(Comparison(first=i, second=j, prob_first=None, orders=(first, second), reason=reason))
    return made
