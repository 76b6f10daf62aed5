"""Labelling a file of candidates: a judge's verdicts as rows of JSON, and preference pairs made of them.

Questions are cut into pieces before any is dealt to a process, and a piece is judged whole: with equal threads in
float32 any number of processes write the same rows. What a judge is told to do twice after a kill is one piece.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefkit.domains.text.candidates import Answered
from prefkit.engine.parts import Key, Parts, dealt, shown
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.evaluation.stats import Interval, bootstrap
from prefkit.feedback.ranking import order_of, pairing_of
from prefkit.protocols import Judge
from prefkit.records import Comparison, Question, Text, Verdict

Row = dict[str, Any]
PIECE = 32
"""questions judged together"""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one start of the work asked of the judge, over all processes."""

    calls: int = 0
    cached: int = 0
    tokens: int = 0
    prompts: int = 0
    """prompts judged now; the others were in the file"""


def label(judge: Judge, given: Sequence[Answered], path: Path, world: World, *, piece: int = PIECE) -> Spent:
    """Write one row per prompt to `path`, in order; those that are there are not judged again.

    Raises InputError where the file holds anything but labels of these candidates by this judge.
    """
    by_row = {one.row: one for one in given}
    out = Parts(path=path, world=world, key=lambda row, where: _key(row, where, by_row, judge.name))
    done = out.open()
    pieces = [given[start : start + piece] for start in range(0, len(given), piece)]
    mine = dealt([one for one in pieces if any((row.row,) not in done for row in one)], world)
    spent = [0, 0, 0, 0]
    for rows in shown(mine, len, label="prompts", visible=world.is_main):
        verdicts = judge.judge([row.question for row in rows])
        missing = [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if (row.row,) not in done]
        out.append([to_row(row, verdict) for row, verdict in missing])
        counts = zip(*((v.calls, v.cached, v.tokens) for v in verdicts), strict=True)
        spent = [a + b for a, b in zip(spent, (*(sum(column) for column in counts), len(missing)), strict=True)]
    out.finish()
    calls, cached, tokens, prompts = (sum(column) for column in zip(*world.gather_objects([spent]), strict=True))
    return Spent(calls=calls, cached=cached, tokens=tokens, prompts=prompts)


def read_labels(path: Path, given: Sequence[Answered]) -> list[tuple[Answered, Verdict]]:
    """The rows that `label` finished, as candidates and verdicts, in order."""
    by_row = {one.row: one for one in given}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [(by_row[row["row"]], to_verdict(row)) for row in rows if row["row"] in by_row]


def to_row(given: Answered, verdict: Verdict) -> Row:
    """One line of the file: what was asked and what the judge holds of it."""
    comparisons = [
        dataclasses.asdict(comparison) | {"orders": comparison.orders and list(comparison.orders)}
        for comparison in verdict.comparisons
    ]
    return {
        "row": given.row,
        "prompt": _plain(given.prompt),
        "answers": [_plain(answer) for answer in given.answers],
        "comparisons": comparisons,
        "scores": None if verdict.scores is None else list(verdict.scores),
        "order": list(order_of(given.question, verdict)),
        "judge": verdict.judge,
        **({"group": given.group} if given.group else {}),
    }


def to_verdict(row: Mapping[str, Any]) -> Verdict:
    """The verdict in a line of the file."""
    comparisons = [
        Comparison(**(values | {"orders": values["orders"] and tuple(values["orders"])}))
        for values in row["comparisons"]
    ]
    return Verdict(judge=row["judge"], comparisons=comparisons, scores=row["scores"])


def preferences(
    labels: Sequence[tuple[Answered, Verdict]], pairing: str, *, seed: int
) -> tuple[list[Row], dict[str, int]]:
    """Preference rows that any method trains on, and the prompts that gave none, by reason."""
    rows: list[Row] = []
    dropped: dict[str, int] = {}
    pick = pairing_of(pairing, seed=seed)
    for given, verdict in labels:
        found = pick(_Told(given.question, verdict), [given.question])[0]
        if found.dropped:
            dropped[found.dropped] = dropped.get(found.dropped, 0) + 1
        for match in found.matches:
            scores = verdict.scores
            numbers = {"score_chosen": scores[match.chosen], "score_rejected": scores[match.rejected]} if scores else {}
            rows.append(
                {
                    "prompt": _plain(given.prompt),
                    "chosen": _plain(given.answers[match.chosen]),
                    "rejected": _plain(given.answers[match.rejected]),
                    "strength": match.strength,
                    **numbers,
                    "judge": verdict.judge,
                    **({"group": given.group} if given.group else {}),
                }
            )
    return rows, dropped


def accuracy(labels: Sequence[tuple[Answered, Verdict]], *, seed: int) -> tuple[Interval | None, int]:
    """Share of labelled pairs whose chosen answer the judge prefers, a tie counting 0.5, with a bootstrap interval over
    groups (prompts where rows have no group); and the labelled pairs without a probability, which are left out.
    """
    credit: list[float] = []
    groups: list[str] = []
    silent = 0
    for given, verdict in labels:
        if not given.labelled:
            continue
        prob = verdict.prob(0, 1)
        if prob is None:
            silent += 1
            continue
        credit.append(0.5 if prob == 0.5 else float(prob > 0.5))
        groups.append(given.group or json.dumps(_plain(given.prompt)))
    return (bootstrap(credit, groups, seed=seed) if credit else None), silent


class _Told:
    """A judge that repeats what was said of a question's answers, for the pairings, which leave repeated texts out."""

    def __init__(self, question: Question, verdict: Verdict) -> None:
        self._question, self._verdict, self.name = question, verdict, verdict.judge

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        return [self._on(question) for question in questions]

    def _on(self, asked: Question) -> Verdict:
        texts, scores = list(self._question.answers), self._verdict.scores
        places = [texts.index(answer) for answer in asked.answers]
        comparisons = [
            Comparison(first=i, second=j, prob_first=self._verdict.prob(places[i], places[j]))
            for i, j in asked.wanted()
        ]
        found = None if scores is None else [scores[place] for place in places]
        return Verdict(judge=self.name, comparisons=comparisons, scores=found)


def _key(row: Mapping[str, Any], where: str, given: Mapping[int, Answered], judge: str) -> Key:
    """(row,) of a line; InputError unless it is this judge's label of this file's candidates."""
    mend = "choose another --out"
    if not {"row", "prompt", "answers", "comparisons", "scores", "order", "judge"} <= set(row):
        raise InputError("is no label by prefkit judge run", where=where, mend=mend)
    if row["judge"] != judge:
        raise InputError(f"was labelled by {row['judge']} (now {judge})", where=where, mend=mend)
    known = given.get(row["row"])
    if known is None or (row["prompt"], row["answers"]) != (_plain(known.prompt), [*map(_plain, known.answers)]):
        raise InputError("labels other candidates than the file holds", where=where, mend=mend)
    return (int(row["row"]),)


def _plain(text: Text) -> Any:
    """A text as it reads back from JSON."""
    return text if isinstance(text, str) else json.loads(json.dumps([dict(turn) for turn in text]))
