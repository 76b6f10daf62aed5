"""The page's section on rounds: what was drawn, who judged it at what cost, and what was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefkit.report import judges, round_plots
from prefkit.report.metrics import duration, number
from prefkit.report.parts import Table, embedded, pairs, table
from prefkit.report.read import Run, json_object
from prefkit.report.round_counts import Counts, Histogram, Rounds, added, read_rounds
from prefkit.report.round_examples import examples

MOST_BINS = 20
"""rows of the tables; more rounds than that are added up"""
MOST_OPEN = 8
"""rows that are shown without being asked for"""
HARD = "\u00a0"
"""a space at which no line breaks"""
DRAWN = ("Round", "Steps", "Prompts", "Answers", "Mean length", "Finished", "Drawing")
JUDGED = (
    "Round",
    "Comparisons",
    "Calls",
    "From cache",
    "Tokens",
    "Orders agree",
    "Ties",
    "No preference",
    "Judging",
)
RANK, BASELINE_RANK = "Rank of the own answer", "Rank of the baseline"
"""of a prompt's first own answer, which in OSP is the one that candidates are compared with"""
USED = ("Round", "Pairs", "Dropped prompts", RANK, "Chosen written by", "Rejected written by")


def section(run: Run, plots: Path) -> dict[str, Any] | None:
    """What the template shows of the run's rounds, figures drawn into `plots`; None for a run without rounds."""
    rounds = read_rounds(run)
    if rounds is None:
        return None
    bins = rounds.bins(MOST_BINS)
    return {
        "judge": rounds.judge,
        "judge_notes": _judge_notes(run, rounds),
        "facts": facts(run, rounds),
        "quality": _quality(run),
        "tables": _tables(bins, run),
        "folded": len(bins) > MOST_OPEN,
        "note": _note(run, rounds, bins),
        "plots": [embedded(figure) for figure in round_plots.draw(bins, plots)],
        "examples": examples(rounds, baseline=_has_baseline(run)),
        "stage1": "RUN/stage1/report.html" if (run.directory / "stage1" / "report.html").is_file() else "",
    }


def summary(run: Run) -> str:
    """One line: rounds, comparisons, calls, dropped. Empty for a run without rounds."""
    rounds = read_rounds(run)
    if rounds is None:
        return ""
    total = rounds.total
    parts = [_counted(len(rounds.each), "round")]
    if rounds.judge:
        cached = f" ({total.cached:,} more from the cache)" if total.cached else ""
        asked = f"{_counted(total.comparisons, 'comparison')} in {_counted(total.calls, 'call')}{cached}"
        parts.append(f"{asked} by {rounds.judge}")
    else:
        parts.append("stored pairs, nobody was asked")
    parts.append(f"{_counted(total.matches, 'pair')} to train on")
    dropped = sum(total.dropped.values())
    parts.append(f"{_counted(dropped, 'prompt')} dropped" + (f" ({_listed(total.dropped)})" if dropped else ""))
    return "; ".join(parts)


def facts(run: Run, rounds: Rounds) -> list[tuple[str, str]]:
    """Totals over all rounds, with the cost where it can be known."""
    total = rounds.total
    found = [("Rounds", f"{len(rounds.each):,}"), ("Prompts", f"{total.prompts:,}")]
    if total.answers:
        found.append(("Answers drawn", f"{total.answers:,}"))
    if rounds.judge:
        found.append(("Comparisons asked", f"{total.comparisons:,}"))
        found.append(("Calls of the judge", f"{total.calls:,}"))
    if total.cached:
        found.append(("Replies from the cache", f"{total.cached:,}"))
    if total.tokens:
        found.append(("Tokens of the judge", f"{total.tokens:,}"))
    if price := cost(run, rounds):
        found.append(("Cost of the judge", price))
    if rounds.online:
        found.append(("Time drawing", _time(total.drawing)))
        found.append(("Time judging", _time(total.judging)))
    return found


def cost(run: Run, rounds: Rounds) -> str:
    """What the judge cost at the prices given: exact where the run's own replies are at hand, else its bounds."""
    prices = [float(run.config.get(name) or 0.0) for name in ("judge_price_in", "judge_price_out")]
    if not any(prices):
        return ""
    if rounds.paid and not run.config.get("judge_cache"):
        spent = rounds.paid.tokens_in * prices[0] + rounds.paid.tokens_out * prices[1]
        return number(spent / 1e6, digits=4)
    low, high = (number(rounds.total.tokens * price / 1e6, digits=4) for price in (min(prices), max(prices)))
    return f"{low} to {high}"


def _judge_notes(run: Run, rounds: Rounds) -> list[str]:
    if not rounds.judge:
        return ["Nobody was asked: the rounds train on stored pairs."]
    what = judges.described(rounds.judge)
    notes = [f"{what[0].upper()}{what[1:]}. {judges.provenance(rounds.judge)}"] if what else []
    if option := judges.same_as_evaluation(run.config):
        notes.append(judges.NOT_INDEPENDENT[option])
    return notes


def _tables(bins: Sequence[Counts], run: Run) -> list[Table]:
    """Three tables of the same rounds; those that would say nothing are left out."""
    last_step = run.result.steps if run.result else None
    found: list[Table] = []
    parts = [(one.label, one) for one in bins]
    parts += [("all", added(bins))] if len(bins) > 1 else []
    if any(one.answers for one in bins):
        rows = [(label, *_drawn(one, last_step)) for label, one in parts]
        found.append(table(DRAWN, rows, title="Answers drawn"))
    if any(one.comparisons for one in bins):
        columns, rows = _without_empty(JUDGED, [(label, *_judged(one)) for label, one in parts])
        numeric = [column for column in columns[1:] if column != "No preference"]
        found.append(table(columns, rows, title="Asked of the judge", numeric=numeric))
    used = [BASELINE_RANK if column == RANK and _has_baseline(run) else column for column in USED]
    columns, rows = _without_empty(used, [(label, *_used(one)) for label, one in parts])
    return [*found, table(columns, rows, title="What was trained on", numeric=())]


def _drawn(one: Counts, last_step: int | None) -> tuple[str, ...]:
    last = one.last_step if last_step is None else max(one.first_step, min(one.last_step, last_step))
    steps = f"{one.first_step:,}" if one.first_step == last else f"{one.first_step:,}–{last:,}"
    drawn = (
        (number(one.mean_length, digits=1), _percent(one.finished), _time(one.drawing)) if one.answers else ("–",) * 3
    )
    return steps, f"{one.prompts:,}", f"{one.answers:,}", *drawn


def _judged(one: Counts) -> tuple[str, ...]:
    return (
        f"{one.comparisons:,}",
        f"{one.calls:,}",
        f"{one.cached:,}" if one.cached else "–",
        f"{one.tokens:,}" if one.tokens else "–",
        _percent(one.agreement),
        _percent(one.ties),
        _listed(one.silent) or "–",
        _time(one.judging) if one.comparisons else "–",
    )


def _used(one: Counts) -> tuple[str, ...]:
    return (
        f"{one.matches:,}",
        _listed(one.dropped) or "–",
        _shares(one.ranks, _ordinal),
        _shares(one.chosen, _origin),
        _shares(one.rejected, _origin),
    )


def _without_empty(
    columns: Sequence[str], rows: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The columns that say something in some row; "Dropped prompts" stays, since none is news, too."""
    kept = [
        place
        for place, column in enumerate(columns)
        if column == "Dropped prompts" or any(row[place] != "–" for row in rows)
    ]
    return tuple(columns[place] for place in kept), [tuple(row[place] for place in kept) for row in rows]


def _has_baseline(run: Run) -> bool:
    """Whether a prompt's first own answer is the baseline that OSP compares candidates with."""
    return run.method == "osp" and run.config.get("baseline") == "policy" and run.config.get("candidates") != "data"


def _note(run: Run, rounds: Rounds, bins: Sequence[Counts]) -> str:
    lines: list[str] = []
    if len(bins) < len(rounds.each):
        size = bins[0].last - bins[0].first + 1
        lines.append(f"{len(rounds.each):,} rounds, {size:,} added up in each row.")
    if rounds.judge:
        lines.append(
            "A prompt is dropped where all its answers read the same (identical), only one took part (alone), the "
            "two that would meet tie (tie), or the judge gives no probability (unsure)."
        )
        baseline = "the baseline, the answer that candidates are compared with"
        which = baseline if _has_baseline(run) else "a prompt's first own answer"
        lines.append(f"The rank is that of {which}, among the distinct answers to its prompt, 1st being the best.")
    return " ".join(lines)


def _quality(run: Run) -> Table | None:
    """What a self-judge was worth on stored pairs before it was used (evaluation/judge.json)."""
    path = run.directory / "evaluation" / "judge.json"
    found = json_object(path, optional=True)
    if not found:
        return None
    rows = [("Pairs it was measured on", number(found.get("num")))]
    for name, label in (("accuracy", "Right by their labels"), ("order_agreement", "Orders agree")):
        spread: Mapping[str, float | None] = found.get(name) or {}
        if (mean := spread.get("mean")) is not None:
            low, high = spread.get("low"), spread.get("high")
            span = "" if low is None or high is None else f" [{number(low)}, {number(high)}]"
            by_place = name == "order_agreement" and high is not None and high < 0.5
            chance = "0.5 is chance" + (
                "; below it the place decides, and only both orders together tell" if by_place else ""
            )
            rows.append((label, f"{number(mean)}{span}; {chance}"))
    rows.append(("Probability on the letters A and B", number(found.get("mass"))))
    used = float(run.config.get("judge_temperature") or 0.0) or found.get("temperature")
    rows.append(("Temperature of its log-odds", number(used)))
    if calibration := found.get("calibration"):
        before, after = (number(calibration.get(f"ece_{when}")) for when in ("before", "after"))
        rows.append(("Calibration error at temperature 1, and as fitted", f"{before}, {after}"))
    return pairs(rows, title="The judge before it was used")


def _shares(counts: Histogram, name: Callable[[str], str]) -> str:
    """'own 56 %, start model 44 %' by falling share for words, in order for ranks."""
    total = sum(counts.values())
    ranked = sorted(counts.items(), key=lambda item: int(item[0]) if item[0].isdigit() else -item[1])
    shares = [f"{name(key)} {_percent(count / total)}" for key, count in ranked if count]
    return ", ".join(share.replace(" ", HARD) for share in shares) or "–"


def _origin(name: str) -> str:
    return round_plots.ORIGINS.get(name, name)


def _ordinal(rank: str) -> str:
    ending = "th" if rank[-2:] in ("11", "12", "13") else {"1": "st", "2": "nd", "3": "rd"}.get(rank[-1:], "th")
    return f"{rank}{ending}"


def _listed(counts: Histogram) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}{HARD}%"


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"
