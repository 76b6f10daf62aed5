"""Weights spread over processes by FSDP2, whole where they must be: for sampling and in files.

`accelerate` (1.15) quietly falls back to plain data parallelism when FSDP is asked for on CPU, so the engine
applies `torch.distributed.fsdp.fully_shard` itself, on every device.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from prefkit.engine.world import World
from prefkit.errors import InputError

_gathered: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def shard(module: nn.Module, world: World) -> nn.Module:
    """Shard `module` in place, one unit per repeated block and one for the rest; unchanged unless the launch
    shards.

    Call it once the module is complete (adapters attached) and on its device, before its Learner is built.
    From then on its weights are whole only inside the forward pass of `module` itself, called as
    `module(...)`, and inside `gathered`; a part called by itself (a head, an embedding) finds pieces. Raises
    InputError for quantised weights, which cannot be cut.
    """
    if not world.sharded:
        return module
    for name, weight in module.named_parameters():
        if not weight.dtype.is_floating_point:
            raise InputError(
                f"{name} is quantised ({weight.dtype}) and cannot be sharded",
                where="--load_in_4bit / --load_in_8bit with FSDP2",
                mend="launch without FSDP, or load the weights whole",
            )
    mesh = init_device_mesh(world.device.type, (world.size,))
    units = [*repeated_blocks(module), module]
    for unit in units:
        # What no block holds (embeddings, head) stays whole from its forward to its backward pass: the largest matrix
        # is gathered once, not twice.
        fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not module)
    for unit in units:
        assert isinstance(unit, FSDPModule)
        # the learner divides by the global weight itself, so gradients are summed, not averaged
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return module


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of every outermost list of like modules that holds a fifth of all weights or more.

    These are the decoder layers of a causal LM (encoder and decoder layers where there are both), whatever
    wraps it.
    """
    floor = sum(weight.numel() for weight in module.parameters()) / 5
    found: list[nn.Module] = []

    def look(parent: nn.Module) -> None:
        for child in parent.children():
            blocks = list(child.children())
            alike = isinstance(child, nn.ModuleList) and len(blocks) > 1 and len({type(block) for block in blocks}) == 1
            if alike and sum(weight.numel() for weight in child.parameters()) >= floor:
                found.extend(blocks)
            else:
                look(child)

    look(module)
    return found


def keep_whole(module: nn.Module, keep: bool) -> None:
    """Whether what no block holds stays whole after the next backward pass: another pass follows, and would gather it
    again. Nothing for a module that is not sharded.
    """
    if isinstance(module, FSDPModule):
        module.set_reshard_after_backward(not keep, recurse=False)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def gathered(module: nn.Module) -> Iterator[nn.Module]:
    """Whole weights inside the block: one all-gather per unit at its start, none per token, pieces again
    after it.

    Every process must enter. For sampling and scoring without gradients; free for a module that is not
    sharded.
    """
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not units or module in _gathered:
        yield module
        return
    _gathered.add(module)
    if isinstance(module, FSDPModule):
        # FSDP2 takes whichever unit runs first for the root; a run that goes on may sample before it scores.
        module._get_fsdp_state()._lazy_init()
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield module
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not module, recurse=False)
            unit.reshard()
        _gathered.discard(module)


def full_state(module: nn.Module, *, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The whole state dict: on the CPU of the main process when sharded (elsewhere empty), otherwise as it
    is.

    `names` takes only these (an adapter's, say). A collective call when sharded: every process must make it.
    """
    own = {name: value for name, value in module.state_dict(keep_vars=True).items() if names is None or name in names}
    if not is_sharded(module):
        return {name: value.detach() for name, value in own.items()}
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied weights stay one tensor, as files and `save_pretrained` expect
    for name, value in own.items():
        if id(value) not in seen:
            seen[id(value)] = whole(value).detach()
        if dist.get_rank() == 0:
            state[name] = seen[id(value)] = seen[id(value)].cpu()
    return state


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, names: Collection[str] | None = None) -> None:
    """Copy whole tensors into the module, sharded or not; tensors count on the main process, the rest receive
    them.

    `names`: the module's tensors that `state` must hold, all by default. Raises InputError when the main
    process's names or shapes are not the module's; of tied weights one name is enough.
    """
    world = World.start()
    own = module.state_dict(keep_vars=True)
    if names is not None:
        own = {name: value for name, value in own.items() if name in names}
    sources = world.on_main(lambda: _sources(own, state))
    with torch.no_grad():
        for name, source in sources.items():
            target = own[name].data
            value = state[source] if world.is_main else torch.empty(target.shape)
            value = value.to(target.device, target.dtype).contiguous()
            if world.size > 1:
                dist.broadcast(value, src=0)
            target.copy_(piece(value, target))


def whole(tensor: Tensor) -> Tensor:
    """A tensor's whole value; a collective call for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def piece(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole `value` that this process holds, placed as `like` is; `value` itself if that is
    whole.
    """
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _sources(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    """For each distinct tensor of the module, one of its names and the name in `state` of its value."""
    aliases: dict[int, list[str]] = {}
    for name, target in own.items():
        aliases.setdefault(id(target), []).append(name)
    sources: dict[str, str] = {}
    missing: list[str] = []
    for names in aliases.values():
        given = [name for name in names if name in state]
        if given:
            sources[names[0]] = given[0]
        else:
            missing.append(names[0])
    strange = [name for name in state if name not in own]
    if missing or strange:
        what = f"lacks {missing[0]}" if missing else f"has {strange[0]}, which the model lacks"
        raise InputError(f"the saved weights do not fit the model: it {what} ({len(missing) + len(strange)} in all)")
    for name, value in state.items():
        if tuple(value.shape) != tuple(own[name].shape):
            raise InputError(f"the saved {name} has shape {tuple(value.shape)}, not {tuple(own[name].shape)}")
    return sources
