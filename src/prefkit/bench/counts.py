"""Counts without noise: the products a forward pass really multiplies, rows that reach the head, attention pairs.

Backward passes multiply every product of the decoder twice more, so that ratios of forward counts hold for steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefkit.bench.arms import Setup, scoring, unshared
from prefkit.bench.workloads import PAD
from prefkit.domains.text.layout import lay_out
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.scoring import causal_lm
from prefkit.records import Group

TOLERANCE = 0.05
"""how far the decoder's ratio may be from the bound that token counts give"""


class Products(TorchDispatchMode):
    """Notes every product of a matrix of rows with a weight; attention's batched products are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[tuple[int, int]] = Counter()
        """rows multiplied, by (inputs, outputs) of the weight"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = {torch.ops.aten.mm.default: args[:2], torch.ops.aten.addmm.default: args[1:3]}.get(func)
        if factors:
            left, right = factors
            self.rows[(right.shape[0], right.shape[1])] += left.shape[0]
        return func(*args, **(kwargs or {}))


def count(setup: Setup, arm: str) -> dict[str, int]:
    """What one arm multiplies to score every row of the workload once: FLOPs of the decoder's linear layers, head rows,
    query-key pairs of one head and layer (needed, multiplied).
    """
    vocabulary = causal_lm(setup.policy.model).config.get_text_config().vocab_size
    needed = multiplied = 0
    with scoring(setup, arm) as policy, torch.no_grad(), Products() as products:
        for groups in batches(setup):
            policy.log_probs(groups)
            pairs = _attention_pairs(policy, arm, groups)
            needed, multiplied = needed + pairs[0], multiplied + pairs[1]
    return {
        "linear_flops": sum(2 * rows * k * n for (k, n), rows in products.rows.items() if n != vocabulary),
        "head_rows": sum(rows for (_, n), rows in products.rows.items() if n == vocabulary),
        "attention_pairs_needed": needed,
        "attention_pairs_multiplied": multiplied,
    }


def batches(setup: Setup) -> list[list[Group]]:
    """The groups of each step."""
    return [[setup.pairs[row].group for row in setup.rows(step)] for step in range(1, setup.workload.steps + 1)]


def counts(setup: Setup, arms: Sequence[str]) -> dict[str, Any]:
    """The counts of every arm, and how they compare with what the lengths allow."""
    prompt = sum(len(pair.prompt) for pair in setup.pairs)
    answers = sum(len(pair.chosen) + len(pair.rejected) for pair in setup.pairs)
    found: dict[str, Any] = {arm: count(setup, arm) for arm in arms}
    ratio = prompt / (answers / 2)
    result: dict[str, Any] = {
        "arms": found,
        "answer_tokens": answers,
        "prompt_tokens": prompt,
        "prompt_to_answer": ratio,
        "token_bound": (2 * ratio + 2) / (ratio + 2),
    }
    if "engine" in found:
        engine = found["engine"]
        result["head_rows_exact"] = engine["head_rows"] == answers
        result["attention_wasted"] = 1 - engine["attention_pairs_needed"] / engine["attention_pairs_multiplied"]
        for arm in ("padded", "packed"):
            if arm in found:
                result[f"linear_{arm}/engine"] = found[arm]["linear_flops"] / engine["linear_flops"]
    if "linear_packed/engine" in result:
        # Without padding on either side: what is left is the prompt alone, which the bound speaks of. Both sides leave
        # most of the prompt out of the last layer, where sharing it saves less: the ratio is a little below the bound.
        result["bound_deviation"] = result["linear_packed/engine"] / result["token_bound"] - 1
        result["bound_held"] = abs(result["bound_deviation"]) <= TOLERANCE
    return result


def _attention_pairs(policy: TextPolicy, arm: str, groups: Sequence[Group]) -> tuple[int, int]:
    if arm == "naive":
        return lay_out(groups, PAD, last=True).attention_pairs
    arranged = unshared(groups) if arm == "packed" else groups
    return policy.module.lay_out(arranged, pad=PAD, device=policy.world.device).attention_pairs
