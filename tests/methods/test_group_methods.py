"""RLOO and GRPO from end to end: groups from one state, advantages, and gradients against direct computations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from method_runs import Inputs, call, column, lines, metrics, run
from prefkit.engine.learner import Learner
from prefkit.errors import InputError

BOTH = pytest.mark.parametrize("method", ["rloo", "grpo"])
FRESH: dict[str, Any] = {"num_ppo_epochs": 1, "max_steps": 1, "save_steps": 1, "max_grad_norm": 0.0}


def rollouts(directory: Path, step: int) -> list[dict[str, Any]]:
    return lines(directory / f"checkpoint-{step}" / "rollouts.jsonl")[1:]


def gradients_of_first_step(monkeypatch: Any) -> dict[str, Tensor]:
    """Filled by the run that follows: the gradients of its first step."""
    found: dict[str, Tensor] = {}
    apply = Learner._apply

    def watched(self: Any) -> Tensor:
        if not found:
            found.update({name: weight.grad.clone() for name, weight in self._weights.items()})
        return apply(self)

    monkeypatch.setattr(Learner, "_apply", watched)
    return found


def token_log_probs(model: Any, rollout: Mapping[str, Any]) -> Tensor:
    """log π of the tokens that were chosen, by the model's own forward pass."""
    ids = torch.tensor([rollout["prompt"] + rollout["tokens"]])
    log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    first = len(rollout["prompt"]) + rollout["prefix"]
    return log_probs.gather(-1, ids[0, 1:, None])[first - 1 :, 0]


def grouped(found: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [found[start : start + size] for start in range(0, len(found), size)]


def assert_gradients(model: Any, loss: Tensor, found: Mapping[str, Tensor]) -> None:
    loss.backward()
    compared = 0
    for name, weight in model.named_parameters():
        if (gradient := found.get(f"model.{name}")) is not None:
            assert weight.grad is not None
            torch.testing.assert_close(gradient, weight.grad, rtol=2e-3, atol=2e-4, msg=name)
            compared += int(bool(weight.grad.abs().max() > 1e-2))
    assert compared > 10


@pytest.mark.parametrize("reset_prob", [0.0, 1.0])
def test_one_pass_of_rloo_is_reinforce_with_a_leave_one_out_baseline(
    inputs: Inputs, tmp_path: Path, monkeypatch, reset_prob: float
) -> None:
    found = gradients_of_first_step(monkeypatch)
    options = {**FRESH, "num_generations": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    directory = run(inputs, "rloo", tmp_path / "run", reset_prob=reset_prob, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(inputs.model).eval()
    groups = grouped(rollouts(directory, 1), 3)
    assert len(groups) == 4
    losses: list[Tensor] = []
    for group in groups:
        scores = [rollout["score"] for rollout in group]
        for rollout in group:
            advantage = rollout["score"] - (sum(scores) - rollout["score"]) / 2
            losses.append(-advantage * token_log_probs(model, rollout).sum())
    assert_gradients(model, torch.stack(losses).mean(), found)


@pytest.mark.parametrize("loss_mean", ["answers", "tokens"])
def test_one_pass_of_grpo_is_a_policy_gradient_of_normalised_scores(
    inputs: Inputs, tmp_path: Path, monkeypatch, loss_mean: str
) -> None:
    found = gradients_of_first_step(monkeypatch)
    options = {**FRESH, "num_generations": 3, "per_device_train_batch_size": 4, "reset_prob": 0.8}
    directory = run(inputs, "grpo", tmp_path / "run", loss_mean=loss_mean, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(inputs.model).eval()
    losses, lengths = [], []
    for group in grouped(rollouts(directory, 1), 3):
        scores = torch.tensor([rollout["score"] for rollout in group])
        for rollout, advantage in zip(group, (scores - scores.mean()) / (scores.std() + 1e-4), strict=True):
            tokens = token_log_probs(model, rollout)
            losses.append(-advantage * (tokens.mean() if loss_mean == "answers" else tokens.sum()))
            lengths.append(len(tokens))
    assert len(set(lengths)) > 1
    total = torch.stack(losses).sum() / (len(losses) if loss_mean == "answers" else sum(lengths))
    assert_gradients(model, total, found)


@BOTH
def test_the_answers_to_a_prompt_begin_with_one_prefix(inputs: Inputs, tmp_path: Path, method: str) -> None:
    options = {"num_generations": 4, "per_device_train_batch_size": 8, "reset_prob": 0.7, "num_ppo_epochs": 1}
    directory = run(inputs, method, tmp_path / "run", k_min=1, **options)
    groups = grouped(rollouts(directory, 4), 4)
    assert len({group[0]["prefix"] for group in groups}) > 2
    for group in groups:
        assert len({(tuple(r["prompt"]), r["prefix"], tuple(r["tokens"][: r["prefix"]])) for r in group}) == 1
        assert [rollout["index"] for rollout in group] == [0, 1, 2, 3]
        assert len({tuple(rollout["tokens"]) for rollout in group}) > 1
    row = metrics(directory)[1]
    assert {"rollout/plain/scores", "rollout/reset/scores"} <= set(row)


@BOTH
def test_a_group_needs_two(inputs: Inputs, tmp_path: Path, method: str) -> None:
    with pytest.raises(InputError, match="compared with the others"):
        call(inputs, method, tmp_path / "run", num_generations=1)
    assert not (tmp_path / "run").exists()


@BOTH
def test_equal_scores_teach_nothing(inputs: Inputs, tmp_path: Path, method: str, monkeypatch) -> None:
    (tmp_path / f"same_{method}.py").write_text("def score(prompts, completions): return [0.1] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = {"num_generations": 3, "kl_coef": 0.0, "reward": f"gold:same_{method}:score", "learning_rate": 1e-2}
    directory = run(inputs, method, tmp_path / "run", **options)
    assert set(column(directory, "grad_norm")) == {0.0}
    assert set(column(directory, "loss")) == {0.0}


@pytest.mark.parametrize(("method", "kl_in"), [("rloo", "reward"), ("grpo", "loss")])
def test_micro_batches_equal_one_batch(inputs: Inputs, tmp_path: Path, method: str, kl_in: str) -> None:
    options = {
        "learning_rate": 1e-3,
        "reset_prob": 0.6,
        "num_generations": 3,
        "kl_in": kl_in,
        "kl_coef": 0.2,
        "max_steps": 2,
    }
    big = run(inputs, method, tmp_path / "big", per_device_train_batch_size=6, **options)
    for name, more in {
        "small": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
        "packed": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "tokens_per_batch": 90},
    }.items():
        other = run(inputs, method, tmp_path / name, **options, **more)
        for key in ("loss", "grad_norm", "objective/kl", "policy/ratio", "objective/entropy"):
            one, many = torch.tensor(column(big, key)), torch.tensor(column(other, key))
            torch.testing.assert_close(many, one, rtol=5e-4, atol=2e-5, msg=f"{name} {key}")


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rloo scaled": ("rloo", {"scale_advantages": "whiten", "kl_in": "loss", "kl_estimator": "k2"}),
    "rloo adaptive": ("rloo", {"kl_target": 1.0, "use_peft": True}),
    "dr grpo": ("grpo", {"scale_rewards": False, "loss_mean": "tokens", "kl_coef": 0.0}),
    "dapo": ("grpo", {"cliprange_high": 0.28, "loss_mean": "tokens", "missing_eos": "subtract"}),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_run(inputs: Inputs, tmp_path: Path, case: str) -> None:
    method, options = VARIANTS[case]
    rows = metrics(run(inputs, method, tmp_path / "run", num_mini_batches=2, **options))[1:]
    assert all(abs(value) < 1e6 for row in rows for value in row.values())
    assert rows[0]["policy/ratio"] == pytest.approx(1, abs=1e-5)


def test_a_higher_upper_clip_acts(inputs: Inputs, tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 1e-2, "num_ppo_epochs": 4, "lr_scheduler_type": "constant"}
    narrow = run(inputs, "grpo", tmp_path / "narrow", cliprange=0.1, **options)
    wide = run(inputs, "grpo", tmp_path / "wide", cliprange=0.1, cliprange_high=2.0, **options)
    assert column(narrow, "policy/clip_fraction")[1] > column(wide, "policy/clip_fraction")[1]
