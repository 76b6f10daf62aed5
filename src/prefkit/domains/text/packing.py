"""Which groups share a forward pass: bin packing by tokens. Pure and deterministic, so a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prefkit.domains.text.batches import micro_batches
from prefkit.errors import InputError
from prefkit.records import Group


def num_tokens(group: Group) -> int:
    """Tokens of a group in a packed row: its prompt once and all its answers."""
    return len(group.prompt) + sum(len(answer) for answer in group.answers)


def pack(sizes: Sequence[int], budget: int, at_least: int = 1) -> list[list[int]]:
    """Indices of `sizes` in as few bins as first-fit-decreasing finds, none over `budget`.

    Every index comes once; bins are in the order of their first index, and sorted. `at_least` asks for more bins, up
    to one for each size: processes that must run equally many passes agree on the number. Raises ValueError for a size
    over the budget.
    """
    if any(size > budget for size in sizes):
        worst = max(range(len(sizes)), key=lambda i: sizes[i])
        raise ValueError(f"size {sizes[worst]} at index {worst} is over the budget of {budget}")
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = (b for b, load in enumerate(loads) if load + sizes[index] <= budget)
        place = next(fitting, None)
        if place is None:
            bins.append([index])
            loads.append(sizes[index])
        else:
            bins[place].append(index)
            loads[place] += sizes[index]
    while len(bins) < min(at_least, len(sizes)):
        fullest = max((b for b in range(len(bins)) if len(bins[b]) > 1), key=lambda b: (loads[b], -b))
        moved = bins[fullest].pop()
        loads[fullest] -= sizes[moved]
        bins.append([moved])
        loads.append(sizes[moved])
    return sorted(sorted(found) for found in bins)


def passes(
    sizes: Sequence[int], *, rows: int, budget: int, agree: Callable[[int], int] | None = None
) -> list[list[int]]:
    """The forward passes of a process's rows: `rows` at a time in order, or packed up to `budget` tokens if given.

    `agree` gives the number of passes of the process that has most, where all must run as many.
    """
    if not budget:
        return micro_batches(range(len(sizes)), rows)
    found = pack(sizes, budget)
    return found if agree is None else pack(sizes, budget, at_least=agree(len(found)))


def scoring_passes(
    sizes: Sequence[int], *, rows: int, budget: int, agree: Callable[[int], int] | None = None
) -> list[list[int]]:
    """The passes of an evaluation: as `passes`, with twice the budget, since nothing is kept for a backward pass. A
    group that is larger still gets a pass of its own size: held-out rows are not refused for it.
    """
    return passes(sizes, rows=rows, budget=max([2 * budget, *sizes]) if budget else 0, agree=agree)


def check_budget(
    groups: Iterable[Group], budget: int, *, where: Callable[[int], str], more: Callable[[Group], int] = lambda _: 0
) -> None:
    """InputError for the first group that no pass has room for. `more`: tokens a step will add to a group."""
    for index, group in enumerate(groups) if budget else ():
        size = num_tokens(group) + more(group)
        if size > budget:
            added = f", {more(group)} of them for fresh answers" if more(group) else ""
            raise InputError(
                f"prompt and answers take {size} tokens{added}, tokens_per_batch is {budget}",
                where=where(index),
                mend=f"raise --tokens_per_batch to {size} or more, or lower --max_length",
            )
