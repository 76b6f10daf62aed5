"""Figures over rounds: how long drawn answers are, who wrote the chosen ones, how the judge behaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefkit.report.canvas import COLOURS, MARGINS, Figure, save
from prefkit.report.curves import frame, label_ends
from prefkit.report.round_counts import Counts

ORIGINS = {"own": "own", "reference": "start model", "chosen": "data's chosen", "rejected": "data's rejected"}
"""who wrote an answer -> in words"""

Points = list[tuple[float, float]]


def draw(bins: Sequence[Counts], folder: Path) -> list[Figure]:
    """What changes over at least two rounds; lines that never move are left to the table."""
    lengths = _points(bins, lambda one: one.mean_length)
    agree = _points(bins, lambda one: one.agreement)
    ties = _points(bins, lambda one: one.ties)
    wrote = [(label, _points(bins, _share_of(name))) for name, label in ORIGINS.items()]
    panels = [
        ("rounds-length", "Length of drawn answers (tokens)", [("", lengths)]),
        ("rounds-chosen", "Who wrote the chosen answers (share)", [line for line in wrote if _any(line[1])]),
        ("rounds-judge", "The judge (share of comparisons)", [("orders agree", agree), ("ties", ties)]),
    ]
    figures = [_figure(name, title, [line for line in lines if line[1]], folder) for name, title, lines in panels]
    return [figure for figure in figures if figure is not None]


def _points(bins: Sequence[Counts], value: Callable[[Counts], float | None]) -> Points:
    """(middle of the rounds' numbers, value) where there is one."""
    found = [((one.first + one.last) / 2, value(one)) for one in bins]
    return [(place, number) for place, number in found if number is not None]


def _share_of(origin: str) -> Callable[[Counts], float | None]:
    return lambda one: one.chosen.get(origin, 0) / one.matches if one.matches else None


def _any(points: Points) -> bool:
    return any(value for _, value in points)


def _figure(name: str, title: str, lines: Sequence[tuple[str, Points]], folder: Path) -> Figure | None:
    if all(len({value for _, value in points}) < 2 for _, points in lines):
        return None

    def paint(axes: Any) -> None:
        for place, (_, points) in enumerate(lines):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=COLOURS[place], marker="o", markersize=4, zorder=4, clip_on=False)
        frame(axes, [value for _, points in lines for _, value in points])
        axes.set_xlabel("round")
        label_ends(axes, [(points[-1][1], label, COLOURS[place]) for place, (label, points) in enumerate(lines)])

    words = "; ".join(
        f"{label + ' ' if label else ''}from {points[0][1]:.3g} to {points[-1][1]:.3g}" for label, points in lines
    )
    longest = max(len(label) for label, _ in lines)
    margins = (MARGINS[0], 0.15 + (0.1 + 0.08 * longest if longest else 0.0), *MARGINS[2:])
    return save(name, title, f"{title} by round: {words}.", folder, paint, margins=margins, whole_x=True)
