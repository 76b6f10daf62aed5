import pytest
from transformers import LlamaConfig, LlamaForCausalLM, T5Config

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
