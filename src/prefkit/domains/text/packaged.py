"""Packaged assets made ready: a GGUF model as a Hugging Face folder, review sentences as preference pairs."""

from __future__ import annotations

import bz2
import csv
import io
import json
import os
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefkit import assets
from prefkit.errors import InputError

Row = dict[str, Any]

STAMP = "prefkit-asset.json"
FORM = 1
"""counts up when the conversion changes, so that folders made by an older one are made anew"""

ROMAN = frozenset({"ii", "iii", "iv", "vi", "vii", "viii", "ix", "xi", "xii"})
TRAIN_SHARE, EVALUATION_SHARE = 0.45, 0.10
"""shares of the films with both verdicts; the rest of the films belongs to the gold classifier"""


@dataclass(frozen=True, kw_only=True)
class Reviews:
    """The three film-disjoint parts of the review data."""

    train: list[Row]
    evaluation: list[Row]
    gold_texts: list[str]
    """sentences from the other films, for the classifier that judges answers"""
    gold_labels: list[int]
    """1 fresh, 0 rotten"""
    gold_films: list[str]


def cache_folder() -> Path:
    """Where converted models are kept: $PREFKIT_CACHE, or prefkit's folder in the user's cache."""
    chosen = os.environ.get("PREFKIT_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "prefkit"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "prefkit" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefkit"


def model_folder(name: str) -> Path:
    """The Hugging Face folder (safetensors, float32) of a packaged model, converted on first use (20 s).

    The folder is stamped with the source's hash; one that is damaged or made from another source is made
    anew, with a line on stderr. Raises InputError when the package is absent or the name is no model.
    """
    asset = assets.get(name)
    if asset.kind != "model":
        raise InputError(f"{name} is data, not a model", mend="give it as --dataset_name")
    source = assets.find(name)
    folder = cache_folder() / "models" / name
    problem = _fault(folder, asset)
    if not problem:
        return folder
    why = "" if problem == "absent" else f"the cached {name} is {problem}; "
    _say(f"{why}converting {name} once, about 20 seconds")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        made = Path(scratch, "model")
        _convert(source, made)
        files = {file.name: [file.stat().st_size, assets.sha256(file)] for file in sorted(made.iterdir())}
        stamp = {"asset": name, "form": FORM, "source_sha256": asset.sha256, "files": files}
        (made / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
        _put(made, folder, asset, Path(scratch))
    return folder


def dataset(name: str, seed: int = 0) -> dict[str, list[Row]]:
    """Preference rows of packaged data by split (`train`, `test`), as `--dataset_name NAME` reads them."""
    if assets.get(name).kind != "data":
        raise InputError(f"{name} is a model, not data", mend="give it as --model_name_or_path")
    reviews = review_pairs(seed)
    return {"train": reviews.train, "test": reviews.evaluation}


def review_pairs(seed: int = 0) -> Reviews:
    """Pairs of a fresh (chosen) and a rotten (rejected) sentence about the same film, split by film.

    Every sentence is used at most once. The films of each part and the evaluation rows never change, so that
    runs of different seeds compare and no gold film is ever trained on; the seed re-pairs the training rows.
    """
    films = _read_reviews(assets.find("rotten-tomatoes"))
    both = sorted(film for film, (rotten, fresh) in films.items() if rotten and fresh)
    fixed, seeded = random.Random("films"), random.Random(f"training pairs {seed}")
    fixed.shuffle(both)
    first, second = round(TRAIN_SHARE * len(both)), round((TRAIN_SHARE + EVALUATION_SHARE) * len(both))
    paired = set(both[:second])
    gold = [
        (text, label, film)
        for film, verdicts in films.items()
        if film not in paired
        for label, texts in enumerate(verdicts)
        for text in texts
    ]
    train = [row for film in both[:first] for row in _pairs(film, films[film], seeded)]
    seeded.shuffle(train)
    return Reviews(
        train=train,
        evaluation=[row for film in both[first:second] for row in _pairs(film, films[film], fixed)],
        gold_texts=[text for text, _, _ in gold],
        gold_labels=[label for _, label, _ in gold],
        gold_films=[film for _, _, film in gold],
    )


def _read_reviews(path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Film -> (rotten sentences, fresh sentences); a sentence that occurs twice is kept once."""
    films: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    seen: set[str] = set()
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join(row["text"].split())
            if row["category"] in ("fresh", "rotten") and text and text.casefold() not in seen:
                seen.add(text.casefold())
                films[_title(row["movie_name"])][row["category"] == "fresh"].append(text)
    return dict(sorted(films.items()))


def _pairs(film: str, verdicts: tuple[Sequence[str], Sequence[str]], rng: random.Random) -> Iterator[Row]:
    rotten, fresh = (rng.sample(texts, len(texts)) for texts in verdicts)
    prompt = [{"role": "user", "content": f'Write a one-sentence film critic\'s verdict on "{film}".'}]
    for chosen, rejected in zip(fresh, rotten, strict=False):  # the longer side's rest stays unused
        yield {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "group": film,
        }


def _title(slug: str) -> str:
    """`star_wars_episode_ii` -> `Star Wars Episode II`."""
    words = [word for word in slug.split("_") if word]
    return " ".join(word.upper() if word in ROMAN else word.capitalize() for word in words)


def _fault(folder: Path, asset: assets.Asset) -> str:
    """Why a cached folder cannot be used: absent, old, damaged; empty when it is sound."""
    if not folder.is_dir():
        return "absent"
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        files: Mapping[str, list[Any]] = stamp["files"]
        if (stamp["source_sha256"], stamp["form"]) != (asset.sha256, FORM):
            return "old"
        for name, (size, digest) in files.items():
            if (folder / name).stat().st_size != size or assets.sha256(folder / name) != digest:
                return "damaged"
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged"
    return ""


def _put(made: Path, folder: Path, asset: assets.Asset, scratch: Path) -> None:
    """Moves a finished folder to its place in one rename, unless another process was faster."""
    if folder.exists():
        if not _fault(folder, asset):
            return
        folder.rename(scratch / "replaced")
    try:
        made.rename(folder)
    except OSError:
        if _fault(folder, asset):
            raise


def _convert(source: Path, made: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": source.name, "local_files_only": True}
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **given)
        model: Any = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **given)
        # The weights are plain float32 now, but the model calls itself quantised and refuses to be saved.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the conversion's progress bars off the terminal, where one line was said; errors still raise."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader draws its own bar, which has no switch
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _say(text: str) -> None:
    print(f"prefkit: {text}", file=sys.stderr, flush=True)
