"""Reference log-probabilities computed once and kept on disk.

The file is a safetensors table with one row per training pair and the key it was computed under in its metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.engine import files
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.records import Group

Key = dict[str, str]


def weights_fingerprint(module: nn.Module) -> str:
    """sha256 over the name, shape, dtype and bytes of every tensor; take it before the module is sharded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokens_fingerprint(groups: Sequence[Group]) -> str:
    """sha256 over every token id: data, tokenizer, template and truncation in one."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(json.dumps([list(group.prompt), [list(a) for a in group.answers]]).encode())
    return digest.hexdigest()


def reference_table(
    path: Path,
    groups: Sequence[Group],
    key: Key,
    *,
    score: Callable[[Sequence[Group]], Tensor],
    batch_size: int,
    say: Callable[[str], None],
    world: World,
) -> Tensor:
    """(rows, K) reference log-probs of all groups, from `path` if it was computed under `key`, else computed now.

    Rows are scored in order, `batch_size` at a time: scoring the same rows in the same batch live gives the same bits.
    The main process alone reads and writes the file, so that all agree. Raises InputError for a damaged file.
    """
    found, line = world.on_main(lambda: _stored(path, key, len(groups)))
    if line:
        say(line)
    if found is not None:
        return found
    pieces = [score(groups[i : i + batch_size]).cpu() for i in range(0, len(groups), batch_size)]
    table = torch.cat(pieces)
    if world.is_main:
        _write(path, table, key)
    return table


def _stored(path: Path, key: Key, num_rows: int) -> tuple[Tensor | None, str]:
    """The table on disk if it fits, and a line that says what was found."""
    if not path.exists():
        return None, ""
    stored, table = _read(path)
    changed = sorted(name for name in key if stored.get(name) != key[name])
    if not changed and len(table) == num_rows:
        return table, f"reference log-probs read from {path}"
    what = ", ".join(changed) or "number of rows"
    return None, f"reference log-probs in {path} were computed for another {what}; again"


def _read(path: Path) -> tuple[Key, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata: Any = file.metadata() or {}
            table = file.get_tensor("log_probs")
        about = json.loads(metadata["about"])
        whole = about.pop("sha256") == _digest(table)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(f"the reference cache is damaged ({error})", where=str(path), mend="delete it") from error
    if not whole:
        raise InputError("the reference cache is damaged (its hash differs)", where=str(path), mend="delete it")
    return about, table


def _write(path: Path, table: Tensor, key: Key) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{files.UNFINISHED}{path.name}")  # a run sweeps leftovers of this name away
    about = json.dumps({**key, "sha256": _digest(table)}, sort_keys=True)
    # One entry: safetensors writes several in any order, and the same table should be the same bytes.
    save_file({"log_probs": table.contiguous()}, temporary, metadata={"about": about})
    os.replace(temporary, path)


def _digest(table: Tensor) -> str:
    return hashlib.sha256(table.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
