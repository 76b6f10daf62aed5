"""The last decoder layer computes only the rows that are read: those before answer tokens, or the ends of answers.

What follows the last layer's keys and values works on each token by itself, so a token that nobody reads need not be
multiplied: not by the MLP, nor by the projections that make queries and follow attention. `install` hangs hooks on
these modules that take the read rows out of their input and put the results back among zeros. The residual stream,
norms, keys, values and attention stay whole. The rows come with the call, as a keyword that reaches attention, so that
a layer that is computed again (gradient checkpointing) takes its own batch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.domains.text.attention import ROWS

ATTENTION = ("self_attn", "attn", "attention")
MLP = "mlp"
BY_ROW = ("q_proj", "o_proj", "c_proj", "out_proj", "dense")
"""of attention: what makes queries alone, and what mixes its heads. Keys and values are needed of every token."""
EXPERTS = ("expert", "router")
"""in the name of a part that sends tokens to different weights: what it does depends on all rows"""


@dataclass
class LastLayer:
    """What the hooks of one layer share."""

    on: bool = True
    rows: Tensor | None = None
    """(m,) flat places of the call in progress"""


@dataclass(frozen=True)
class Enter:
    """Before attention: takes up the rows that came with the call, or that none did."""

    layer: LastLayer

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer.rows = kwargs.get(ROWS) if self.layer.on else None


@dataclass(frozen=True)
class Take:
    """Before a module that works by rows: (r, s, d) -> (1, m, d)."""

    layer: LastLayer
    shapes: list[torch.Size]
    """of the whole input, for the `Put` that follows"""

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        self.shapes.clear()
        rows = self.layer.rows
        if rows is None:
            return None
        self.shapes.append(args[0].shape[:-1])
        return (args[0].flatten(0, 1).index_select(0, rows)[None], *args[1:])


@dataclass(frozen=True)
class Put:
    """After it: (1, m, d) -> (r, s, d), zero where nobody reads."""

    layer: LastLayer
    shapes: list[torch.Size]
    ends: bool
    """whether the layer has no more parts"""

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        rows = self.layer.rows
        if rows is None or not self.shapes:
            return None
        if self.ends:
            self.layer.rows = None
        shape = self.shapes.pop()
        whole = output.new_zeros(shape.numel(), output.shape[-1])
        return whole.index_copy_(0, rows, output[0]).unflatten(0, shape)


def install(decoder: Any) -> LastLayer | None:
    """Hook a decoder's last layer, once; None where it is not built as we know. Nothing happens in calls without rows.

    That results stay what they were is for the caller to try: only then may it be left on.
    """
    parts = _parts(decoder)
    if parts is None:
        return None
    into, mlp = parts
    # The hooks of a copied model are copies too.
    found = next((hook.layer for hook in into._forward_pre_hooks.values() if isinstance(hook, Enter)), None)
    if found is not None:
        found.on = True
        return found
    layer = LastLayer()
    into.register_forward_pre_hook(Enter(layer), with_kwargs=True)
    children = dict(into.named_children())
    for module in (*(children[name] for name in BY_ROW if name in children), mlp):
        shapes: list[torch.Size] = []
        module.register_forward_pre_hook(Take(layer, shapes))
        module.register_forward_hook(Put(layer, shapes, module is mlp))
    return layer


def _parts(decoder: Any) -> tuple[nn.Module, nn.Module] | None:
    """Attention and MLP of the layer that runs last."""
    count = getattr(decoder.config.get_text_config(), "num_hidden_layers", 0)
    stacks = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(stacks) != 1:
        return None
    children = dict(stacks[0][-1].named_children())
    attentions = [children[name] for name in ATTENTION if name in children]
    mlp = children.get(MLP)
    if len(attentions) != 1 or mlp is None:
        return None
    if any(word in name.lower() for name, _ in mlp.named_modules() for word in EXPERTS):
        return None
    return attentions[0], mlp
