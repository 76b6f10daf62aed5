"""Golden values of the objectives from direct formulas: float64 numpy and loops, nothing of prefkit or torch.

Run `python tests/golden/direct.py` to write the JSON files beside it; a change in them needs a reason in the
change log.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def log_sigmoid(x: float) -> float:
    return float(-np.log1p(np.exp(-x)))


def dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta, kind, label_smoothing) -> list[float]:
    losses = []
    for pair in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True):
        d = (pair[0] - pair[2]) - (pair[1] - pair[3])
        if kind == "sigmoid":
            loss = -(1 - label_smoothing) * log_sigmoid(beta * d) - label_smoothing * log_sigmoid(-beta * d)
        elif kind == "ipo":
            loss = (d - 1 / (2 * beta)) ** 2
        else:
            loss = max(0.0, 1 - beta * d)
        losses.append(float(loss))
    return losses


def surrogate(own, ref_own, estimator, state_kl) -> tuple[float, list, list]:
    """Value, gradient to own and to state_kl for one prompt; own is [k] or [k][t]."""
    k, own, ref = len(own), np.array(own), np.array(ref_own)
    d = own - ref
    weight = np.zeros_like(own)
    to_kl = np.zeros_like(own)
    for j in range(k):
        if estimator == "rloo":
            weight[j] = d[j] - sum(d[i] for i in range(k) if i != j) / (k - 1)
        elif estimator == "reinforce":
            weight[j] = d[j]
        else:
            for t in range(own.shape[1]):
                weight[j, t] = sum(d[j, t:]) if estimator == "rtg" else sum(state_kl[j][t + 1 :])
            to_kl[j] = 1 / k
    value = float((weight * own).sum() / k) + (float(np.sum(state_kl)) / k if estimator == "rb" else 0.0)
    return value, (weight / k).tolist(), to_kl.tolist()


def dpo_cases() -> list[dict]:
    draw = np.random.default_rng(0)
    cases = []
    for kind, beta, label_smoothing in (
        ("sigmoid", 0.1, 0.0),
        ("sigmoid", 0.5, 0.0),
        ("sigmoid", 0.1, 0.1),
        ("ipo", 0.1, 0.0),
        ("hinge", 0.3, 0.0),
    ):
        names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
        inputs = {name: np.round(-30 * draw.random(4), 3).tolist() for name in names}
        options = {"beta": beta, "kind": kind, "label_smoothing": label_smoothing}
        cases.append({"inputs": inputs, "options": options, "loss": dpo(**inputs, **options)})
    return cases


def hypo_cases() -> list[dict]:
    draw = np.random.default_rng(1)
    cases = []
    for estimator, shape in (
        ("rloo", (2, 2)),
        ("rloo", (2, 4)),
        ("reinforce", (2, 1)),
        ("rtg", (2, 2, 3)),
        ("rb", (2, 2, 3)),
    ):
        names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
        pairs = {name: np.round(-30 * draw.random(2), 3).tolist() for name in names}
        own, ref_own = (np.round(-5 * draw.random(shape), 3).tolist() for _ in range(2))
        state_kl = np.round(draw.random(shape), 3).tolist() if estimator == "rb" else None
        offline = dpo(**pairs, beta=0.1, kind="sigmoid", label_smoothing=0.0)
        online = [surrogate(own[i], ref_own[i], estimator, state_kl[i] if state_kl else None) for i in range(shape[0])]
        total = [np.sum(np.array(own[i]) - np.array(ref_own[i])) / shape[1] for i in range(shape[0])]
        cases.append(
            {
                "inputs": {**pairs, "own": own, "ref_own": ref_own},
                "state_kl": state_kl,
                "options": {"beta": 0.1, "kl_weight": 0.05, "estimator": estimator},
                "loss": [a + 0.05 * b[0] for a, b in zip(offline, online, strict=True)],
                "gradient_own": [(0.05 * np.array(b[1])).tolist() for b in online],
                "gradient_state_kl": [(0.05 * np.array(b[2])).tolist() for b in online] if state_kl else None,
                "kl": [float(value) for value in total],
            }
        )
    return cases


def selm_cases() -> list[dict]:
    """α multiplies β; coefficients on chosen, rejected and own are -βs, βs and αβ, s = σ(-m)."""
    draw = np.random.default_rng(2)
    cases = []
    for beta, alpha, bound in ((0.01, 0.001, None), (0.1, 0.1, None), (0.1, 0.5, 5.0)):
        names = ("chosen", "rejected", "own", "ref_chosen", "ref_rejected", "ref_own")
        inputs = {name: np.round(-30 * draw.random(4), 3).tolist() for name in names}
        own = [a - b for a, b in zip(inputs["own"], inputs["ref_own"], strict=True)]
        pairs = [inputs[name] for name in names if "own" not in name]
        offline = dpo(*pairs, beta=beta, kind="sigmoid", label_smoothing=0.0)
        pull = [1 - float(np.exp(-loss)) for loss in offline]
        held = [bound is not None and x < -bound for x in own]
        cases.append(
            {
                "inputs": inputs,
                "options": {"beta": beta, "alpha": alpha, "max_log_ratio": bound},
                "loss": [
                    loss + alpha * beta * (-(bound or 0.0) if stop else x)
                    for loss, x, stop in zip(offline, own, held, strict=True)
                ],
                "gradient": {
                    "chosen": [-beta * s for s in pull],
                    "rejected": [beta * s for s in pull],
                    "own": [0.0 if stop else alpha * beta for stop in held],
                },
                "share": [alpha / (alpha + 2 * s) for s in pull],
            }
        )
    return cases


def xpo_cases() -> list[dict]:
    """α stands alone."""
    draw = np.random.default_rng(3)
    cases = []
    for beta, alpha in ((0.1, 1e-5), (0.5, 0.02)):
        names = ("chosen", "rejected", "ref_sample", "ref_chosen", "ref_rejected")
        inputs = {name: np.round(-30 * draw.random(4), 3).tolist() for name in names}
        pairs = [inputs[name] for name in names if name != "ref_sample"]
        offline = dpo(*pairs, beta=beta, kind="sigmoid", label_smoothing=0.0)
        cases.append(
            {
                "inputs": inputs,
                "options": {"beta": beta, "alpha": alpha},
                "loss": [loss + alpha * x for loss, x in zip(offline, inputs["ref_sample"], strict=True)],
            }
        )
    return cases


FILES = {"dpo.json": dpo_cases, "hypo.json": hypo_cases, "selm.json": selm_cases, "xpo.json": xpo_cases}

if __name__ == "__main__":
    for name, cases in FILES.items():
        (HERE / name).write_text(json.dumps(cases(), indent=1) + "\n")
