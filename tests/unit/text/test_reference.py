"""The reference is the start policy, bit for bit, and stays so; training moves nothing but what it should."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.reference import AdaptersOff, FrozenAdapter, FrozenCopy
from prefkit.engine.learner import Learner
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.methods import dpo
from prefkit.objectives.preference import dpo_loss
from prefkit.records import Group

GROUPS = [Group([5, 6, 7, 8], [[9, 10, 11], [12]]), Group([40], [[41, 42], [43, 44, 45, 46, 47]])]


def create(model: Any = None, **options: Any) -> TextPolicy:
    config = dpo.Config(**{"dtype": "float32", **options})
    if not config.model_name_or_path:
        model = model or tiny.model()
    return TextPolicy.create(config, World.start(), model=model, tokenizer=tiny.tokenizer())


def train(made: TextPolicy, steps: int = 3) -> None:
    config = dpo.Config(learning_rate=1e-2, lr_scheduler_type="constant")
    learner = Learner(made.module, config, total_steps=steps, world=made.world)

    def compute(batch: list[Group]) -> Any:
        scores, reference = made.log_probs(batch), made.reference_log_probs(batch)
        return dpo_loss(scores[:, 0], scores[:, 1], reference[:, 0], reference[:, 1], beta=0.1), {}

    for _ in range(steps):
        learner.update([GROUPS], compute)


def digests(module: torch.nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in module.state_dict().items()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An adapter that does something, with dropout configured, as an earlier stage may have left it."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    settings = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"use_peft": True}, {"use_peft": True, "gradient_checkpointing": True}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_at_step_0_rewards_are_exactly_0_and_the_loss_is_log_2(family: str, options: Any, dtype: str) -> None:
    made = create(tiny.model(family), dtype=dtype, **options)
    scores, reference = made.log_probs(GROUPS), made.reference_log_probs(GROUPS)
    assert torch.equal(scores, reference)
    assert scores.requires_grad and not reference.requires_grad
    losses = dpo_loss(scores[:, 0], scores[:, 1], reference[:, 0], reference[:, 1], beta=0.1)
    torch.testing.assert_close(losses, torch.full((2,), 0.693147), rtol=0, atol=1e-6)


def test_adapters_off_equals_a_frozen_copy_equals_the_start_model() -> None:
    whole, lora = create(), create(use_peft=True)
    assert isinstance(whole.reference, FrozenCopy)
    assert isinstance(lora.reference, AdaptersOff)
    start = whole.log_probs(GROUPS).detach()
    train(whole)
    train(lora)
    for made in (whole, lora):
        assert (made.log_probs(GROUPS) - start).abs().max() > 0.1, "training must have moved the policy"
        assert torch.equal(made.reference_log_probs(GROUPS), start)


def test_full_training_leaves_the_frozen_copy_alone() -> None:
    made = create()
    before, policy = digests(made.reference.module), digests(made.module)
    train(made)
    assert digests(made.reference.module) == before == policy
    assert digests(made.module) != policy
    assert not any(weight.requires_grad for weight in made.reference.module.parameters())


def test_lora_training_changes_the_adapter_only() -> None:
    made = create(use_peft=True)
    before = digests(made.module)
    train(made)
    changed = {name for name, value in digests(made.module).items() if value != before[name]}
    assert changed == {name for name in before if "lora_" in name}


def test_looking_at_the_reference_leaves_everything_trainable_as_it_was(adapter: Path) -> None:
    for made in (create(use_peft=True), create(use_peft=True, adapter_name_or_path=str(adapter))):
        before = {name: weight.requires_grad for name, weight in made.module.named_parameters()}
        assert {name for name, value in before.items() if value} == {n for n in before if ".default." in n}
        score = made.log_probs(GROUPS).detach()
        made.reference_log_probs(GROUPS)
        with pytest.raises(RuntimeError, match="stop"), made.reference.active():
            raise RuntimeError("stop")
        assert before == {name: weight.requires_grad for name, weight in made.module.named_parameters()}
        assert torch.equal(made.log_probs(GROUPS), score)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_from_an_adapter_its_frozen_copy_is_the_reference(base: Path, adapter: Path, checkpointing: bool) -> None:
    made = create(
        model_name_or_path=str(base),
        use_peft=True,
        adapter_name_or_path=str(adapter),
        gradient_checkpointing=checkpointing,
    )
    assert isinstance(made.reference, FrozenAdapter)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    expected = create(plain.merge_and_unload()).log_probs(GROUPS).detach()
    start = made.log_probs(GROUPS).detach()
    torch.testing.assert_close(start, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(made.reference_log_probs(GROUPS), start), "dropout off, same adapter: rewards are exactly 0"
    assert (start - create(model_name_or_path=str(base)).log_probs(GROUPS)).abs().max() > 0.1
    before = digests(made.module)
    train(made)
    changed = {name for name, value in digests(made.module).items() if value != before[name]}
    assert changed and all(".default." in name for name in changed)
    assert torch.equal(made.reference_log_probs(GROUPS), start)
    assert (made.log_probs(GROUPS) - start).abs().max() > 0.1


def test_gradient_checkpointing_survives_the_reference_adapter(base: Path, adapter: Path) -> None:
    made = create(
        model_name_or_path=str(base), use_peft=True, adapter_name_or_path=str(adapter), gradient_checkpointing=True
    )
    layers = [part for part in made.module.modules() if getattr(part, "gradient_checkpointing", False)]
    assert layers and all(part.training for part in layers), "transformers checkpoints in training mode only"


def test_an_adapter_may_be_named_by_the_run_that_made_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").symlink_to(adapter)
    named = create(model_name_or_path=str(base), use_peft=True, adapter_name_or_path=str(tmp_path))
    assert torch.equal(named.log_probs(GROUPS), named.reference_log_probs(GROUPS))


def test_an_adapter_that_is_none_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        create(model_name_or_path=str(base), use_peft=True, adapter_name_or_path=str(tmp_path))
    with pytest.raises(InputError, match="LoRA is off"):
        create(model_name_or_path=str(base), adapter_name_or_path=str(tmp_path))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_dropout_is_off(family: str, checkpointing: bool) -> None:
    config = tiny.config(family)
    for name in ("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0.5)
    torch.manual_seed(0)
    made = create(AutoModelForCausalLM.from_config(config), gradient_checkpointing=checkpointing)
    assert torch.equal(made.log_probs(GROUPS), made.log_probs(GROUPS))
    assert torch.equal(made.log_probs(GROUPS), made.reference_log_probs(GROUPS))


@pytest.mark.parametrize("use_peft", [False, True])
def test_what_trains_is_float32_even_for_a_bfloat16_model_given_in_memory(use_peft: bool) -> None:
    made = create(tiny.model().to(torch.bfloat16), dtype="bfloat16", use_peft=use_peft)
    trained = {weight.dtype for weight in made.module.parameters() if weight.requires_grad}
    assert trained == {torch.float32}


def test_a_new_adapter_depends_on_the_seed_alone() -> None:
    def fresh(seed: int, noise: int) -> dict[str, str]:
        model = tiny.model()
        torch.manual_seed(noise)
        return digests(create(model, use_peft=True, seed=seed).module)

    assert fresh(0, noise=1) == fresh(0, noise=2)
    assert fresh(0, noise=1) != fresh(1, noise=1)


def test_a_stage_starts_where_the_one_before_it_ended(base: Path, tmp_path: Path) -> None:
    first = create(model_name_or_path=str(base), use_peft=True)
    train(first)
    assert first.save_final(tmp_path) == {"model": "model", "adapter": "adapter"}
    ended = first.log_probs(GROUPS).detach()
    second = create(model_name_or_path=str(tmp_path / "model"), use_peft=True)
    stored = create(model_name_or_path=str(tmp_path / "model"))
    train(second)
    assert torch.equal(second.reference_log_probs(GROUPS), stored.log_probs(GROUPS))
    torch.testing.assert_close(second.reference_log_probs(GROUPS), ended, rtol=1e-4, atol=1e-4)
    assert (second.log_probs(GROUPS) - ended).abs().max() > 0.1
