"""Checkpoints: folders `checkpoint-N` that are whole or absent, holding safetensors and JSON only.

A folder is filled under a temporary name; `manifest.json`, written last, lists every file with its size and
sha256; then the folder gets its name. Every tracked object writes its own files into the one folder, so that
it is a plain Hugging Face model folder with `optimizer.safetensors` and `trainer_state.json` beside the
weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from prefkit.engine import files
from prefkit.engine.world import World
from prefkit.errors import InputError

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class Tracked(Protocol):
    """Something whose state belongs into a checkpoint. Both are called on every process; only the main one
    writes.
    """

    def save(self, folder: Path, /) -> None: ...
    def load(self, folder: Path, /) -> None: ...


@runtime_checkable
class Sized(Protocol):
    """A tracked object that knows the bytes it adds to a checkpoint, for the look at free space before
    training.
    """

    @property
    def nbytes(self) -> int: ...


def path_of(directory: Path, step: int) -> Path:
    return directory / f"checkpoint-{step}"


def steps_in(directory: Path) -> list[int]:
    """The steps of the checkpoints in a run directory, oldest first, whole or not."""
    if not directory.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in directory.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def write(directory: Path, step: int, tracked: Mapping[str, Tracked], state: Mapping[str, Any], world: World) -> None:
    """Write `checkpoint-step` at once, replacing one of that name; InputError on every process when the disk
    is full.

    An error while writing leaves no partial checkpoint and no older one touched.
    """
    folder = path_of(directory, step)
    unfinished = directory / f"{files.UNFINISHED}{folder.name}"

    def prepare() -> None:
        files.discard(unfinished)
        unfinished.mkdir()

    def complete() -> None:
        files.write_json(unfinished / STATE, state)
        files.write_json(unfinished / MANIFEST, {"files": _listing(unfinished)})
        if folder.exists():
            files.discard(folder)
        unfinished.rename(folder)
        files.force(directory)

    world.on_main(prepare)
    try:
        _save_all(unfinished, tracked, world)
        world.on_main(complete)
    except Exception:
        if world.is_main:
            files.discard(unfinished)
        raise


def problem(folder: Path) -> str:
    """What is wrong with a checkpoint folder in a few words; empty when it is whole."""
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        listing = files.read_json(folder / MANIFEST)["files"]
        for name, entry in listing.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"] or files.sha256(path) != entry["sha256"]:
                return f"{name} is not what was written"
        files.read_json(folder / STATE)
    except (InputError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST} or {STATE} is damaged ({type(error).__name__})"
    return ""


def newest_whole(directory: Path) -> tuple[int | None, list[str]]:
    """The newest whole checkpoint's step (None when there never was one), and a line for each damaged newer
    one.

    Raises InputError when checkpoints are there and none is whole: starting again from nothing is the user's
    call.
    """
    damaged: list[str] = []
    for step in reversed(steps_in(directory)):
        wrong = problem(path_of(directory, step))
        if not wrong:
            return step, damaged
        damaged.append(f"checkpoint-{step} is damaged ({wrong})")
    if damaged:
        raise InputError(
            f"no whole checkpoint to continue from: {'; '.join(damaged)}",
            where=str(directory),
            mend="restore one from a backup, or start anew with --overwrite",
        )
    return None, damaged


def read_state(directory: Path, step: int) -> dict[str, Any]:
    return files.read_json(path_of(directory, step) / STATE)


def rotate(directory: Path, keep: int, protected: Iterable[int] = ()) -> None:
    """Delete all but the `keep` newest checkpoints, the protected ones, and those a kept one names as its
    best.

    `keep` 0 deletes nothing.
    """
    if keep <= 0:
        return
    steps = steps_in(directory)
    kept = set(steps[-keep:])
    needed = kept | set(protected)
    for step in kept:
        best = _best_named_in(directory, step)
        needed |= set() if best is None else {best}
    for step in steps:
        if step not in needed:
            files.discard(path_of(directory, step))


def _best_named_in(directory: Path, step: int) -> int | None:
    try:
        best = read_state(directory, step)["selection"]["best"]
    except (InputError, KeyError):  # a damaged checkpoint names nothing, and a healthy run goes on
        return None
    return None if best is None else int(best["step"])


def size_of(folder: Path) -> int:
    """Bytes in a checkpoint folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _save_all(folder: Path, tracked: Mapping[str, Tracked], world: World) -> None:
    """Let every object write. One process's full disk is raised on all, so that none waits for ever."""
    seen: dict[str, tuple[str, int]] = {}
    for name, item in tracked.items():
        failure: list[tuple[str, str, str]] = []
        try:
            with files.full_disk_is_an_input_error(folder.parent):
                item.save(folder)
        except InputError as error:
            failure.append((error.what, error.where, error.mend))
        failures = world.gather_objects(failure)
        if failures:
            what, where, mend = failures[0]
            raise InputError(what, where=where, mend=mend)
        if world.is_main:
            _refuse_collisions(folder, name, seen)


def _refuse_collisions(folder: Path, owner: str, seen: dict[str, tuple[str, int]]) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            key, stamp = path.relative_to(folder).as_posix(), path.stat().st_mtime_ns
            if key in seen and seen[key][1] != stamp:
                raise ValueError(f"tracked objects {seen[key][0]} and {owner} both write {key}")
            seen.setdefault(key, (owner, stamp))


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    listing: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            files.force(path)
            continue
        files.force(path)
        listing[path.relative_to(folder).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": files.sha256(path),
        }
    return listing
