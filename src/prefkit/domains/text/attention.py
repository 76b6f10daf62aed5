"""Attention over packed tokens: what the plan of a batch says each token may see, in place of padding and masks.

A packed batch is one row of T tokens. Per group it holds one *trunk* (the prompt and one answer) and a *branch* for
every other answer, which continues the prompt and sees neither the trunk's answer nor other branches. The linear layers
need to know nothing of that. Attention does, and gets it from the plan that travels with the forward call, so that a
recomputed layer (gradient checkpointing) sees its own batch and no other.

`install` puts one function in front of a model's attention: with a plan the plan computes, without one (generation,
padded rows) the model's own attention does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PREFIX = "prefkit_"
PLAN = "prefkit_plan"
"""keyword under which a plan reaches the attention function through the model's own forward"""
ROWS = "prefkit_rows"
"""keyword for the places that are read in the end: what the last layer must compute"""


class Plan(Protocol):
    """Who sees whom in one packed batch."""

    seen: list[int | None] | None
    """when a list: the sliding window that each layer asked for is added to it"""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, window: int | None, soft_cap: float
    ) -> Tensor:
        """query (1, h, T, d), key and value (1, h_kv, T, d) -> (1, T, h, d)."""
        ...


@dataclass(frozen=True)
class Block:
    """Segments attended in one call, as r rows of like length: l query and s key places each.

    Trunks are their own keys and need no mask but the causal one; a branch's keys are its prompt and itself.
    """

    queries: Tensor
    """(r, l) places in the packed row; a repeated place where a row has ended"""
    keys: Tensor
    """(r, s), as `queries`"""
    query_positions: Tensor
    """(r, l) position ids; a very large one where the row has ended, which sees everything and is never read"""
    key_positions: Tensor
    """(r, s); a larger one still where the row has ended, which no token sees"""
    trunk: bool
    start: int = -1
    """first place, where the queries are simply the next r x l places; -1 otherwise"""
    reach: int = 0
    """longest distance from a token to one it sees"""


RESPECTED = {"scaling", "sliding_window", "softcap"}
"""settings of an attention call that a plan takes up"""
HARMLESS = {
    "dropout",  # off in every model prefkit scores with
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}
"""settings that change nothing here; any other (attention sinks, position biases) makes a model unfit for plans"""
ENDED = 1 << 30
"""position id of a query that is only padding; keys of padding lie beyond it"""


@dataclass
class SdpaPlan:
    """Torch's scaled-dot-product attention, block by block."""

    blocks: Sequence[Block]
    order: Tensor | None
    """(T,) for every packed token its row in the blocks' joined output; None where they are in order already"""
    seen: list[int | None] | None = None
    _masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, window: int | None, soft_cap: float
    ) -> Tensor:
        if self.seen is not None:
            self.seen.append(window)
        flat = [part.squeeze(0).transpose(0, 1) for part in (query, key, value)]
        outputs: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            q = _take(flat[0], block.queries, block.start)
            k, v = (_take(part, block.keys, block.start if block.trunk else -1) for part in flat[1:])
            mask = None
            if not block.trunk or soft_cap or (window and window <= block.reach):
                mask = self._mask(number, window or 0, query.dtype)
            output = _attention(q, k, v, mask=mask, scale=scale, soft_cap=soft_cap)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        if self.order is not None:
            joined = joined.index_select(0, self.order)
        return joined[None]

    def _mask(self, number: int, window: int, dtype: torch.dtype) -> Tensor:
        """(r, 1, l, s) zero where a query sees a key and -inf elsewhere; one for all layers."""
        key = (number, window, dtype)
        if key not in self._masks:
            block = self.blocks[number]
            distance = block.query_positions[:, :, None] - block.key_positions[:, None, :]
            hidden = distance < 0
            if window:
                hidden |= (distance >= window) & (block.query_positions[:, :, None] < ENDED)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[key] = mask[:, None]
        return self._masks[key]


def _take(flat: Tensor, places: Tensor, start: int) -> Tensor:
    """(T, h, d) -> (r, h, l, d), without a copy where the places follow one another."""
    rows, length = places.shape
    if start >= 0:
        return flat[start : start + rows * length].unflatten(0, (rows, length)).transpose(1, 2)
    return flat.index_select(0, places.flatten()).unflatten(0, (rows, length)).transpose(1, 2)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float | None, soft_cap: float
) -> Tensor:
    """(r, h, l, d); without a mask each row is causal."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    if not soft_cap:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    assert mask is not None
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / soft_cap) * soft_cap + mask
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value


@dataclass
class FlexPlan:
    """FlexAttention with a block mask over the whole packed row; compiled on CUDA, eager elsewhere.

    Torch has no backward pass for it on a CPU: there a call that needs one takes the same mask, written out.
    """

    groups: Tensor
    """(T,) number of each token's group"""
    branches: Tensor
    """(T,) number of each token's answer, -1 in the prompt"""
    positions: Tensor
    """(T,)"""
    seen: list[int | None] | None = None
    _masks: dict[int, Any] = field(default_factory=dict)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, window: int | None, soft_cap: float
    ) -> Tensor:
        if self.seen is not None:
            self.seen.append(window)
        if query.device.type != "cuda" and torch.is_grad_enabled() and query.requires_grad:
            mask = self._dense(window or 0, query.dtype)
            return _attention(query, key, value, mask=mask, scale=scale, soft_cap=soft_cap).transpose(1, 2)
        output = flex_function(query.device.type)(
            query,
            key,
            value,
            score_mod=_soft_capped(soft_cap) if soft_cap else None,
            block_mask=self._mask(window or 0),
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2)

    def _mask(self, window: int) -> Any:
        if window not in self._masks:
            from torch.nn.attention.flex_attention import create_block_mask

            length = len(self.groups)
            self._masks[window] = create_block_mask(
                self._visible(window), None, None, length, length, device=self.groups.device
            )
        return self._masks[window]

    def _dense(self, window: int, dtype: torch.dtype) -> Tensor:
        from torch.nn.attention.flex_attention import create_mask

        length, device = len(self.groups), self.groups.device
        visible = create_mask(self._visible(window), 1, 1, length, length, device=str(device))
        return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)

    def _visible(self, window: int) -> Callable[[Any, Any, Any, Any], Any]:
        groups, branches, positions = self.groups, self.branches, self.positions

        def visible(_row: Any, _head: Any, q: Any, k: Any) -> Any:
            own = (branches[k] < 0) | (branches[k] == branches[q])
            seen = (groups[q] == groups[k]) & own & (positions[k] <= positions[q])
            return seen & (positions[q] - positions[k] < window) if window else seen

        return visible


def _soft_capped(cap: float) -> Callable[..., Tensor]:
    def score(value: Tensor, *_: Any) -> Tensor:
        return torch.tanh(value / cap) * cap

    return score


_flex: dict[str, Any] = {}


def flex_function(device: str) -> Any:
    """`flex_attention`, compiled once on CUDA: uncompiled it would hold every score in memory."""
    if device not in _flex:
        from torch.nn.attention.flex_attention import flex_attention

        _flex[device] = torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
    return _flex[device]


def install(model: Any) -> None:
    """Let plans decide attention in this model; calls without a plan run as before. Doing it twice does no harm."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    config = model.config.get_text_config()
    own = config._attn_implementation
    if own.startswith(PREFIX):
        return
    name = f"{PREFIX}{own}"
    AttentionInterface.register(name, _planned(own))
    if own in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    for part in {id(c): c for c in (model.config, config)}.values():
        part._attn_implementation = name


def installed(model: Any) -> bool:
    """Whether attention calls of this model (or decoder) come through here."""
    return str(model.config.get_text_config()._attn_implementation).startswith(PREFIX)


def own_attention(config: Any) -> str:
    """The name of the model's own attention, whether `install` has been here or not."""
    return str(config.get_text_config()._attn_implementation).removeprefix(PREFIX)


def _planned(own: str) -> Callable[..., Any]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **settings: Any
    ) -> tuple[Tensor, Any]:
        plan: Plan | None = settings.pop(PLAN, None)
        settings.pop(ROWS, None)
        if plan is None:
            return _own_function(own, module)(module, query, key, value, attention_mask, **settings)
        unknown = sorted(k for k, v in settings.items() if v is not None and k not in RESPECTED | HARMLESS)
        if unknown:
            raise NotImplementedError(f"it asks for {', '.join(unknown)}, which packed rows do not have")
        output = plan.attend(
            query,
            key,
            value,
            scale=settings.get("scaling"),
            window=settings.get("sliding_window"),
            soft_cap=settings.get("softcap") or 0.0,
        )
        return output, None

    return attention


def _own_function(own: str, module: Any) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # A model's eager attention is a function of its own file, and stands in no table.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return eager if own == "eager" and eager is not None else ALL_ATTENTION_FUNCTIONS[own]
