"""Write a run's model as a folder that plain `from_pretrained` loads: `prefkit export RUN --to FOLDER [--merge]`.

A LoRA run gives its adapter, or with --merge the whole model; a run that trained all weights gives the model. The
folder holds weights, tokenizer, chat template, generation config and the model card.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefkit import assets
from prefkit.domains.text import loading
from prefkit.engine import files
from prefkit.errors import InputError
from prefkit.report import card
from prefkit.report.read import Run, read

DTYPES = ("bfloat16", "float32")
GENERATION = "generation_config.json"
CARD = "README.md"


def main(argv: Sequence[str]) -> int:
    """Parses the command line, writes the folder and prints what it is."""
    parser = argparse.ArgumentParser(
        prog="prefkit export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="directory of a finished run")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--merge", action="store_true", help="LoRA runs: the whole model with the adapter merged")
    parser.add_argument("--dtype", choices=DTYPES, default="", help="convert the weights (default: as trained)")
    parser.add_argument(
        "--base", default="", metavar="NAME", help="adapter: name this base model instead of the run's own"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there")
    options = parser.parse_args(list(argv))
    folder = Path(options.to)
    what = export(
        options.run, folder, merge=options.merge, dtype=options.dtype, base=options.base, overwrite=options.overwrite
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{what}, {size / 1e6:.3g} MB: {folder}")
    return 0


def export(
    directory: str | Path,
    folder: Path,
    *,
    merge: bool = False,
    dtype: str = "",
    base: str = "",
    overwrite: bool = False,
) -> str:
    """Write the final model of a run to `folder`, whole or not at all. Returns what was written, in words.

    Raises InputError for a run that has no such model and for a folder that must not be replaced.
    """
    run = read(directory)
    adapter = _wants_adapter(run, merge)
    source = run.directory / (run.result.adapter if adapter else run.result.model)  # pyright: ignore[reportOptionalMemberAccess]
    _check_target(run, folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{files.UNFINISHED}{folder.name}")
    files.discard(unfinished)
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    files.require_space(folder.parent, size, what="the export")
    try:
        with files.full_disk_is_an_input_error(folder.parent):
            shutil.copytree(source, unfinished)
            what = _adapter(run, unfinished, dtype, base) if adapter else _model(run, unfinished, dtype)
            (unfinished / CARD).write_text(card.render(run, adapter=adapter), encoding="utf-8")
            for file in unfinished.rglob("*"):
                files.force(file)
        files.discard(folder)
        unfinished.rename(folder)
    finally:
        files.discard(unfinished)
    files.force(folder.parent)
    return what


def _wants_adapter(run: Run, merge: bool) -> bool:
    where = str(run.directory)
    if run.result is None or not (run.result.model or run.result.adapter):
        raise InputError(
            "the run has not finished, so it has no final model", where=where, mend=f"prefkit resume {where}"
        )
    if merge and not run.result.model:
        raise InputError(
            "the adapter was trained on quantised weights and cannot be merged: rounding the sum would change the "
            "model, and the unrounded base is not the one the adapter was trained on",
            where=where,
            mend="leave --merge off, and load the adapter on the same quantised base",
        )
    # A ranker's adapter lacks the markers' embeddings and the head: only the whole model is one.
    return bool(run.result.adapter) and not merge and run.method != "ranker"


def _check_target(run: Run, folder: Path, overwrite: bool) -> None:
    """Refuse a folder in use, and ever to replace anything but a model folder outside the run."""
    place, source = folder.resolve(), run.directory.resolve()
    if place == source or place in source.parents or source in place.parents:
        raise InputError("lies in or around the run itself", where=f"--to {folder}", mend="choose another folder")
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file, not a folder", where=f"--to {folder}", mend="choose another name")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names and not overwrite:
        raise InputError("is not empty", where=f"--to {folder}", mend="choose another folder, or add --overwrite")
    if names and (not names & {"config.json", loading.ADAPTER} or "metrics.jsonl" in names):
        raise InputError(
            f"is no model folder (it holds {', '.join(sorted(names)[:3])}), so --overwrite does not delete it",
            where=f"--to {folder}",
            mend="choose another folder",
        )


def _model(run: Run, folder: Path, dtype: str) -> str:
    """Finish a copy of the run's whole model."""
    kind = {"reward": "reward model", "ranker": "pairwise ranker"}.get(run.method, "model")
    config = files.read_json(folder / "config.json")
    if dtype and dtype != (config.get("dtype") or config.get("torch_dtype")):
        if run.method == "ranker":
            raise InputError(
                "a ranker is kept in float32", where="--dtype", mend="leave it out; --judge_dtype says how it computes"
            )
        model = _load(folder, dtype)
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        model.save_pretrained(folder)
    return f"{kind} with merged adapter" if run.config.get("use_peft") else f"{kind}, all weights trained"


def _load(folder: Path, dtype: str) -> Any:
    import torch
    import transformers

    names = files.read_json(folder / "config.json").get("architectures") or [""]
    auto = transformers.AutoModelForCausalLM
    if names[0].endswith("ForSequenceClassification"):
        auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder, dtype=getattr(torch, dtype))


def _adapter(run: Run, folder: Path, dtype: str, base: str) -> str:
    """Finish a copy of the run's adapter: name its base, and put the base's generation config beside it."""
    path = folder / loading.ADAPTER
    settings = files.read_json(path)
    named = base or _base(run) or settings.get("base_model_name_or_path") or ""
    if not named:
        raise InputError(
            "the run started from a model in memory, so the adapter has no base to name",
            where=str(run.directory),
            mend="name it with --base, or export the whole model with --merge",
        )
    settings["base_model_name_or_path"] = named
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if dtype:
        _convert(folder / "adapter_model.safetensors", dtype)
    _copy_generation_config(run, named, folder)
    bits = next((n for n in (4, 8) if run.config.get(f"load_in_{n}bit")), 0)
    return f"adapter of {named}{f', trained on its {bits}-bit weights' if bits else ''}"


def _copy_generation_config(run: Run, base: str, folder: Path) -> None:
    """The run's merged model has the base's; beside a quantised base, which has none, ask the base itself."""
    if run.result and run.result.model:
        file = run.directory / run.result.model / GENERATION
        if file.is_file():
            shutil.copyfile(file, folder / GENERATION)
        return
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(base).save_pretrained(folder)
    except OSError:  # a base without one: generation then has the library's defaults, as it had in training
        return


def _base(run: Run) -> str:
    """The base the user named: a Hub id as it is, anything on this machine by its whole path."""
    name = str(run.config.get("model_name_or_path") or "")
    if not name or (name not in assets.ASSETS and not Path(name).exists()):
        return name
    return str(Path(loading.resolve(name)).resolve())


def _convert(path: Path, dtype: str) -> None:
    """Rewrite a safetensors file in another dtype."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata=metadata)
