"""What a run directory tells of its rounds: RUN/rounds/*.json added up, items for a look, and what the judge cost.

The format is `domains/text/round_store.py`'s. A round whose items are not there is still being made, and left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from prefkit.errors import InputError
from prefkit.report.read import Row, Run, json_object, json_row

MEND = "restore the file from a copy, or start the run anew with --overwrite"
Histogram = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """One round, or several in a row, added up. Means and shares are None where there is nothing to take them of."""

    first: int
    last: int
    """numbers of the rounds, from 1"""
    first_step: int
    last_step: int
    prompts: int
    answers: int
    """drawn ones"""
    mean_length: float | None
    """tokens of the drawn answers"""
    finished: float | None
    comparisons: int
    calls: int
    cached: int
    tokens: int
    agreement: float | None
    """share of comparisons in which both orders say the same"""
    ties: float | None
    silent: Histogram
    """comparisons without a probability, by reason"""
    matches: int
    dropped: Histogram
    """prompts without a match, by reason"""
    ranks: Histogram
    """rank, from 1, of a prompt's first own answer"""
    chosen: Histogram
    """who wrote the chosen answers: own, reference, chosen, rejected"""
    rejected: Histogram
    offline: int
    """rounds in which nothing was drawn"""
    drawing: float
    judging: float
    """seconds"""
    judge: str

    @property
    def label(self) -> str:
        return f"{self.first:,}" if self.first == self.last else f"{self.first:,}–{self.last:,}"


@dataclass(frozen=True, kw_only=True)
class Paid:
    """What the replies in RUN/judge-cache took, by everybody who used that folder."""

    calls: int
    tokens_in: int
    tokens_out: int
    wasted: int
    """of the calls, those that may have been charged and brought nothing"""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The whole rounds of a run, at least one."""

    folder: Path
    each: tuple[Counts, ...]
    paid: Paid | None

    @cached_property
    def total(self) -> Counts:
        return added(self.each)

    @property
    def online(self) -> tuple[Counts, ...]:
        """Rounds in which answers were drawn and judged."""
        return tuple(one for one in self.each if not one.offline)

    @property
    def judge(self) -> str:
        """Who judged, by full name; empty where nobody was asked."""
        return self.total.judge

    def bins(self, most: int) -> tuple[Counts, ...]:
        """The rounds themselves, or where there are more than `most`, equally many of them added up at a time."""
        size = -(-len(self.each) // most)
        return tuple(added(self.each[start : start + size]) for start in range(0, len(self.each), size))

    def item(self, number: int, place: int) -> Row | None:
        """One prompt of a round with its answers; None where the round has no so many."""
        path = self.folder / f"{number:05d}.jsonl"
        try:
            with path.open(encoding="utf-8", newline="\n") as lines:
                line = next(islice(lines, place, None), None)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read: {error}", where=str(path), mend=MEND) from None
        return None if line is None else json_row(line, path, place + 1)


def read_rounds(run: Run) -> Rounds | None:
    """The run's rounds; None where it has none (yet). Raises InputError for a damaged file."""
    folder = run.directory / "rounds"
    paths = {int(path.stem): path for path in folder.glob("*.json") if path.stem.isdigit()}
    whole = [path for _, path in sorted(paths.items()) if path.with_suffix(".jsonl").exists()]
    each = [_counts(path) for path in whole]
    if not each:
        return None
    return Rounds(folder=folder, each=tuple(each), paid=_paid(run.directory / "judge-cache"))


def added(parts: Sequence[Counts]) -> Counts:
    """Rounds in a row as one."""

    def sums(name: str) -> int:
        return sum(getattr(part, name) for part in parts)

    def histogram(name: str) -> Histogram:
        return _merged([getattr(part, name) for part in parts])

    answers = [part.answers for part in parts]
    decided = [part.comparisons - sum(part.silent.values()) for part in parts]
    return Counts(
        first=parts[0].first,
        last=parts[-1].last,
        first_step=parts[0].first_step,
        last_step=parts[-1].last_step,
        prompts=sums("prompts"),
        answers=sums("answers"),
        mean_length=_mean([part.mean_length for part in parts], answers),
        finished=_mean([part.finished for part in parts], answers),
        comparisons=sums("comparisons"),
        calls=sums("calls"),
        cached=sums("cached"),
        tokens=sums("tokens"),
        agreement=_mean([part.agreement for part in parts], decided),  # what was asked in both orders is decided
        ties=_mean([part.ties for part in parts], decided),
        silent=histogram("silent"),
        matches=sums("matches"),
        dropped=histogram("dropped"),
        ranks=histogram("ranks"),
        chosen=histogram("chosen"),
        rejected=histogram("rejected"),
        offline=sums("offline"),
        drawing=sum(part.drawing for part in parts),
        judging=sum(part.judging for part in parts),
        judge=next((part.judge for part in reversed(parts) if part.judge), ""),
    )


def _counts(path: Path) -> Counts:
    row = json_object(path)
    try:
        seconds: Mapping[str, Any] = row.get("seconds") or {}
        return Counts(
            first=int(row["round"]),
            last=int(row["round"]),
            first_step=int(row["first_step"]),
            last_step=int(row["first_step"]) + int(row["steps"]) - 1,
            prompts=int(row["prompts"]),
            answers=int(row["answers"]),
            mean_length=row["mean_length"],
            finished=row["answers_finished"],
            comparisons=int(row["comparisons"]),
            calls=int(row["judge_calls"]),
            cached=int(row["judge_cached"]),
            tokens=int(row["judge_tokens"]),
            agreement=row["order_agreement"],
            ties=row["tie_rate"],
            silent=dict(row["without_probability"]),
            matches=int(row["matches"]),
            dropped=dict(row["dropped"]),
            ranks=dict(row["own_rank"]),
            chosen=dict(row["chosen_origin"]),
            rejected=dict(row["rejected_origin"]),
            offline=int(bool(row["offline"])),
            drawing=float(seconds.get("drawing", 0.0)),
            judging=float(seconds.get("judging", 0.0)),
            judge=str(row["judge"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"does not have the counts of a round ({type(error).__name__}: {error})", where=str(path), mend=MEND
        ) from None


def _paid(folder: Path) -> Paid | None:
    """Replies on disk, each charged once; None where there are none. A cut last line is being written, and left out."""
    calls = tokens_in = tokens_out = wasted = 0
    for row in _replies(folder):
        if "reply" in row:
            calls += 1
            tokens_in += int(row.get("tokens_in") or 0)
            tokens_out += int(row.get("tokens_out") or 0)
        elif "wasted" in row:
            calls, wasted = calls + 1, wasted + 1
            tokens_in += int(row.get("tokens") or 0)
    return Paid(calls=calls, tokens_in=tokens_in, tokens_out=tokens_out, wasted=wasted) if calls else None


def _replies(folder: Path) -> Iterator[Mapping[str, Any]]:
    for path in sorted(folder.glob("replies-*.jsonl")):
        with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            for place, line in enumerate(lines, 1):
                if line.endswith("\n") and line.strip():
                    yield json_row(line, path, place)


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None and weight]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def _merged(parts: Sequence[Histogram]) -> Histogram:
    counts: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            counts[name] = counts.get(name, 0) + count
    return dict(sorted(counts.items()))
