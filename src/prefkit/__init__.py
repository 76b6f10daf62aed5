"""Preference optimization that joins the data you have with the data your model makes.

Each method is a module with `Config`, `PRESETS` and `run`: `prefkit.dpo.run(prefkit.dpo.Config(...))`.
It is imported when first used, so that `import prefkit` stays light.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

from prefkit.errors import InputError

__version__ = "0.1.0"

# Read by huggingface_hub when it is imported; set before anything here imports it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

METHODS = tuple(sorted(file.stem for file in Path(__file__).with_name("methods").glob("[!_]*.py")))
"""a method is found by its file being there"""

__all__ = ["METHODS", "InputError", "__version__", *METHODS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> ModuleType:
    if name in METHODS:
        return importlib.import_module(f"prefkit.methods.{name}")
    raise AttributeError(f"module 'prefkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
