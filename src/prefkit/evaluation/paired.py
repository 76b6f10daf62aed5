"""Two policies on the same held-out rows: match the rows, then difference what was measured on them.

Rows are the plain dictionaries of a run's `evaluation/pairs.jsonl`, `completions.jsonl` and `samples.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    """A win rate of `first` over `second` by one judge (a gold reward or a reward model)."""

    judge: str
    first: str
    second: str
    outcome: WinRate


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything two runs' held-out rows say about them; nothing where either wrote no such rows."""

    rows: int
    samples: int
    differences: tuple[Difference, ...]
    wins: tuple[Win, ...]


JUDGES = ("gold", "reward_model")
"""prefixes of score columns in samples.jsonl: JUDGE_start, JUDGE_final, JUDGE_reference"""

COLUMNS = {
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "nll": "loss",
    "log_ratio": "objective/kl",
    "length": "completions/mean_length",
    "finished": "val/contain_eos_token",
    "gold_final": "gold",
    "reward_model_final": "objective/scores",
}
"""columns of evaluation rows that are compared, and the metric each is the mean of"""


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
    rows: Sequence[tuple[Row, Row]],
    samples: Sequence[tuple[Row, Row]],
    *,
    names: tuple[str, str] = ("A", "B"),
    num_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Differences A - B with paired bootstrap intervals by group, and win rates by every judge whose scores are stored.

    `rows` are matched stored pairs or completions, `samples` matched own answers; a row without a `group` is its own
    group. Win rates: A over B, each over its own start model, each over the data set's answers.
    """
    options: dict[str, Any] = {"num_resamples": num_resamples, "seed": seed, "level": level}
    return Comparison(
        rows=len(rows),
        samples=len(samples),
        differences=(*_differences(rows, **options), *_differences(samples, **options)),
        wins=tuple(win for judge in JUDGES for win in _wins(samples, names, judge, **options)),
    )


def _differences(rows: Sequence[tuple[Row, Row]], *, num_resamples: int, seed: int, level: float) -> list[Difference]:
    found: list[Difference] = []
    first, second, groups = [left for left, _ in rows], [right for _, right in rows], groups_of(rows)
    for column, name in COLUMNS.items():
        if not (_all_have(first, column) and _all_have(second, column)):
            continue
        a, b = [float(row[column]) for row in first], [float(row[column]) for row in second]
        interval = paired_bootstrap(a, b, groups, num_resamples=num_resamples, seed=seed, level=level)
        p = sign_flip_p(a, b, groups, num_resamples=num_resamples, seed=seed)
        found.append(Difference(metric=name, a=fmean(a), b=fmean(b), difference=interval, p=p))
    return found


def _wins(samples: Sequence[tuple[Row, Row]], names: tuple[str, str], judge: str, **options: Any) -> list[Win]:
    a, b = [left for left, _ in samples], [right for _, right in samples]
    final, start, reference = f"{judge}_final", f"{judge}_start", f"{judge}_reference"
    contests = [
        (names[0], a, names[1], b, final),
        (names[0], a, f"{names[0]} at its start", a, start),
        (names[1], b, f"{names[1]} at its start", b, start),
        (names[0], a, "the answers in the data", a, reference),
        (names[1], b, "the answers in the data", b, reference),
    ]
    groups = groups_of(samples)
    return [
        Win(
            judge=judge,
            first=first,
            second=second,
            outcome=from_scores([row[final] for row in left], [row[column] for row in right], groups, **options),
        )
        for first, left, second, right, column in contests
        if _all_have(left, final) and _all_have(right, column)
    ]


def _all_have(rows: Sequence[Row], name: str) -> bool:
    return bool(rows) and all(row.get(name) is not None for row in rows)


def groups_of(rows: Sequence[tuple[Row, Row]]) -> list[tuple[str, Any]]:
    """What matched rows are resampled by: their `group`, or each row alone."""
    return [
        ("row", index) if left.get("group") in (None, "") else ("group", str(left["group"]))
        for index, (left, _) in enumerate(rows)
    ]


def _by_key(rows: Sequence[Row], what: str) -> dict[tuple[Any, str], Row]:
    keyed: dict[tuple[Any, str], Row] = {}
    for row in rows:
        key = (row["row"], _words(row["prompt"]))
        if key in keyed:
            raise InputError(
                f"row {row['row']} with the same prompt stands twice among the {what}",
                mend="rerun the evaluation: each held-out row is measured once",
            )
        keyed[key] = row
    return keyed


def _words(prompt: Any) -> str:
    """A prompt in words: older runs wrote conversations so, newer ones as messages."""
    if isinstance(prompt, str) or not all(isinstance(turn, Mapping) for turn in prompt):
        return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return "\n".join(f"{turn.get('role')}: {turn.get('content') or ''}" for turn in prompt)
