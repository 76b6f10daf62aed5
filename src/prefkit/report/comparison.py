"""The report of several runs: their results side by side, their curves laid over each other."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefkit.report import curves, wording
from prefkit.report.canvas import Figure, interval_text
from prefkit.report.metrics import UNIMPORTANT, duration, metric, number, plain, rank
from prefkit.report.page import render, save
from prefkit.report.parts import Table, embedded, table
from prefkit.report.read import Run
from prefkit.report.round_counts import read_rounds


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Rows of paired differences for one pair of runs, made by whoever may know statistics (a command)."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write(
    runs: Sequence[Run], out: Path, *, differences: Sequence[Differences] = (), warnings: Sequence[str] = ()
) -> Path:
    """Writes the comparison page to `out` and its figures beside it, in a folder of the page's name. Returns
    `out`.
    """
    labels = names(runs)
    figures = curves.overlay(runs, labels, out.with_name(f"{out.stem}-plots"))
    return save(render("comparison.html", context(runs, labels, figures, differences, warnings)), out)


def context(
    runs: Sequence[Run],
    labels: Sequence[str],
    figures: Sequence[Figure],
    differences: Sequence[Differences],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Everything the template `comparison.html` shows."""
    settings = _settings(runs)
    return {
        "title": f"{' · '.join(labels)}: prefkit comparison",
        "version": runs[0].version,
        "heading": " vs ".join(labels) if len(runs) == 2 else f"{len(runs)} runs compared",
        "lede": f"The same measurements for each run; differences are {labels[0]} minus the other run.",
        "warnings": [*warnings, *_unfinished(runs, labels)],
        "runs": _runs(runs, labels),
        "results": _results(runs, labels),
        "results_note": "Final values with their intervals where the run stored them. Overlapping "
        "intervals do not mean equal runs: the paired differences below are the sharper test.",
        "differences": [table(part.columns, part.rows, title=part.title) for part in differences],
        "plots": [embedded(figure) for figure in figures],
        "settings": table(("Option", *labels), settings, numeric=(), kind="settings") if settings else None,
        "command_list": _commands(runs),
    }


def names(runs: Sequence[Run]) -> list[str]:
    """Short distinct names: the folder's, with its parent's where two folders are called the same."""
    short = [run.name for run in runs]
    return [
        name if short.count(name) == 1 else f"{run.directory.resolve().parent.name}/{name}"
        for name, run in zip(short, runs, strict=True)
    ]


def _runs(runs: Sequence[Run], labels: Sequence[str]) -> Table:
    rows = [
        (
            label,
            f"{run.method} {run.preset}".strip(),
            wording.named(run.config.get("model_name_or_path")) or "in memory",
            wording.named(run.config.get("dataset_name")) or "in memory",
            f"{run.result.selected_step:,} of {run.result.steps:,}" if run.result else "not finished",
            duration(run.result.seconds) if run.result else "–",
        )
        for label, run in zip(labels, runs, strict=True)
    ]
    columns = ("Run", "Method", "Model", "Data", "Selected step", "Time")
    rounds = [read_rounds(run) for run in runs]
    if not any(rounds):
        return table(columns, rows, numeric=())
    budget = [(f"{len(one.each):,}", f"{one.total.comparisons:,}") if one else ("–", "–") for one in rounds]
    more = [(*row, *found) for row, found in zip(rows, budget, strict=True)]
    return table((*columns, "Rounds", "Comparisons asked"), more, numeric=())


def _results(runs: Sequence[Run], labels: Sequence[str]) -> Table:
    measured = dict.fromkeys(name for run in runs for name in run.main_evaluation.final)
    chosen = [name for name in measured if plain(name) not in UNIMPORTANT]
    chosen.sort(key=rank)
    rows = [(metric(name).label, *(_cell(run, name) for run in runs)) for name in chosen]
    return table(("Metric", *labels), rows)


def _cell(run: Run, name: str) -> str:
    value = number(run.main_evaluation.final.get(name))
    estimate = run.main_evaluation.intervals.get(name)
    return f"{value} {interval_text(estimate)}" if estimate else value


def _settings(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    every = dict.fromkeys(name for run in runs for name in run.config if name not in ("output_dir", "overwrite"))
    return [
        (name, *(wording.shown(run.config[name]) if name in run.config else "no such option" for run in runs))
        for name in every
        if not _all_same([run.config for run in runs], name)
    ]


def _all_same(configs: Sequence[Mapping[str, Any]], name: str) -> bool:
    if any(name not in config for config in configs):
        return False
    return all(wording.same(config[name], configs[0][name]) for config in configs)


def _unfinished(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    return [f"{label} has not finished." for label, run in zip(labels, runs, strict=True) if run.result is None]


def _commands(runs: Sequence[Run]) -> list[tuple[str, str]]:
    folders = [shlex.quote(wording.place(run)) for run in runs]
    lines = [("Write this page again", f"prefkit report {' '.join(folders)}")]
    lines += [("Paired differences in the terminal", f"prefkit compare {folders[0]} {other}") for other in folders[1:]]
    return lines
