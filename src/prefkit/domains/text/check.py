"""Look at data before anything is trained on it: the same pure function for `data check` and for training."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prefkit.domains.text.encoder import Encoded, Settings
from prefkit.domains.text.problems import Problem, Where, raise_first, row_name
from prefkit.domains.text.prompts import last_content, plain
from prefkit.domains.text.tokenize import encode_rows, to_example, to_pair
from prefkit.records import Completion, Example, Pair, Preference, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = Preference | Completion
QUANTILES = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)
LEAK = 16
"""characters a prompt must have before an answer that begins with it counts as a leak"""
BINS = 12
"""bins of a length histogram"""
SHOWN = 50
"""problems written to data.json"""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of one part of the rows, in `unit`."""

    unit: Literal["tokens", "characters"]
    quantiles: dict[str, float]
    edges: list[int]
    """borders of the histogram's bins: bin i holds edges[i] <= length < edges[i + 1], the last its end too"""
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a check found. `examples` are the tokenized rows to train on (empty without a tokenizer)."""

    name: str
    rows: int
    kept: int
    """rows that training uses"""
    counts: dict[str, int]
    """duplicates, identical, empty, ties, truncated, leaked, apart: how many rows each"""
    dropped: dict[str, int]
    """rows left out of training, by reason"""
    lengths: dict[str, Lengths]
    overlap: dict[str, int]
    problems: list[Problem]
    fingerprint: str
    keep: list[int] = field(repr=False)
    """places (in the checked list) of the rows that training uses"""
    examples: list[Pair] | list[Example] = field(repr=False, default_factory=list)

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "error"]

    def raise_errors(self) -> None:
        """Raise the first error as an InputError that counts the others."""
        raise_first(self.problems)

    def to_json(self) -> dict[str, Any]:
        """The content of data.json."""
        return {
            "name": self.name,
            "rows": self.rows,
            "kept": self.kept,
            "dropped": self.dropped,
            **self.counts,
            "lengths": {part: asdict(lengths) for part, lengths in self.lengths.items()},
            "overlap": self.overlap,
            "problem_counts": dict(Counter(f"{p.level}: {p.kind}" for p in self.problems)),
            "problems": [problem.to_json() for problem in self.problems[:SHOWN]],
            "fingerprint": self.fingerprint,
        }


def check(
    rows: Sequence[Record],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    evaluation: Sequence[Record] | None = None,
    max_length: int = 1024,
    append_eos: bool = True,
    long_prompts: Literal["refuse", "drop"] = "refuse",
    context: int = 0,
    where: Where = row_name,
    problems: Iterable[Problem] = (),
    name: str = "",
) -> Report:
    """Check rows of one kind (all Preference or all Completion).

    With a tokenizer every row is tokenized: borders, template, lengths in tokens, truncation; without one
    lengths are in characters. `evaluation`: rows that must not be trained on. `where` names the place of a
    row (0-based), `problems` are those found while reading, `context` the tokens the model takes (0: any
    number). Empty answers and rows that cannot be tokenized are errors; identical pairs (as text or, cut to
    max_length, as tokens) are left out of training, counted.
    """
    settings = Settings(max_length, append_eos, long_prompts, context)
    found = _Findings(list(problems), where)
    unread = {problem.row for problem in found.problems if problem.row >= 0} - {row.row for row in rows}
    _texts(rows, found)
    _duplicates(rows, found)
    overlap = _overlap(rows, evaluation or (), found)
    encoded = _encode(rows, tokenizer, settings, found) if tokenizer is not None else {}
    keep = [place for place, row in enumerate(rows) if place not in found.out]
    examples: list[Any] = [
        to_pair(row, encoded[place]) if isinstance(row, Preference) else to_example(row, encoded[place])
        for place, row in enumerate(rows)
        if place in encoded and place not in found.out
    ]
    counted = ("duplicate", "identical", "empty", "tie", "truncated", "leaked prompt", "apart")
    names = ("duplicates", "identical", "empty", "ties", "truncated", "leaked", "apart")
    return Report(
        name=name,
        rows=len(rows) + len(unread),
        kept=len(keep),
        counts={shown: len(found.rows[kind]) for shown, kind in zip(names, counted, strict=True)},
        dropped=dict(Counter(found.out.values())),
        lengths=_lengths(rows, encoded if tokenizer is not None else None),
        overlap=overlap,
        problems=sorted(found.problems, key=lambda problem: (problem.level != "error", problem.row)),
        fingerprint=fingerprint(rows),
        keep=keep,
        examples=examples,
    )


def fingerprint(rows: Iterable[Record]) -> str:
    """sha256 (hex) over every field of every row, in order: another order is other data."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(vars(row), sort_keys=True, ensure_ascii=False, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


class _Findings:
    """Problems, the rows of each kind, and the places of rows left out of training with the reason."""

    def __init__(self, problems: list[Problem], where: Where) -> None:
        self.problems, self.where = problems, where
        self.rows: defaultdict[str, set[int]] = defaultdict(set)
        self.out: dict[int, str] = {}

    def warn(self, kind: str, row: Record, field: str, what: str, mend: str) -> None:
        self._add("warning", kind, row, field, what, mend)

    def refuse(self, kind: str, row: Record, field: str, what: str, mend: str) -> None:
        self._add("error", kind, row, field, what, mend)

    def _add(
        self, level: Literal["error", "warning"], kind: str, row: Record, field: str, what: str, mend: str
    ) -> None:
        self.rows[kind].add(row.row)
        where = self.where(row.row)
        self.problems.append(
            Problem(kind=kind, level=level, where=where, row=row.row, field=field, what=what, mend=mend)
        )


def _answers(row: Record) -> dict[str, Text]:
    if isinstance(row, Preference):
        return {"chosen": row.chosen, "rejected": row.rejected}
    return {"completion": row.completion}


def _texts(rows: Sequence[Record], found: _Findings) -> None:
    """Empty answers, identical pairs, ties, scores against the order, answers that repeat their prompt."""
    leaks = 0
    for place, row in enumerate(rows):
        for name, answer in _answers(row).items():
            if not last_content(answer).strip():
                found.refuse("empty", row, name, "the answer is empty", "drop the row or write the answer")
                found.out[place] = "empty"
        leaked = [name for name, answer in _answers(row).items() if _leaks(row.prompt, answer)]
        leaks += len(leaked) == len(_answers(row))
        if leaked:
            what, mend = "the answer begins by repeating the prompt", "cut the prompt off the answer"
            found.warn("leaked prompt", row, leaked[0], what, mend)
        if isinstance(row, Preference):
            _scores(row, found)
            if row.chosen == row.rejected:
                what = "chosen and rejected are identical; the row is left out of training"
                found.warn("identical", row, "rejected", what, "drop the row")
                found.out.setdefault(place, "identical")
    if rows and leaks > len(rows) / 2:
        what = f"in {leaks} of {len(rows)} rows every answer repeats the prompt"
        mend = "drop the prompt column (the common beginning is then the prompt), or cut it off the answers"
        found.problems.append(Problem(kind="leaked prompt", what=what, mend=mend, field="prompt"))


def _leaks(prompt: Text, answer: Text) -> bool:
    asked = last_content(prompt).strip()
    return len(asked) >= LEAK and last_content(answer).lstrip().startswith(asked)


def _scores(row: Preference, found: _Findings) -> None:
    if row.score_chosen is None or row.score_rejected is None:
        return
    if row.score_chosen == row.score_rejected:
        what = f"both answers score {row.score_chosen:g}, yet one is called better"
        found.warn("tie", row, "score_chosen", what, "drop ties, or give strength 0.5 to methods that use it")
    elif row.score_chosen < row.score_rejected:
        what = f"chosen scores {row.score_chosen:g}, rejected {row.score_rejected:g}"
        found.warn("score order", row, "score_chosen", what, "swap the answers or correct the scores")


def _key(row: Record) -> str:
    return "\0".join([plain(row.prompt), *(plain(answer) for answer in _answers(row).values())])


def _duplicates(rows: Sequence[Record], found: _Findings) -> None:
    first: dict[str, int] = {}
    for row in rows:
        seen = first.setdefault(_key(row), row.row)
        if seen != row.row:
            what = f"the same as {found.where(seen)}"
            found.warn("duplicate", row, "", what, "drop one, unless the repetition is meant as weight")


def _overlap(rows: Sequence[Record], evaluation: Sequence[Record], found: _Findings) -> dict[str, int]:
    """Rows and prompts that also stand in the evaluation data: {} without evaluation data."""
    if not evaluation:
        return {}
    held, prompts = {_key(row) for row in evaluation}, {plain(row.prompt) for row in evaluation}
    same = [row for row in rows if _key(row) in held]
    asked = [row for row in rows if plain(row.prompt) in prompts]
    mend = "hold out whole prompts, so that evaluation measures what was not trained on"
    for row in same:
        found.warn("overlap", row, "", "the same row stands in the evaluation data", mend)
    if len(asked) > len(same):
        what = f"{len(asked)} rows have a prompt of the evaluation data"
        found.problems.append(Problem(kind="overlap", level="warning", what=what, mend=mend, field="prompt"))
    return {"rows": len(same), "prompts": len(asked)}


def _encode(
    rows: Sequence[Record], tokenizer: PreTrainedTokenizerBase, settings: Settings, found: _Findings
) -> dict[int, Encoded]:
    encoded: dict[int, Encoded] = {}
    for place, result in enumerate(encode_rows(tokenizer, rows, settings, where=found.where)):
        row = rows[place]
        if isinstance(result, Problem):
            found.problems.append(result)
            found.out.setdefault(place, result.kind)
            continue
        encoded[place] = result
        if result.apart:
            found.rows["apart"].add(row.row)
        names = [name for name, cut in zip(_answers(row), result.truncated, strict=True) if cut]
        if names:
            what = f"cut at {settings.named()}; no end-of-sequence token is added"
            found.warn("truncated", row, ", ".join(names), what, "raise --max_length if memory allows")
        if isinstance(row, Preference) and result.answers[0] == result.answers[1] and place not in found.out:
            what = "chosen and rejected are the same tokens once cut; the row is left out of training"
            found.warn("identical", row, "rejected", what, "raise --max_length")
            found.out[place] = "identical"
    return encoded


def _lengths(rows: Sequence[Record], encoded: Mapping[int, Encoded] | None) -> dict[str, Lengths]:
    if not rows:
        return {}
    names = ["prompt", *_answers(rows[0])]
    if encoded is None:
        table = [[_size(row.prompt), *map(_size, _answers(row).values())] for row in rows]
    else:
        table = [[len(one.prompt), *map(len, one.answers)] for one in encoded.values()]
        names.append("total")
        table = [[*row, row[0] + max(row[1:])] for row in table]
    if not table:
        return {}
    unit: Literal["tokens", "characters"] = "characters" if encoded is None else "tokens"
    return {name: _summary(column, unit) for name, column in zip(names, np.array(table).T, strict=True)}


def _size(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message.get("content") or "") for message in text)


def _summary(lengths: np.ndarray, unit: Literal["tokens", "characters"]) -> Lengths:
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high + 1 - low) // BINS))
    edges = list(range(low, high + width + 1, width))
    counts, _ = np.histogram(lengths, bins=edges)
    quantiles = np.quantile(lengths, QUANTILES, method="higher")
    return Lengths(
        unit=unit,
        quantiles={f"{share:g}": float(value) for share, value in zip(QUANTILES, quantiles, strict=True)},
        edges=edges,
        counts=counts.tolist(),
    )
