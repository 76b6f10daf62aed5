"""Which layout a model is scored in: tried on the model itself at the start, and said in one line."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from prefkit.domains.text import attention, last_layer
from prefkit.domains.text.layout import Layout, lay_out
from prefkit.domains.text.scoring import LanguageModel, causal_lm, hidden_states
from prefkit.engine.precision import autocast
from prefkit.errors import InputError
from prefkit.records import Group

AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2.0, torch.float16: 0.25}
"""how far packed rows may be from padded ones; nats for log-probs, a share of their size for hidden states. In bfloat16
a 135 M model moves a token by 0.6 nats for no other reason than another batch; a missing mask moves one by 6."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""how far log-probs may be from the model's own forward pass, in nats, by the dtype computed in"""
UNFIT = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError)
"""what a model raises that does not take what it is given"""
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
LONGEST_PROBE = 256
"""a sliding window beyond this is not run over by the probe; that its layers hand it over is checked all the same"""


def choose(module: Any, wanted: str, *, pad: int, vocabulary: int) -> None:
    """Set `module.backend` to the one `wanted`, or with "auto" to the fastest that passes, and `module.how` to a line.

    Raises InputError where a backend asked for by name does not give this model's own log-probs.
    """
    if wanted == "padded":
        module.backend, module.how = "padded", "scoring in padded rows, as asked"
        return
    on_cuda = next(module.parameters()).device.type == "cuda"
    tried: tuple[Any, ...] = (wanted,) if wanted != "auto" else ("flex", "sdpa") if on_cuda else ("sdpa",)
    reason = ""
    for backend in tried:
        reason = _try(module, backend, pad, vocabulary)
        if not reason:
            module.backend = backend
            module.how = f"scoring in packed rows, each prompt once ({backend} attention)"
            return
    if wanted != "auto":
        raise InputError(
            f"backend {wanted!r} cannot score this model: {reason}",
            where="--scoring_backend",
            mend="use auto, or padded",
        )
    module.backend, module.how = "padded", f"scoring in padded rows: packed ones cannot be used, {reason}"


def _try(module: Any, backend: Any, pad: int, vocabulary: int) -> str:
    """Why packed rows cannot be used with this model; empty where they can."""
    model = causal_lm(module.model)
    config = model.config.get_text_config()
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS)
    if strange:
        return f"it has layers of the kind {', '.join(strange)}"
    own = config._attn_implementation
    if "position_ids" not in inspect.signature(_decoder(module).forward).parameters:
        return "it takes no position ids"
    for whole in (False, True):  # the last layer at the rows that are read; where that does not fit, all of it
        reason, seen, trimmed = _fit(module, backend, pad, vocabulary, whole)
        if not reason:
            break
        _restore(model, own)
        if not trimmed:
            return reason
    expected, found = _windows(config), sum(window is not None for window in seen)
    if found != expected:
        _restore(model, own)
        return f"{expected} of its layers have a sliding window and {found} hand it over"
    return ""


def _fit(module: Any, backend: Any, pad: int, vocabulary: int, whole: bool) -> tuple[str, list[int | None], bool]:
    """Install a plan's attention and try it: what is wrong, each layer's window, whether the last layer is trimmed."""
    model, last = causal_lm(module.model), None
    try:
        attention.install(model)
        last = last_layer.install(_decoder(module))
        if last is not None:
            last.on = not whole
        gap, seen = _gap(module, backend, pad, vocabulary)
    except UNFIT as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"its attention takes no plan ({why})", [], last is not None and last.on
    reason = "" if gap <= AGREEMENT[_probe_dtype(module)] else f"they differ from padded ones by {gap:.3g}"
    return reason if seen else "its attention takes no plan", seen or [], last is not None and last.on


def _restore(model: nn.Module, own: str) -> None:
    """The model's own attention again; copies made later are then as the user's model was."""
    config: Any = model.config
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part._attn_implementation = own


def _windows(config: Any) -> int:
    """Layers that should see a window only."""
    if not getattr(config, "sliding_window", None):
        return 0
    kinds = getattr(config, "layer_types", None)
    return config.num_hidden_layers if kinds is None else sum(kind == "sliding_attention" for kind in kinds)


def probe(vocabulary: int, window: int = 0) -> list[Group]:
    """Ragged groups of one to three answers, one-token prompts and answers among them, longer than a small window."""
    reach = window + 8 if 0 < window <= LONGEST_PROBE else 0

    def ids(count: int, start: int) -> list[int]:
        return [(37 * (start + i) + 11) % vocabulary for i in range(count)]

    return [
        Group(ids(max(9, reach), 1), [ids(5, 100), ids(7, 200), ids(1, 300)]),
        Group(ids(1, 400), [ids(6, 500)]),
        Group(ids(5, 600), [ids(2, 700), ids(max(8, reach), 800)]),
    ]


@torch.no_grad()
def _gap(module: Any, backend: Any, pad: int, vocabulary: int) -> tuple[float, list[int | None] | None]:
    """Largest difference to padded rows with a whole last layer, and the window of every layer (None where no layer
    took the plan).

    In nats for a model that scores; for a reward model, in hidden states relative to their size.
    """
    device = next(module.parameters()).device
    config = causal_lm(module.model).config.get_text_config()
    groups = probe(vocabulary, getattr(config, "sliding_window", None) or 0)
    packed = lay_out(groups, pad, device, backend=backend)
    assert packed.plan is not None
    packed.plan.seen = []
    dtype, module.dtype = module.dtype, _probe_dtype(module)
    try:
        padded = lay_out(groups, pad, device)
        expected, *scored = [_values(module, layout) for layout in (replace(padded, rows=None), packed, padded)]
    finally:
        module.dtype = dtype
    seen = packed.plan.seen
    return max(float((values - expected).abs().max()) for values in scored), seen or None


def _probe_dtype(module: Any) -> torch.dtype:
    """float32 where the weights are: a coarser one would hide a small difference."""
    kinds = {weight.dtype for weight in module.parameters() if weight.is_floating_point()}
    return torch.float32 if kinds == {torch.float32} else module.dtype


def _decoder(module: Any) -> Any:
    model = causal_lm(module.model)
    return model.get_decoder() if isinstance(module, LanguageModel) else model.base_model


def _values(module: Any, layout: Layout) -> torch.Tensor:
    if isinstance(module, LanguageModel):
        return module(layout)  # pyright: ignore[reportReturnType]
    with autocast(module.dtype, layout.ids.device):
        hidden = hidden_states(_decoder(module), layout).flatten(0, 1).index_select(0, layout.before)
    return hidden.float() / hidden.float().abs().mean()
