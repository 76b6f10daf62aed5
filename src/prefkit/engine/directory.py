"""The run directory: made, recognised, refused or emptied; and which options may differ between starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import prefkit
from prefkit.engine import files
from prefkit.errors import InputError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
RESULT = "result.json"
RUN_FILES = (
    CONFIG,
    METRICS,
    ENVIRONMENT,
    RESULT,
    "data.json",
    "evaluation.json",
    "evaluation",
    "reference.safetensors",
    "rounds",
    "judge-cache",
    "stage1",
    "sft",
    "reward",
    "ppo",
    "model",
    "adapter",
    "report.html",
    "plots",
    "tensorboard",
    "wandb",
)
"""what a run writes beside checkpoint-N; --overwrite deletes these and nothing else"""

STAGES = ("stage1", "sft", "reward", "ppo")
"""runs of their own inside a run; they know themselves whether their options are still those asked for"""

FREE_TO_DIFFER = ("output_dir", "overwrite", "dry_run", "report_to")
"""options that do not change what a run computes"""


def default_path(method: str) -> Path:
    """Where a run without --output_dir goes."""
    return Path("runs") / method


def prepare(
    directory: Path,
    *,
    method: str,
    preset: str,
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    overwrite: bool,
) -> bool:
    """Make `directory` ready for this run; True when it continues an earlier start of the same run.

    Raises InputError when the directory holds something that is no run, another method's run, or a run whose
    options differ (each differing option is named). Call on the main process.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError("is a file, not a folder", where=f"--output_dir {directory}", mend="choose another name")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be made ({error.strerror})", where=f"--output_dir {directory}") from error
    used = [path.name for path in directory.iterdir() if not path.name.startswith(files.UNFINISHED)]
    earlier = _run_in(directory) if used else None
    if used and earlier is None:
        raise InputError(
            f"is not empty and is no prefkit run (it holds {', '.join(sorted(used)[:3])}"
            f"{', ...' if len(used) > 3 else ''})",
            where=f"--output_dir {directory}",
            mend="choose an empty or a new folder",
        )
    found = [] if earlier is None or overwrite else _found(earlier, method=method, values=values)
    if earlier is not None and found and not _begun(directory):
        # Refused before its first step (a wrong option): the mended command starts. A stage that is done stays done.
        _empty(directory, keep=(CONFIG, *STAGES) if earlier["method"] == method else ())
        earlier, found = None, []
    if found:
        _refuse(directory, found)
    if earlier is not None and overwrite:
        _empty(directory)
    files.sweep(directory)
    # a stored config must be able to continue the run, so the two switches that would not are left off
    stored = {**values, **{name: False for name in ("overwrite", "dry_run") if name in values}}
    content = {"method": method, "preset": preset, "prefkit": prefkit.__version__, "config": stored}
    content["defaults"] = dict(defaults)  # so that a reader of the run sees what was chosen
    if earlier is None or overwrite or earlier["config"] != stored:
        files.write_json(directory / CONFIG, content)
    return earlier is not None and not overwrite


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` for every option that forbids continuing; `max_steps` may grow."""
    found: list[str] = []
    for name in sorted({*old, *new} - set(FREE_TO_DIFFER)):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if name == "max_steps" and isinstance(before, int) and isinstance(now, int) and now > max(before, 0):
            continue
        note = " (may grow, not shrink)" if name == "max_steps" else ""
        absent = [where for where, values in (("the earlier run", old), ("this one", new)) if name not in values]
        change = f"unknown to {absent[0]}" if absent else f"{before!r} -> {now!r}"
        found.append(f"{name}: {change}{note}")
    return found


def _run_in(directory: Path) -> dict[str, Any] | None:
    path = directory / CONFIG
    if not path.is_file():
        return None
    content = files.read_json(path)
    return content if isinstance(content.get("config"), dict) and "method" in content else None


def _found(earlier: Mapping[str, Any], *, method: str, values: Mapping[str, Any]) -> list[str]:
    """What differs between the run in the directory and this one, the method first."""
    other = [f"method: {earlier['method']!r} -> {method!r}"] if earlier["method"] != method else []
    return other + differences(earlier["config"], values)


def _refuse(directory: Path, found: list[str]) -> None:
    raise InputError(
        "holds a run with other options:\n    " + "\n    ".join(found),
        where=f"--output_dir {directory}",
        mend="choose another --output_dir, give the same options to continue that run, "
        "or --overwrite to delete it and start anew",
    )


def _empty(directory: Path, keep: Collection[str] = ()) -> None:
    """Delete what a run writes. The config goes last: until then a killed deletion is still seen as a run."""
    names = set(RUN_FILES) - set(keep)
    doomed = [path for path in directory.iterdir() if path.name in names or _is_checkpoint(path)]
    for path in sorted(doomed, key=lambda path: path.name == CONFIG):
        files.discard(path)


def _begun(directory: Path) -> bool:
    """Whether there is anything a new start would lose: a row of metrics or a checkpoint."""
    metrics = directory / METRICS
    return (metrics.is_file() and metrics.stat().st_size > 0) or any(
        _is_checkpoint(path) for path in directory.iterdir()
    )


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and path.name.startswith("checkpoint-") and path.name.removeprefix("checkpoint-").isdigit()
