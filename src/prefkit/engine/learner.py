"""From per-example losses to one optimizer step, the same whatever the micro-batches and processes.

The gradient is that of (sum of all losses) / (sum of all weights) over every micro-batch and every process,
so that N small batches equal one big one and P processes equal one. Nothing here waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prefkit.engine import deepspeed, files, optimizers, sharding
from prefkit.engine.config import Optimisation
from prefkit.engine.world import World
from prefkit.errors import InputError

B = TypeVar("B")

BUCKET = 1 << 25
"""gradients are summed over processes in pieces of at most about this many numbers"""


class Learner:
    """Trains the parameters of `module` that require a gradient."""

    def __init__(self, module: nn.Module, config: Optimisation, *, total_steps: int, world: World) -> None:
        """Build it after the module is on its device and sharded, if it is to be.

        Raises InputError when nothing is trainable, and for an optimizer that is unknown or not installed.
        """
        self._config, self._world, self._total, self._first = config, world, total_steps, 1
        self._module = module
        self._weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        if not self._weights:
            raise InputError("nothing is trainable: every weight is frozen", mend="train a LoRA adapter (--use_peft)")
        self._sharded = any(isinstance(weight, DTensor) for weight in self._weights.values())
        self._optimizer = optimizers.build(config, self._weights, sharded=self._sharded or world.zero > 0)
        self._zero: deepspeed.Zero | None = None
        if world.zero:
            self._zero = deepspeed.Zero(
                module,
                self._weights,
                self._optimizer,
                stage=world.zero,
                size=world.size,
                max_grad_norm=config.max_grad_norm,
            )
        self._metric_names: list[str] | None = None
        self.step = 0
        """optimizer steps done"""

    @property
    def learning_rate(self) -> float:
        """That of the step to come."""
        return optimizers.learning_rate(self._config, self.step + 2 - self._first, self._total)

    def forget_metric_names(self) -> None:
        """The next step may measure other things; with several processes names are agreed once and then kept."""
        self._metric_names = None

    def schedule(self, *, first: int, total: int, peak: float) -> None:
        """Follow a schedule of `total` steps that begins at step `first` and peaks at `peak` (a round's own).

        At its first step the optimizer's state is forgotten. Raises InputError under DeepSpeed, which keeps that state
        itself.
        """
        if self._zero is not None:
            raise InputError(
                "DeepSpeed keeps the optimizer's state, which is to start anew in each round",
                where="--reset_optimizer",
                mend="use FSDP2, or --no_reset_optimizer",
            )
        self._config, self._first, self._total = dataclasses.replace(self._config, learning_rate=peak), first, total
        if self.step + 1 == first:
            self._optimizer.state.clear()

    @property
    def nbytes(self) -> int:
        """About the bytes of a checkpoint: trained weights and optimizer state, whole."""
        each = optimizers.STATE_BYTES[optimizers.canonical(self._config.optim)]
        return sum(weight.numel() * (weight.element_size() + each) for weight in self._weights.values())

    def update(
        self,
        batches: Sequence[B],
        compute: Callable[[B], tuple[Tensor, Mapping[str, Tensor]]],
        weight: Callable[[B], float] = len,  # pyright: ignore[reportArgumentType]
    ) -> dict[str, Tensor]:
        """One optimizer step over this process's micro-batches.

        `compute` gives per-example losses (b,) and per-example metrics {name: (b,)}; `weight` is what a batch
        adds to the divisor (its examples; its target tokens for token means). Under FSDP2 and DeepSpeed every
        process must bring the same number of micro-batches. With several processes the metrics must have the
        same names at every step.

        Returns 0-dim tensors: `loss`, `grad_norm` (before clipping), `learning_rate`, and every metric
        averaged over all examples.
        """
        divisor = self._world.all_sum(self._scalar(sum(weight(batch) for batch in batches))).clamp_(min=1e-6)
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        rate = self.learning_rate
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        for number, batch in enumerate(batches, start=1):
            sharding.keep_whole(self._module, number < len(batches))
            losses, metrics = compute(batch) if self._zero is None else self._zero.losses(compute, batch)
            assert losses.ndim == 1, f"compute must give one loss per example, not shape {tuple(losses.shape)}"
            if self._zero is None:
                (losses.sum() / divisor).backward()
            else:
                self._zero.backward(losses.sum() / divisor, step=number == len(batches))
            for name, values in {"loss": losses, **metrics}.items():
                total = values.detach().float().sum()
                sums[name] = sums[name] + total if name in sums else total
                counts[name] = counts.get(name, 0) + values.numel()
        norm = self._apply() if self._zero is None else self._zero.norm()
        self.step += 1
        averages = self._averages(sums, counts, divisor)
        rate_now = self._scalar(rate, dtype=torch.float64)
        return {"loss": averages.pop("loss"), "grad_norm": norm, "learning_rate": rate_now, **averages}

    def save(self, folder: Path, /) -> None:
        """Write optimizer.safetensors and optimizer.json; a collective call when sharded or under DeepSpeed."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        zero = self._zero
        states = optimizers.state_of(self._optimizer, self._weights).items() if zero is None else zero.state()
        for name, entry in states:
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    whole = sharding.whole(value)
                    if self._world.is_main:
                        tensors[f"{name}::{key}"] = whole.cpu().contiguous()
                else:
                    numbers[f"{name}::{key}"] = value
        if self._world.is_main:
            save_file(tensors, folder / "optimizer.safetensors")
            optim = optimizers.canonical(self._config.optim)
            files.write_json(folder / "optimizer.json", {"optim": optim, "step": self.step, "numbers": numbers})

    def load(self, folder: Path, /) -> None:
        """Take up what `save` wrote; InputError when it belongs to another optimizer or other weights."""
        about = files.read_json(folder / "optimizer.json")
        if about["optim"] != optimizers.canonical(self._config.optim):
            raise InputError(f"holds the state of {about['optim']}, not of {self._config.optim}", where=str(folder))
        state: dict[str, dict[str, Any]] = {}
        for key, value in (*self._stored(folder), *about["numbers"].items()):
            name, _, part = key.rpartition("::")
            state.setdefault(name, {})[part] = value
        optimizers.check_state(self._weights, state)
        if self._zero is None:
            optimizers.restore(self._optimizer, self._weights, state)
        else:
            self._zero.restore(state)
        self.step = int(about["step"])

    def _stored(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """The saved tensors on the devices of their weights, in the pieces this process holds; whole and on the
        CPU under DeepSpeed, which takes its pieces itself.
        """
        with safe_open(folder / "optimizer.safetensors", framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                name, _, part = key.rpartition("::")
                value = file.get_tensor(key)
                if name not in self._weights or self._zero is not None:
                    yield key, value
                    continue
                weight = self._weights[name]
                if part != "step" or self._optimizer.defaults.get("fused"):
                    value = value.to(weight.device)
                same_shape = tuple(value.shape) == tuple(weight.shape)
                yield key, sharding.piece(value, weight) if same_shape else value

    def _apply(self) -> Tensor:
        """Sum gradients over processes, clip, step; gives the global norm before clipping (0-dim float32)."""
        gradients: list[Tensor] = []
        for weight in self._weights.values():
            if weight.grad is None:  # unused by these batches, though perhaps used by another process's
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        if self._world.size > 1 and not self._sharded:
            _sum_over(self._world, local)
        norm = nn.utils.get_total_norm(local)
        if self._sharded:
            norm = self._world.all_sum(norm.square()).sqrt()
        if self._config.max_grad_norm > 0:
            scale = (self._config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in local:
                gradient.mul_(scale)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _averages(self, sums: dict[str, Tensor], counts: Mapping[str, int], divisor: Tensor) -> dict[str, Tensor]:
        """Averages over all examples of all processes, in one reduction; the loss is over the weights."""
        names = self._agreed_names(sums)
        zero = self._scalar(0)
        packed = [sums.get(name, zero).to(zero.device) for name in names]
        packed += [self._scalar(counts.get(name, 0)) for name in names]
        totals, numbers = self._world.all_sum(torch.stack(packed)).chunk(2)
        # A round may leave a step without any match: its means are 0, not NaN.
        values = dict(zip(names, (totals / numbers.clamp(min=1)).unbind(), strict=True))
        values["loss"] = totals[names.index("loss")] / divisor
        return values

    def _scalar(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """A number on the device, filled in there: copying it over would wait for the device."""
        return torch.full((), value, dtype=dtype, device=self._world.device)

    def _agreed_names(self, sums: Mapping[str, Tensor]) -> list[str]:
        """The metric names in an order that every process shares: agreed at the first step, fixed from then
        on.
        """
        if self._world.size == 1:
            return list(sums)
        if self._metric_names is None:
            self._metric_names = list(dict.fromkeys(self._world.gather_objects(["loss", *sums])))
        new = [name for name in sums if name not in self._metric_names]
        assert not new, f"metric {new[0]} was not there at the first step, as several processes need"
        return self._metric_names


def _sum_over(world: World, gradients: Sequence[Tensor]) -> None:
    """Sum gradients over processes in place, many in one message."""
    bucket: list[Tensor] = []
    for index, gradient in enumerate(gradients):
        bucket.append(gradient)
        last = index + 1 == len(gradients)
        full = sum(item.numel() for item in bucket) >= BUCKET
        if last or full or gradients[index + 1].dtype != gradient.dtype:
            flat = world.all_sum(torch.cat([item.flatten() for item in bucket]))
            for item, piece in zip(bucket, flat.split([item.numel() for item in bucket]), strict=True):
                item.copy_(piece.view_as(item))
            bucket = []
