"""Models and tokenizers from folders, run directories, the Hub, or packaged assets."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from prefkit import assets
from prefkit.domains.text import quantised
from prefkit.domains.text.config import Lora, Model
from prefkit.domains.text.packaged import model_folder
from prefkit.engine.seeds import number
from prefkit.engine.world import World
from prefkit.errors import InputError

ADAPTER = "adapter_config.json"
"""the file that makes a folder a peft adapter"""
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
"""OWNER/NAME, or a bare NAME as the oldest models on the Hub have"""
ALIGNMENT = 64
"""bytes; where torch begins a tensor of its own on a CPU"""
HEADS = ("score", "classifier")
"""the heads of reward models, which a causal LM's folder has not"""


def resolve(name: str) -> str:
    """The folder or Hub id behind a name: a packaged asset, a run directory's final model, a folder, or the Hub."""
    if not name:
        raise InputError("no model given", where="--model_name_or_path", mend="name a folder or a Hub id")
    if name in assets.ASSETS and not Path(name).exists():
        return str(model_folder(name))
    path = Path(name).expanduser()
    if (path / "config.json").is_file() and (path / "metrics.jsonl").is_file():
        return _final_model(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"folder {name} holds no config.json, so it is no model",
                where="--model_name_or_path",
                mend="give the folder that `save_pretrained` wrote",
            )
        return str(path)
    if not HUB_ID.fullmatch(name):
        raise InputError(
            f"there is no model folder {name}",
            where="--model_name_or_path",
            mend="give an existing folder, a Hub id (owner/name), or an asset of `prefkit assets`",
        )
    return name


def _final_model(run: Path) -> str:
    final = run / "model"
    if (final / "config.json").is_file() and (run / "result.json").is_file():
        return str(final)
    if (run / "result.json").is_file() and (run / "adapter" / ADAPTER).is_file():
        raise InputError(
            f"run directory {run} ended with an adapter alone, because its base is quantised and cannot be merged into",
            where="--model_name_or_path",
            mend=f"name the run's base model again and add --use_peft --adapter_name_or_path {run}",
        )
    raise InputError(
        f"run directory {run} has no final model yet",
        where="--model_name_or_path",
        mend=f"finish it with `prefkit resume {run}`",
    )


@dataclass(frozen=True)
class Trained:
    """What a name stands for when it is to be used, not trained: a whole model, or an adapter on its base."""

    model: str
    """folder or Hub id"""
    adapter: Path | None = None
    options: Model = field(default_factory=Model)
    """how the base was loaded in training: its revision and its bits"""


def trained(name: str) -> Trained:
    """The model behind a name as `resolve` takes it, or behind an adapter folder or a run that ended with one."""
    path = Path(name)
    run = path if (path / "metrics.jsonl").is_file() else path.parent
    if run == path and not (path / "model" / "config.json").is_file() and (path / "adapter" / ADAPTER).is_file():
        path = path / "adapter"
    if not (path / ADAPTER).is_file():
        return Trained(resolve(name))
    values: dict[str, Any] = {}
    if (run / "metrics.jsonl").is_file():
        values = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
    base = values.get("model_name_or_path") or adapter_base(path)
    if not base:
        raise InputError(
            "the adapter does not say which model it belongs to",
            where=str(path / ADAPTER),
            mend="write the base model's folder or Hub id into base_model_name_or_path",
        )
    known = ("model_revision", "load_in_4bit", "load_in_8bit")
    return Trained(resolve(base), path, Model(**{name: values[name] for name in known if name in values}))


def context(options: Model, model: Any = None) -> int:
    """Most tokens the model takes, prompt and answer together; 0 where its config names no limit.

    `model`: the model itself where it is in memory. Raises InputError.
    """
    from transformers import AutoConfig

    if model is not None:
        return _positions(model.config)
    source = resolve(options.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(source, revision=options.model_revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the config of {source} cannot be read: {_first_line(error)}", where="--model_name_or_path"
        ) from error
    return _positions(config)


def _positions(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 0)


def load_tokenizer(options: Model, source: str) -> Any:
    """The model's own tokenizer, with a pad token (the end token stands in where there is none)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=options.model_revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer could be loaded from {source}: {_first_line(error)}",
            where="--model_name_or_path",
            mend="save the tokenizer in the model folder with tokenizer.save_pretrained(folder)",
        ) from error
    return prepare_tokenizer(tokenizer)


def prepare_tokenizer(tokenizer: Any) -> Any:
    """Give a tokenizer a pad token where it has none; padding is never trained on or attended to."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has neither a pad nor an end-of-sequence token")
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def load_model(options: Model, lora: Lora, source: str, dtype: torch.dtype, *, kind: str = "causal") -> Any:
    """A causal LM whose frozen weights have the compute dtype and whose trained weights stay float32."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    bits = quantised.settings(options, dtype)
    arguments: dict[str, Any] = {"revision": options.model_revision}
    arguments["dtype"] = dtype if lora.use_peft or bits is not None else torch.float32
    if options.attn_implementation:
        arguments["attn_implementation"] = options.attn_implementation
    if bits is not None:
        arguments["quantization_config"] = bits
    auto: Any = AutoModelForCausalLM
    if kind == "reward":
        auto = AutoModelForSequenceClassification
        arguments["num_labels"] = 1
    try:
        model, found = auto.from_pretrained(source, output_loading_info=True, **arguments)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"the model {source} could not be loaded: {_first_line(error)}",
            where="--model_name_or_path",
            mend="check the name; without a network only folders, cached Hub models and packaged assets can be loaded",
        ) from error
    missing = sorted(name for name in found["missing_keys"] if kind != "reward" or name.partition(".")[0] not in HEADS)
    if missing:
        raise InputError(
            f"the model {source} lacks {missing[0]} ({len(missing)} weights in all); they would be random numbers",
            where="--model_name_or_path",
            mend="give a folder with all the weights its config.json asks for",
        )
    return in_own_memory(model)


def in_own_memory(model: Any) -> Any:
    """The model with every weight where a fresh tensor would stand.

    Weights that are a view of a mapped file begin at any byte, and the CPU's matrix kernels round otherwise there: a
    process of a launch, whose weights are copied, would give other last digits than one alone.
    """
    for weight in (*model.parameters(), *model.buffers()):
        if weight.device.type == "cpu" and weight.data_ptr() % ALIGNMENT:
            weight.data = weight.data.clone()
    return model


def add_adapter(model: Any, options: Model, lora: Lora, *, seed: int, modules_to_save: list[str] | None = None) -> Any:
    """Put a fresh LoRA adapter on the model (its weights depend on `seed`), or load the one training starts from."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if options.adapter_name_or_path:
        folder = adapter_folder(options.adapter_name_or_path)
        _same_adapter(folder, lora)
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    targets: Any = list(lora.lora_target_modules)
    settings = LoraConfig(
        task_type="SEQ_CLS" if modules_to_save else "CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,  # pyright: ignore[reportArgumentType]  # a float is fine: it is only divided
        lora_dropout=0.0,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=modules_to_save,
    )
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():  # peft draws from the global generator
            # ... and asks transformers for an attribute that was renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            torch.manual_seed(number(seed, "adapter"))
            return get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(
            f"LoRA cannot be put on {targets}: {_first_line(error)}",
            where="--lora_target_modules",
            mend="name linear modules of this model, or all-linear",
        ) from error


def _same_adapter(folder: Path, lora: Lora) -> None:
    """InputError where LoRA options were given that the adapter to start from does not have."""
    stored = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    for name, key in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
        asked = getattr(lora, name)
        if asked != getattr(Lora(), name) and asked != stored.get(key):
            raise InputError(
                f"{name} is {asked}, the adapter to start from has {stored.get(key)}",
                where=f"--{name} with --adapter_name_or_path {folder}",
                mend=f"leave --{name} out: training goes on with the adapter's own",
            )


def adapter_folder(name: str) -> Path:
    """The folder of an adapter: the one named, or `adapter` in a run directory. Raises InputError."""
    folder = Path(name)
    if (folder / "adapter" / ADAPTER).is_file():
        folder = folder / "adapter"
    if not (folder / ADAPTER).is_file():
        raise InputError(
            f"folder {folder} holds no adapter_config.json, so it is no LoRA adapter",
            where="--adapter_name_or_path",
            mend="give the folder that peft's save_pretrained wrote",
        )
    return folder


def refuse_adapted(model: Any) -> None:
    """InputError for a model given in memory that carries a LoRA adapter of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Adapter layers stay inside a model after its peft wrapper is gone, as after an earlier run in this process.
    if any(isinstance(part, BaseTunerLayer) for part in model.modules()):
        raise InputError(
            "the model given in memory already carries a LoRA adapter",
            mend="load the model anew, give model.merge_and_unload(), or the base model and adapter_name_or_path",
        )


def refuse_sharded_merge(options: Any, world: World) -> None:
    """InputError for a model in memory with LoRA under FSDP2: its base cannot be read again for the merge."""
    if world.sharded and options.use_peft:
        raise InputError(
            "LoRA on a model given in memory cannot be merged once it is sharded",
            where="model=",
            mend="save the model and name its folder as model_name_or_path",
        )


def widen(model: Any, dtype: torch.dtype) -> None:
    """Make what trains float32, and with compute dtype float32 the frozen weights too; models in memory come as any."""
    for weight in model.parameters():
        if weight.is_floating_point() and (weight.requires_grad or dtype == torch.float32):
            weight.data = weight.data.float()


def load_adapter(model: Any, folder: Path) -> Any:
    """The model with a trained adapter on it, for use without training."""
    from peft import PeftModel

    return in_own_memory(PeftModel.from_pretrained(model, str(folder)))


def adapter_base(folder: Path) -> str:
    """The base model an adapter folder names; empty where it names none."""
    return json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
