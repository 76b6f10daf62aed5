"""Models and tokenizers from folders, run directories, the Hub, or packaged assets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from prefkit import assets
from prefkit.domains.text.config import Lora, Model
from prefkit.domains.text.packaged import model_folder
from prefkit.errors import InputError


def resolve(name: str) -> str:
    """The folder or Hub id behind a name: a packaged asset, a run directory's final model, a folder, or the Hub."""
    if not name:
        raise InputError("no model given", where="--model_name_or_path", mend="name a folder or a Hub id")
    if name in assets.ASSETS and not Path(name).exists():
        return str(model_folder(name))
    path = Path(name)
    if (path / "config.json").is_file() and (path / "metrics.jsonl").is_file():
        final = path / "model"
        if not (final / "config.json").is_file():
            raise InputError(
                f"run directory {name} has no final model yet",
                where="--model_name_or_path",
                mend=f"finish it with `prefkit resume {name}`",
            )
        return str(final)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"folder {name} holds no config.json, so it is no model",
                where="--model_name_or_path",
                mend="give the folder that `save_pretrained` wrote",
            )
        return name
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise InputError(
            f"there is no model folder {name}",
            where="--model_name_or_path",
            mend="give an existing folder, a Hub id (owner/name), or an asset of `prefkit assets`",
        )
    return name


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

    quantised = options.load_in_4bit or options.load_in_8bit
    arguments: dict[str, Any] = {"revision": options.model_revision}
    arguments["dtype"] = dtype if lora.use_peft or quantised else torch.float32
    if options.attn_implementation:
        arguments["attn_implementation"] = options.attn_implementation
    if quantised:
        arguments["quantization_config"] = _quantisation(options, lora, dtype)
    auto: Any = AutoModelForCausalLM
    if kind == "reward":
        auto = AutoModelForSequenceClassification
        arguments["num_labels"] = 1
    try:
        return auto.from_pretrained(source, **arguments)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the model {source} could not be loaded: {_first_line(error)}",
            where="--model_name_or_path",
            mend="check the name; without a network only folders, cached Hub models and packaged assets can be loaded",
        ) from error


def _quantisation(options: Model, lora: Lora, dtype: torch.dtype) -> Any:
    if options.load_in_4bit and options.load_in_8bit:
        raise InputError("load_in_4bit and load_in_8bit exclude each other", mend="choose one")
    if not lora.use_peft:
        raise InputError(
            "quantised weights cannot be trained",
            where="--load_in_4bit/--load_in_8bit",
            mend="add --use_peft, which trains an adapter on top of them",
        )
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore
    except ImportError as error:
        raise InputError(
            "quantised base weights need bitsandbytes", where="--load_in_4bit", mend="pip install 'prefkit[quant]'"
        ) from error
    from transformers import BitsAndBytesConfig

    if options.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def add_adapter(model: Any, options: Model, lora: Lora, *, modules_to_save: list[str] | None = None) -> Any:
    """Put a fresh LoRA adapter on the model, or load the one that training starts from."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if options.adapter_name_or_path:
        folder = Path(options.adapter_name_or_path)
        if (folder / "adapter" / "adapter_config.json").is_file():
            folder = folder / "adapter"
        if not (folder / "adapter_config.json").is_file():
            raise InputError(
                f"folder {folder} holds no adapter_config.json, so it is no LoRA adapter",
                where="--adapter_name_or_path",
                mend="give the folder that peft's save_pretrained wrote",
            )
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
        return get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(
            f"LoRA cannot be put on {targets}: {_first_line(error)}",
            where="--lora_target_modules",
            mend="name linear modules of this model, or all-linear",
        ) from error


def adapter_base(folder: Path) -> str:
    """The base model an adapter folder names."""
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
