"""TensorBoard and Weights & Biases, through accelerate's trackers; metrics.jsonl never depends on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from prefkit.errors import InputError

KNOWN = ("tensorboard", "wandb")


def names_of(report_to: str) -> list[str]:
    """The trackers asked for; InputError for an unknown one and for one that is not installed."""
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in KNOWN:
            raise InputError(f"unknown tracker {name!r}", where="--report_to", mend=f"choose none, {', '.join(KNOWN)}")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is not installed", where="--report_to", mend=f"pip install {name}")
    return names


def start(
    names: list[str], directory: Path, *, title: str, config: Mapping[str, Any], after: int
) -> list[GeneralTracker]:
    """Open trackers on the main process; points past step `after` of an earlier start are dropped where
    possible.
    """
    opened: list[GeneralTracker] = []
    for name in names:
        if name == "tensorboard":
            tracker: GeneralTracker = TensorBoardTracker("tensorboard", directory, purge_step=after + 1)
        else:
            tracker = WandBTracker(title, dir=str(directory), name=directory.name)
        tracker.start()
        if name == "wandb":
            tracker.store_init_configuration(dict(config))
        opened.append(tracker)
    return opened


def log(trackers: list[GeneralTracker], row: Mapping[str, Any], step: int) -> None:
    """Send one row of metrics."""
    values = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
    for tracker in trackers:
        tracker.log(values, step=step)


def finish(trackers: list[GeneralTracker]) -> None:
    for tracker in trackers:
        tracker.finish()
