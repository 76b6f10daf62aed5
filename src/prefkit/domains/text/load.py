"""Read rows from files, folders saved by `datasets`, the Hub, or memory, without interpreting them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefkit.domains.text.files import Source, not_empty, read_file
from prefkit.errors import InputError

EVALUATION_SPLITS = ("test", "validation", "valid", "dev", "eval", "test_prefs")


def load(name: Any, *, split: str = "", config: str = "", what: str = "train") -> Source:
    """Read one split.

    `name`: path of a file (jsonl, json, csv, parquet; all but the last may be gzipped), of a folder saved by
    `datasets` or holding one file per split, a Hub id, a list of dicts, a Dataset, or either by split.
    `split`: empty takes the only split there is, else the one that fits `what` ("train", "evaluation", ...).
    A file, a list and a Dataset have no splits: asking for one other than "train" is refused there, since it
    would quietly evaluate on training rows. Raises InputError.
    """
    if not isinstance(name, (str, Path)):
        return _from_memory(name, split=split, what=what)
    text = str(name)
    if not text:
        raise InputError(f"no {what} data given", mend="pass a file, a folder, a Hub id or rows in memory")
    path = Path(text).expanduser()
    if path.is_dir():
        return _from_folder(path, split=split, what=what)
    if path.exists():
        _refuse_split(split, text)
        return read_file(path)
    if _looks_like_path(text):
        raise _missing(path)
    return _from_hub(text, split=split, config=config, what=what)


def splits(name: Any, *, config: str = "") -> tuple[str, ...]:
    """Names of the splits; empty for what has none (a file, a list, a Dataset). Raises InputError."""
    import datasets

    if isinstance(name, Mapping):
        return tuple(str(key) for key in name)
    if not isinstance(name, (str, Path)):
        return ()
    path = Path(str(name)).expanduser()
    if path.is_dir():
        loaded = _saved(path)
        return tuple(_split_files(path)) if loaded is None else splits(loaded)
    if path.exists() or _looks_like_path(str(name)):
        return ()
    try:
        return tuple(str(key) for key in datasets.get_dataset_split_names(str(name), config or None))
    except Exception as error:
        raise _not_on_hub(str(name), error) from error


def evaluation_split(names: Sequence[str]) -> str:
    """The split usually held out, or "" if none of `names` is."""
    return next((name for name in EVALUATION_SPLITS if name in names), "")


def _choose(names: Sequence[str], split: str, what: str, where: str) -> str:
    if split:
        if split in names:
            return split
        what = f"no split {split!r}; it has {', '.join(map(repr, names))}"
        raise InputError(what, where=where, mend=_nearest(split, names))
    if len(names) == 1:
        return names[0]
    wanted = ("train", "train_prefs") if what == "train" else EVALUATION_SPLITS
    for candidate in wanted:
        if candidate in names:
            return candidate
    raise InputError(
        f"several splits ({', '.join(map(repr, names))}) and none named for {what}",
        where=where,
        mend="name the split (--dataset_train_split, --dataset_eval_split, or --split)",
    )


def _refuse_split(split: str, where: str) -> None:
    if split not in ("", "train"):
        raise InputError(
            f"a split {split!r} was asked for, but this has no splits",
            where=where,
            mend="leave the split empty, or pass the other rows as --eval_dataset",
        )


def _from_memory(data: Any, *, split: str, what: str) -> Source:
    import datasets

    if isinstance(data, Mapping):  # a DatasetDict, or rows by split
        where = f"{what} data in memory"
        data = data[_choose([str(key) for key in data], split, what, where)]
    else:
        _refuse_split(split, f"{what} data in memory")
    if isinstance(data, datasets.Dataset):
        data = data.to_list()
    if not isinstance(data, Sequence):
        raise InputError(
            f"{what} data is a {type(data).__name__}",
            mend="pass a path, a Hub id, a list of dicts, a Dataset or a DatasetDict",
        )
    for place, row in enumerate(data):
        if not isinstance(row, dict):
            where = f"{what} data row {place + 1}"
            raise InputError(f"is a {type(row).__name__}, not a dict", where=where, mend="pass one dict per row")
    return not_empty(Source(rows=data, name=f"{what} data"))


def _saved(path: Path) -> Any:
    """The Dataset or DatasetDict saved in a folder; None if `datasets` did not write the folder."""
    import datasets

    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return None
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow, json, OSError: whatever a damaged folder causes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"saved data set cannot be read: {reason}"
        raise InputError(what, where=str(path), mend="save it anew") from error


def _split_files(path: Path) -> dict[str, list[Path]]:
    """Data files of a folder by split: train.jsonl, test-00000-of-00002.parquet, data/train-....parquet."""
    found: dict[str, list[Path]] = {}
    for folder in (path, path / "data"):
        for file in sorted(folder.glob("*")) if folder.is_dir() else ():
            if re.search(r"\.(parquet|pq|csv(\.gz)?|(jsonl|ndjson)(\.gz)?)$", file.name):
                found.setdefault(re.split(r"[-.]", file.name)[0], []).append(file)
    return found


def _from_folder(path: Path, *, split: str, what: str) -> Source:
    import datasets

    saved = _saved(path)
    if isinstance(saved, datasets.DatasetDict):
        saved = saved[_choose([str(key) for key in saved], split, what, str(path))]
    elif saved is not None:
        _refuse_split(split, str(path))
    if saved is not None:
        return not_empty(Source(rows=saved.to_list(), name=str(path)))
    files = _split_files(path)
    if not files:
        raise InputError(
            "folder holds no data set",
            where=str(path),
            mend="pass a file, a folder written by save_to_disk, or one with train.jsonl, test.jsonl, ...",
        )
    chosen = files[_choose(list(files), split, what, str(path))]
    if len(chosen) == 1:
        return read_file(chosen[0])
    rows = [row for file in chosen for row in read_file(file).rows]
    return Source(rows=rows, name=f"{path} ({len(chosen)} files)")


def _looks_like_path(text: str) -> bool:
    suffix = re.search(r"\.(jsonl|ndjson|json|csv|parquet|pq|gz|txt|arrow)$", text.lower())
    return bool(suffix) or text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1


def _missing(path: Path) -> InputError:
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    if parent != path.parent:
        near = f"the folder {path.parent} does not exist; {parent} does"
    else:
        names = sorted(entry.name for entry in parent.iterdir())
        near = _nearest(path.name, names)
        data = [name for name in names if _looks_like_path(name)]
        if near == "check the name" and data:
            near = f"check the name; that folder holds {', '.join(data[:5])}"
    return InputError("no such file or folder", where=str(path), mend=near)


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else "check the name"


def _from_hub(name: str, *, split: str, config: str, what: str) -> Source:
    import datasets

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise _missing(Path(name))
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # every library below raises its own kinds; the user needs one answer
        raise _not_on_hub(name, error) from error
    assert isinstance(loaded, datasets.DatasetDict)
    chosen = loaded[_choose([str(key) for key in loaded], split, what, name)]
    return not_empty(Source(rows=chosen.to_list(), name=name))


def _not_on_hub(name: str, error: Exception) -> InputError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    near = difflib.get_close_matches(name, [entry.name for entry in Path().iterdir()], n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? Otherwise " if near else ""
    return InputError(
        f"neither an existing file or folder nor a data set the Hub gives: {reason}",
        where=name,
        mend=f"{hint}check the spelling; without a network pass a local file or a data set in the cache",
    )
