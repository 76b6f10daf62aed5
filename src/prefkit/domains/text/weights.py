"""Weights to and from Hugging Face folders: whole models, adapters, and adapters merged into their base."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefkit.engine.files import UNFINISHED, read_json, write_json
from prefkit.engine.sharding import full_state, load_state
from prefkit.engine.world import World
from prefkit.errors import InputError

Kind = Literal["causal", "reward"]
PREFIX = "model."
"""the transformers model is the attribute `model` of every module the engine trains"""

EXTRA = "prefkit.json"
"""beside an adapter: what a whole model's config.json would hold of ours"""


def extra(folder: Path) -> dict[str, Any]:
    """What `save_final` put beside an adapter."""
    return read_json(folder / EXTRA) if (folder / EXTRA).is_file() else {}


def save(module: nn.Module, tokenizer: Any, folder: Path, *, world: World, adapter: bool) -> None:
    """Write the trained weights: the adapter, or the whole model. Every process must call it."""
    state = full_state(module, names=_trained(module, adapter))
    if not world.is_main:
        return
    model: Any = module.model
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    if adapter:
        model.save_pretrained(folder, state_dict=state, selected_adapters=["default"])
    else:
        model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def load(module: nn.Module, folder: Path, *, adapter: bool) -> None:
    """Put back what `save` wrote, bit for bit; InputError where the weights do not fit."""
    if adapter:
        from safetensors.torch import load_file

        state = _with_adapter_name(module, load_file(folder / "adapter_model.safetensors"))
    else:
        state = _whole_model(module, folder)
    load_state(module, state, names=_trained(module, adapter))


def _whole_model(module: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder under the module's names, on the main process; empty elsewhere.

    transformers reads them: names and shapes in its files are not always those of the model in memory.
    """
    if not World.start().is_main:
        return {}
    model: Any = module.model
    stored, found = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if found["missing_keys"]:
        raise InputError(f"lacks {sorted(found['missing_keys'])[0]}", where=str(folder))
    return {PREFIX + name: tensor for name, tensor in stored.state_dict().items()}


def save_final(
    module: nn.Module,
    tokenizer: Any,
    directory: Path,
    *,
    world: World,
    adapter: bool,
    source: str,
    revision: str = "main",
    kind: Kind,
    extra_config: Mapping[str, Any] | None = None,
) -> dict[str, str | None]:
    """Write DIRECTORY/adapter where LoRA was used, and DIRECTORY/model with the adapter merged.

    A quantised base cannot take a merge: there the adapter alone is the result. Gives the names of what was written.
    """
    if not adapter:
        with _whole(directory / "model", world) as folder:
            save(module, tokenizer, folder, world=world, adapter=False)
        return {"model": "model", "adapter": None}
    with _whole(directory / "adapter", world) as folder:
        save(module, tokenizer, folder, world=world, adapter=True)
        if world.is_main and extra_config:
            write_json(folder / EXTRA, extra_config)
    wrapped: Any = module.model
    if getattr(wrapped.get_base_model(), "hf_quantizer", None) is not None:
        return {"model": None, "adapter": "adapter"}
    merged: Any = None
    if world.is_main:
        if source:
            merged = merge(_load_base(source, revision, kind), directory / "adapter")
        else:
            merged = copy.deepcopy(wrapped).float().merge_and_unload(safe_merge=True)
        for name, value in (extra_config or {}).items():
            setattr(merged.config, name, value)
    with _whole(directory / "model", world) as folder:
        if world.is_main:
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return {"model": "model", "adapter": "adapter"}


@contextmanager
def _whole(folder: Path, world: World) -> Iterator[Path]:
    """A folder to write into that takes its name only once it is complete; an older one of that name goes."""
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    if world.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
    world.barrier()
    yield unfinished
    world.barrier()
    if world.is_main:
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)


def merge(base: Any, adapter: Path) -> Any:
    """A base model with an adapter folder merged into its weights, in the precision of the base given."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)


def _load_base(source: str, revision: str, kind: Kind) -> Any:
    """The base in float32: in bfloat16 the merge would round away most of a small update."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if kind == "reward":
        return AutoModelForSequenceClassification.from_pretrained(
            source, revision=revision, num_labels=1, dtype=torch.float32
        )
    return AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=torch.float32)


def _trained(module: nn.Module, adapter: bool) -> set[str] | None:
    """The adapter's tensors, or None for all: what a checkpoint holds."""
    if not adapter:
        return None
    return {name for name in module.state_dict() if ".default." in name}


def _with_adapter_name(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """peft leaves the adapter's name out of the names in its files; here they are the module's own again."""
    names = _trained(module, True) or ()
    own = {name.replace(".default.", ".").replace(".modules_to_save.", "."): name for name in names}
    return {own.get(PREFIX + name, PREFIX + name): tensor for name, tensor in state.items()}
