"""The processes of a run: who we are, and the few collectives a run needs.

`accelerate` sets the processes up (plain `python`, `accelerate launch`, `torchrun`); one process is the
ordinary case, and every function here is then free.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from prefkit.engine import deepspeed
from prefkit.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among `size`; `sharded` is True when FSDP2 shards the weights over them.

    `zero` is the stage of DeepSpeed's ZeRO (1 or 2), which leaves the weights whole; 0 without it.
    """

    rank: int
    size: int
    device: torch.device
    sharded: bool = False
    zero: int = 0

    @classmethod
    def start(cls) -> World:
        """Join the processes of this launch (once; later calls return the same world).

        Raises InputError for a launch the engine does not run: FSDP version 1, ZeRO stage 3, ZeRO with offload.
        """
        sharded, zero = _asked("ACCELERATE_USE_FSDP"), deepspeed.stage()
        if sharded and os.environ.get("FSDP_VERSION", "2") != "2":
            raise InputError(
                "FSDP version 1 is asked for, and only version 2 is supported",
                where="accelerate launch",
                mend="add --fsdp_version 2, or `fsdp_version: 2` under fsdp_config",
            )
        fresh = not dist.is_initialized()
        if zero:  # accelerate starts DeepSpeed's own process group, which it does not with `cpu`
            state = PartialState(backend=None if torch.cuda.is_available() else "gloo")
        else:
            state = PartialState(cpu=_asked("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
        if fresh and dist.is_initialized():
            atexit.register(state.destroy_process_group)
        rank, size, device = int(state.process_index), int(state.num_processes), state.device
        assert device is not None, "accelerate sets a device"
        return cls(rank=rank, size=size, device=device, sharded=sharded and size > 1, zero=zero if size > 1 else 0)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place where there are several; same shape on every process."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """The main process's value (anything picklable), on every process."""
        if self.size == 1:
            return value
        box: list[T | None] = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return cast(T, box[0])

    def gather_objects(self, rows: Sequence[T]) -> list[T]:
        """Every process's rows in rank order, on every process."""
        if self.size == 1:
            return list(rows)
        boxes: list[list[T] | None] = [None] * self.size
        dist.all_gather_object(boxes, list(rows))
        return [row for box in boxes for row in (box or [])]

    @property
    def in_step(self) -> bool:
        """Whether every process must run as many forward passes as the others: sharded weights are gathered in each."""
        return self.sharded or self.zero > 0

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return max(self.gather_objects([number]))

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` on the main process and give its result to all; its InputError is raised on all."""
        outcome: tuple[T | None, tuple[str, str, str] | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(), None)
            except InputError as error:
                if self.size == 1:
                    raise
                outcome = (None, (error.what, error.where, error.mend))
        result, failure = self.broadcast(outcome)
        if failure is not None:
            raise InputError(failure[0], where=failure[1], mend=failure[2])
        return cast(T, result)


def leave(code: int) -> None:
    """End this process at once if it is one of several: its work is done and its files are closed.

    The threads of the process group outlive Python's own shutdown, and now and then one that is still waking up then
    aborts a process that had finished well. A single process has none: nothing happens, the caller leaves as usual.
    """
    if not dist.is_initialized():
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code == 0:  # after a failure the others may never come
        dist.destroy_process_group()
    os._exit(code)


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
