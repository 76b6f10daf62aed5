"""ZeRO stages 1 and 2 of DeepSpeed: weights whole in every process, optimizer state (and gradients, 2) in pieces.

Through the interface that accelerate documents: the launch's plugin, `prepare`, `accelerator.backward` (which also
clips, steps and clears the gradients) and the calls that read and write whole optimizer states. DeepSpeed's own
checkpoints are pickles and are never written.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prefkit.errors import InputError

B = TypeVar("B")
Compute = Callable[[B], tuple[Tensor, Mapping[str, Tensor]]]

STATE = ("exp_avg", "exp_avg_sq")
BUCKET = 1 << 25  # gradients and weights travel in messages of at most this many numbers


def stage() -> int:
    """The ZeRO stage this launch asks for; 0 without DeepSpeed. InputError for a launch the engine does not run."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("1", "true", "yes"):
        return 0

    def given(name: str, default: str = "none") -> str:
        return os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", default)

    number = given("ZERO_STAGE", "2")
    offload = {given("OFFLOAD_OPTIMIZER_DEVICE"), given("OFFLOAD_PARAM_DEVICE")} != {"none"}
    what = mend = ""
    if number not in ("1", "2") or offload:
        which = "offload" if offload else f"stage {number}"
        what = f"DeepSpeed ZeRO {which} is asked for; prefkit runs stages 1 and 2, without offload"
        mend = "shard the weights with FSDP2 instead: prefkit/commands/accelerate/fsdp2.yaml"
    elif given("CONFIG_FILE") != "none":
        what = "a DeepSpeed config file is given, and prefkit sets precision, optimizer and clipping itself"
        mend = "use prefkit/commands/accelerate/deepspeed_zero2.yaml, which names the stage alone"
    elif importlib.util.find_spec("deepspeed") is None:
        what, mend = "DeepSpeed is asked for and is not installed", "pip install 'prefkit[deepspeed]'"
    elif "LOCAL_RANK" not in os.environ:
        what, mend = "DeepSpeed is asked for outside of a launch", "start it with `accelerate launch`"
    if what:
        raise InputError(what, where="accelerate launch", mend=mend)
    return int(number)


class Zero:
    """What a Learner does otherwise under DeepSpeed: losses, gradients, the step, and optimizer state."""

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        stage: int,
        size: int,
        max_grad_norm: float,
    ) -> None:
        """Hand the trained `weights` of `module` and their AdamW over to DeepSpeed, one of `size` processes.

        They stay the same Parameters, and whole, in DeepSpeed's buffers. Raises InputError for quantised weights.
        """
        if any(not weight.dtype.is_floating_point for weight in module.parameters()):
            raise InputError(
                "quantised weights are not supported under DeepSpeed",
                where="--load_in_4bit / --load_in_8bit",
                mend="launch without DeepSpeed, or load the weights whole",
            )
        from accelerate import Accelerator

        accelerator: Any = Accelerator(mixed_precision="no")
        accelerator.deepspeed_plugin.deepspeed_config.update(
            # Micro-batches are the learner's: DeepSpeed is told of one, so that it divides by nothing.
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,
            train_batch_size=size,
            gradient_clipping=max_grad_norm,
            zero_optimization={"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
        )
        self._accelerator, self._size = accelerator, size
        self._weights, self._optimizer = weights, optimizer
        self._engine: Any = accelerator.prepare(_Losses(module), optimizer)[0]
        # AdamW's first state, made now: DeepSpeed (0.19) looks for that of every group after the first group's step.
        for group in optimizer.param_groups:
            for flat in group["params"]:
                moments = {key: torch.zeros_like(flat, requires_grad=False) for key in STATE}
                optimizer.state[flat] = {"step": torch.zeros((), dtype=torch.float32), **moments}

    def losses(self, compute: Compute[B], batch: B) -> tuple[Tensor, Mapping[str, Tensor]]:
        """`compute(batch)`, inside the forward pass that DeepSpeed watches."""
        return self._engine(compute, batch)

    def backward(self, loss: Tensor, *, step: bool) -> None:
        """Add the gradient of `loss`; with `step`, sum over processes, clip and step at the optimizer's rate."""
        if step:  # files are loaded into the weights, not into the copy that DeepSpeed steps
            self._engine.optimizer.refresh_fp32_params()
        self._accelerator.sync_gradients = step
        self._accelerator.backward(loss * self._size)  # DeepSpeed averages over processes

    def norm(self) -> Tensor:
        """The global gradient norm of the last step, before clipping."""
        device = next(iter(self._weights.values())).device
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=device)

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Whole optimizer state by weight name, one weight at a time, as AdamW keeps it; a collective call."""
        get = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state
        for name, weight in self._weights.items() if (step := self._steps()[0]) else ():
            yield name, {"step": step.clone(), **{key: get(weight, key) for key in STATE}}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take up whole optimizer states that `state` gave, each process its piece; a collective call."""
        if not state:
            return
        if not self._steps()[0]:  # DeepSpeed knows whose state is where after a first step: take an empty one
            for group in self._optimizer.param_groups:
                group["lr"] = 0.0
            weights = list(self._weights.values())
            zero, _ = self.losses(lambda _: (torch.stack([0 * w.sum() for w in weights]).sum(), {}), None)
            self.backward(zero, step=True)
        put = importlib.import_module("deepspeed.utils").safe_set_full_optimizer_state
        for name, weight in self._weights.items():
            for key in STATE:
                put(weight, state[name][key], key)
        for count in self._steps():
            count.fill_(float(next(iter(state.values()))["step"]))

    def _steps(self) -> list[Tensor]:
        return [entry["step"] for entry in self._optimizer.state.values()]


class _Losses(nn.Module):
    """DeepSpeed follows one module from its call to its loss; a method's loss may call the model several times."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, compute: Compute[B], batch: B) -> tuple[Tensor, Mapping[str, Tensor]]:
        return compute(batch)
