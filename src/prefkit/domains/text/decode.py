"""The decoding loop: tokens drawn one after another over a key-value cache, and rows that are done leave the batch.

A prompt that several rows share is computed once and its cache repeated. Prompts are padded on the left, with position
ids that count real tokens only, so that models with absolute positions see what they see without padding. Logits are
the model's own, with its scale and soft cap, of the last position alone. What is drawn from them is the caller's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefkit.domains.text.attention import own_attention

Pick = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""logits (n, v) and uniform numbers (n,) -> tokens (n,) and their log-probs (n,)"""

EVERY = {"cpu": 1, "cuda": 8}
"""steps between two looks at who is done, by kind of device: one that computes ahead is waited for at each look"""
PAYS = 4
"""done rows are taken out once they are 1/PAYS of the batch: moving the cache costs about as much as a step"""
ROOM = 64
"""slots by which a full cache grows, at least"""
NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")


@dataclass(frozen=True)
class Start:
    """Where a row's answer begins, and how long it may get."""

    prompt: tuple[int, ...]
    prefix: tuple[int, ...]
    """tokens that follow the prompt and are given, not drawn"""
    budget: int
    """most tokens drawn, at least 1"""

    @property
    def context(self) -> tuple[int, ...]:
        """What the model has read before it draws."""
        return self.prompt + self.prefix


def unfit(model: Any) -> str:
    """Why this loop cannot run a transformers causal LM, for a message; empty where it can."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
    from transformers.generation.utils import GenerationMixin

    name = type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    if missing := [word for word in NEEDED if word not in accepted]:
        return f"{name} takes no {missing[0]}"
    step: Any = GenerationMixin
    if type(model).prepare_inputs_for_generation is not step.prepare_inputs_for_generation:
        return f"{name} prepares the inputs of each step in its own way"
    try:
        layers = DynamicCache(config=model.config.get_text_config()).layers
    except KeyError as error:
        return f"{name} has {error} layers, for which transformers has no cache"
    other = sorted(
        {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    )
    return f"{name} needs {other[0]} in its cache" if other else ""


@functools.cache
def _layer_with_room() -> Any:
    """transformers' cache layer, which copies itself at every step, with room to write the next token into."""
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):
        """`keys` and `values` (n, h, s, d) are the filled parts of (n, h, more, d)."""

        whole: tuple[Tensor, Tensor]

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
                self.whole = (key_states, value_states)
                return self._fill(key_states.shape[-2])
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            if end > self.whole[0].shape[-2]:
                self._grow(self.whole, start, end)
            for whole, new in zip(self.whole, (key_states, value_states), strict=True):
                whole[:, :, start:end] = new
            return self._fill(end)

        def batch_select_indices(self, indices: Tensor) -> None:
            filled = self.get_seq_length()
            keys, values = (part[:, :, :filled].index_select(0, indices) for part in self.whole)
            self._grow((keys, values), filled, filled + 1)
            self._fill(filled)

        def _grow(self, parts: tuple[Tensor, Tensor], filled: int, least: int) -> None:
            """More room, so much that it is rare."""
            room = least + max(ROOM, least // 4)
            keys, values = (part.new_empty(*part.shape[:2], room, part.shape[-1]) for part in parts)
            for whole, part in zip((keys, values), parts, strict=True):
                whole[:, :, :filled] = part[:, :, :filled]
            self.whole = (keys, values)

        def _fill(self, length: int) -> tuple[Tensor, Tensor]:
            keys, values = (whole[:, :, :length] for whole in self.whole)
            self.keys, self.values = keys, values
            return keys, values

    return Roomy


class _Reader:
    """A model that reads on, row by row of a batch, and gives the logits of what comes next."""

    def __init__(self, model: Any, pad: int, device: torch.device) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        self.model, self.pad, self.device = model, pad, device
        config = model.config.get_text_config()
        self.cache: Any = DynamicCache(config=config)
        self.sliding = any(self.cache.is_sliding)
        kinds: Any = [_layer_with_room()() if type(one) is DynamicLayer else one for one in self.cache.layers]
        self.cache.layers = kinds
        # A prepared mask spares transformers' own, whose making looks at values and so waits for the device.
        self.prepared = own_attention(config) == "sdpa" and not self.sliding
        last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.settings: dict[str, Any] = {"use_cache": True, **({"logits_to_keep": 1} if last else {})}
        self.mask = torch.empty(0, 0, dtype=torch.bool, device=device)
        """(n, s) whether a slot of the cache holds a real token"""
        self.lengths = torch.empty(0, dtype=torch.long, device=device)
        """(n,) real tokens read"""

    def read(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Next logits (n, v) after a piece of each row's text, left-padded; those after an empty piece are void."""
        width = max(map(len, pieces))
        ids = torch.tensor([[self.pad] * (width - len(piece)) + list(piece) for piece in pieces])
        gaps = torch.tensor([width - len(piece) for piece in pieces])
        real = (torch.arange(width) >= gaps[:, None]).to(self.device)
        if not self.mask.numel():
            self.mask, self.lengths = real[:, :0], real.new_zeros(len(pieces), dtype=torch.long)
        positions = (self.lengths[:, None] + real.cumsum(1) - 1).clamp_(min=0)
        self.lengths = self.lengths + real.sum(1)
        self.mask = torch.cat([self.mask, real], 1)
        return self._logits(ids.to(self.device), positions, self.mask.long())

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Next logits (n, v) after one more token (n,) of each row, at the given positions (n,)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        mask = self.mask[:, None, None] if self.prepared else self.mask.long()
        return self._logits(tokens[:, None], positions[:, None], mask)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may come several times."""
        self.cache.batch_select_indices(rows)
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        found = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, **self.settings
        )
        return found.logits[:, -1]


def _open(reader: _Reader, starts: Sequence[Start]) -> Tensor:
    """Read every row's context, what rows share once; the reader's rows are then the starts'. Next logits (n, v)."""
    pairs = list(dict.fromkeys((start.prompt, start.prefix) for start in starts))
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    apart = len(prompts) * max(map(len, prompts)) + len(pairs) * max(len(prefix) for _, prefix in pairs)
    whole = len(pairs) * max(len(prompt) + len(prefix) for prompt, prefix in pairs)
    device = reader.device
    # Prompts and prefixes one after the other leave a gap of padding between them, which a sliding window would count.
    if reader.sliding or apart >= whole:
        logits = reader.read([prompt + prefix for prompt, prefix in pairs])
    else:
        first = {prompt: i for i, prompt in enumerate(prompts)}
        shared = torch.tensor([first[prompt] for prompt, _ in pairs], device=device)
        before = reader.read(prompts)[shared]
        reader.select(shared)
        given = torch.tensor([bool(prefix) for _, prefix in pairs], device=device)
        logits = torch.where(given[:, None], reader.read([prefix for _, prefix in pairs]), before)
    places = {pair: i for i, pair in enumerate(pairs)}
    rows = torch.tensor([places[start.prompt, start.prefix] for start in starts], device=device)
    reader.select(rows)
    return logits[rows]


@torch.no_grad()
def decode(
    model: Any,
    starts: Sequence[Start],
    uniforms: Tensor,
    pick: Pick,
    *,
    pad: int,
    ends: Sequence[int],
    stopped: Callable[[int, list[int]], bool] | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Draw every row's answer, until it ends or its budget is spent.

    Args:
        model: a transformers causal LM for which `unfit` has no reason, in evaluation mode.
        uniforms: (n, t) for the tokens drawn, t the largest budget.
        ends: tokens that end an answer.
        stopped: whether row i is done with these drawn tokens, for ends that are no single token. It is asked now and
            then, so the answer may go on behind its end.

    Returns for each row the tokens drawn and their log-probs, cut at its budget; what follows an end is void.
    """
    device, steps = uniforms.device, uniforms.shape[1]
    every = EVERY.get(device.type, max(EVERY.values()))
    reader = _Reader(model, pad, device)
    logits = _open(reader, starts)
    tokens = torch.full((len(starts), steps), pad, device=device)
    log_probs = torch.zeros(len(starts), steps, device=device)
    final = torch.tensor(ends, dtype=torch.long, device=device)
    budgets = torch.tensor([start.budget for start in starts], device=device)
    lengths, counts, order = reader.lengths, [steps] * len(starts), list(range(len(starts)))
    live, done = torch.arange(len(starts), device=device), torch.zeros(len(starts), dtype=torch.bool, device=device)
    for step in range(steps):
        drawn, logs = pick(logits, uniforms[live, step])
        tokens[live, step], log_probs[live, step] = drawn, logs.to(log_probs.dtype)
        done = done | torch.isin(drawn, final) | (budgets <= step + 1)
        if (step + 1) % every == 0:
            flags: list[bool] = done.tolist()
            if stopped is not None:
                said = zip(flags, order, tokens[live, : step + 1].tolist(), strict=True)
                flags = [flag or stopped(row, one) for flag, row, one in said]
                done = torch.tensor(flags, device=device)
            if all(flags):
                steps = step + 1
                break
            if sum(flags) * PAYS >= len(flags):
                for row, flag in zip(order, flags, strict=True):
                    counts[row] = step + 1 if flag else counts[row]
                order = [row for row, flag in zip(order, flags, strict=True) if not flag]
                kept = torch.tensor([i for i, flag in enumerate(flags) if not flag], device=device)
                reader.select(kept)
                live, done, budgets, lengths, drawn = (part[kept] for part in (live, done, budgets, lengths, drawn))
        if step + 1 < steps:
            # A row whose budget is spent stays at its last position: further ones may pass the model's context.
            logits = reader.step(drawn, lengths + (budgets - 1).clamp(max=step))
    made = [min(start.budget, count, steps) for start, count in zip(starts, counts, strict=True)]
    rows = zip(made, tokens.tolist(), log_probs.tolist(), strict=True)
    return [(one[:length], logs[:length]) for length, one, logs in rows]
