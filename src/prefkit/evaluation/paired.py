"""Two policies on the same held-out rows: match the rows, then difference what was measured on them.

Rows are the plain dictionaries of a run's `evaluation/pairs.jsonl` and `evaluation/samples.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from prefkit.errors import InputError
from prefkit.evaluation.stats import Interval, paired_bootstrap, sign_flip_p
from prefkit.evaluation.winrate import WinRate, from_scores

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One measurement of A and of B on matched rows; `difference` is A - B, `p` the sign-flip test's."""

    metric: str
    a: float
    b: float
    difference: Interval
    p: float


@dataclass(frozen=True, kw_only=True)
class Win:
    """A win rate by gold reward: `first` over `second`."""

    first: str
    second: str
    outcome: WinRate


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything two runs' held-out rows say about them; empty lists where neither wrote such rows."""

    pairs: int
    samples: int
    differences: tuple[Difference, ...]
    wins: tuple[Win, ...]


PAIR_METRICS: dict[str, Callable[[Row], float]] = {
    "rewards/margins": lambda row: row["margin"],
    "rewards/accuracies": lambda row: row["accuracy"],
    "rewards/chosen": lambda row: row["reward_chosen"],
    "rewards/rejected": lambda row: row["reward_rejected"],
}
SAMPLE_METRICS: dict[str, Callable[[Row], float]] = {
    "objective/kl": lambda row: row["log_ratio"],
    "length": lambda row: row["length"],
    "finished": lambda row: float(row["finished"]),
}


def match(a: Sequence[Row], b: Sequence[Row], what: str) -> list[tuple[Row, Row]]:
    """Rows of A beside the same rows of B, matched by (row, prompt), in A's order.

    Raises InputError when the two sets of rows differ, saying how many match, or when a row stands twice.
    """
    first, second = _by_key(a, what), _by_key(b, what)
    shared = [key for key in first if key in second]
    if len(shared) < len(first) or len(shared) < len(second):
        raise InputError(
            f"the runs were evaluated on different {what}: {len(shared)} match, "
            f"{len(first) - len(shared)} only in A, {len(second) - len(shared)} only in B",
            mend="evaluate both runs with the same eval_dataset, num_eval_samples and num_eval_prompts",
        )
    return [(first[key], second[key]) for key in shared]


def compare(
    pairs: Sequence[tuple[Row, Row]],
    samples: Sequence[tuple[Row, Row]],
    *,
    names: tuple[str, str] = ("A", "B"),
    num_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Differences A - B with paired bootstrap intervals by group, and gold-reward win rates.

    A row without a `group` is its own group. Win rates: A over B, each over its own start model
    (`gold_start`) and each over the data set's reference answers (`gold_reference`), where those are stored.
    """
    options = {"num_resamples": num_resamples, "seed": seed}
    differences: list[Difference] = []
    for rows, metrics in ((pairs, PAIR_METRICS), (samples, SAMPLE_METRICS | _gold_metric(samples))):
        if not rows:
            continue
        groups = _groups(rows)
        for name, read in metrics.items():
            a, b = [float(read(left)) for left, _ in rows], [float(read(right)) for _, right in rows]
            differences.append(
                Difference(
                    metric=name,
                    a=fmean(a),
                    b=fmean(b),
                    difference=paired_bootstrap(a, b, groups, level=level, **options),
                    p=sign_flip_p(a, b, groups, **options),
                )
            )
    wins = _wins(samples, names, level=level, **options) if samples else []
    return Comparison(
        pairs=len(pairs), samples=len(samples), differences=tuple(differences), wins=tuple(wins)
    )


def _wins(samples: Sequence[tuple[Row, Row]], names: tuple[str, str], **options: Any) -> list[Win]:
    a, b = [left for left, _ in samples], [right for _, right in samples]
    contests = [
        (names[0], a, "gold_final", names[1], b, "gold_final"),
        (names[0], a, "gold_final", f"{names[0]} at its start", a, "gold_start"),
        (names[1], b, "gold_final", f"{names[1]} at its start", b, "gold_start"),
        (names[0], a, "gold_final", "the answers in the data", a, "gold_reference"),
        (names[1], b, "gold_final", "the answers in the data", b, "gold_reference"),
    ]
    groups = _groups(samples)
    return [
        Win(
            first=first,
            second=second,
            outcome=from_scores([row[x] for row in left], [row[y] for row in right], groups, **options),
        )
        for first, left, x, second, right, y in contests
        if _all_have(left, x) and _all_have(right, y)
    ]


def _gold_metric(samples: Sequence[tuple[Row, Row]]) -> dict[str, Callable[[Row], float]]:
    both = [row for pair in samples for row in pair]
    return {"gold": lambda row: row["gold_final"]} if _all_have(both, "gold_final") else {}


def _all_have(rows: Sequence[Row], name: str) -> bool:
    return bool(rows) and all(row.get(name) is not None for row in rows)


def _groups(rows: Sequence[tuple[Row, Row]]) -> list[tuple[str, Any]]:
    return [
        ("row", index) if left.get("group") in (None, "") else ("group", str(left["group"]))
        for index, (left, _) in enumerate(rows)
    ]


def _by_key(rows: Sequence[Row], what: str) -> dict[tuple[Any, str], Row]:
    keyed: dict[tuple[Any, str], Row] = {}
    for row in rows:
        key = (row["row"], json.dumps(row["prompt"], sort_keys=True))
        if key in keyed:
            raise InputError(
                f"row {row['row']} with the same prompt stands twice among the {what}",
                mend="rerun the evaluation: each held-out row is measured once",
            )
        keyed[key] = row
    return keyed
