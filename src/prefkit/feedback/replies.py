"""Replies that were paid for, on disk: asked once, never again.

A folder of append-only JSON lines, one file per process, so that any number of processes may share it. Rows:

    {"asked": KEY, "most": n}                       a request is about to be sent; it can take n tokens at most
    {"reply": KEY, "content": ..., ...}             its reply; forced to disk before anybody uses it
    {"wasted": KEY, "why": ..., "tokens": n}        an attempt that may have been charged and gave nothing
    {"ended": KEY, "why": ...}                      ended in good order without one

A request that was asked, and neither answered nor ended, is in flight, or was when its file's process was killed: a
process holds a lock on its file as long as it lives. KEY is the hash of everything that could change the reply; the
folder never holds an API key.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from prefkit.engine import files
from prefkit.errors import InputError

PATTERN = "replies-*.jsonl"
LOCK = "lock"
"""file that whoever is about to send a request locks for a moment"""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an endpoint answered, as it answered it."""

    content: str
    finish: str = ""
    """why the reply ended: stop, length, content_filter"""
    refusal: str = ""
    model: str = ""
    """the model that the endpoint says it was"""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0


@dataclass
class _Read:
    """How far a file has been read, and what was asked there and has no end yet."""

    offset: int = 0
    lines: int = 0
    pending: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    """with the most tokens each can take"""


class Replies:
    """The replies of a folder, those of other processes included; `refresh` reads what is new."""

    def __init__(self, folder: Path) -> None:
        """Reads the folder if it is there; it is made when something is first written. Raises InputError."""
        self.folder = folder
        self.paid_calls = 0
        """requests paid for in the folder, by whomever"""
        self.paid_tokens = 0
        self._replies: dict[str, Reply] = {}
        self._read: dict[Path, _Read] = {}
        self._own: Path | None = None
        self._descriptor = -1
        self._closing: Callable[[], object] = lambda: None
        self.refresh()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def refresh(self) -> None:
        """Read what other processes have added."""
        if not self.folder.is_dir():
            if self.folder.exists():
                raise InputError("is no folder", where=f"--judge_cache {self.folder}", mend="name a folder")
            return
        for path in sorted(self.folder.glob(PATTERN)):
            if path != self._own:
                self._read_on(path)

    def lost(self, keys: Iterable[str]) -> int:
        """How many of these requests were in flight when a process was killed, and are to be asked again."""
        wanted = set(keys) - self._replies.keys()
        lost: set[str] = set()
        for path, read in self._read.items():
            if wanted & read.pending.keys() and not _in_use(path):
                lost |= wanted & read.pending.keys()
        return len(lost)

    def elsewhere(self) -> dict[str, int]:
        """What other living processes have in flight: keys, and the most tokens each request can take."""
        found: dict[str, int] = {}
        for path, read in self._read.items():
            if read.pending and _in_use(path):
                found |= read.pending
        return found

    @contextmanager
    def alone(self) -> Generator[None, None, None]:
        """A block that one process at a time is in: what it reads of the folder, and `asked`, are one step."""
        with files.full_disk_is_an_input_error(self.folder):
            descriptor = self._opened(self.folder / LOCK, os.O_RDWR)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def asked(self, key: str, most: int) -> None:
        """Note that a request is about to be sent. Not forced to disk: a power cut may cost the note, not money."""
        self._append({"asked": key, "most": most}, force=False)

    def keep(self, key: str, reply: Reply, about: Mapping[str, Any]) -> None:
        """Put a reply on disk. about: who was asked and how (judge, template), for readers of the file."""
        self._append({"reply": key, **dataclasses.asdict(reply), **about}, force=True)
        self._take(key, reply)

    def waste(self, key: str, why: str, tokens: int) -> None:
        """Count an attempt that may have been charged and brought no reply."""
        self._append({"wasted": key, "why": why, "tokens": tokens}, force=True)
        self._count(tokens)

    def end(self, key: str, why: str) -> None:
        """Note that a request is in flight no more, and brought no reply."""
        self._append({"ended": key, "why": why}, force=False)

    def close(self) -> None:
        """Give the file up; a later write starts another one."""
        if self._own is not None:
            self._read[self._own] = _Read(offset=self._own.stat().st_size)
            self._closing()
        self._own, self._descriptor = None, -1

    def _take(self, key: str, reply: Reply) -> None:
        self._replies[key] = reply
        self._count(reply.tokens_in + reply.tokens_out)

    def _count(self, tokens: int) -> None:
        self.paid_calls += 1
        self.paid_tokens += tokens

    def _append(self, row: Mapping[str, Any], *, force: bool) -> None:
        line = files.line_of(row).encode(errors="surrogatepass")  # a reply may hold half of a surrogate pair
        with files.full_disk_is_an_input_error(self.folder):
            if self._descriptor < 0:
                self._start()
            end = os.fstat(self._descriptor).st_size
            try:
                _write_all(self._descriptor, line)
                if force:
                    os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, end)  # no later line may join half of this one
                raise

    def _start(self) -> None:
        """A file of this process's own, locked as long as it lives."""
        path = self.folder / PATTERN.replace("*", uuid4().hex[:16])
        self._descriptor = self._opened(path, os.O_WRONLY | os.O_APPEND | os.O_EXCL)
        self._own, self._closing = path, weakref.finalize(self, os.close, self._descriptor)
        with suppress(OSError):  # a file system without locks: another process may then count our requests as lost
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        files.force(self.folder)

    def _opened(self, path: Path, flags: int) -> int:
        """A file of the folder, made if need be, as the folder is. Raises InputError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return os.open(path, flags | os.O_CREAT, 0o644)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise InputError(
                f"cannot be written ({error})", where=f"--judge_cache {self.folder}", mend="name another folder"
            ) from error

    def _read_on(self, path: Path) -> None:
        """Take the whole lines that `path` has gained; a line without its end is cut, or still being written."""
        read = self._read.setdefault(path, _Read())
        if path.stat().st_size <= read.offset:
            return
        with path.open("rb") as file:
            file.seek(read.offset)
            gained = file.read()
        whole = gained[: gained.rfind(b"\n") + 1]
        for line in whole.splitlines():
            read.lines += 1
            try:
                self._row(json.loads(line), read.pending)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"is no row of a judge's replies ({error})",
                    where=f"{path} line {read.lines}",
                    mend="remove this line; its reply is then asked for again",
                ) from error
        read.offset += len(whole)

    def _row(self, row: Mapping[str, Any], pending: dict[str, int]) -> None:
        if "asked" in row:
            pending[row["asked"]] = int(row.get("most", 0))
        elif "reply" in row:
            pending.pop(row["reply"], None)
            self._take(row["reply"], Reply(**{name: row[name] for name in _REPLY}))
        elif "wasted" in row:
            self._count(row["tokens"])
        else:
            pending.pop(row["ended"], None)


_REPLY = tuple(one.name for one in dataclasses.fields(Reply))


def key_of(values: Mapping[str, Any]) -> str:
    """The key of a request: sha256 of everything that could change its reply."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _in_use(path: Path) -> bool:
    """Whether the process that writes `path` lives: it then holds the file's lock."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    else:
        return False
    finally:
        os.close(descriptor)
