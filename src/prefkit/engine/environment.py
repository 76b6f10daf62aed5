"""What a run ran on: versions, device, processor, and the command, without the user's folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prefkit.engine.precision import resolve_dtype
from prefkit.engine.world import World

PACKAGES = (
    "prefkit",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "bitsandbytes",
    "vllm",
)


def environment(world: World, *, dtype: str) -> dict[str, Any]:
    """The content of environment.json; `dtype` is the option's value, resolved here."""
    return {
        "command": command(),
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device_name(world.device),
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "memory_gib": memory_gib(),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "sharded": world.sharded,
        "dtype": str(resolve_dtype(dtype, world.device, training=False)).removeprefix("torch."),
    }


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two environments and makes bit-identical continuation doubtful."""
    names = ("versions", "platform", "device", "cpu", "threads", "dtype")
    found: list[str] = []
    for name in names:
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            found += [f"{key} {before.get(key)} -> {now.get(key)}" for key in keys]
        else:
            found.append(f"{name} {before} -> {now}")
    return found


def command() -> str:
    """The command line: the program's bare name, and paths relative to where it ran, to home, or by last
    name.
    """
    program = Path(sys.argv[0]).name if sys.argv else ""
    if program in ("__main__.py", "-m", ""):
        program = "python -m prefkit" if program == "__main__.py" else "python"
    return " ".join([program, *(_short(argument) for argument in sys.argv[1:])])


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_model() -> str:
    """The processor's name where the system tells it, otherwise its architecture."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Physical memory in GiB; None where the system does not tell."""
    found = _physical_memory()
    return None if found is None else round(found / 2**30, 1)


def memory_bytes(device: torch.device) -> int:
    """Memory of the device in bytes; 8 GiB is assumed where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _physical_memory() or 8 * 2**30


def _physical_memory() -> int | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _short(argument: str) -> str:
    flag, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    path = Path(value).expanduser() if value else Path()
    if not path.is_absolute():
        return argument
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base):
            return f"{flag}{equals}{prefix}{path.relative_to(base)}"
    return f"{flag}{equals}.../{path.name}"
