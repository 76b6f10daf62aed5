"""Win rates of own answers by a judge that is asked now: A over B, each over its start and over the data's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefkit.evaluation.length_control import LengthControlled, length_controlled
from prefkit.evaluation.paired import Row, groups_of
from prefkit.evaluation.winrate import WinRate, from_probabilities
from prefkit.records import Question, Verdict

if TYPE_CHECKING:
    from prefkit.protocols import Judge  # whose module brings torch along


@dataclass(frozen=True, kw_only=True)
class JudgedWin:
    """A win rate of `first` over `second`. Answers that are equal tie unasked; verdicts without a probability are left
    out and counted.
    """

    first: str
    second: str
    outcome: WinRate | None
    """None where the judge said nothing usable"""
    unusable: int
    controlled: LengthControlled | None = None
    """at equal length in characters, where it was asked for"""


@dataclass(frozen=True)
class _Contest:
    first: str
    second: str
    sides: tuple[int, int]
    """places of the two answers in a prompt's question"""


def questions_of(samples: Sequence[tuple[Row, Row]]) -> list[Question]:
    """One question for each matched prompt: final answers of A and B, their start answers, the data's.

    Equal answers are not asked about, and answers that a run did not write are empty strings which no comparison names.
    """
    found: list[Question] = []
    sides = [contest.sides for contest in _contests(("A", "B"), samples)]
    for place, (a, b) in enumerate(samples):
        answers = _answers(a, b)
        pairs = [(i, j) for i, j in sides if answers[i] != answers[j]]
        if pairs:
            found.append(Question(prompt=a["prompt"], answers=answers, row=place, pairs=pairs))
    return found


def judged(
    samples: Sequence[tuple[Row, Row]],
    judge: Judge,
    *,
    names: tuple[str, str] = ("A", "B"),
    control_length: bool = False,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[list[JudgedWin], list[Verdict]]:
    """Ask `judge` about matched rows of samples.jsonl; the win rates, and what the judge said."""
    questions = questions_of(samples)
    verdicts = judge.judge(questions) if questions else []
    by_row = {question.row: verdict for question, verdict in zip(questions, verdicts, strict=True)}
    options: dict[str, Any] = {"num_resamples": num_resamples, "seed": seed}
    contests = _contests(names, samples)
    return [_win(contest, samples, by_row, control_length, options) for contest in contests], verdicts


def _win(
    contest: _Contest,
    samples: Sequence[tuple[Row, Row]],
    by_row: dict[int, Verdict],
    control_length: bool,
    options: dict[str, Any],
) -> JudgedWin:
    i, j = contest.sides
    probabilities: list[float] = []
    lengths: list[tuple[int, int]] = []
    groups: list[Any] = []
    labels = groups_of(samples)
    for place, (a, b) in enumerate(samples):
        answers = _answers(a, b)
        prob = 0.5 if answers[i] == answers[j] else by_row[place].prob(i, j)
        if prob is not None:
            probabilities.append(prob)
            lengths.append((len(answers[i]), len(answers[j])))
            groups.append(labels[place])
    unusable = len(samples) - len(probabilities)
    if not probabilities:
        return JudgedWin(first=contest.first, second=contest.second, outcome=None, unusable=unusable)
    controlled = None
    if control_length:
        own, other = zip(*lengths, strict=True)
        resamples = min(options["num_resamples"], 2_000)  # each is a fit of its own
        controlled = length_controlled(probabilities, own, other, groups, num_resamples=resamples, seed=options["seed"])
    return JudgedWin(
        first=contest.first,
        second=contest.second,
        outcome=from_probabilities(probabilities, groups, **options),
        unusable=unusable,
        controlled=controlled,
    )


def _contests(names: tuple[str, str], samples: Sequence[tuple[Row, Row]]) -> list[_Contest]:
    """The contests for which every row has the answers."""

    def have(side: int, name: str) -> bool:
        return all(row[side].get(name) is not None for row in samples)

    a, b = names
    contests = [_Contest(a, b, (0, 1))]
    for side, name in enumerate(names):
        if have(side, "answer_start"):
            contests.append(_Contest(name, f"{name} at its start", (side, 2 + side)))
    if have(0, "answer_reference"):
        contests += [_Contest(name, "the answers in the data", (side, 4)) for side, name in enumerate(names)]
    return contests


def _answers(a: Row, b: Row) -> list[str]:
    found = (a["answer_final"], b["answer_final"], a.get("answer_start"), b.get("answer_start"))
    return ["" if answer is None else str(answer) for answer in (*found, a.get("answer_reference"))]
