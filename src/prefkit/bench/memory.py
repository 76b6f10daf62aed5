"""Peak memory of one step above weights, gradients and optimizer, each arm in a process of its own.

A tiny step comes first, so that optimizer states exist; gradients are then filled with zeros. What the process holds at
that moment is the floor; how far the next step, on the real lengths, rises above it is the result.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prefkit.bench import arms
from prefkit.bench.workloads import Lengths, Workload
from prefkit.errors import InputError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TINY: Lengths = (4, 4, 4)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "MALLOC_TOP_PAD_": "0"}
"""freed tensors go back to the system at once, so that resident memory is what is in use (glibc)"""


class Gauge:
    """Reads floor and peak around the second step of a block."""

    def __init__(self, weights: Sequence[torch.Tensor], device: torch.device) -> None:
        self.weights, self.device = weights, device
        self.floor = self.peak = 0
        self.how = ""

    def begin(self, step: int) -> None:
        if step != 2:
            return
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight).fill_(0.0)  # filled: pages not touched would not be resident
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.floor, self.how = torch.cuda.memory_allocated(self.device), "max_memory_allocated"
            return
        _trim()
        self.how = _reset()
        self.floor = _status("VmRSS")

    def end(self, step: int) -> None:
        if step == 2:
            cuda = self.device.type == "cuda"
            self.peak = torch.cuda.max_memory_allocated(self.device) if cuda else _status("VmHWM")


def alone(workload: Workload, arm: str) -> dict[str, Any]:
    """Measure one arm in this process."""
    lengths = [TINY] * workload.batch + workload.lengths()[: workload.batch]
    setup = arms.prepare(workload, lengths)
    if arm == "trl":
        from prefkit.bench.peer import Peer

        peer = Peer(setup)
        model = peer.trainer.model
        gauge = Gauge([weight for _, weight in arms.trained(model)], setup.device)
        peer.block(gauge)
    else:
        model = setup.policy.model
        gauge = Gauge([weight for _, weight in arms.trained(model)], setup.device)
        arms.block(setup, arm, gauge)
    trained = sum(weight.numel() * weight.element_size() for weight in gauge.weights)
    return {
        "bytes_above_floor": gauge.peak - gauge.floor,
        "floor": gauge.floor,
        "peak": gauge.peak,
        "how": gauge.how,
        "weight_bytes": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        "gradient_bytes": trained,
        "optimizer_bytes": 2 * trained,
    }


def apart(arm: str, argv: Sequence[str]) -> dict[str, Any]:
    """Measure one arm in a new process: this command line again, with this arm alone. Raises InputError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "memory.json"
        # Later options win, so that the arm's own replace the caller's.
        command = [sys.executable, "-m", "prefkit", "bench", *argv, "--arms", arm, "--alone", str(file)]
        done = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False)
        if done.returncode or not file.is_file():
            raise InputError(f"arm {arm} failed in its own process:\n{done.stderr.strip()[-2000:]}", where="--memory")
        return json.loads(file.read_text(encoding="utf-8"))


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The arms and, where both are there, the engine's share of the peer's memory."""
    result: dict[str, Any] = {"arms": found, "malloc": MALLOC}
    for slow in ("trl", "naive", "padded"):
        if slow in found and "engine" in found:
            share = found["engine"]["bytes_above_floor"] / max(1, found[slow]["bytes_above_floor"])
            result[f"engine/{slow}"] = share
    return result


def _status(field: str) -> int:
    """Bytes of a field of this process's status. Raises InputError where the system has none."""
    if not STATUS.is_file():
        raise InputError("resident memory can be read on Linux or on a GPU only", where="--memory")
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise InputError(f"{STATUS} names no {field}", where="--memory")


def _reset() -> str:
    """Let the peak begin here; how it will be read."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return "VmHWM since the process began (the system does not let it be reset): an upper bound"
    return "VmHWM, reset before the step"


def _trim() -> None:
    """Give freed memory back, where the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return
