"""metrics.jsonl: rows appended as they come, cut back to what a checkpoint counted when a run continues."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefkit.engine import files


class Journal:
    """The rows of one run, in `path`. Used on the main process only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows = 0

    def cut(self, rows: int) -> int:
        """Keep the first `rows` whole rows and drop the rest; gives how many rows are there."""
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        kept = whole[:rows]
        if len(kept) < len(lines) or not self._path.exists():
            files.write_text(self._path, b"".join(kept).decode())
        self.rows = len(kept)
        return self.rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; InputError when the disk is full (the part written is cut on the next start)."""
        with (
            files.full_disk_is_an_input_error(self._path.parent),
            self._path.open("a", encoding="utf-8") as file,
        ):
            file.write(files.line_of(row))
        self.rows += 1

    def force(self) -> None:
        """Force the rows to disk, so that a checkpoint never counts rows that a power cut could take."""
        with self._path.open("ab") as file:
            os.fsync(file.fileno())
