"""Label a file of candidate answers by any judge: `prefkit judge run --judge SPEC --candidates FILE --out FILE`.

prefkit judge run --judge reward:runs/reward --candidates answers.jsonl --out labels.jsonl --pairs pairs.jsonl
prefkit judge run --judge llm:MODEL --judge_base_url URL --candidates answers.jsonl --out labels.jsonl --dry_run

Candidates are rows with prompt and answers, preference pairs, or what `prefkit sample --num K` writes. Killed, the same
command goes on where it stopped. Under `accelerate launch`, processes share the prompts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefkit.domains.text.candidates import Answered, read_candidates
from prefkit.engine.files import line_of, write_text
from prefkit.engine.progress import duration
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.feedback.config import Judging, add_arguments, from_arguments
from prefkit.feedback.tally import Tally
from prefkit.loops.judging import judge_of
from prefkit.loops.labelling import PIECE, Spent, accuracy, label, preferences, read_labels

PAIRINGS = ("best_worst", "best_random", "all")
SCORING = ("gold", "reward")
"""judges that have something to say of one answer alone"""


def main(argv: Sequence[str]) -> int:
    """Runs `prefkit judge ...`. Raises InputError for candidates or a judge that cannot be used."""
    parser = _parser()
    found = parser.parse_args([_underscored(word) for word in argv])
    if found.verb is None:
        parser.print_help()
        return 0
    return _run(found)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="prefkit judge", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    verbs = parser.add_subparsers(title="commands", metavar="run", dest="verb")
    run = verbs.add_parser("run", help="label a file of candidates", allow_abbrev=False)
    add = run.add_argument
    add(
        "--candidates", required=True, metavar="FILE", help="answers to compare: jsonl, json, csv, parquet, or a Hub id"
    )
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="JSON lines, one per prompt; prompts in the file are not judged again",
    )
    add("--pairs", default="", metavar="FILE", help="also write preference pairs, ready to train on")
    add("--pairing", choices=PAIRINGS, default="best_worst", help="which answers of a prompt make pairs (best_worst)")
    add("--seed", type=int, default=0, help="seed of best_random and of packaged gold rewards (0)")
    add("--dry_run", action="store_true", help="print what it would take: calls, and for llm judges tokens and cost")
    add_arguments(run)
    return parser


def _underscored(word: str) -> str:
    """--dry-run and --dry_run are the same option."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def _run(found: argparse.Namespace) -> int:
    options = from_arguments(found)
    kind, out = options.judge.partition(":")[0], Path(found.out)
    if not options.judge:
        raise InputError("no judge given", where="--judge", mend="for example --judge reward:MODEL; see --help")
    if found.seed < 0:
        raise InputError(f"seed is {found.seed}", where="--seed", mend="0 or more")
    given = read_candidates(found.candidates)
    if kind not in SCORING and all(len(row.answers) < 2 for row in given):
        raise InputError(
            "every prompt has one answer alone: there is nothing to compare",
            where=found.candidates,
            mend="give several answers to a prompt (`prefkit sample --num 2` draws them)",
        )
    world = World.start()
    if found.dry_run:
        if world.is_main:
            _forecast(options, given, out)
        return 0
    judge = judge_of(options, directory=out.parent, say=_said if world.is_main else None)
    started = time.monotonic()
    # Where replies come over the network, a piece holds enough requests to keep all of them in flight.
    piece = max(PIECE, 4 * options.judge_concurrency) if kind == "llm" else PIECE
    spent = label(judge, given, out, world, piece=piece)
    cost = sum(world.gather_objects([_cost(judge, options)]))
    if world.is_main:
        labels = read_labels(out, given)
        print(f"judge: {judge.name}")
        _print_verdicts(labels, found.seed)
        _print_spent(spent, cost, time.monotonic() - started)
        if found.pairs:
            _write_pairs(labels, found)
        print(f"labels: {out}")
    return 0


def _forecast(options: Judging, given: Sequence[Answered], out: Path) -> None:
    """What judging all candidates would take. Only a judge behind an endpoint is made for it: nothing is loaded."""
    questions = [row.question for row in given]
    comparisons, answers = sum(len(q.wanted()) for q in questions), sum(len(q.answers) for q in questions)
    print(f"{len(given)} prompts, {answers} answers, {comparisons} comparisons")
    if options.judge.startswith("llm:"):
        judge: Any = judge_of(options, directory=out.parent)
        print(f"{judge.name}: {judge.dry_run(questions)}")


def _cost(judge: Any, options: Judging) -> float:
    """What this process's requests cost at the prices given."""
    tally = getattr(judge, "tally", None)
    return tally.cost(options.judge_price_in, options.judge_price_out) if isinstance(tally, Tally) else 0.0


def _print_verdicts(labels: Sequence[Any], seed: int) -> None:
    """Everything in the file: what was decided, how far the orders agree, and accuracy where there are labels."""
    tally = Tally()
    tally.add(verdict for _, verdict in labels)
    parts = [f"{tally.decided} of {tally.comparisons} comparisons decided"]
    if tally.tie_rate is not None:
        parts.append(f"ties {tally.tie_rate:.1%}")
    parts += [f"{reason} {count}" for reason, count in sorted(tally.reasons.items())]
    print(f"{len(labels)} prompts: {', '.join(parts)}")
    if tally.agreement is not None:
        print(f"both orders prefer the same answer in {tally.agreement:.1%} of {tally.both_orders} comparisons")
    found, silent = accuracy(labels, seed=seed)
    left = f"; {silent} without a usable verdict are left out" if silent else ""
    if found is not None:
        span = "unbounded, one group" if found.groups == 1 else f"{found.low:.3f} to {found.high:.3f}"
        print(f"accuracy on the file's labels: {found.mean:.3f} (95 %: {span}) of {found.n} pairs{left}")
    elif silent:
        print(f"accuracy on the file's labels: none of {silent} pairs has a usable verdict")


def _print_spent(spent: Spent, cost: float, seconds: float) -> None:
    parts = [f"{spent.prompts} prompts judged now", f"{spent.calls:,} calls", f"{spent.cached:,} cached"]
    if spent.tokens:
        parts.append(f"{spent.tokens:,} tokens")
    if cost:
        parts.append(f"cost {cost:.4f}")
    print(", ".join([*parts, duration(seconds)]))


def _write_pairs(labels: Sequence[Any], found: argparse.Namespace) -> None:
    rows, dropped = preferences(labels, found.pairing, seed=found.seed)
    path = Path(found.pairs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(map(line_of, rows)))
    told = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items()))
    print(f"pairs: {path} ({len(rows)} rows{f'; prompts without one: {told}' if told else ''})")


def _said(text: str) -> None:
    print(text, file=sys.stderr)
