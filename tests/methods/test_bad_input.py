"""Input that cannot be used: exit code 2, one message that names place and mend, and nothing left in the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tiny
from method_runs import METHODS, Inputs, lines, metrics, read, run
from prefkit import cli
from prefkit.methods import dpo


def refused(capsys: Any, arguments: list[str], *words: str) -> str:
    """The message of a command that must fail with code 2; `words` must all stand in it."""
    capsys.readouterr()
    code = cli.run(arguments)
    said = capsys.readouterr().err
    message = said[said.rfind("prefkit: ") :]
    assert code == 2, said
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert "Traceback" not in said
    return message


def rows(change: Callable[[list[dict[str, Any]]], None]) -> str:
    made = tiny.pairs(16)
    change(made)
    return "".join(json.dumps(row) + "\n" for row in made)


def mixed_roles(made: list[dict[str, Any]]) -> None:
    made[5]["chosen"] = [{"role": "user", "content": "blue"}]


def strings_among_conversations(made: list[dict[str, Any]]) -> None:
    made[3]["prompt"] = "red"


def no_rejected(made: list[dict[str, Any]]) -> None:
    for row in made:
        row["worse"] = row.pop("rejected")


def empty_answer(made: list[dict[str, Any]]) -> None:
    made[6]["chosen"] = [{"role": "assistant", "content": "  "}]


def nan_score(made: list[dict[str, Any]]) -> None:
    for row in made:
        row["score_chosen"] = 1.0
        row["score_rejected"] = 0.0
    made[2]["score_chosen"] = float("nan")


def long_prompt(made: list[dict[str, Any]]) -> None:
    made[7]["prompt"] = [{"role": "user", "content": "red blue " * 2000}]


BAD_FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "wrong column": (rows(no_rejected), ("train.jsonl", "rejected", "worse", "mend")),
    "mixed roles": (rows(mixed_roles), ("train.jsonl line 6", "chosen", "mend")),
    "strings among conversations": (rows(strings_among_conversations), ("train.jsonl line 4", "prompt")),
    "empty file": ("", ("train.jsonl", "mend")),
    "broken JSON": (rows(lambda made: None) + '{"prompt": "a", "chosen": \n', ("train.jsonl line 17", "mend")),
    "NaN score": (rows(nan_score), ("train.jsonl line 3", "score_chosen", "mend")),
    "empty answer": (rows(empty_answer), ("train.jsonl line 7", "chosen", "empty", "mend")),
    "long prompt": (rows(long_prompt), ("train.jsonl line 8", "prompt", "no room", "mend")),
}


@pytest.mark.parametrize("method", ["dpo", "hypo", "reward"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_training_files(inputs: Inputs, tmp_path: Path, capsys, case: str, method: str) -> None:
    content, words = BAD_FILES[case]
    train, output = tmp_path / "train.jsonl", tmp_path / "run"
    train.write_text(content)
    refused(capsys, inputs.arguments(method, output, dataset_name=train), *words)
    assert not output.exists(), "data are checked before anything is written"


@pytest.mark.parametrize("case", ["wrong column", "NaN score", "broken JSON"])
def test_bad_evaluation_files(inputs: Inputs, tmp_path: Path, capsys, case: str) -> None:
    content, words = BAD_FILES[case]
    held = tmp_path / "train.jsonl"
    held.write_text(content)
    refused(capsys, inputs.arguments("dpo", tmp_path / "run", eval_dataset=held), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", METHODS)
def test_missing_models_and_data(inputs: Inputs, tmp_path: Path, capsys, method: str) -> None:
    output = tmp_path / "run"
    missing = tmp_path / "nowhere"
    refused(
        capsys, inputs.arguments(method, output, model_name_or_path=missing), "nowhere", "--model_name_or_path", "mend"
    )
    refused(capsys, inputs.arguments(method, output, dataset_name=missing), "nowhere", "mend")
    refused(capsys, inputs.arguments(method, output, model_name_or_path=""), "--model_name_or_path")
    refused(capsys, inputs.arguments(method, output, dataset_name=""), "--dataset_name")
    (tmp_path / "folder").mkdir()
    message = refused(capsys, inputs.arguments(method, output, model_name_or_path=tmp_path / "folder"), "config.json")
    assert "save_pretrained" in message
    assert not output.exists()


def test_conversations_need_a_chat_template(inputs: Inputs, tmp_path: Path, capsys) -> None:
    model = shutil.copytree(inputs.model, tmp_path / "plain")
    (model / "chat_template.jinja").unlink()
    refused(capsys, inputs.arguments("dpo", tmp_path / "run", model_name_or_path=model), "chat template", "mend")
    assert not (tmp_path / "run").exists()
    shutil.copy(inputs.model / "chat_template.jinja", model)
    run(inputs, "dpo", tmp_path / "run", model_name_or_path=model)


def test_a_prompt_longer_than_the_context_is_refused_at_start(inputs: Inputs, tmp_path: Path, capsys) -> None:
    def long(made: list[dict[str, Any]]) -> None:
        made[7]["prompt"] = [{"role": "user", "content": "red blue " * 200}]

    train = tmp_path / "train.jsonl"
    train.write_text(rows(long))
    for method in METHODS:  # 256 positions; the default max_length of 1024 does not see it
        refused(capsys, inputs.arguments(method, tmp_path / method, dataset_name=train), "context", "256", "mend")
        assert not (tmp_path / method / "checkpoint-2").exists()


def test_samples_past_the_context_are_refused_before_the_first_step(inputs: Inputs, tmp_path: Path, capsys) -> None:
    def long(made: list[dict[str, Any]]) -> None:
        made[7]["prompt"] = [{"role": "user", "content": "red blue " * 58}]

    train = tmp_path / "train.jsonl"
    train.write_text(rows(long))
    arguments = inputs.arguments("hypo", tmp_path / "run", dataset_name=train, max_new_tokens=100, num_train_epochs=1)
    refused(capsys, [*arguments, "--max_steps", "-1"], "train.jsonl line 8", "context", "256", "--max_new_tokens")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or metrics(tmp_path / "run") == [], (
        "before training, not at the step that draws the row"
    )


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_held_out_prompts_past_the_context_stop_no_run(inputs: Inputs, tmp_path: Path, capsys, method: str) -> None:
    held = tiny.pairs(4)
    held[1]["prompt"] = [{"role": "user", "content": "red blue " * 58}]
    file = tiny.jsonl(tmp_path / "held.jsonl", held)
    output = run(inputs, method, tmp_path / "run", eval_dataset=file, max_new_tokens=100, num_eval_prompts=9)
    said = "1 of 4 held-out prompts leave no room for 100 new tokens"
    assert capsys.readouterr().err.replace("\n", " ").count(said) == 1
    assert [row["row"] for row in lines(output / "evaluation" / "samples.jsonl")] == [0, 2, 3]


ONLY_MODEL_SHOWS = {
    "lora_target_modules": (
        {"use_peft": True, "lora_target_modules": "nonsense"},
        ("--lora_target_modules", "nonsense"),
    ),
    "keep_best": ({"keep_best": "eval_nothing", "eval_steps": 2}, ("nothing", "--keep_best", "eval_rewards/margins")),
    "optim": ({"optim": "sgdish"}, ("sgdish", "mend")),
    "dtype": ({"dtype": "float16"}, ("--dtype", "bfloat16")),
    "adapter": ({"use_peft": True, "adapter_name_or_path": "nowhere"}, ("--adapter_name_or_path",)),
    "patience": ({"patience": 2, "eval_steps": 2}, ("--patience", "--keep_best")),
    "gold": ({"gold_reward": "nowhere:at_all"}, ("--gold_reward", "nowhere")),
    "reward_model": ({"reward_model": "/nowhere"}, ("/nowhere", "--reward_model")),
    "temperature": ({"temperature": "-1"}, ("temperature",)),
    "report_to": ({"report_to": "carrier-pigeon"}, ("carrier-pigeon",)),
}


@pytest.mark.parametrize("case", ONLY_MODEL_SHOWS)
def test_a_corrected_command_runs_in_the_same_directory(inputs: Inputs, tmp_path: Path, capsys, case: str) -> None:
    options, words = ONLY_MODEL_SHOWS[case]
    refused(capsys, inputs.arguments("dpo", tmp_path / "run", **options), *words)
    run(inputs, "dpo", tmp_path / "run")
    assert read(tmp_path / "run" / "result.json")["status"] == "complete"


def test_weights_that_cannot_be_read(inputs: Inputs, tmp_path: Path, capsys) -> None:
    model = shutil.copytree(inputs.model, tmp_path / "damaged")
    (model / "model.safetensors").write_bytes(b"12345678")
    refused(capsys, inputs.arguments("dpo", tmp_path / "run", model_name_or_path=model), "damaged", "mend")
    (model / "model.safetensors").unlink()
    refused(capsys, inputs.arguments("dpo", tmp_path / "run", model_name_or_path=model), "damaged", "mend")
    whole = load_file(inputs.model / "model.safetensors")
    del whole["model.norm.weight"]  # transformers would fill it with fresh numbers and go on
    save_file(whole, model / "model.safetensors", metadata={"format": "pt"})
    refused(
        capsys, inputs.arguments("dpo", tmp_path / "run", model_name_or_path=model), "lacks model.norm.weight", "mend"
    )
    run(inputs, "dpo", tmp_path / "run")


def test_keep_best_needs_evaluations(inputs: Inputs, tmp_path: Path, capsys) -> None:
    for option in ({"keep_best": "eval_rewards/margins"}, {"stop_at_kl": 1.0}):
        refused(capsys, inputs.arguments("dpo", tmp_path / "run", **option), "--eval_steps", "mend")


def test_a_tokenizer_larger_than_the_model(inputs: Inputs, tmp_path: Path, capsys) -> None:
    model = tmp_path / "small"
    tiny.model(vocabulary=64).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    refused(capsys, inputs.arguments("dpo", tmp_path / "run", model_name_or_path=model), "only 64", "mend")


NONSENSE = {
    "beta": ("0", "-1", "nan"),
    "label_smoothing": ("0.5", "-0.1", "nan"),
    "sft_weight": ("-1",),
    "offline_kl_weight": ("-1",),
    "learning_rate": ("-1", "nan"),
    "warmup_ratio": ("1.5", "-0.5"),
    "lora_r": ("0",),
    "max_new_tokens": ("0",),
    "top_p": ("0", "1.5"),
    "per_device_train_batch_size": ("0",),
    "gradient_accumulation_steps": ("0",),
    "max_length": ("0",),
    "num_eval_prompts": ("-1",),
    "seed": ("-1",),
    "save_steps": ("-1",),
    "logging_steps": ("0",),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values])
def test_numbers_out_of_range(inputs: Inputs, tmp_path: Path, capsys, name: str, value: str) -> None:
    refused(capsys, [*inputs.arguments("dpo", tmp_path / "run", use_peft=True), f"--{name}={value}"], name)
    run(inputs, "dpo", tmp_path / "run", max_steps=1, num_eval_prompts=0)


def test_debug_shows_the_traceback(inputs: Inputs, tmp_path: Path, capsys) -> None:
    arguments = inputs.arguments("dpo", tmp_path / "run", model_name_or_path=tmp_path / "nowhere")
    assert cli.run([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_model_in_memory_needs_its_tokenizer(inputs: Inputs, tmp_path: Path) -> None:
    config = dpo.Config(output_dir=str(tmp_path / "run"), dataset_name=str(inputs.train))
    with pytest.raises(ValueError, match="needs its tokenizer"):
        dpo.run(config, model=tiny.model())
