"""Files that are whole or absent: written under another name, forced to disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefkit.errors import InputError

UNFINISHED = ".tmp-"
"""names that start so are leftovers of a killed write"""
DISCARDED = ".old-"
"""names that start so were being deleted"""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace `path` by these values at once; InputError when the disk is full."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by this text at once; InputError when the disk is full."""
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    with full_disk_is_an_input_error(path.parent):
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    force(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError when it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON ({error})", where=str(path)) from error
    if not isinstance(values, dict):
        raise InputError("does not hold a JSON object", where=str(path))
    return values


def line_of(row: Mapping[str, Any]) -> str:
    """One line of JSON; numbers that JSON lacks (NaN, infinity) become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def force(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard(path: Path) -> None:
    """Delete a file or folder; a folder first loses its name, so that a kill never leaves half of one."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        doomed = path
        if not path.name.startswith((DISCARDED, UNFINISHED)):
            doomed = path.with_name(f"{DISCARDED}{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
        shutil.rmtree(doomed)


def sweep(directory: Path) -> None:
    """Remove what a killed write or deletion left in `directory`."""
    for path in list(directory.iterdir()):
        if path.name.startswith((UNFINISHED, DISCARDED)):
            discard(path)


def require_space(directory: Path, needed: int, *, what: str) -> None:
    """InputError unless `needed` bytes are free where `directory` is."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise _no_space(directory, f"{what} needs about {_size(needed)}, {_size(free)} is free")


@contextmanager
def full_disk_is_an_input_error(directory: Path) -> Iterator[None]:
    """Turn 'no space left on device' and its like, from Python or from safetensors, into an InputError."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if full or "No space left" in str(error) or "File too large" in str(error):
            raise _no_space(directory, str(error)) from error
        raise


def _no_space(directory: Path, detail: str) -> InputError:
    return InputError(
        f"no space left on disk: {detail}",
        where=str(directory),
        mend="free some space or choose another --output_dir; --save_total_limit 1 keeps fewer checkpoints; "
        "the same command then continues from the last checkpoint",
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
