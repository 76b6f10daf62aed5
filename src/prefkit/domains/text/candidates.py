"""Candidate answers to be judged: what `prefkit sample --num K` writes, rows with `answers`, or preference pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from prefkit.domains.text.columns import read_completions, read_preferences
from prefkit.domains.text.files import Row, Source
from prefkit.domains.text.load import load
from prefkit.domains.text.prompts import last_content
from prefkit.errors import InputError
from prefkit.records import Preference, Question, Text

SHAPES = "prompt and answers, or prompt, chosen, rejected, or the rows that `prefkit sample --num K` writes"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A prompt with its answers, in the form the file has them."""

    row: int
    """place in the file; the prompt's row for what `prefkit sample` wrote"""
    prompt: Text
    answers: Sequence[Text]
    labelled: bool = False
    """whether the first of two answers is the one somebody chose"""
    group: str = ""
    """what its rows have in common with others, for intervals; empty for nothing"""

    @property
    def question(self) -> Question:
        """What a judge is asked: every two of the answers."""
        return Question(prompt=self.prompt, answers=[last_content(answer) for answer in self.answers], row=self.row)


def read_candidates(name: Any) -> list[Answered]:
    """The candidates of a file, in order of rows. Raises InputError naming line and field."""
    source = load(name, what="candidates")
    columns = {column for row in source.rows for column in row}
    if {"prompt", "answers"} <= columns:
        return [_of_answers(row, place, source) for place, row in enumerate(source.rows)]
    if {"chosen", "rejected"} <= columns:
        return [_of_pair(pair) for pair in read_preferences(source)]
    if {"row", "prompt", "completion"} <= columns:
        return _of_samples(source)
    raise InputError(
        f"holds no candidates; columns are {', '.join(sorted(columns)) or 'none'}",
        where=source.name,
        mend=f"write {SHAPES}",
    )


def _of_pair(pair: Preference) -> Answered:
    return Answered(
        row=pair.row,
        prompt=pair.prompt,
        answers=(pair.chosen, pair.rejected),
        labelled=True,
        group=_group(pair.extra),
    )


def _of_answers(row: Row, place: int, source: Source) -> Answered:
    """A row of `answers`. Each is read as a completion is, so that the same things are refused in the same words."""
    answers, where = row.get("answers"), source.path_of_row(place)
    if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
        what = f"answers is {_short(answers)}"
        raise InputError(what, where=f"{where}, field 'answers'", mend="write a list of at least one answer")
    prompt = row.get("prompt")
    listed = cast("Sequence[Any]", answers)
    chat = prompt is not None and not isinstance(prompt, str)
    # In a conversation, what an answer says stands for the assistant's turn.
    turns: list[Any] = [
        [{"role": "assistant", "content": one}] if chat and isinstance(one, str) else one for one in listed
    ]
    try:
        rows = [{"prompt": prompt, "completion": one} for one in turns]
        found = read_completions(Source(rows=rows, name=source.name))
    except InputError as error:
        field = "answers" if "completion" in error.where else "prompt"
        raise InputError(error.what, where=f"{where}, field {field!r}", mend=error.mend) from error
    return Answered(row=place, prompt=found[0].prompt, answers=[one.completion for one in found], group=_group(row))


def _of_samples(source: Source) -> list[Answered]:
    """Rows of one prompt each are put together by `row`, in order of `index` where there is one."""
    by_row: dict[int, list[tuple[int, Any]]] = {}
    first: dict[int, tuple[str, int]] = {}
    for one in read_completions(source):
        raw, where = source.rows[one.row], source.path_of_row(one.row)
        number, index = _whole(raw, "row", where), _whole(raw, "index", where) if "index" in raw else one.row
        key = json.dumps(one.prompt if isinstance(one.prompt, str) else [dict(turn) for turn in one.prompt])
        known = first.setdefault(number, (key, one.row))
        if known[0] != key:
            raise InputError(
                f"row {number} has another prompt here than in {source.path_of_row(known[1])}",
                where=where,
                mend="give each prompt a `row` of its own",
            )
        members = by_row.setdefault(number, [])
        if any(index == other for other, _ in members):
            raise InputError(f"answer {index} of row {number} stands twice", where=where, mend="remove one of them")
        members.append((index, one))
    return [
        Answered(
            row=number,
            prompt=members[0][1].prompt,
            answers=[one.completion for _, one in sorted(members, key=lambda member: member[0])],
            group=_group(members[0][1].extra),
        )
        for number, members in sorted(by_row.items())
    ]


def _whole(row: Row, field: str, where: str) -> int:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{field} is {_short(value)}", where=f"{where}, field {field!r}", mend="write 0, 1, 2, ...")
    return value


def _group(row: Mapping[str, Any]) -> str:
    return "" if row.get("group") in (None, "") else str(row["group"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
