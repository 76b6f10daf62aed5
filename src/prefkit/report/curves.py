"""Curves of one run, or of several laid over each other: raw values faint, a light smoothing on top.

Every line is labelled at its end, in its own colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefkit.report.canvas import COLOURS, FAINT, MARGINS, Figure, save
from prefkit.report.read import Run


@dataclass(frozen=True)
class Panel:
    """Metrics that share one pair of axes: (name in metrics.jsonl, label) each, and the line of 'nothing
    learned'.
    """

    name: str
    title: str
    lines: tuple[tuple[str, str], ...]
    neutral: float | None = None
    smooth: bool = True
    constant: bool = True
    """drawn, too, where no value differs from another"""


def _both(name: str, title: str, metric: str, neutral: float | None = None) -> Panel:
    return Panel(name, title, ((metric, "train"), (f"eval_{metric}", "held out")), neutral)


PANELS = (
    _both("loss", "Loss", "loss"),
    _both("accuracies", "Preference accuracy", "rewards/accuracies", 0.5),
    _both("margins", "Reward margin", "rewards/margins", 0.0),
    Panel("rewards", "Rewards in training", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")), 0.0),
    Panel("strength", "Strength of the pairs, by the judge", (("strength", ""),), 0.5, constant=False),
    Panel("optimism", "Optimism's share of the gradient", (("optimism/gradient_share", ""),), 0.0),
    Panel("optimism_ratio", "Log-ratio of the optimism answer (nats)", (("optimism/log_ratio", ""),), 0.0),
    Panel(
        "judge",
        "The judge on answers drawn (shares)",
        (("judge/gold_accuracy", "as gold says"), ("judge/prefers_longer", "for longer")),
        0.5,
    ),
    Panel(
        "resets",
        "Score in training, by start",
        (("rollout/plain/scores", "prompt"), ("rollout/reset/scores", "reset")),
    ),
    _both("kl", "KL to the reference (nats)", "objective/kl", 0.0),
    _both("gold", "Gold reward of own answers", "gold"),
    _both("scores", "Reward-model score of own answers", "objective/scores"),
    _both("length", "Length of own answers (tokens)", "completions/mean_length"),
    _both("finished", "Share of answers that ended", "val/contain_eos_token"),
    Panel("entropy", "Entropy of own tokens (nats)", (("objective/entropy", ""),)),
    Panel("clip_fraction", "Share of tokens that the clip holds", (("policy/clip_fraction", ""),), 0.0),
    Panel("explained", "Variance that the value function explains", (("value/explained_variance", ""),), 0.0),
    Panel("learning_rate", "Learning rate", (("learning_rate", ""),), smooth=False),
    Panel("grad_norm", "Gradient norm before clipping", (("grad_norm", ""),)),
)


MOST_BORDERS = 12
"""borders of rounds that are drawn; more would be a hatching"""


def borders(run: Run) -> list[float]:
    """Where rounds begin after the first, between the last step of one and the first of the next; none of many."""
    steps, rounds = run.series("rounds/round")
    found = [
        (steps[place - 1] + steps[place]) / 2
        for place in range(1, len(rounds))
        if rounds[place] != rounds[place - 1] and steps[place] > steps[place - 1]
    ]
    return found if len(found) <= MOST_BORDERS else []


def draw(run: Run, folder: Path) -> list[Figure]:
    """Writes every curve the run has numbers for into `folder` (RUN/plots) and returns them in reading order."""
    figures = [_panel(panel, [run], folder) for panel in PANELS]
    return [figure for figure in figures if figure is not None]


def overlay(runs: Sequence[Run], labels: Sequence[str], folder: Path) -> list[Figure]:
    """One figure per metric with every run's curve in its own colour; `labels` are the runs' names."""
    figures: list[Figure | None] = []
    for panel in PANELS:
        for name, label in panel.lines:
            title = f"{panel.title}: {label}" if label else panel.title
            file = f"{panel.name}-{label}".strip("-").replace(" ", "-")
            single = replace(panel, name=file, title=title, lines=((name, label),))
            figures.append(_panel(single, runs, folder, labels))
    return [figure for figure in figures if figure is not None]


@dataclass(frozen=True)
class Line:
    """One curve: `smooth` draws the raw values faint behind a running mean."""

    label: str
    steps: list[float]
    values: list[float]
    colour: str
    smooth: bool

    @property
    def shown(self) -> list[float]:
        """The values of the strong line."""
        return smoothed(self.values) if self.smooth else self.values


def _panel(panel: Panel, runs: Sequence[Run], folder: Path, labels: Sequence[str] = ()) -> Figure | None:
    lines: list[Line] = []
    for place, run in enumerate(runs):
        for part, (name, label) in enumerate(panel.lines):
            steps, values = run.series(name)
            if not values:
                continue
            smooth = panel.smooth and not name.startswith("eval_") and len(values) >= 12
            colour = COLOURS[(place if labels else part) % len(COLOURS)]
            lines.append(Line(_short(labels[place]) if labels else label, steps, values, colour, smooth))
    if all(len(line.values) < 2 for line in lines):
        return None
    if not panel.constant and all(len(set(line.values)) == 1 for line in lines):
        return None

    def paint(axes: Any) -> None:
        if panel.neutral is not None:
            axes.axhline(panel.neutral, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for border in () if labels else borders(runs[0]):
            axes.axvline(border, color=FAINT, linewidth=0.7, alpha=0.6, zorder=0)
        limits: list[float] = [] if panel.neutral is None else [panel.neutral]
        for line in lines:
            limits += _draw(axes, line)
        frame(axes, limits)
        axes.set_xlabel("step")
        label_ends(axes, [(line.shown[-1], line.label, line.colour) for line in lines])

    parts = [f"{line.label or panel.title} ends at {line.shown[-1]:.4g}" for line in lines]
    longest = max(len(line.label) for line in lines)
    margins = (MARGINS[0], 0.15 + (0.1 + 0.08 * longest if longest else 0.0), *MARGINS[2:])
    return save(panel.name, panel.title, f"{panel.title} by step: {'; '.join(parts)}.", folder, paint, margins=margins)


def _short(label: str) -> str:
    """A run's name that fits beside a curve; names of one family differ at their ends, so both ends stay."""
    return label if len(label) <= 17 else f"{label[:7]}…{label[-9:]}"


def _draw(axes: Any, line: Line) -> list[float]:
    """Draws one curve and returns the values that should be in view (outliers of a noisy curve need not be)."""
    if not line.smooth:
        marker = "o" if len(line.values) <= 40 else ""
        axes.plot(line.steps, line.values, color=line.colour, marker=marker, markersize=4, zorder=4, clip_on=False)
        return line.values
    axes.plot(line.steps, line.values, color=line.colour, linewidth=0.8, alpha=0.3, zorder=2)
    axes.plot(line.steps, line.shown, color=line.colour, zorder=3)
    return [*line.shown, *np.quantile(line.values, [0.01, 0.99]).tolist()]


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred running mean over about a fifteenth of the curve, over what there is of the window near its
    ends.
    """
    array = np.asarray(values, dtype=np.float64)
    reach = max(1, len(array) // 30)
    sums = np.concatenate([[0.0], np.cumsum(array)])
    places = np.arange(len(array))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(array))
    return ((sums[high] - sums[low]) / (high - low)).tolist()


def frame(axes: Any, limits: Sequence[float]) -> None:
    """Sets the height of the axes so that these values are in view."""
    low, high = min(limits), max(limits)
    # At least half a percent of the values themselves is shown: noise in the sixth digit is no curve.
    span = max(high - low, 0.005 * max(abs(low), abs(high)), 1e-9)
    middle, room = (low + high) / 2, 0.56 * span
    axes.set_ylim(middle - room, middle + room)


def label_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes each line's label right of its end, moved apart where two would touch."""
    low, high = axes.get_ylim()
    gap, free = 0.085, -1.0
    for value, label, colour in sorted(ends):
        height = max((value - low) / (high - low), free + gap)
        free = height
        axes.annotate(
            label,
            (1.02, height),
            xycoords="axes fraction",
            color=colour,
            fontweight="bold",
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
