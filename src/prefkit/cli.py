"""The command line: finds a method or command by file name, imports only that one, says errors plainly."""

from __future__ import annotations

import ast
import dataclasses
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefkit.errors import InputError

PURPOSE = "preference optimization that joins the data you have with the data your model makes"

USAGE = """usage: prefkit METHOD [PRESET] [--option value ...]
       prefkit COMMAND ...
"""
EXAMPLES = """examples
  prefkit hypo demo                       train a small packaged model on packaged data, on a CPU
  prefkit dpo --model_name_or_path MODEL --dataset_name pairs.jsonl --beta 0.1 --use_peft
  prefkit dpo --from runs/dpo --seed 1 --output_dir runs/dpo-1
  prefkit resume runs/hypo-demo           continue a run that was interrupted

`prefkit METHOD --help` lists the options and presets of a method; `--debug` anywhere shows tracebacks."""

INPUT, FAILED, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and leaves with its exit code."""
    code = run(sys.argv[1:] if argv is None else argv)
    world = sys.modules.get("prefkit.engine.world")  # there only if the command needed it: no torch for --help
    if world is not None:
        world.leave(code)
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Runs one command line; returns 0, or 2 for bad input, 130 when interrupted, 1 for any other failure."""
    debug = "--debug" in argv
    words = [word for word in argv if word != "--debug"]
    try:
        return dispatch(words)
    except BrokenPipeError:  # the reader of our output left, as in `prefkit ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        code, message = explain(error)
        print(f"prefkit: {message}", file=sys.stderr)
        return code


def dispatch(words: Sequence[str]) -> int:
    """Runs the method or command named by the first word."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"prefkit {version()}")
        return 0
    name, rest = words[0].replace("-", "_"), list(words[1:])
    if name in modules("methods"):
        return run_method(name, rest)
    if name in modules("commands"):
        quiet()
        return int(load("commands", name).main(rest))
    from prefkit.options import unknown

    raise unknown("method or command", words[0], [*modules("methods"), *modules("commands")])


def run_method(name: str, rest: Sequence[str]) -> int:
    """Parses the options of a method and runs it."""
    from prefkit import flags
    from prefkit.options import PRESET

    quiet()
    method = load("methods", name)
    description = (method.__doc__ or name).strip()
    config, preset = flags.parse(
        method.Config, rest, prog=f"prefkit {name}", presets=method.PRESETS, description=description
    )
    if not config.output_dir:
        config = dataclasses.replace(config, output_dir=f"runs/{name}-{preset}" if preset else f"runs/{name}")
    PRESET.set(preset)
    try:
        method.run(config)
    except KeyboardInterrupt:
        if Path(config.output_dir, "config.json").is_file():
            raise KeyboardInterrupt(f"continue with: prefkit resume {config.output_dir}") from None
        raise
    return 0


def quiet() -> None:
    """One progress bar on the terminal, ours, no call home, polite threads: read by libraries on their import."""
    settings = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that spin long while they wait slow a run several times where others want the same cores.
        "GOMP_SPINCOUNT": "20000",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    # it warns of a missing kernel whenever it is imported, in runs that quantise nothing too
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def modules(package: str) -> dict[str, Path]:
    """The files of a package by name; a file is found by being there, nothing registers it."""
    folders = importlib.import_module(f"prefkit.{package}").__path__
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.py"))]
    return {file.stem: file for file in files if not file.stem.startswith("_")}


def load(package: str, name: str) -> Any:
    """Imports one method or command."""
    return importlib.import_module(f"prefkit.{package}.{name}")


def overview() -> str:
    """The page of `prefkit --help`: the first docstring line of every method and command, none imported."""
    parts = [f"prefkit {version()}: {PURPOSE}\n", USAGE]
    listed = {title: modules(package) for title, package in (("methods", "methods"), ("commands", "commands"))}
    width = max([len(name) for files in listed.values() for name in files], default=0)
    for title, files in listed.items():
        parts.append("\n".join([title, *(f"  {name:<{width}}  {summary(file)}" for name, file in files.items()), ""]))
    return "\n".join([*parts, EXAMPLES])


def summary(file: Path) -> str:
    """The first docstring line of a Python file."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def version() -> str:
    """The installed version."""
    return str(importlib.import_module("prefkit").__version__)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message for an error that ended the command."""
    if isinstance(error, InputError):
        return INPUT, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted; {error}" if str(error) else "interrupted; the same command starts it again"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" ({error.filename})" if error.filename else ""
        return INPUT, f"no space left on the disk{place}\n  mend: free some, or choose another --output_dir"
    if isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in ("out of memory", "allocate memory")
    ):
        mend = "a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, a smaller"
        return FAILED, f"out of memory\n  mend: {mend} --max_length, --gradient_checkpointing or --use_peft"
    name = type(error).__name__
    return FAILED, f"{name}: {error}\n  this may be a fault in prefkit: rerun with --debug for the traceback"
