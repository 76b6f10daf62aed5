"""Compare two runs on the same held-out rows: differences with intervals, and win rates."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefkit.errors import InputError
from prefkit.evaluation.judged import JudgedWin, judged, questions_of
from prefkit.evaluation.paired import Comparison, Row, compare, match
from prefkit.evaluation.stats import Interval
from prefkit.feedback.config import add_arguments, from_arguments
from prefkit.feedback.tally import Tally
from prefkit.report import comparison, table
from prefkit.report.metrics import metric, number, signed
from prefkit.report.page import save
from prefkit.report.read import Run, read

DIFFERENCE_COLUMNS = ("Metric", "{a}", "{b}", "Difference", "95 % interval", "p")
WIN_COLUMNS = ("Win rate", "Rate", "95 % interval", "Won / tied / lost", "p")
LENGTH_COLUMNS = ("Win rate at equal length", "Rate", "95 % interval", "Slope")


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
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of resampling and packaged gold rewards (0)"
    )
    parser.add_argument("--length_controlled", action="store_true", help="also the judge's win rates at equal length")
    parser.add_argument(
        "--dry_run", action="store_true", help="print what asking the judge would take, and ask nothing"
    )
    add_arguments(parser)
    options = parser.parse_args(list(argv))
    if options.num_resamples < 1:
        raise InputError("must be at least 1", where="--num_resamples", mend="10000 is a good number")
    for name in ("length_controlled", "dry_run"):
        if getattr(options, name) and not options.judge:
            raise InputError("needs a judge", where=f"--{name}", mend="add --judge SPEC")
    runs = read(options.run_a), read(options.run_b)
    labels = _names(*runs)
    result = compared(*runs, num_resamples=options.num_resamples, seed=options.seed)
    wins: list[JudgedWin] = []
    lines: list[str] = []
    if options.judge:
        wins, lines = _judge(runs, labels, options)
        if options.dry_run:
            print("\n".join(lines))
            return 0
    for columns, rows in [*tables(result, labels), *judged_tables(wins, options.judge)]:
        table.print_rows(columns, rows)
    print(f"{result.rows} held-out rows and {result.samples} own answers matched by row and prompt.")
    for line in lines:
        print(line)
    if options.json:
        content = json.dumps(to_json(result, labels, wins), indent=2, ensure_ascii=False)
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


def judged_tables(wins: Sequence[JudgedWin], judge: str) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """(columns, rows) of the win rates by a judge that was asked now and, where asked for, of those at equal length."""
    usual = [
        (
            f"{entry.first} over {entry.second}, by {judge}",
            number(entry.outcome.rate.mean),
            _span(entry.outcome.rate),
            f"{entry.outcome.wins} / {entry.outcome.ties} / {entry.outcome.losses}",
            _p(entry.outcome.p),
        )
        for entry in wins
        if entry.outcome is not None
    ]
    even = [
        (
            f"{entry.first} over {entry.second}, by {judge}",
            number(entry.controlled.rate.mean),
            _span(entry.controlled.rate),
            signed(entry.controlled.slope),
        )
        for entry in wins
        if entry.controlled is not None
    ]
    return [*([(WIN_COLUMNS, usual)] if usual else []), *([(LENGTH_COLUMNS, even)] if even else [])]


def _judge(
    runs: tuple[Run, Run], labels: tuple[str, str], options: argparse.Namespace
) -> tuple[list[JudgedWin], list[str]]:
    """Win rates by the judge named, and lines on what it said; with --dry_run what it would take."""
    from prefkit.loops.judging import judge_of  # brings torch along

    a, b = runs
    samples = _matched(a.samples, b.samples, "prompts")
    if not samples:
        raise InputError(
            "the runs have no own answers to compare",
            where=f"{a.directory}, {b.directory}",
            mend="train with --num_eval_prompts above 0",
        )
    questions = questions_of(samples)
    asked = f"{sum(len(question.pairs) for question in questions)} comparisons of {len(samples)} prompts' answers"
    if options.dry_run and not options.judge.startswith("llm:"):
        return [], [f"{asked}, by {options.judge}"]
    directory = Path(options.json).parent if options.json else a.directory
    judge: Any = judge_of(from_arguments(options), directory=directory, say=lambda text: print(text, file=sys.stderr))
    if options.dry_run:
        return [], [f"{asked}; {judge.name}: {judge.dry_run(questions)}"]
    wins, verdicts = judged(
        samples,
        judge,
        names=labels,
        control_length=options.length_controlled,
        num_resamples=options.num_resamples,
        seed=options.seed,
    )
    return wins, [f"{asked}, by {judge.name}", *_said(wins, verdicts, judge, options)]


def _said(wins: Sequence[JudgedWin], verdicts: Sequence[Any], judge: Any, options: argparse.Namespace) -> list[str]:
    """Lines on the judge: agreement of both orders, verdicts without a probability, calls and cost."""
    tally = Tally()
    tally.add(verdicts)
    lines: list[str] = []
    if tally.agreement is not None:
        lines.append(f"both orders prefer the same answer in {tally.agreement:.1%} of {tally.both_orders} comparisons")
    if tally.reasons:
        told = ", ".join(f"{reason} {count}" for reason, count in sorted(tally.reasons.items()))
        lines.append(f"comparisons without a usable verdict, left out of the rates: {told}")
    silent = [f"{win.first} over {win.second}" for win in wins if win.outcome is None]
    lines += [f"no usable verdict at all on {name}" for name in silent]
    calls, cached = sum(v.calls for v in verdicts), sum(v.cached for v in verdicts)
    own = getattr(judge, "tally", None)
    cost = own.cost(options.judge_price_in, options.judge_price_out) if isinstance(own, Tally) else 0.0
    return [*lines, f"{calls:,} calls, {cached:,} cached" + (f", cost {cost:.4f}" if cost else "")]


def to_json(result: Comparison, names: Sequence[str], judged_wins: Sequence[JudgedWin] = ()) -> dict[str, Any]:
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
        "judged": [_win_to_json(entry) for entry in judged_wins],
    }


def _win_to_json(entry: JudgedWin) -> dict[str, Any]:
    fields = asdict(entry)
    if entry.outcome is not None:
        fields["outcome"]["rate"] = entry.outcome.rate.to_json()
    if entry.controlled is not None:
        fields["controlled"]["rate"] = entry.controlled.rate.to_json()
    return fields


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
