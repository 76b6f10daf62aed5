import copy
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config

from prefkit.domains.text.memory import forecast, shape_of, shape_of_config
from prefkit.errors import InputError

CONFIG = LlamaConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    vocab_size=50,
    max_position_embeddings=64,
)


GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=50, bos_token_id=0, eos_token_id=0)


def test_parameters_are_counted_exactly() -> None:
    shape = shape_of_config(CONFIG)
    model = LlamaForCausalLM(CONFIG)
    assert shape.parameters == model.num_parameters()
    per_layer = 2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24)
    assert shape.linear == 2 * per_layer
    assert (shape.layers, shape.hidden, shape.inner, shape.vocabulary, shape.context) == (2, 16, 24, 50, 64)


def test_adapters_need_less_and_checkpointing_keeps_less() -> None:
    shape = shape_of_config(CONFIG)
    full = forecast(shape, rows=4, length=32)
    lora = forecast(shape, rows=4, length=32, trained="lora", lora_r=2)
    assert full.weights == 4 * shape.parameters and full.reference == 4 * shape.parameters
    assert (lora.optimizer, lora.gradients, lora.reference) == (8 * 2 * shape.linear, 4 * 2 * shape.linear, 0)
    assert lora.total < full.total
    assert forecast(shape, rows=4, length=32, checkpointing=True).activations < full.activations
    assert forecast(shape, rows=8, length=32).logits == 2 * full.logits
    assert forecast(shape, rows=4, length=32, answer=8).logits * 4 == full.logits


def test_gpt2s_own_linear_layers_are_counted() -> None:
    model = GPT2LMHeadModel(GPT2)
    shape = shape_of_config(GPT2)
    per_layer = (16 + 48) + (16 + 16) + 2 * (16 + 64)
    assert shape.linear == 2 * per_layer
    assert shape.body == 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64)
    for targets in ("all-linear", ["c_attn"], ["c_proj", "wte"], ["mlp.c_fc", "h.0.attn.c_proj"]):
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, target_modules=targets, fan_in_fan_out=True))
        trained = sum(weight.numel() for weight in peft.parameters() if weight.requires_grad)
        assert 3 * shape.rank([targets] if isinstance(targets, str) else targets) == trained, targets


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["lm_head", "layers.1.mlp.up_proj"]])
def test_adapters_have_the_size_that_peft_gives_them(targets: Any) -> None:
    shape = shape_of_config(CONFIG)
    peft = get_peft_model(LlamaForCausalLM(CONFIG), LoraConfig(r=5, target_modules=targets))
    trained = sum(weight.numel() for weight in peft.parameters() if weight.requires_grad)
    names = [targets] if isinstance(targets, str) else targets
    assert 5 * shape.rank(names) == trained
    assert forecast(shape, rows=1, length=8, trained="lora", lora_r=5, targets=names).gradients == 4 * trained


def test_targets_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="no such layers"):
        shape_of_config(CONFIG).rank(["proj"])


def test_the_page_tells_the_bytes_of_the_reference() -> None:
    shape = shape_of_config(CONFIG)
    page = (Path(__file__).parents[3] / "docs" / "data-formats.md").read_text(encoding="utf-8")
    told = re.search(r"\| reference \| all weights train: \$(\d)P\$; LoRA: 0 \|", page)
    assert told and forecast(shape, rows=1, length=8).reference == int(told.group(1)) * shape.parameters
    assert forecast(shape, rows=1, length=8, trained="lora").reference == 0


def test_bits_moments_and_sampling_are_counted() -> None:
    shape = shape_of_config(CONFIG)
    assert shape.body == 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    assert shape.key_values == 2 * 2 * 8  # keys and values of one head of 8, in two layers
    plain, small, smaller = (forecast(shape, rows=1, length=8, trained="lora", bits=bits) for bits in (0, 8, 4))
    assert plain.weights - small.weights == shape.body
    assert small.weights > smaller.weights > plain.weights - 1.6 * shape.body
    assert forecast(shape, rows=1, length=8, moments=2).optimizer == 2 * shape.parameters
    drawn = forecast(shape, rows=1, length=8, sampled=10**6)
    assert drawn.cache == 10**6 * shape.key_values * 2
    held = drawn.weights + drawn.reference + drawn.gradients + drawn.optimizer
    assert drawn.total == held + drawn.cache, "sampling is over before the step's own peak"


def test_what_is_no_causal_model_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="no model config can be read"):
        shape_of(str(tmp_path))
    with pytest.raises(InputError, match="is no causal language model"):
        shape_of_config(T5Config(), name="t5")
