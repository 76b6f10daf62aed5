"""Read one data file into rows that remember their line: JSON lines, JSON, CSV, Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefkit.errors import InputError

FORMATS = ("jsonl", "json", "csv", "parquet")
NUMBERS = ("score_chosen", "score_rejected", "strength", "margin")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows as read, with the place each came from."""

    rows: Sequence[Row]
    name: str
    lines: Sequence[int] | None = None
    """1-based line of each row in a text file; None where rows have no line"""

    def path_of_row(self, row: int) -> str:
        """Where a user finds the 0-based row: "pairs.jsonl line 12", or "data set row 12" counted from 1."""
        return f"{self.name} row {row + 1}" if self.lines is None else f"{self.name} line {self.lines[row]}"

    def take(self, count: int) -> Source:
        """The first `count` rows; 0 takes all."""
        return replace(self, rows=self.rows[:count]) if count else self


def read_file(path: Path) -> Source:
    """All rows of one file, read by its suffix (all but parquet may be gzipped); errors name the line."""
    kind = _format(path)
    if kind == "parquet":
        return not_empty(_read_parquet(path))
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text (byte {error.start})"
        raise InputError(what, where=str(path), mend="save it as UTF-8") from error
    except (OSError, EOFError) as error:
        what = f"cannot be read: {error}"
        raise InputError(what, where=str(path), mend="check the file and its rights") from error
    if not text.strip():
        raise InputError("is empty", where=str(path), mend="check how the file was written")
    reader = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv}[kind]
    return not_empty(reader(text, str(path)))


def _format(path: Path) -> str:
    suffixes = [suffix.lower().lstrip(".") for suffix in path.suffixes]
    if suffixes and suffixes[-1] == "gz":
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    kind = {"ndjson": "jsonl", "pq": "parquet"}.get(kind, kind)
    if kind not in FORMATS:
        raise InputError(
            f"unknown kind of file {('.' + kind) if kind else '(no suffix)'}",
            where=str(path),
            mend=f"rename it to one of {', '.join('.' + name for name in FORMATS)}",
        )
    return kind


def _read_jsonl(text: str, name: str) -> Source:
    rows: list[Row] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"broken JSON: {error.msg} at character {error.pos + 1}: {_around(line, error.pos)}",
                where=f"{name} line {number}",
                mend="write one whole JSON object per line",
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"holds a {_json_type(row)}, not an object",
                where=f"{name} line {number}",
                mend='write one object per line, like {"prompt": ..., "chosen": ..., "rejected": ...}',
            )
        rows.append(row)
        lines.append(number)
    return Source(rows=rows, name=name, lines=lines)


def _read_json(text: str, name: str) -> Source:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object after another: JSON lines under a .json name
            return _read_jsonl(text, name)
        line = text.split("\n")[error.lineno - 1]
        raise InputError(
            f"broken JSON: {error.msg} at character {error.colno}: {_around(line, error.colno - 1)}",
            where=f"{name} line {error.lineno}",
            mend="write a list of objects, or JSON lines",
        ) from error
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(data) == 1 and lists else [data]
    if not isinstance(data, list):
        what = f"holds a {_json_type(data)}, not a list"
        raise InputError(what, where=name, mend="write a list of objects")
    for place, row in enumerate(data):
        if not isinstance(row, dict):
            what = f"holds a {_json_type(row)}, not an object"
            raise InputError(what, where=f"{name} row {place + 1}", mend="write one object per row")
    return Source(rows=data, name=name)


def _read_csv(text: str, name: str) -> Source:
    csv.field_size_limit(2**31 - 1)  # the module's 128 KiB is shorter than a long conversation
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    lines: list[int] = []
    try:
        header = next(reader)
        line = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):
                raise InputError(
                    f"has {len(values)} cells where the header has {len(header)}",
                    where=f"{name} line {line}",
                    mend="quote cells that hold commas or line breaks",
                )
            if values:
                rows.append({key: _cell(key, value) for key, value in zip(header, values, strict=True)})
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        where = f"{name} line {reader.line_num}"
        raise InputError(f"broken CSV: {error}", where=where, mend="check its quotes") from error
    return Source(rows=rows, name=name, lines=lines)


def _cell(key: str, value: str) -> Any:
    """CSV knows only text: numbers and truth values are read where a column of that name must hold them."""
    if key in NUMBERS:
        if not value.strip():
            return None
        try:
            return float(value)
        except ValueError:
            return value  # reported with row and field when the columns are read
    if key == "label":
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    return value


def _read_parquet(path: Path) -> Source:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot be read: {reason}", where=str(path), mend="write the file anew") from error
    return Source(rows=rows, name=str(path))


def _around(line: str, position: int) -> str:
    return f"...{line[max(0, position - 20) : position + 20]!r}..."


def _json_type(value: Any) -> str:
    names = {list: "list", str: "string", bool: "truth value", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def not_empty(source: Source) -> Source:
    """`source`, or an InputError if it has no rows."""
    if not source.rows:
        raise InputError("has no rows", where=source.name, mend="check how the file was written")
    return source
