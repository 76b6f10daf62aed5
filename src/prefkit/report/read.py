"""A run directory as frozen records. Nothing here needs torch, the model or the data.

Missing parts are allowed where a run may still be going or was stopped (`result` is None then); a damaged
part is an InputError that names the file and line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefkit.errors import InputError

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its interval, as evaluation.json stores it; ends are infinite where nothing bounds them."""

    mean: float
    low: float
    high: float
    n: int
    groups: int
    level: float
    method: str

    def excludes(self, value: float) -> bool:
        return value < self.low or value > self.high

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One held-out split: metric name -> value before and after training, and intervals of the final values."""

    start: Mapping[str, float] = field(default_factory=dict[str, float])
    final: Mapping[str, float] = field(default_factory=dict[str, float])
    intervals: Mapping[str, Estimate] = field(default_factory=dict[str, Estimate])


@dataclass(frozen=True, kw_only=True)
class Result:
    """How the run ended."""

    status: str
    reason: str = ""
    steps: int = 0
    selected_step: int = 0
    rule: str = ""
    seconds: float = 0.0
    model: str = ""
    adapter: str = ""

    @property
    def selected_by_held_out(self) -> bool:
        """True when held-out rows chose the step, which makes their final value optimistic."""
        return self.rule.startswith("best")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a run wrote about itself; `evaluation` is the validation split, `test` a separate one if
    any.
    """

    directory: Path
    method: str
    preset: str
    version: str
    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: tuple[Row, ...]
    data: Mapping[str, Any]
    evaluation: Evaluation
    test: Evaluation | None
    pairs: tuple[Row, ...]
    completions: tuple[Row, ...]
    samples: tuple[Row, ...]
    result: Result | None
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def main_evaluation(self) -> Evaluation:
        """The test split where there is one: it never chose anything."""
        return self.test or self.evaluation

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of one metric; two empty lists when it was never logged.

        A held-out series ends with the final evaluation, unless other held-out rows measured the steps before.
        """
        points = [(float(row.get("step", 0)), row.get(name)) for row in self.metrics]
        if name in self.evaluation.final and self.result and not self.data.get("parts", {}).get("selection"):
            points = [point for point in points if point[0] != self.result.selected_step or point[1] is not None]
            if all(step != self.result.selected_step for step, _ in points):
                points.append((float(self.result.selected_step), self.evaluation.final[name]))
        finite = [
            (step, float(value)) for step, value in points if isinstance(value, (int, float)) and math.isfinite(value)
        ]
        finite.sort()
        return [step for step, _ in finite], [value for _, value in finite]


def read(directory: Path | str) -> Run:
    """Reads a run directory. Raises InputError when it is none, or when a file of it is damaged."""
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(directory), mend="give the --output_dir of a run")
    if not (folder / "config.json").is_file():
        raise InputError(
            "this is not a run directory: it has no config.json",
            where=str(directory),
            mend="give the folder that a prefkit training command wrote",
        )
    head = json_object(folder / "config.json")
    if not isinstance(head.get("method"), str) or not isinstance(head.get("config"), dict):
        raise InputError(
            "this config.json is not prefkit's: it has no 'method' and 'config'",
            where=str(folder / "config.json"),
            mend="give the run directory itself, not its model folder or a checkpoint",
        )
    evaluation = json_object(folder / "evaluation.json", optional=True)
    metrics, notes = _metrics(folder / "metrics.jsonl")
    return Run(
        directory=folder,
        method=head["method"],
        preset=str(head.get("preset") or ""),
        version=str(head.get("prefkit") or ""),
        config=head["config"],
        defaults=head.get("defaults") or {},
        environment=json_object(folder / "environment.json", optional=True),
        metrics=metrics,
        data=json_object(folder / "data.json", optional=True),
        evaluation=_evaluation(evaluation, folder / "evaluation.json"),
        test=_evaluation(evaluation["test"], folder / "evaluation.json") if evaluation.get("test") else None,
        pairs=_rows(folder / "evaluation" / "pairs.jsonl", ("row", "prompt", "margin", "accuracy")),
        completions=_rows(folder / "evaluation" / "completions.jsonl", ("row", "prompt", "nll")),
        samples=_rows(folder / "evaluation" / "samples.jsonl", ("row", "prompt", "answer_final")),
        result=_result(folder / "result.json"),
        notes=notes,
    )


def json_object(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A file of one JSON object, {} if it may be missing; InputError where it is damaged."""
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"damaged JSON at line {error.lineno}: {error.msg}", where=str(path), mend=MEND_DAMAGE
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path), mend=MEND_DAMAGE) from None
    if not isinstance(content, dict):
        raise InputError("must hold a JSON object", where=str(path), mend=MEND_DAMAGE)
    return content


def _rows(path: Path, needed: tuple[str, ...]) -> tuple[Row, ...]:
    if not path.exists():
        return ()
    rows: list[Row] = []
    for place, line in _lines(path):
        row = json_row(line, path, place)
        missing = [name for name in needed if name not in row]
        if missing:
            raise InputError(f"line {place} has no field '{missing[0]}'", where=str(path), mend=MEND_DAMAGE)
        rows.append(row)
    return tuple(rows)


def _metrics(path: Path) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Rows, and a note when the last line was cut off: that is what a killed run leaves, and no damage."""
    if not path.exists():
        return (), ("No step was logged.",)
    lines = _lines(path)
    cut = bool(lines) and not path.read_text(encoding="utf-8").endswith("\n") and not _parses(lines[-1][1])
    rows = tuple(json_row(line, path, place) for place, line in (lines[:-1] if cut else lines))
    return rows, ("The last line of metrics.jsonl was cut off while it was written; it is left out.",) if cut else ()


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path), mend=MEND_DAMAGE) from None
    # Not splitlines(): a JSON string may hold U+2028 and its kin unescaped.
    return [(place, line) for place, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def json_row(line: str, path: Path, place: int) -> Row:
    """A line of a JSONL file, `place` counted from 1; InputError where it is damaged."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"damaged JSON at line {place}: {error.msg}", where=str(path), mend=MEND_DAMAGE) from None
    if not isinstance(row, dict):
        raise InputError(f"line {place} is not a JSON object", where=str(path), mend=MEND_DAMAGE)
    return row


def _evaluation(content: Mapping[str, Any], path: Path) -> Evaluation:
    try:
        intervals = {name: _estimate(fields) for name, fields in content.get("intervals", {}).items()}
        start = _numbers(content.get("start") or {})
        final = _numbers(content.get("final") or {})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"has an unexpected shape ({type(error).__name__}: {error})", where=str(path), mend=MEND_DAMAGE
        ) from None
    return Evaluation(start=start, final=final, intervals=intervals)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None}


def _estimate(fields: Mapping[str, Any]) -> Estimate:
    low, high = fields["low"], fields["high"]
    return Estimate(
        mean=float(fields["mean"]),
        low=-math.inf if low is None else float(low),
        high=math.inf if high is None else float(high),
        n=int(fields["n"]),
        groups=int(fields["groups"]),
        level=float(fields["level"]),
        method=str(fields["method"]),
    )


def _result(path: Path) -> Result | None:
    content = json_object(path, optional=True)
    if not content:
        return None
    known = {name: content[name] for name in Result.__dataclass_fields__ if content.get(name) is not None}
    if "status" not in known:
        raise InputError("has no 'status'", where=str(path), mend=MEND_DAMAGE)
    return Result(**known)


MEND_DAMAGE = "resume the run (prefkit resume RUN), which writes the file anew, or restore it from a copy"
