"""`prefkit export`: folders that plain from_pretrained loads, and that compute what the run's model computed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import tiny
from prefkit import cli
from prefkit.domains.text.policy import TextPolicy
from prefkit.methods import dpo, reward, sft
from prefkit.records import Group

IDS = torch.tensor([[5, 9, 30, 31, 80, 7]])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tiny.folder(folder / "base")
    GenerationConfig(eos_token_id=[2, 0], pad_token_id=2, max_new_tokens=17).save_pretrained(folder / "base")
    tiny.jsonl(folder / "pairs.jsonl", tiny.pairs())
    return folder


def train(place: Path, method: Any, name: str, **options: Any) -> Path:
    config = dataclasses.replace(
        method.PRESETS["tiny"],
        model_name_or_path=str(place / "base"),
        dataset_name=str(place / "pairs.jsonl"),
        output_dir=str(place / name),
        dtype="float32",
        learning_rate=0.05,
        max_steps=2,
        **options,
    )
    return method.run(config).directory


@pytest.fixture(scope="module")
def lora(place: Path) -> Path:
    return train(place, dpo, "lora", use_peft=True, lora_r=4)


@pytest.fixture(scope="module")
def full(place: Path) -> Path:
    return train(place, sft, "full")


@pytest.fixture(scope="module")
def scorer(place: Path) -> Path:
    return train(place, reward, "scorer", use_peft=True, lora_r=4)


def export(run: Path, to: Path, *words: str) -> int:
    return cli.run(["export", str(run), "--to", str(to), *words])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def test_merged_equals_unmerged_equals_what_was_trained(lora: Path, place: Path, tmp_path: Path) -> None:
    assert export(lora, tmp_path / "adapter") == export(lora, tmp_path / "merged", "--merge") == 0
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    before = logits(base)
    unmerged = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert (unmerged - before).abs().max() > 0.05, "the adapter does something"
    torch.testing.assert_close(merged, unmerged, atol=1e-4, rtol=1e-4)


def test_an_adapter_folder_is_all_a_loader_needs(lora: Path, place: Path, tmp_path: Path) -> None:
    export(lora, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(place / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)  # transformers finds the base
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(PeftModel.from_pretrained(base, str(tmp_path / "out"))))


def test_runs_and_exported_folders_are_sampled_from_alike(lora: Path, tmp_path: Path) -> None:
    export(lora, tmp_path / "adapter")
    export(lora, tmp_path / "merged", "--merge")
    group = Group(IDS[0, :3].tolist(), [IDS[0, 3:].tolist()])
    places = (lora, tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        scores = [float(TextPolicy.pretrained(str(place), dtype="float32").log_probs([group])) for place in places]
    assert scores[0] == scores[2] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize("words", [(), ("--merge",)])
def test_tokenizer_template_generation_config_and_card_are_there(lora: Path, tmp_path: Path, words: Any) -> None:
    export(lora, tmp_path / "out", *words)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny.TEMPLATE
    assert tokenizer("red dog").input_ids == tiny.tokenizer()("red dog").input_ids
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---") and "dpo" in card.lower()
    assert not list((tmp_path / "out").glob(".tmp*"))


def test_a_full_run_gives_its_model(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(full, tmp_path / "out")
    assert "model, all weights trained" in capsys.readouterr().out.splitlines()[-1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(full / "model")))
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 17


def test_a_reward_run_gives_a_sequence_classifier(scorer: Path, place: Path, tmp_path: Path) -> None:
    export(scorer, tmp_path / "merged", "--merge")
    export(scorer, tmp_path / "adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = merged.config.pad_token_id
    unmerged = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert logits(merged).shape == (1, 1)
    torch.testing.assert_close(logits(merged), logits(unmerged), atol=1e-4, rtol=1e-4)
    assert isinstance(merged.config.prefkit_reward_mean, float)


@pytest.mark.parametrize("words", [(), ("--merge",)])
def test_weights_are_converted_on_request(lora: Path, tmp_path: Path, words: Any) -> None:
    export(lora, tmp_path / "out", "--dtype", "bfloat16", *words)
    tensors = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    exact = load_file(lora / ("model/model.safetensors" if words else "adapter/adapter_model.safetensors"))
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}, "the run keeps its own"
    assert all(torch.equal(tensors[name], exact[name].bfloat16()) for name in exact)


def test_the_base_can_be_named_and_the_summary_says_so(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(lora, tmp_path / "out", "--base", "owner/model")
    line = capsys.readouterr().out.strip()
    assert line.startswith("adapter of owner/model, 0.0") and line.endswith(f" MB: {tmp_path / 'out'}")
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/model"
    )


def test_a_used_folder_is_refused_and_replaced_when_asked(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert export(lora, out) == 0, "an empty folder may be used"
    (out / "extra.txt").write_text("left over")
    assert export(lora, out) == 2
    assert "is not empty" in capsys.readouterr().err
    assert export(lora, out, "--overwrite", "--merge") == 0
    assert (out / "config.json").exists() and not (out / "extra.txt").exists()


def test_nothing_but_a_model_folder_is_ever_replaced(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    assert export(lora, tmp_path / "letters", "--overwrite") == 2
    assert "is no model folder" in capsys.readouterr().err
    assert (tmp_path / "letters" / "dear.txt").exists()
    for inside in (lora, lora / "model", lora.parent):
        assert export(lora, inside, "--overwrite") == 2
        assert "in or around the run" in capsys.readouterr().err
    assert (lora / "model" / "config.json").exists()


def test_a_failed_export_leaves_nothing(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prefkit.report.card.render", full_disk)
    assert export(lora, tmp_path / "out") == 2
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_refused(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(lora, copy)
    (copy / "result.json").unlink()
    assert export(copy, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "has not finished" in error and "prefkit resume" in error


def test_an_adapter_of_a_model_in_memory_needs_its_base_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(
        dpo.PRESETS["tiny"], dtype="float32", use_peft=True, lora_r=2, max_steps=1, output_dir=str(tmp_path / "run")
    )
    run = dpo.run(config, model=tiny.model(), tokenizer=tiny.tokenizer(), train=tiny.pairs()).directory
    capsys.readouterr()
    assert export(run, tmp_path / "out") == 2
    assert "--base" in capsys.readouterr().err
    assert export(run, tmp_path / "out", "--base", str(place / "base")) == 0
    assert export(run, tmp_path / "merged", "--merge") == 0
