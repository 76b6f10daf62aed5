"""`--tokens_per_batch` changes which rows share a forward pass, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from method_runs import Inputs, column, metrics, run
from prefkit import cli
from prefkit.domains.text import layout
from prefkit.domains.text.scoring import LanguageModel

OPTIONS: dict[str, Any] = {"max_steps": 3, "gradient_accumulation_steps": 4, "learning_rate": 1e-3, "eval_steps": 0}
BUDGET = 130


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs.make(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("method", ["dpo", "hypo", "sft", "reward"])
def test_a_budget_leaves_losses_and_gradients_as_they_are(inputs: Inputs, tmp_path: Path, method: str) -> None:
    options = {**OPTIONS, **({"kl_weight": 0.1} if method == "hypo" else {})}
    budget = 4 * BUDGET if method == "hypo" else BUDGET
    plain = run(inputs, method, tmp_path / "plain", **options)
    packed = run(inputs, method, tmp_path / "packed", tokens_per_batch=budget, **options)
    for name in ("loss", "grad_norm"):
        first, second = torch.tensor(column(plain, name)), torch.tensor(column(packed, name))
        torch.testing.assert_close(second, first, rtol=2e-4, atol=2e-5, msg=name)
    start, other = (json.loads((directory / "evaluation" / "start.json").read_text()) for directory in (plain, packed))
    assert other["metrics"] == pytest.approx(start["metrics"], rel=1e-4, abs=1e-5)


def test_passes_are_few_and_within_the_budget(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = LanguageModel.forward

    def watched(self: LanguageModel, made: layout.Layout, **options: Any) -> Any:
        if torch.is_grad_enabled() and not self.model.training and any(w.requires_grad for w in self.parameters()):
            sizes.append(made.num_tokens)
        return original(self, made, **options)

    monkeypatch.setattr(LanguageModel, "forward", watched)
    run(inputs, "dpo", tmp_path / "run", tokens_per_batch=BUDGET, **OPTIONS)
    assert max(sizes) <= BUDGET
    rows = 8  # of a step: 2 at a time, 4 times
    assert OPTIONS["max_steps"] <= len(sizes) < OPTIONS["max_steps"] * rows, "more than one row in most passes"


@pytest.mark.parametrize(("method", "budget", "said"), [("dpo", 30, "take 40 tokens"), ("hypo", 60, "fresh answers")])
def test_a_row_over_the_budget_is_named_before_training(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, budget: int, said: str
) -> None:
    directory = tmp_path / "run"
    assert cli.run(inputs.arguments(method, directory, tokens_per_batch=budget)) == 2
    message = capsys.readouterr().err
    assert f"{inputs.train} line 1" in message and said in message
    assert f"tokens_per_batch is {budget}" in message and "raise --tokens_per_batch to" in message
    assert not directory.exists(), "nothing was begun"


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_token_metrics_are_logged_when_asked_for(inputs: Inputs, tmp_path: Path, method: str) -> None:
    asked = run(inputs, method, tmp_path / "asked", log_token_metrics=True, **OPTIONS)
    left = run(inputs, method, tmp_path / "left", **OPTIONS)
    assert all(0 < value < 6 for value in column(asked, "entropy")), "nats; log 320 = 5.77"
    assert len(column(asked, "mean_token_accuracy")) == OPTIONS["max_steps"]
    assert not column(left, "entropy")
    assert column(asked, "loss") == column(left, "loss")
    assert len(metrics(asked)) == len(metrics(left))
