"""Reward against KL to the reference, evaluation by evaluation: what a run paid for what it gained.

A run that trained PPO beside itself, from the same stages and at the same budget (RUN/ppo), shows both paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefkit.report.canvas import COLOURS, FAINT, MARGINS, Figure, save
from prefkit.report.curves import frame, label_ends
from prefkit.report.read import Run, read

KL = "eval_objective/kl"
SCORES = (("scores", "eval_objective/scores", "Reward-model score"), ("gold", "eval_gold", "Gold reward"))
ARM = "ppo"
"""folder of the run beside, in the run's own"""

Path_ = list[tuple[float, float]]


def draw(run: Run, folder: Path) -> list[Figure]:
    """A figure for each score that was evaluated beside the KL more than twice, or with a run beside."""
    if not run.series("rollout/episodes")[1]:
        return []
    arms = [(_name(run), run)]
    if (run.directory / ARM / "config.json").is_file():
        arms.append(("PPO", read(run.directory / ARM)))
    figures: list[Figure] = []
    for name, metric, title in SCORES:
        paths = [(label, points(arm, metric)) for label, arm in arms]
        paths = [(label, path) for label, path in paths if len(path) > 1]
        if paths and (len(paths) > 1 or len(paths[0][1]) > 2):
            figures.append(_figure(name, title, paths, folder))
    return figures


def points(run: Run, metric: str) -> Path_:
    """(KL, score) of the steps that evaluated both, in order of steps."""
    kl = dict(zip(*run.series(KL), strict=True))
    scores = dict(zip(*run.series(metric), strict=True))
    return [(kl[step], scores[step]) for step in sorted(kl) if step in scores]


def _name(run: Run) -> str:
    return "DR-PO" if run.config.get("reset_prob") else "PPO" if run.method in ("drpo", "ppo") else run.method.upper()


def _figure(name: str, title: str, paths: list[tuple[str, Path_]], folder: Path) -> Figure:
    def paint(axes: Any) -> None:
        for place, (_, path) in enumerate(paths):
            colour = COLOURS[place]
            axes.plot(*zip(*path, strict=True), color=colour, marker="o", markersize=4, alpha=0.85, zorder=3)
            axes.plot(*path[-1], color=colour, marker="o", markersize=8, zorder=4)
        start = paths[0][1][0]
        axes.axhline(start[1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        frame(axes, [score for _, path in paths for _, score in path])
        axes.set_xlabel("KL to the reference (nats per answer)")
        label_ends(axes, [(path[-1][1], label, COLOURS[place]) for place, (label, path) in enumerate(paths)])

    parts = [f"{label} ends at {path[-1][1]:.4g} with a KL of {path[-1][0]:.4g}" for label, path in paths]
    longest = max(len(label) for label, _ in paths)
    margins = (MARGINS[0], 0.25 + 0.08 * longest, *MARGINS[2:])
    alt = f"{title} of held-out answers by their KL to the reference: {'; '.join(parts)}."
    return save(f"frontier-{name}", f"{title} by KL", alt, folder, paint, margins=margins)
