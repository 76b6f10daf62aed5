"""What every method owes its user, whatever it trains: the run directory, repeatability, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tiny
from method_runs import METHODS, Inputs, assert_same_state, call, column, lines, metrics, read, run, state, weights
from prefkit import cli
from prefkit.errors import InputError

LORA = [False, True]
ON_EPISODES = ("ppo", "drpo", "rloo", "grpo")
"""methods that learn from their own answers alone, two steps a batch in `tiny`: no stored pairs are measured"""
FILES = (
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "data.json",
    "evaluation.json",
    "result.json",
    "report.html",
)
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def done(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory):
    """Each method's run, with LoRA or without, made once."""
    made: dict[tuple[str, bool], Path] = {}

    def get(method: str, lora: bool) -> Path:
        if (method, lora) not in made:
            folder = tmp_path_factory.mktemp(method) / "run"
            made[method, lora] = run(inputs, method, folder, use_peft=lora, eval_steps=2, save_steps=2)
        return made[method, lora]

    return get


def test_all_four_methods_are_found() -> None:
    assert {"sft", "reward", "dpo", "hypo"} <= set(METHODS)


@every_method
@pytest.mark.parametrize("lora", LORA)
def test_the_run_directory_is_complete(done, inputs: Inputs, method: str, lora: bool) -> None:
    directory = done(method, lora)
    for name in FILES:
        assert (directory / name).is_file(), name
    config = read(directory / "config.json")
    assert config["method"] == method
    assert config["config"]["model_name_or_path"] == str(inputs.model)
    result = read(directory / "result.json")
    assert result["status"] == "complete"
    assert result["steps"] == result["selected_step"] == 4
    assert result["rule"] == "last step"
    assert result["model"] == "model"
    assert result["adapter"] == ("adapter" if lora else None)
    assert (directory / "adapter" / "adapter_config.json").is_file() == lora
    assert read(directory / "data.json")["parts"] == {"train": 16, "test": 8, "selection": 0}
    report = (directory / "report.html").read_text()
    assert "<html" in report and method in report.lower()
    card = (directory / "model" / "README.md").read_text()
    assert card.startswith("---\n") and "prefkit" in card
    assert not [path for path in directory.rglob("*") if ".tmp" in path.name or path.name.startswith(".")]


@every_method
@pytest.mark.parametrize("lora", LORA)
def test_metrics_are_finite_and_one_row_a_step(done, method: str, lora: bool) -> None:
    rows = metrics(done(method, lora))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows:
        assert all(abs(value) < 1e6 for value in row.values()), row
        assert bool(row["step"]) == ("loss" in row)
        measured = {"eval_rewards/margins", "eval_loss"} if method not in ON_EPISODES else {"eval_objective/kl"}
        assert bool(measured & set(row)) == (row["step"] in (0, 2, 4))
    passes = 2 if method in ON_EPISODES else 1
    assert [row["epoch"] * passes for row in rows[1:]] == [0.125, 0.25, 0.375, 0.5]
    assert all(row["grad_norm"] > 0 for row in rows[1:])


@every_method
@pytest.mark.parametrize("lora", LORA)
def test_the_evaluation_holds_start_final_and_intervals(done, method: str, lora: bool) -> None:
    directory = done(method, lora)
    report = read(directory / "evaluation.json")
    rows = metrics(directory)
    assert report["start"] == {name: value for name, value in rows[0].items() if name.startswith("eval_")}
    last = {name: value for name, value in rows[-1].items() if name.startswith("eval_")}
    if method == "reward":  # centred after the last step: differences stay
        last = {name: last[name] for name in ("eval_rewards/accuracies",)}
    for name, value in last.items():
        assert report["final"][name] == pytest.approx(value, abs=1e-6), name
    table = lines(directory / "evaluation" / ("completions.jsonl" if method == "sft" else "pairs.jsonl"))
    if method in ON_EPISODES:
        assert table == [] and report["intervals"]
    else:
        assert [row["index"] for row in table] == list(range(8))
        assert {row["group"] for row in table} == {"g0", "g1", "g2", "g3"}
    for name, interval in report["intervals"].items():
        low, high = (interval[end] for end in ("low", "high"))  # None: two groups bound nothing
        assert (low is None or low <= interval["mean"]) and (high is None or high >= interval["mean"]), name
        assert interval["mean"] == pytest.approx(report["final"][name], abs=1e-6)
    samples = lines(directory / "evaluation" / "samples.jsonl")
    assert len(samples) == (0 if method in ("reward", "ranker") else 2)
    assert all({"answer_start", "answer_final", "length", "finished"} <= set(row) for row in samples)


@every_method
@pytest.mark.parametrize("lora", LORA)
def test_the_model_folder_loads_by_plain_from_pretrained(done, inputs: Inputs, method: str, lora: bool) -> None:
    directory = done(method, lora)
    auto = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    model = auto.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    assert tokenizer.chat_template == tiny.TEMPLATE
    start = AutoModelForCausalLM.from_pretrained(inputs.model).base_model.state_dict()
    moved = [name for name, value in model.base_model.state_dict().items() if not torch.equal(value, start[name])]
    assert moved, "training must have changed the weights that were saved"
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@every_method
@pytest.mark.parametrize("lora", LORA)
def test_a_second_run_gives_the_same_bits(done, inputs: Inputs, tmp_path: Path, method: str, lora: bool) -> None:
    torch.manual_seed(123)  # what came before in the process must not matter
    again = run(inputs, method, tmp_path / "again", use_peft=lora, eval_steps=2, save_steps=2)
    assert_same_state(done(method, lora), again)


@every_method
def test_another_seed_gives_other_numbers(done, inputs: Inputs, tmp_path: Path, method: str) -> None:
    other = run(inputs, method, tmp_path / "other", use_peft=True, eval_steps=2, save_steps=2, seed=1)
    assert column(other, "grad_norm") != column(done(method, True), "grad_norm")


@every_method
def test_a_finished_run_may_grow(inputs: Inputs, tmp_path: Path, method: str) -> None:
    options = {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "save_steps": 2}
    whole = run(inputs, method, tmp_path / "whole", max_steps=6, **options)
    grown = run(inputs, method, tmp_path / "grown", max_steps=4, **options)
    run(inputs, method, grown, max_steps=6, **options)
    assert_same_state(whole, grown)


@every_method
def test_the_same_command_again_keeps_a_finished_run(done, inputs: Inputs, method: str) -> None:
    directory = done(method, False)
    before = state(directory)
    run(inputs, method, directory, use_peft=False, eval_steps=2, save_steps=2)
    assert state(directory) == before


@every_method
def test_a_used_directory_is_refused_with_the_differing_fields(done, inputs: Inputs, method: str, capsys) -> None:
    directory = done(method, False)
    before = state(directory)
    options = {"use_peft": False, "eval_steps": 2, "save_steps": 2}
    code = cli.run(inputs.arguments(method, directory, **{**options, "learning_rate": 0.5, "seed": 7}))
    message = capsys.readouterr().err
    assert code == 2
    assert "learning_rate" in message and "0.5" in message and "seed: 0 -> 7" in message
    assert "--overwrite" in message and "Traceback" not in message
    assert cli.run(inputs.arguments(method, directory, **{**options, "max_steps": 3})) == 2
    assert "max_steps: 4 -> 3" in capsys.readouterr().err
    assert state(directory) == before


def test_another_method_is_refused_in_a_used_directory(done, inputs: Inputs, capsys) -> None:
    assert cli.run(inputs.arguments("hypo", done("dpo", False))) == 2
    assert "method: 'dpo' -> 'hypo'" in capsys.readouterr().err


@every_method
def test_overwrite_starts_anew(inputs: Inputs, tmp_path: Path, method: str) -> None:
    fresh = run(inputs, method, tmp_path / "fresh", max_steps=2)
    used = run(inputs, method, tmp_path / "used", max_steps=3, seed=3, use_peft=True)
    run(inputs, method, used, "--overwrite", max_steps=2)
    assert_same_state(fresh, used)
    assert read(used / "config.json")["config"]["overwrite"] is False


@every_method
def test_the_config_of_a_run_reruns_it(done, method: str, tmp_path: Path) -> None:
    directory = done(method, True)
    assert cli.run([method, "--from", str(directory), "--output_dir", str(tmp_path / "again")]) == 0
    assert_same_state(directory, tmp_path / "again")


@every_method
def test_a_dry_run_trains_and_writes_nothing(inputs: Inputs, tmp_path: Path, method: str, capsys) -> None:
    run(inputs, method, tmp_path / "run", "--dry_run")
    assert not (tmp_path / "run").exists()
    shown = capsys.readouterr().out.lower()
    assert "memory" in shown and "disk" in shown and "time" in shown


@every_method
@pytest.mark.parametrize("lora", LORA)
def test_python_use_takes_loaded_objects(done, inputs: Inputs, tmp_path: Path, method: str, lora: bool) -> None:
    import dataclasses
    import importlib

    module = importlib.import_module(f"prefkit.methods.{method}")
    config = dataclasses.replace(
        module.PRESETS["tiny"],
        output_dir=str(tmp_path / "run"),
        dtype="float32",
        use_peft=lora,
        eval_steps=2,
        save_steps=2,
    )
    rows = {name: lines(path) for name, path in (("train", inputs.train), ("held", inputs.held_out))}
    model = AutoModelForCausalLM.from_pretrained(inputs.model)
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    data = Dataset.from_list(rows["train"]) if lora else rows["train"]
    held = DatasetDict({"train": Dataset.from_list(rows["held"])}) if lora else rows["held"]
    result = module.run(config, model=model, tokenizer=tokenizer, train=data, evaluation=held)
    assert result.directory == tmp_path / "run"
    assert result.tokenizer is tokenizer
    assert result.metrics == read(tmp_path / "run" / "evaluation.json")["final"]
    assert [r["loss"] for r in metrics(tmp_path / "run")[1:]] == column(done(method, lora), "loss")
    named, loaded = weights(done(method, lora)), weights(tmp_path / "run")
    assert named.keys() == loaded.keys()
    assert all(torch.equal(named[name], loaded[name]) for name in named)
    assert any(parameter is not None for parameter in result.model.parameters())


@every_method
def test_gradient_accumulation_equals_one_batch(inputs: Inputs, tmp_path: Path, method: str) -> None:
    options = {"learning_rate": 1e-3, "max_steps": 3}
    big = run(inputs, method, tmp_path / "big", per_device_train_batch_size=8, **options)
    small = run(
        inputs, method, tmp_path / "small", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(
            torch.tensor(column(small, name)), torch.tensor(column(big, name)), rtol=1e-4, atol=1e-6
        )
    one, many = weights(big), weights(small)
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-4, atol=1e-4, msg=name)


@every_method
def test_nan_in_training_ends_with_a_plain_message(inputs: Inputs, tmp_path: Path, method: str) -> None:
    with pytest.raises(InputError, match="diverged"):
        call(inputs, method, tmp_path / "run", learning_rate=1e30, max_grad_norm=0.0, lr_scheduler_type="constant")
    assert not (tmp_path / "run" / "result.json").exists()
    assert all(json.loads(line)["step"] <= 4 for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
