"""The objectives give the stored numbers, and the stored numbers are those of the direct formulas."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from prefkit.objectives.margin import KINDS
from prefkit.objectives.optimism import optimism_share, selm_loss, xpo_loss
from prefkit.objectives.preference import dpo_loss, hypo_kl, hypo_loss

HERE = Path(__file__).parent


def load(name: str) -> list[dict]:
    return json.loads((HERE / name).read_text())


def tensors(values: dict) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def near(value: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo.json", "hypo.json", "selm.json", "xpo.json"])
def test_files_are_what_the_direct_formulas_give(name):
    spec = importlib.util.spec_from_file_location("direct", HERE / "direct.py")
    assert spec and spec.loader
    direct = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(direct)
    again = json.loads(json.dumps(direct.FILES[name]()))
    for case, stored in zip(again, load(name), strict=True):
        assert case["inputs"] == stored["inputs"]
        assert case["loss"] == pytest.approx(stored["loss"], rel=1e-12)


@pytest.mark.parametrize("case", load("dpo.json"), ids=lambda case: str(case["options"]))
def test_dpo(case):
    options = {**case["options"], "kind": KINDS[case["options"]["kind"]]}
    near(dpo_loss(**tensors(case["inputs"]), **options), case["loss"])


@pytest.mark.parametrize("case", load("hypo.json"), ids=lambda case: case["options"]["estimator"])
def test_hypo(case):
    inputs = tensors(case["inputs"])
    own = inputs["own"].requires_grad_()
    state_kl = None
    if case["state_kl"]:
        state_kl = torch.tensor(case["state_kl"], dtype=torch.float64, requires_grad=True)
    loss = hypo_loss(**inputs, **case["options"], state_kl=state_kl)
    near(loss, case["loss"])
    loss.sum().backward()
    assert own.grad is not None
    near(own.grad, case["gradient_own"])
    if state_kl is not None and state_kl.grad is not None:
        near(state_kl.grad, case["gradient_state_kl"])
    near(hypo_kl(inputs["own"], inputs["ref_own"]), case["kl"])


@pytest.mark.parametrize("case", load("selm.json"), ids=lambda case: str(case["options"]))
def test_selm(case):
    inputs = {name: value.requires_grad_() for name, value in tensors(case["inputs"]).items()}
    options = dict(case["options"])
    loss = selm_loss(**inputs, **options)
    near(loss, case["loss"])
    loss.sum().backward()
    for name, expected in case["gradient"].items():
        slope = inputs[name].grad
        assert slope is not None
        near(slope, expected)
    del options["max_log_ratio"]
    pair = {name: value for name, value in inputs.items() if "own" not in name}
    near(optimism_share(**pair, **options), case["share"])


@pytest.mark.parametrize("case", load("xpo.json"), ids=lambda case: str(case["options"]))
def test_xpo(case):
    near(xpo_loss(**tensors(case["inputs"]), **case["options"]), case["loss"])
