"""What is wrong with a row of data, as a value: collected by `data check`, raised by training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from prefkit.errors import InputError

Where = Callable[[int], str]
"""0-based row -> the place a user can open, e.g. "pairs.jsonl line 12"."""


def row_name(row: int) -> str:
    """The place of a row whose file is not known; rows are counted from 1 for people."""
    return f"row {row + 1}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of one row (or of the whole file: row -1). Errors stop training, warnings are counted."""

    kind: str
    """short stable name, e.g. "duplicate"; problems of one kind are shown together"""
    what: str
    mend: str
    level: Literal["error", "warning"] = "error"
    where: str = ""
    row: int = -1
    field: str = ""

    def to_json(self) -> dict[str, str | int]:
        return {
            "level": self.level,
            "kind": self.kind,
            "where": self.where,
            "row": self.row,
            "field": self.field,
            "what": self.what,
            "mend": self.mend,
        }

    def to_error(self, more: int = 0) -> InputError:
        """This problem as the exception a user sees; `more` counts the errors not shown."""
        place = f"{self.where}, field {self.field!r}" if self.field else self.where
        rest = f" ({more} more errors; `prefkit data check` lists them)" if more else ""
        return InputError(self.what + rest, where=place, mend=self.mend)


def raise_first(problems: Iterable[Problem]) -> None:
    """Raise the first error as an InputError that counts the others; warnings pass."""
    errors = [problem for problem in problems if problem.level == "error"]
    if errors:
        raise errors[0].to_error(more=len(errors) - 1)
