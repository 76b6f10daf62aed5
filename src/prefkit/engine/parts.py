"""A file of JSON lines that one or several processes fill, killed and continued as often as need be.

    out.jsonl           all rows, in order of their keys once the work is done
    out.jsonl.part-1    rows of process 1 while several processes work; gone once they are merged

Rows are forced to disk as they come. The next start takes up what is there, whatever number of processes wrote it.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from prefkit.engine import files
from prefkit.engine.world import World
from prefkit.errors import InputError

Key = tuple[int, ...]
"""what a row is known by and sorted by"""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The rows of `path` and of the parts beside it."""

    path: Path
    world: World
    key: Callable[[Mapping[str, Any], str], Key]
    """(row, where it stands) -> its key; raises InputError for a row that does not belong to this work"""

    def open(self) -> set[Key]:
        """Keys of the rows that are there, on every process. Parts of an earlier start are merged, and what a kill cut
        is removed.

        Raises InputError where a file holds anything but rows of this work; it is then left as it was.
        """
        return set(self.world.on_main(self._merge))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add this process's rows and force them to disk."""
        path = self.path if self.world.size == 1 else self._part(self.world.rank)
        with files.full_disk_is_an_input_error(path.parent), path.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            out.flush()
            os.fsync(out.fileno())

    def finish(self) -> None:
        """Wait for every process, then leave one file with all rows in order."""
        self.world.barrier()
        self.world.on_main(lambda: len(self._merge(ordered=True)))

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the finished file, in order; read it on the main process."""
        return [json.loads(line) for _, line in self._read(self.path)]

    def _merge(self, *, ordered: bool = False) -> list[Key]:
        """Keys of all rows. One file is left where there were parts; with `ordered` it is sorted by key."""
        if self.path.is_dir():
            raise InputError("is a folder", where=f"--out {self.path}", mend="name a file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = sorted(Path(name) for name in glob.glob(glob.escape(str(self.path)) + ".part-*"))
        found = [self._read(path) for path in (self.path, *parts)]
        # A kill between writing the merged file and removing the parts leaves rows twice.
        lines = {key: line for rows in reversed(found) for key, line in rows}
        if parts or (ordered and [key for key, _ in found[0]] != sorted(lines)):
            files.write_text(self.path, "".join(lines[key] + "\n" for key in sorted(lines)))
            for part in parts:
                part.unlink()
        else:
            self._cut()
        return list(lines)

    def _read(self, path: Path) -> list[tuple[Key, str]]:
        """(key, line) of the whole lines of one file; a last line without an end was cut by a kill and is no row."""
        if not path.exists():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        found: list[tuple[Key, str]] = []
        # Not splitlines(): a JSON string may hold U+2028 and its kin unescaped.
        for number, line in enumerate(whole.decode("utf-8", errors="replace").split("\n")[:-1], start=1):
            where = f"{path} line {number}"
            try:
                row: Any = json.loads(line)
            except ValueError as error:
                raise InputError("is no line of JSON", where=where, mend="choose another --out") from error
            if not isinstance(row, dict):
                raise InputError("is no JSON object", where=where, mend="choose another --out")
            found.append((self.key(cast("dict[str, Any]", row), where), line))
        return found

    def _cut(self) -> None:
        """Remove the piece of a line at the end of the file."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with self.path.open("r+b") as file:
                file.truncate(end)

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part-{rank}")


def dealt(pieces: Sequence[T], world: World) -> list[T]:
    """This process's share of pieces that were cut before anyone knew how many processes there are.

    What is computed together must not depend on the number of processes: sums in another order give other last digits.
    """
    return list(pieces[world.rank :: world.size])


def shown(pieces: Sequence[T], size: Callable[[T], int], *, label: str, visible: bool) -> Iterator[T]:
    """The pieces one after another, behind a bar on a terminal that counts their sizes."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (visible and console.is_terminal)) as bar:
        task = bar.add_task(label, total=sum(map(size, pieces)))
        for piece in pieces:
            yield piece
            bar.advance(task, size(piece))
