"""A policy in and out of files: what it loads, what it refuses, what it writes, and that it comes back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from prefkit.domains.text import loading
from prefkit.domains.text.policy import TextPolicy
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.methods import dpo
from prefkit.records import Group

GROUPS = [Group([5, 6, 7, 8], [[9, 10, 11], [12]]), Group([40], [[41, 42], [43, 44]])]
FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "cohere", "granite", "mistral")


def create(model: Any = None, **options: Any) -> TextPolicy:
    config = dpo.Config(**{"dtype": "float32", **options})
    if not config.model_name_or_path:
        model = model or tiny.model()
    return TextPolicy.create(config, World.start(), model=model, tokenizer=tiny.tokenizer())


def move(made: TextPolicy, seed: int = 1) -> None:
    """Change everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.module.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_bit_for_bit(tmp_path: Path, family: str, lora: bool) -> None:
    made = create(tiny.model(family), use_peft=lora)
    start = made.log_probs(GROUPS).detach()
    move(made)
    moved = made.log_probs(GROUPS).detach()
    assert (moved - start).abs().max() > 0.01
    made.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert ("adapter_model.safetensors" if lora else "model.safetensors") in names
    move(made, seed=2)
    assert not torch.equal(made.log_probs(GROUPS), moved)
    made.load(tmp_path)
    assert torch.equal(made.log_probs(GROUPS), moved)
    fresh = create(tiny.model(family), use_peft=lora)
    fresh.load(tmp_path)
    assert torch.equal(fresh.log_probs(GROUPS), moved)
    assert torch.equal(fresh.reference_log_probs(GROUPS), start)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_model_is_a_stock_folder_with_the_same_scores(
    tmp_path: Path, family: str, lora: bool, named: bool
) -> None:
    source = {"model_name_or_path": str(tiny.folder(tmp_path / "base", family))} if named else {}
    made = create(None if named else tiny.model(family), use_peft=lora, **source)
    move(made)
    written = made.save_final(tmp_path / "run")
    assert written == {"model": "model", "adapter": "adapter" if lora else None}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert type(model) is type(tiny.model(family))
    assert "peft" not in "".join((tmp_path / "run" / "model" / "config.json").read_text().split()).lower()
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template == tiny.TEMPLATE
    again = create(model).log_probs(GROUPS)
    torch.testing.assert_close(again, made.log_probs(GROUPS), rtol=1e-4, atol=1e-4)
    if lora:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base") if named else tiny.model(family)
        with_adapter = loading.load_adapter(base, tmp_path / "run" / "adapter").merge_and_unload()
        torch.testing.assert_close(create(with_adapter).log_probs(GROUPS), again, rtol=1e-4, atol=1e-4)


def test_saving_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    for lora in (False, True):
        made = create(use_peft=lora)
        move(made)
        before = made.log_probs(GROUPS).detach()
        made.save_final(tmp_path / str(lora))
        made.save(tmp_path / f"{lora}-checkpoint")
        after = made.log_probs(GROUPS)
        assert torch.equal(after, before) and after.requires_grad
        assert made.uses_adapter == lora


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    create(tiny.model(layers=1)).save(tmp_path / "shorter")
    with pytest.raises(InputError, match="do not fit"):
        create().load(tmp_path / "shorter")
    create(use_peft=True, lora_r=4).save(tmp_path / "narrow")
    with pytest.raises(InputError, match="shape"):
        create(use_peft=True, lora_r=8).load(tmp_path / "narrow")
    create(use_peft=True).save(tmp_path / "half")
    half = load_file(tmp_path / "half" / "adapter_model.safetensors")
    save_file(dict(list(half.items())[2:]), tmp_path / "half" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="lacks"):
        create(use_peft=True).load(tmp_path / "half")


def test_a_bfloat16_base_is_merged_in_its_stored_precision(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base")
    made = create(model_name_or_path=str(base), use_peft=True, dtype="bfloat16")
    assert {w.dtype for w in made.module.parameters() if not w.requires_grad} == {torch.bfloat16}
    assert {w.dtype for w in made.module.parameters() if w.requires_grad} == {torch.float32}
    made.save_final(tmp_path / "run")  # B is 0: the merge must give the stored weights themselves
    stored, merged = (load_file(p / "model.safetensors") for p in (base, tmp_path / "run" / "model"))
    assert all(torch.equal(merged[name], value) for name, value in stored.items())


def test_a_generation_config_is_kept(tmp_path: Path) -> None:
    model = tiny.model()
    model.generation_config.eos_token_id = [2, 5]
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for lora in (False, True):
        create(model_name_or_path=str(tmp_path / "base"), use_peft=lora).save_final(tmp_path / str(lora))
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / str(lora) / "model").generation_config
        assert kept.eos_token_id == [2, 5] and kept.max_new_tokens == 77


def test_a_description_says_what_trains() -> None:
    assert "all weights" in create().describe() and "float32" in create().describe()
    assert "LoRA" in create(use_peft=True).describe()


def test_a_policy_without_reference_has_none() -> None:
    config = dpo.Config(dtype="float32")
    made = TextPolicy.create(
        config, World.start(), model=tiny.model(), tokenizer=tiny.tokenizer(), copy_reference=False
    )
    assert not made.has_reference
    with pytest.raises(AssertionError, match="without a reference"):
        made.reference_log_probs(GROUPS)


def test_an_adapted_model_in_memory_is_refused() -> None:
    adapted = get_peft_model(tiny.model(), LoraConfig(target_modules="all-linear"))
    for lora in (False, True):
        with pytest.raises(InputError, match="already carries a LoRA adapter"):
            create(adapted, use_peft=lora)


def test_names_and_what_they_stand_for(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base")
    assert loading.resolve(str(base)) == str(base)
    for on_the_hub in ("owner/name", "gpt2"):
        assert loading.resolve(on_the_hub) == on_the_hub
    for wrong in ("", "/nowhere/at/all", "./x", "a/b/c"):
        with pytest.raises(InputError):
            loading.resolve(wrong)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no final model yet"):
        loading.resolve(str(run))
    base.rename(run / "model")
    with pytest.raises(InputError, match="no final model yet"):  # one of an earlier total, until the run has ended
        loading.resolve(str(run))
    (run / "result.json").write_text("{}")
    assert loading.resolve(str(run)) == str(run / "model")


def test_a_tokenizer_gets_a_pad_token_where_it_has_none() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    assert loading.prepare_tokenizer(tokenizer).pad_token_id == tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither a pad nor an end-of-sequence"):
        loading.prepare_tokenizer(tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_is_read_from_the_config(tmp_path: Path, family: str) -> None:
    options = dpo.Config(model_name_or_path=str(tiny.folder(tmp_path / "base", family)))
    length = tiny.config(family).max_position_embeddings
    assert loading.context(options) == loading.context(dpo.Config(), tiny.model(family)) == length > 0
