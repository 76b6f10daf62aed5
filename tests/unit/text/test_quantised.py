"""4- and 8-bit base weights with LoRA: exact references, whole gradients, and scores that no batch or mode changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import tiny
from prefkit import cli
from prefkit.domains.text import quantised
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.reward import RewardModel
from prefkit.domains.text.sampler import Decoding, TransformersSampler
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.methods import dpo, hypo, reward, sft
from prefkit.records import Group

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (extra `quant`)")

BITS = (4, 8)
GROUPS = [Group([5, 9, 30, 31], [[80, 7, 2], [44]]), Group([60], [[7, 8, 9, 10, 11], [3, 2]])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are whole blocks of 64 weights wide, as processors with AVX512-BF16 repack them."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3.0)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    tiny.jsonl(folder / "pairs.jsonl", tiny.pairs())
    return folder


def policy(base: Path, bits: int, *, awake: bool = True, **options: Any) -> TextPolicy:
    how = {"use_peft": True, "lora_r": 4, "dtype": "float32", f"load_in_{bits}bit": True, **options}
    made = TextPolicy.create(dpo.Config(model_name_or_path=str(base), **how), World.start())
    if awake:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in made.module.named_parameters():
                if "lora_B.default" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return made


def dequantised(made: TextPolicy) -> TextPolicy:
    """The same policy with each quantised layer replaced by a plain one of the weights it stands for."""
    from torch import nn

    for name, part in list(made.module.named_modules()):
        if type(part).__name__ not in quantised.LAYERS or not type(part).__module__.startswith("bitsandbytes"):
            continue
        weight: Any = part.weight
        if type(part).__name__ == "Linear4bit":
            values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            rows = part.state.CB if part.state.CB is not None else weight.CB
            scale = part.state.SCB if part.state.SCB is not None else weight.SCB
            values = rows.float() * scale.float()[:, None] / 127
        plain = nn.Linear(part.in_features, part.out_features, bias=False)
        plain.weight = nn.Parameter(values.float(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        made.module.get_submodule(parent).register_module(last, plain)
    return made


def score_and_gradients(made: TextPolicy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    scores = made.log_probs(GROUPS)
    scores.sum().backward()
    found = {name: w.grad.clone() for name, w in made.module.named_parameters() if w.grad is not None}
    made.module.zero_grad()
    return scores.detach(), found


@pytest.mark.parametrize("bits", BITS)
def test_base_weights_are_stored_in_few_bits(base: Path, bits: int) -> None:
    made = policy(base, bits)
    assert quantised.is_quantised(made.model)
    layer = made.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert layer.dtype in (torch.uint8, torch.int8) and layer.numel() == 64 * 128 * bits // 8
    assert {w.dtype for w in made.module.parameters() if w.requires_grad} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
def test_the_reference_is_the_same_base_exactly(base: Path, bits: int, dtype: str) -> None:
    made = policy(base, bits, awake=False, dtype=dtype)
    before = made.reference_log_probs(GROUPS)
    assert torch.equal(made.log_probs(GROUPS).detach(), before)
    with torch.no_grad():
        for name, weight in made.module.named_parameters():
            if "lora_B.default" in name:
                weight.add_(0.3)
    assert not torch.equal(made.log_probs(GROUPS).detach(), before)
    assert torch.equal(made.reference_log_probs(GROUPS), before)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_scores_and_gradients_are_those_of_the_dequantised_weights(base: Path, bits: int, checkpointing: bool) -> None:
    """No layer drops its gradient: on AVX512-BF16 bitsandbytes' inference kernel would."""
    made = policy(base, bits, gradient_checkpointing=checkpointing)
    made.reference_log_probs(GROUPS)  # scoring without gradient comes first, as in training
    scores, gradients = score_and_gradients(made)
    plain, expected = score_and_gradients(dequantised(policy(base, bits)))
    torch.testing.assert_close(scores, plain, atol=2e-3, rtol=1e-4)
    assert gradients.keys() == expected.keys() and len(gradients) == 2 * 7 * 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-3, rtol=2e-2, msg=name)


@pytest.mark.parametrize("bits", BITS)
def test_sampling_and_batching_change_no_score(base: Path, bits: int) -> None:
    made = policy(base, bits)
    before = made.log_probs(GROUPS).detach()
    decoding = Decoding(max_new_tokens=8)
    drawn = TransformersSampler(made).sample([[5, 9], [7] * 9], num=2, decoding=decoding, seed=0, path=(), rows=[0, 1])
    for one in (s for answers in drawn for s in answers):
        scores = made.token_log_probs([Group(one.prompt, [one.tokens])])[0].tolist()
        assert one.log_probs == pytest.approx(scores, abs=1e-3)
    assert torch.equal(made.log_probs(GROUPS).detach(), before)
    alone = torch.cat([made.log_probs([group]) for group in GROUPS]).detach()
    torch.testing.assert_close(alone, before, atol=1e-4, rtol=1e-5)


def options(base: Path, method: Any, to: Path, bits: int, **more: Any) -> Any:
    how: dict[str, Any] = {
        "model_name_or_path": str(base),
        "dataset_name": str(base / "pairs.jsonl"),
        "output_dir": str(to),
        "use_peft": True,
        "lora_r": 4,
        "dtype": "float32",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        f"load_in_{bits}bit": True,
    }
    return dataclasses.replace(method.PRESETS["tiny"], **{**how, **more})


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("method", "bits"), [(dpo, 4), (hypo, 4), (hypo, 8), (sft, 8), (reward, 4), (reward, 8)])
def test_methods_train_and_end_with_an_adapter(base: Path, tmp_path: Path, method: Any, bits: int) -> None:
    run = method.run(options(base, method, tmp_path / "run", bits)).directory
    result = json.loads((run / "result.json").read_text())
    assert (result["model"], result["adapter"]) == (None, "adapter")
    rows = metrics(run)
    if method in (dpo, hypo):
        assert rows[0]["eval_rewards/margins"] == rows[1]["rewards/chosen"] == rows[1]["rewards/rejected"] == 0.0
        assert rows[1]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert all(row["grad_norm"] > 0 for row in rows[1:] if "grad_norm" in row)
    if method is reward:
        judge = RewardModel.load(str(run), dtype="float32")
        assert judge.mean != 0.0
        chosen = [row["chosen"][0]["content"] for row in tiny.pairs()]
        assert len(judge.judge([row["prompt"] for row in tiny.pairs()], chosen)) == len(chosen)


@pytest.mark.parametrize("bits", BITS)
def test_a_run_continues_bit_for_bit(base: Path, tmp_path: Path, bits: int) -> None:
    whole, parts = (options(base, dpo, tmp_path / name, bits, save_steps=2) for name in ("whole", "parts"))
    dpo.run(dataclasses.replace(whole, max_steps=4))
    dpo.run(dataclasses.replace(parts, max_steps=2))
    dpo.run(dataclasses.replace(parts, max_steps=4))
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_the_next_stage_starts_from_the_adapter(base: Path, tmp_path: Path) -> None:
    first = dpo.run(options(base, dpo, tmp_path / "first", 4)).directory
    second = dpo.run(options(base, dpo, tmp_path / "second", 4, adapter_name_or_path=str(first))).directory
    assert metrics(second)[1]["rewards/chosen"] == 0.0
    ended, began = metrics(first)[-1], metrics(second)[0]
    assert began["eval_rewards/margins"] == 0.0 and ended["step"] == 2


def test_the_end_of_a_run_is_sampled_and_exported_as_an_adapter(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = dpo.run(options(base, dpo, tmp_path / "run", 4)).directory
    opened = TextPolicy.pretrained(str(run), dtype="float32")
    assert quantised.is_quantised(opened.model)
    capsys.readouterr()
    assert cli.run(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    assert "trained on its 4-bit weights" in capsys.readouterr().out
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert cli.run(["export", str(run), "--to", str(tmp_path / "merged"), "--merge"]) == 2
    assert "cannot be merged" in capsys.readouterr().err
    again = options(base, dpo, tmp_path / "next", 4, model_name_or_path=str(run))
    with pytest.raises(InputError, match=f"--adapter_name_or_path {run}"):
        dpo.run(again)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"use_peft": False}, "add --use_peft"),
        ({"load_in_8bit": True}, "exclude each other"),
    ],
)
def test_combinations_that_cannot_work_are_refused_before_anything_is_written(
    base: Path, tmp_path: Path, more: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        dpo.run(options(base, dpo, tmp_path / "run", 4, **more))
    assert not (tmp_path / "run").exists()


def test_a_model_in_memory_keeps_its_weights(base: Path, tmp_path: Path) -> None:
    how = options(base, dpo, tmp_path / "run", 4, model_name_or_path="")
    with pytest.raises(InputError, match="in memory keeps the weights it has"):
        dpo.run(how, model=tiny.model(), tokenizer=tiny.tokenizer(), train=tiny.pairs())


def test_vllm_would_sample_another_policy(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fake_vllm
    from prefkit.domains.text.vllm import VllmSampler

    fake_vllm.install(monkeypatch)
    with pytest.raises(InputError, match="unrounded base"):
        VllmSampler(policy(base, 4))


def test_eight_bit_optimizer_states_train_and_continue(base: Path, tmp_path: Path) -> None:
    """All weights train: bitsandbytes keeps eight-bit states for tensors of 4,096 values or more only."""
    more: dict[str, Any] = {"use_peft": False, "load_in_4bit": False, "optim": "adamw_8bit", "learning_rate": 1e-3}
    whole, parts = (options(base, dpo, tmp_path / name, 4, save_steps=2, **more) for name in ("whole", "parts"))
    dpo.run(dataclasses.replace(whole, max_steps=4))
    dpo.run(dataclasses.replace(parts, max_steps=2))
    dpo.run(dataclasses.replace(parts, max_steps=4))
    assert metrics(tmp_path / "whole")[2]["loss"] < 0.693
    name = "model/model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    with safe_open(tmp_path / "whole" / "checkpoint-4" / "optimizer.safetensors", framework="pt") as states:
        assert any(states.get_tensor(key).dtype == torch.uint8 for key in states.keys())  # noqa: SIM118
