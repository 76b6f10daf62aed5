"""Figures that show a spread: intervals of the held-out metrics, histograms of per-row measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefkit.report.canvas import COLOURS, FAINT, INK, Figure, interval_text, save
from prefkit.report.metrics import metric, number, rank
from prefkit.report.read import Estimate, Run

START, FINAL = "#8C8C8C", COLOURS[0]


def intervals(run: Run, folder: Path) -> Figure | None:
    """One strip per held-out metric: final mean with its interval, the start's value, the 'nothing learned'
    line.
    """
    evaluation = run.main_evaluation
    shown = [
        (name, fields)
        for name, fields in sorted(evaluation.intervals.items(), key=lambda item: rank(item[0]))
        if fields.bounded
    ][:6]
    if not shown:
        return None
    started = [evaluation.start.get(name) for name, _ in shown]

    def paint(axes: Any) -> None:
        # Each strip has a scale of its own, drawn by hand: metrics here differ in unit.
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.set_ylim(len(shown) - 0.35, -0.6)
        for place, (name, fields) in enumerate(shown):
            _strip(axes, place, name, fields, started[place])

    alt = "; ".join(f"{metric(name).label} {number(e.mean)} {interval_text(e)}" for name, e in shown)
    title = f"Held-out results with {round(100 * shown[0][1].level)} % intervals"
    return save(
        "intervals",
        title,
        f"{alt}.",
        folder,
        paint,
        size=(4.6, 0.5 + 0.62 * len(shown)),
        margins=(0.1, 0.1, 0.06, 0.4),
    )


def _strip(axes: Any, place: int, name: str, fields: Estimate, start: float | None) -> None:
    known = metric(name)
    marks = [fields.low, fields.high, *(value for value in (known.neutral, start) if value is not None)]
    low, high = min(marks), max(marks)
    room = 0.08 * (high - low) or 1.0

    def at(value: float) -> float:
        return (value - low + room) / (high - low + 2 * room)

    axes.plot([0, 1], [place, place], color="#E6E6E6", linewidth=1, zorder=1)
    if known.neutral is not None:
        x = at(known.neutral)
        axes.plot([x, x], [place - 0.13, place + 0.2], color=INK, linewidth=1.2, zorder=2)
        axes.text(x, place + 0.26, number(known.neutral, digits=1), ha="center", va="top", fontsize=8, color=INK)
    if start is not None and start != known.neutral:
        axes.plot([at(start)], [place], "o", color="white", markeredgecolor=START, markersize=6, zorder=3)
        axes.text(at(start), place + 0.26, "start", ha="center", va="top", fontsize=8, color=START)
    axes.plot([at(fields.low), at(fields.high)], [place, place], color=FINAL, linewidth=4, zorder=4, alpha=0.45)
    axes.plot([at(fields.mean)], [place], "o", color=FINAL, markersize=8, zorder=5)
    axes.text(0, place - 0.2, known.label, ha="left", va="bottom", fontsize=9.5, color=INK)
    axes.text(
        1,
        place - 0.2,
        f"{number(fields.mean)}  {interval_text(fields)}",
        ha="right",
        va="bottom",
        fontsize=9.5,
        color=FINAL,
        fontweight="bold",
    )


def histograms(run: Run, folder: Path) -> list[Figure]:
    """Spread over held-out rows: margins of pairs, log-ratios and gold rewards of own answers, where stored."""
    figures: list[Figure] = []
    margins = _column(run.pairs, "margin")
    if len(margins) > 1:
        title = "Reward margins of held-out pairs"
        figures.append(_histogram("margins-spread", title, [("after", margins, FINAL)], folder, zero=True))
    ratios = _column(run.samples, "log_ratio")
    if len(ratios) > 1:
        title = "Log-ratio of own answers, nats"
        figures.append(_histogram("log-ratios", title, [("after", ratios, FINAL)], folder, zero=True))
    for judge, title in (("gold", "Gold reward of own answers"), ("reward_model", "Reward-model score of own answers")):
        before, after = _column(run.samples, f"{judge}_start"), _column(run.samples, f"{judge}_final")
        if len(after) > 1:
            both = [("before", before, START)] if len(before) > 1 else []
            figures.append(_histogram(f"{judge}-spread", title, [*both, ("after", after, FINAL)], folder))
    return figures


def _histogram(
    name: str, title: str, sets: Sequence[tuple[str, list[float], str]], folder: Path, *, zero: bool = False
) -> Figure:
    every = [value for _, values, _ in sets for value in values]
    low, high = min(every), max(every)
    if low == high:
        low, high = low - 0.5, high + 0.5
    count = min(30, max(8, round(2 * math.sqrt(max(len(values) for _, values, _ in sets)))))
    edges = np.linspace(low, high, count + 1)

    def paint(axes: Any) -> None:
        for label, values, colour in sets:
            axes.hist(values, bins=edges, histtype="stepfilled", color=colour, alpha=0.25)
            axes.hist(values, bins=edges, histtype="step", color=colour, linewidth=1.8)
            mean = float(np.mean(values))
            axes.axvline(mean, color=colour, linewidth=1.5, linestyle=(0, (2, 2)))
            place = sets.index((label, values, colour))
            axes.annotate(
                f"{label}: mean {number(mean)}",
                (1.0, 1.0 - 0.1 * place),
                xycoords="axes fraction",
                ha="right",
                va="top",
                color=colour,
                fontweight="bold",
                fontsize=9,
            )
        if zero and low < 0 < high:
            axes.axvline(0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        top = axes.get_ylim()[1]
        axes.set_ylim(0, top * 1.18)
        axes.set_ylabel("rows")

    words = "; ".join(f"{label}: mean {np.mean(values):.4g} over {len(values)} rows" for label, values, _ in sets)
    return save(
        name,
        title,
        f"Histogram of {title[0].lower()}{title[1:]}. {words}.",
        folder,
        paint,
        margins=(0.62, 0.15, 0.4, 0.42),
    )


def _column(rows: Sequence[Any], name: str) -> list[float]:
    return [float(row[name]) for row in rows if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]
