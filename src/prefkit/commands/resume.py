"""Continue an interrupted run: `prefkit resume DIR [--max_steps N]`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefkit import flags, options
from prefkit.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Runs the method of a run directory with that run's own config; further flags may raise max_steps."""
    parser = argparse.ArgumentParser(prog="prefkit resume", description=__doc__)
    parser.add_argument("directory", help="run directory, as printed when the run started")
    chosen, rest = parser.parse_known_args(list(argv))
    method, config = read_run(chosen.directory)
    config = flags.from_flags(config, rest, prog=f"prefkit resume {chosen.directory}")
    try:
        method.run(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with: prefkit resume {chosen.directory}") from None
    return 0


def read_run(directory: str) -> tuple[Any, Any]:
    """Method module and Config of the run in a directory; InputError where there is none."""
    file = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise InputError("there is no such run directory", where=directory)
    if not file.is_file():
        raise InputError("this folder is not a prefkit run: it has no config.json", where=directory)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        name, values = record["method"], dict(record["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"not the config of a run ({type(error).__name__}: {error})", where=str(file)) from None
    if not str(name).isidentifier() or importlib.util.find_spec(f"prefkit.methods.{name}") is None:
        raise InputError(
            f"the run's method {name!r} is not in this prefkit", where=str(file), mend="install its version"
        )
    method = importlib.import_module(f"prefkit.methods.{name}")
    config = options.from_json(method.Config, values, where=str(file))
    fresh: dict[str, Any] = {"output_dir": directory} | dict.fromkeys(flags.ONE_RUN_ONLY, False)
    return method, dataclasses.replace(config, **fresh)
