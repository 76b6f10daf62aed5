"""Compare two runs on the same held-out rows: differences with intervals, and win rates."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefkit.errors import InputError
from prefkit.evaluation.paired import Comparison, Row, compare, match
from prefkit.evaluation.stats import Interval
from prefkit.report import comparison, table
from prefkit.report.metrics import metric, number, signed
from prefkit.report.page import save
from prefkit.report.read import Run, read

DIFFERENCE_COLUMNS = ("Metric", "{a}", "{b}", "Difference", "95 % interval", "p")
WIN_COLUMNS = ("Win rate", "Rate", "95 % interval", "Won / tied / lost", "p")


def main(argv: Sequence[str]) -> int:
    """Parses the command line and prints the comparison."""
    parser = argparse.ArgumentParser(
        prog="prefkit compare",
        description=__doc__,
        allow_abbrev=False,
        epilog="Both runs must have been evaluated on the same held-out rows. Differences are A minus B.",
    )
    parser.add_argument("run_a", metavar="RUN_A", help="run directory")
    parser.add_argument("run_b", metavar="RUN_B", help="run directory it is compared with")
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--num_resamples", type=int, default=10_000, metavar="N", help="bootstrap resamples (10000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the resampling (0)")
    options = parser.parse_args(list(argv))
    if options.num_resamples < 1:
        raise InputError("must be at least 1", where="--num_resamples", mend="10000 is a good number")
    runs = read(options.run_a), read(options.run_b)
    labels = comparison.names(runs)
    result = compared(*runs, num_resamples=options.num_resamples, seed=options.seed)
    for columns, rows in tables(result, (labels[0], labels[1])):
        table.print_rows(columns, rows)
    print(f"{result.rows} held-out rows and {result.samples} own answers matched by row and prompt.")
    if options.json:
        content = json.dumps(to_json(result, labels), indent=2, ensure_ascii=False)
        print(save(content + "\n", Path(options.json)))
    return 0


def compared(a: Run, b: Run, *, num_resamples: int = 10_000, seed: int = 0) -> Comparison:
    """The comparison of two runs; InputError when they were evaluated on different rows, or on none."""
    rows = _matched(a.pairs, b.pairs, "pairs") or _matched(a.completions, b.completions, "completions")
    samples = _matched(a.samples, b.samples, "prompts")
    if not rows and not samples:
        raise InputError(
            "the runs share no kind of held-out rows",
            where=f"{a.directory}, {b.directory}",
            mend="compare runs that finished and whose methods evaluate pairs or own answers",
        )
    return compare(rows, samples, names=_names(a, b), num_resamples=num_resamples, seed=seed)


def tables(result: Comparison, names: tuple[str, str]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """(columns, rows) of the differences and, where there is a gold reward, of the win rates."""
    columns = tuple(column.format(a=names[0], b=names[1]) for column in DIFFERENCE_COLUMNS)
    differences = [
        (
            metric(entry.metric).label,
            number(entry.a),
            number(entry.b),
            signed(entry.difference.mean),
            _span(entry.difference),
            _p(entry.p),
        )
        for entry in result.differences
    ]
    wins = [
        (
            f"{entry.first} over {entry.second}, by {entry.judge.replace('_', ' ')}",
            number(entry.outcome.rate.mean),
            _span(entry.outcome.rate),
            f"{entry.outcome.wins} / {entry.outcome.ties} / {entry.outcome.losses}",
            _p(entry.outcome.p),
        )
        for entry in result.wins
    ]
    return [(columns, differences), *([(WIN_COLUMNS, wins)] if wins else [])]


def to_json(result: Comparison, names: Sequence[str]) -> dict[str, Any]:
    """The comparison as JSON values."""
    return {
        "a": names[0],
        "b": names[1],
        "rows": result.rows,
        "samples": result.samples,
        "differences": [asdict(entry) | {"difference": entry.difference.to_json()} for entry in result.differences],
        "wins": [
            {
                "judge": entry.judge,
                "first": entry.first,
                "second": entry.second,
                **asdict(entry.outcome),
                "rate": entry.outcome.rate.to_json(),
            }
            for entry in result.wins
        ],
    }


def _matched(a: Sequence[Row], b: Sequence[Row], what: str) -> list[tuple[Row, Row]]:
    """Matched rows of one kind; none when either run wrote none of that kind (its method has no such evaluation)."""
    return match(a, b, f"held-out {what}") if a and b else []


def _names(a: Run, b: Run) -> tuple[str, str]:
    first, second = comparison.names((a, b))
    return first, second


def _span(interval: Interval) -> str:
    if interval.groups == 1:
        return "unbounded (one group)"
    return (
        f"[{signed(interval.low)}, {signed(interval.high)}]"
        if interval.method.startswith("paired")
        else (f"[{number(interval.low)}, {number(interval.high)}]")
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
