"""How much memory a model needs to train: arithmetic on its config.json, nothing is loaded.

Parameters are counted exactly, on a model built without storage. The rest is a forecast in bytes:

    weights      frozen: parameters x bytes of the dtype (linear ones x bits/8 if quantised); trained: x 4 (float32)
    reference    a second float32 copy where all weights train; nothing with LoRA (adapters off)
    gradients    4 x trained parameters
    optimizer    8 x trained parameters (AdamW's two moments in float32; 2 with 8-bit moments)
    activations  rows x length x (17 x hidden + 3 x inner) x layers x bytes: attention without its square
                 matrix; with gradient checkpointing one layer of it, and hidden per layer
    logits       3 x rows x answer tokens x vocabulary x 4: logits, log-softmax and their gradient
                 (both are those of padded rows and a whole vocabulary matrix: packed rows and a chunked head need less)
    cache        keys and values of every layer for the answers drawn at once; freed before the step's own peak
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from prefkit.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the forecast needs to know of a model."""

    name: str
    parameters: int
    linear: int
    """sum of inputs + outputs over the linear layers an adapter attaches to: one rank of LoRA"""
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    context: int
    body: int = 0
    """weights of those linear layers: every token of a forward pass is multiplied by each of them once"""
    key_values: int = 0
    """keys and values kept for each token, over all layers"""
    sides: Mapping[str, int] = field(default_factory=dict[str, int])
    """inputs + outputs by name, of every layer an adapter can attach to, head and embeddings included"""

    def rank(self, targets: Sequence[str]) -> int:
        """Weights of one rank of LoRA on `targets`, named as `--lora_target_modules`; InputError where none is."""
        if list(targets) == ["all-linear"]:
            return self.linear
        found = [side for name, side in self.sides.items() if any(f".{name}".endswith(f".{one}") for one in targets)]
        if not found:
            raise InputError(
                f"LoRA cannot be put on {list(targets)}: {self.name} has no such layers",
                where="--lora_target_modules",
                mend="name linear modules of this model, or all-linear",
            )
        return sum(found)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes by use; `total` is the larger of two peaks, the training step's and the sampling before it."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    cache: int = 0

    @property
    def total(self) -> int:
        kept = self.weights + self.reference + self.gradients + self.optimizer
        return kept + max(self.activations + self.logits, self.cache)


def shape_of(name: str, *, revision: str = "main") -> Shape:
    """Read config.json of a folder or Hub id. Raises InputError where there is none or it is no causal LM."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"no model config can be read: {reason}",
            where=name,
            mend="give a folder that holds config.json, or a Hub id",
        ) from error
    return shape_of_config(config, name=name)


def shape_of_config(config: PretrainedConfig, *, name: str = "") -> Shape:
    """Count parameters on a model without storage. Raises InputError where it is no causal LM."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise InputError("is no causal language model", where=name, mend="name a causal LM") from error
    head = model.get_output_embeddings()
    sides: dict[str, int] = {}
    linear: dict[str, torch.nn.Module] = {}
    for part_name, part in model.named_modules():
        # GPT-2's own linear layer keeps its weight the other way round; an adapter attaches to it all the same
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding | Conv1D):
            sides[part_name] = sum(part.weight.shape)
            if part is not head and not isinstance(part, torch.nn.Embedding):
                linear[part_name] = part
    text = config.get_text_config()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        name=name,
        parameters=sum(weight.numel() for weight in model.parameters()),
        linear=sum(sides[part] for part in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", 0) or 0,
        body=sum(part.weight.numel() for part in linear.values() if isinstance(part.weight, torch.Tensor)),
        sides=sides,
        key_values=2 * text.num_hidden_layers * head * (getattr(text, "num_key_value_heads", None) or heads),
    )


def forecast(
    shape: Shape,
    *,
    rows: int,
    length: int,
    answer: int | None = None,
    trained: Literal["all", "lora"] = "all",
    lora_r: int = 16,
    targets: Sequence[str] = ("all-linear",),
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    checkpointing: bool = False,
    reference: bool = True,
    bits: Literal[0, 4, 8] = 0,
    moments: int = 8,
    sampled: int = 0,
) -> Forecast:
    """Bytes of one optimizer step.

    `rows`: sequences per forward pass (two for each pair); `length`: tokens of the longest; `answer`: how
    many of them are scored (default: all); `targets`: layers LoRA adapts; `bits` of quantised base weights;
    `moments`: bytes of optimizer state per trained weight; `sampled`: tokens, prompts included, of the answers
    drawn at once. Raises InputError where LoRA finds no layer.
    """
    size = 4 if dtype == "float32" else 2
    lora = trained == "lora"
    moving = shape.rank(targets) * lora_r if lora else shape.parameters
    tokens = rows * length
    per_layer = tokens * (17 * shape.hidden + 3 * shape.inner) * size
    kept = per_layer * shape.layers
    if checkpointing:
        kept = per_layer + tokens * shape.hidden * shape.layers * size
    scored = rows * (length if answer is None else answer)
    # 4-bit storage keeps a scale for each block of 64 weights, itself quantised: half a byte and 1/64 more
    saved = shape.body * (size - {0: size, 4: 0.516, 8: 1}[bits])
    return Forecast(
        weights=round(shape.parameters * size - saved) + moving * 4 if lora else moving * 4,
        reference=moving * 4 if reference and not lora else 0,
        gradients=moving * 4,
        optimizer=moving * moments,
        activations=kept,
        logits=3 * scored * shape.vocabulary * 4,
        cache=sampled * shape.key_values * size,
    )
