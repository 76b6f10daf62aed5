"""keep_best, patience and stop_at_kl through whole methods: what was selected, by which rule, on which rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from method_runs import Inputs, column, lines, metrics, read, run

BASE: dict[str, Any] = {"max_steps": 6, "eval_steps": 1, "save_steps": 2, "save_total_limit": 0, "logging_steps": 1}
FAST = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}


def evaluations(directory: Path, name: str) -> list[float]:
    """The metric at steps 1, 2, ... (the start's row is left out)."""
    return [row[name] for row in metrics(directory) if name in row and row["step"] > 0]


@pytest.mark.parametrize(
    ("method", "metric"), [("dpo", "rewards/margins"), ("hypo", "eval_objective/kl"), ("sft", "loss")]
)
@pytest.mark.parametrize("lower", [False, True])
def test_the_best_step_becomes_the_model(inputs: Inputs, tmp_path: Path, method: str, metric: str, lower: bool) -> None:
    wanted = ("-" if lower else "") + metric
    directory = run(inputs, method, tmp_path / "run", f"--keep_best={wanted}", **{**BASE, **FAST})
    full = f"eval_{metric.removeprefix('eval_')}"
    values = evaluations(directory, full)
    best = (min if lower else max)(values)
    step = values.index(best) + 1
    result = read(directory / "result.json")
    assert result["selected_step"] == step
    assert result["steps"] == 6
    assert result["rule"].startswith(f"best {full} over 6 evaluations")
    assert ("lower is better" in result["rule"]) == lower
    saved, kept = (load_file(directory / name / "model.safetensors") for name in (f"checkpoint-{step}", "model"))
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    assert str(step) in (directory / "report.html").read_text()


def test_half_of_the_held_out_prompts_choose_and_the_other_half_test(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "dpo", tmp_path / "run", **BASE, **FAST, keep_best="rewards/margins")
    parts = read(directory / "data.json")["parts"]
    assert parts["test"] + parts["selection"] == 8 and min(parts.values()) >= 2
    tested = {row["prompt"] for row in lines(directory / "evaluation" / "pairs.jsonl")}
    assert len(lines(directory / "evaluation" / "pairs.jsonl")) == parts["test"]
    held = {tiny_prompt(row) for row in lines(inputs.held_out)}
    assert tested < held
    final = read(directory / "evaluation.json")["final"]["eval_rewards/margins"]
    seen = evaluations(directory, "eval_rewards/margins")
    assert all(abs(final - value) > 1e-7 for value in seen), "the test rows are not those that chose"
    plain = run(inputs, "dpo", tmp_path / "plain", **BASE, **FAST)
    assert read(plain / "data.json")["parts"]["selection"] == 0


def tiny_prompt(row: dict[str, Any]) -> str:
    return "user: " + row["prompt"][0]["content"]


def test_a_single_held_out_prompt_cannot_do_both(inputs: Inputs, tmp_path: Path, capsys) -> None:
    from prefkit import cli

    held = tiny.jsonl(tmp_path / "held.jsonl", tiny.pairs(1, seed=5))
    options = {**BASE, "eval_dataset": held, "keep_best": "rewards/margins"}
    assert cli.run(inputs.arguments("dpo", tmp_path / "run", **options)) == 2
    assert "cannot both choose a checkpoint and test it" in capsys.readouterr().err


def test_patience_stops_and_says_so(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(
        inputs,
        "dpo",
        tmp_path / "run",
        "--keep_best=-rewards/accuracies",
        **{**BASE, **FAST, "max_steps": 12, "patience": 2},
    )
    result = read(directory / "result.json")
    values = evaluations(directory, "eval_rewards/accuracies")
    best = values.index(min(values)) + 1
    assert result["status"] == "stopped"
    assert result["reason"] == "no better eval_rewards/accuracies in 2 evaluations"
    assert result["steps"] == best + 2 == len(values) < 12
    assert result["selected_step"] == best


def test_a_kl_limit_stops_the_run(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(inputs, "dpo", tmp_path / "run", **{**BASE, **FAST, "max_steps": 12, "stop_at_kl": 0.05})
    result = read(directory / "result.json")
    values = evaluations(directory, "eval_objective/kl")
    assert values[-1] > 0.05 and all(value <= 0.05 for value in values[:-1])
    assert result["status"] == "stopped" and "passed 0.05" in result["reason"]
    assert result["steps"] == result["selected_step"] == len(values) < 12


def test_only_the_limit_and_the_best_are_kept_on_disk(inputs: Inputs, tmp_path: Path) -> None:
    options = {**BASE, **FAST, "save_steps": 1, "save_total_limit": 2}
    directory = run(inputs, "dpo", tmp_path / "run", "--keep_best=-rewards/margins", **options)
    best = read(directory / "result.json")["selected_step"]
    kept = {int(path.name.partition("-")[2]) for path in directory.glob("checkpoint-*")}
    assert kept == {5, 6, best}


def test_a_reward_model_judges_the_answers_of_a_policy(inputs: Inputs, tmp_path: Path) -> None:
    judge = run(inputs, "reward", tmp_path / "reward", use_peft=True, **FAST)
    directory = run(inputs, "dpo", tmp_path / "dpo", reward_model=judge, **FAST)
    report = read(directory / "evaluation.json")
    rows = lines(directory / "evaluation" / "samples.jsonl")
    assert len(rows) == 2
    for side in ("start", "final"):
        mean = sum(row[f"reward_model_{side}"] for row in rows) / 2
        assert report[side]["eval_objective/scores"] == pytest.approx(mean, abs=1e-6)
    assert column(directory, "eval_objective/scores")[0] == report["start"]["eval_objective/scores"]
    assert "eval_objective/scores" in report["intervals"]


def test_reward_margins_are_learned(inputs: Inputs, tmp_path: Path) -> None:
    directory = run(
        inputs,
        "reward",
        tmp_path / "run",
        **{**FAST, "learning_rate": 3e-3},
        max_steps=24,
        per_device_train_batch_size=8,
    )
    final = read(directory / "evaluation.json")["final"]
    assert final["eval_rewards/accuracies"] == 1.0, "'... yes' is always chosen, '... no' rejected"
    assert final["eval_rewards/margins"] > 1
    assert "prefkit_reward_mean" in read(directory / "model" / "config.json")
