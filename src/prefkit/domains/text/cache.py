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
from prefkit.errors import InputError
from prefkit.records import Group

Key = dict[str, str]


def weights_fingerprint(module: nn.Module) -> str:
    """sha256 over name, shape and up to 4,096 evenly spaced values of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // 4096)][:4096]
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
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
    write: bool,
) -> Tensor:
    """(rows, K) reference log-probs of all groups, from `path` if it was computed under `key`, else computed now.

    Rows are scored in order, `batch_size` at a time: scoring the same rows in the same batch live gives the same bits.
    Raises InputError for a damaged file.
    """
    if path.exists():
        stored, table = _read(path)
        changed = sorted(name for name in key if stored.get(name) != key[name])
        if not changed and len(table) == len(groups):
            say(f"reference log-probs read from {path}")
            return table
        say(f"reference log-probs in {path} were computed for another {', '.join(changed) or 'number of rows'}; again")
    pieces = [score(groups[i : i + batch_size]).cpu() for i in range(0, len(groups), batch_size)]
    table = torch.cat(pieces)
    if write:
        _write(path, table, key)
    return table


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
