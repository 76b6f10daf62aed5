"""Interpret columns (TRL's names): rows of any accepted shape -> Preference, Completion, Prompt.

Every problem carries file, row, field and mend. `parse_*` return them beside the good rows (for `data
check`), `read_*` raise the first error. Columns without a meaning here stay in `extra`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from prefkit.domains.text.convert import detect
from prefkit.domains.text.files import Row, Source
from prefkit.domains.text.load import load
from prefkit.domains.text.problems import Problem, raise_first
from prefkit.domains.text.prompts import ROLES, Prompt, split_messages, split_strings, turn_order
from prefkit.errors import InputError
from prefkit.records import Completion, Message, Preference, Text

NUMBERS = ("score_chosen", "score_rejected", "strength", "margin")
WORDS = ("source", "judge", "policy_version")
_PREFERENCE = ("prompt", "chosen", "rejected", *NUMBERS, *WORDS)
_ALIASES = {
    "prompt": ("question", "query", "instruction", "input", "context"),
    "chosen": (
        "response_chosen",
        "answer_chosen",
        "preferred",
        "accepted",
        "winner",
        "response_j",
        "positive",
    ),
    "rejected": ("response_rejected", "answer_rejected", "dispreferred", "loser", "response_k", "negative"),
    "completion": ("response", "answer", "output", "target"),
}
_EXPECTED = "prompt, chosen, rejected (or chosen and rejected that both begin with the prompt)"

R = TypeVar("R")


class _Bad(Exception):
    """A row that cannot be used: field, what, mend. Caught in this module."""

    def __init__(self, field: str, what: str, mend: str, kind: str = "row") -> None:
        self.field, self.what, self.mend, self.kind = field, what, mend, kind
        super().__init__(what)


def read_preferences(source: Source) -> list[Preference]:
    """Rows as preferences. Raises InputError for the first bad row."""
    return _strict(parse_preferences(source))


def read_completions(source: Source) -> list[Completion]:
    """Rows as prompt/completion (with `label`: unpaired feedback). Raises InputError for the first bad row.

    `messages` rows train their last assistant turn on what precedes it; `text` rows have an empty prompt.
    Preference rows give their chosen answer.
    """
    return _strict(parse_completions(source))


def read_prompts(name: Any, *, split: str = "", config: str = "") -> list[Prompt]:
    """Prompts of a file, Hub id or rows in memory: a `prompt` or `messages` column, or text lines (.txt).

    Answers in the rows are ignored; trailing assistant turns are cut off. Raises InputError.
    """
    if isinstance(name, (str, Path)) and str(name).endswith(".txt") and Path(name).is_file():
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        prompts = [
            Prompt(prompt=line, row=row, where=f"{name} line {row + 1}")
            for row, line in enumerate(lines)
            if line.strip()
        ]
        if not prompts:
            raise InputError("is empty", where=str(name), mend="write one prompt per line")
        return prompts
    source = load(name, split=split, config=config, what="prompts")
    columns = _columns(source)
    if "prompt" not in columns and "messages" not in columns and {"chosen", "rejected"} <= columns:
        prompts = [Prompt(prompt=row.prompt, row=row.row, extra=row.extra) for row in read_preferences(source)]
    else:
        prompts = _strict(_parse(source, _prompt))
    return [replace(prompt, where=source.path_of_row(prompt.row)) for prompt in prompts]


def is_preference(source: Source) -> bool:
    """Whether the rows hold pairs (chosen and rejected) rather than single completions."""
    return {"chosen", "rejected"} & _columns(source) != set()


def parse_preferences(source: Source) -> tuple[list[Preference], list[Problem]]:
    """The rows that can be read, and the problems of all others."""
    missing = _missing_columns(source, ("chosen", "rejected"), _EXPECTED)
    if missing:
        return [], missing
    explicit = "prompt" in _columns(source)
    rows, problems = _parse(source, lambda row, place: _preference(row, place, explicit))
    return rows, problems + _mixed(rows, source)


def parse_completions(source: Source) -> tuple[list[Completion], list[Problem]]:
    """The rows that can be read, and the problems of all others."""
    columns = _columns(source)
    if {"chosen", "rejected"} <= columns:
        pairs, problems = parse_preferences(source)
        return [
            Completion(prompt=pair.prompt, completion=pair.chosen, row=pair.row, extra=pair.extra) for pair in pairs
        ], problems
    for shape, reader in (("messages", _from_messages), ("text", _from_text)):
        if shape in columns and "completion" not in columns:
            return _parse(source, reader)
    missing = _missing_columns(source, ("prompt", "completion"), "prompt and completion, or messages, or text")
    return ([], missing) if missing else _parse(source, _completion)


def _strict(parsed: tuple[list[R], list[Problem]]) -> list[R]:
    rows, problems = parsed
    raise_first(problems)
    return rows


def _parse(source: Source, reader: Callable[[Row, int], R]) -> tuple[list[R], list[Problem]]:
    rows: list[R] = []
    problems: list[Problem] = []
    for place, row in enumerate(source.rows):
        try:
            rows.append(reader(row, place))
        except _Bad as bad:
            where = source.path_of_row(place)
            problems.append(
                Problem(kind=bad.kind, what=bad.what, mend=bad.mend, where=where, row=place, field=bad.field)
            )
    return rows, problems


def _columns(source: Source) -> set[str]:
    return {column for row in source.rows for column in row}


def _missing_columns(source: Source, needed: Iterable[str], expected: str) -> list[Problem]:
    columns = sorted(_columns(source))
    missing = [name for name in needed if name not in columns]
    if not missing:
        return []
    shape = detect(source.rows[0])
    if shape:
        mend = f"this looks like {shape}: `prefkit data convert {source.name} --from {shape} --out pairs.jsonl`"
    else:
        near = [f"{_nearest(name, columns)} -> {name}" for name in missing if _nearest(name, columns)]
        mend = f"rename {', '.join(near)}" if near else "rename your columns; docs/data-formats.md shows each shape"
    found = ", ".join(columns) if columns else "none"
    what = f"no column {' nor '.join(map(repr, missing))}; found {found}; expected {expected}"
    return [Problem(kind="columns", what=what, mend=mend, where=source.name, field=missing[0])]


def _nearest(name: str, columns: Sequence[str]) -> str:
    alias = next((column for column in columns if column.lower() in (name, *_ALIASES.get(name, ()))), "")
    if alias:
        return alias
    free = [column for column in columns if column not in _PREFERENCE]
    return next(iter(difflib.get_close_matches(name, free, n=1, cutoff=0.6)), "")


def _mixed(rows: Sequence[Preference], source: Source) -> list[Problem]:
    """Strings in some rows and conversations in others render differently: errors for the fewer."""
    chats = [row for row in rows if not isinstance(row.chosen, str)]
    strings = [row for row in rows if isinstance(row.chosen, str)]
    return [
        Problem(
            kind="mixed types",
            what=f"is a {'string' if isinstance(row.chosen, str) else 'conversation'}, unlike most rows",
            mend="write all rows as strings or all as lists of {role, content}",
            where=source.path_of_row(row.row),
            row=row.row,
            field="chosen",
        )
        for row in min(chats, strings, key=len)
    ]


def _text(row: Row, field: str) -> Text:
    value = row.get(field)
    if value is None:
        raise _Bad(field, "is missing in this row", f"give every row a {field!r}")
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return _messages(value, field)
    raise _Bad(
        field,
        f"holds a {type(value).__name__}",
        "write a string or a list of {role, content}",
        "content type",
    )


def _messages(value: Sequence[Any], field: str) -> list[Message]:
    if not value:
        raise _Bad(field, "is an empty conversation", "drop the row or fill it", "empty")
    return [_message(message, f"{field}[{place}]") for place, message in enumerate(value)]


def _message(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping) or "role" not in value or "content" not in value:
        shape = f"keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        hint = "; `prefkit data convert` reads from/value" if isinstance(value, Mapping) and "from" in value else ""
        raise _Bad(field, f"is not a message but {shape}", "write {role, content}" + hint, "content type")
    message = {key: item for key, item in value.items() if item is not None or key in ("role", "content")}
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise _Bad(field, f"unknown role {role!r}", f"use one of {', '.join(ROLES)}", "role order")
    if content is None and "tool_calls" in message:
        return {**message, "content": ""}
    if not isinstance(content, str):
        raise _Bad(field, f"content is a {type(content).__name__}", "write the content as a string", "content type")
    return message


def _ordered(prompt: Text, answers: Mapping[str, Text]) -> None:
    if isinstance(prompt, str):
        return
    for field, answer in answers.items():
        assert not isinstance(answer, str)
        complaint = turn_order(prompt, answer)
        if complaint:
            repeats = list(answer[: len(prompt)]) == list(prompt)
            mend = "alternate user and assistant; the prompt ends with the user, the answer is the assistant's"
            if repeats:
                mend = f"{field!r} repeats the prompt: drop the prompt column or the repeated turns"
            raise _Bad("prompt" if complaint.startswith("prompt") else field, complaint, mend, "role order")


def _same_type(row: Row, fields: Mapping[str, Text]) -> None:
    names = {field: "a string" if isinstance(value, str) else "a conversation" for field, value in fields.items()}
    if len(set(names.values())) > 1:
        listed = ", ".join(f"{field} is {name}" for field, name in names.items())
        field = next(reversed(names))
        raise _Bad(field, listed, "write all as strings or all as lists of {role, content}", "mixed types")


def _preference(row: Row, place: int, explicit: bool) -> Preference:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    _same_type(row, {"chosen": chosen, "rejected": rejected})
    prompt = _text(row, "prompt") if explicit else None
    if prompt is None or _repeated(prompt, chosen, rejected):
        prompt, chosen, rejected = _implicit(chosen, rejected)
    _same_type(row, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    _ordered(prompt, {"chosen": chosen, "rejected": rejected})
    return Preference(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        row=place,
        score_chosen=_number(row, "score_chosen"),
        score_rejected=_number(row, "score_rejected"),
        strength=_number(row, "strength"),
        margin=_number(row, "margin"),
        source=_word(row, "source"),
        judge=_word(row, "judge"),
        policy_version=_word(row, "policy_version"),
        extra={key: value for key, value in row.items() if key not in _PREFERENCE},
    )


def _repeated(prompt: Text, chosen: Text, rejected: Text) -> bool:
    """UltraFeedback-binarized's shape: the prompt as a string, and again as the first turn of both."""
    if not isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
        return False
    border = split_messages(chosen, rejected)
    return border > 0 and chosen[border - 1]["content"].strip() == prompt.strip()


def _implicit(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    if isinstance(chosen, str):
        assert isinstance(rejected, str)
        end = split_strings(chosen, rejected)
        if not end:
            raise _Bad(
                "chosen",
                "no prompt column, and chosen and rejected share no beginning that ends at a word",
                "add a prompt column",
                "implicit prompt",
            )
        return chosen[:end], chosen[end:], rejected[end:]
    assert not isinstance(rejected, str)
    border = split_messages(chosen, rejected)
    if not border:
        raise _Bad(
            "chosen",
            "no prompt column, and chosen and rejected share no first turns up to a user's",
            "add a prompt column, or begin both with the same messages",
            "implicit prompt",
        )
    return list(chosen[:border]), list(chosen[border:]), list(rejected[border:])


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Bad(name, f"{value!r} is not a number", "write a finite number or leave it out", "number")
    if not math.isfinite(value):
        raise _Bad(name, f"is {value}", "write a finite number or leave it out", "number")
    if name == "strength" and not 0 <= value <= 1:
        raise _Bad(name, f"{value} is outside [0, 1]", "strength is the probability that chosen is better", "number")
    return float(value)


def _word(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, (str, int)):
        raise _Bad(name, f"holds a {type(value).__name__}", "write a string", "content type")
    return str(value)


def _completion(row: Row, place: int) -> Completion:
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    _same_type(row, {"prompt": prompt, "completion": completion})
    _ordered(prompt, {"completion": completion})
    label = row.get("label")
    if label is not None and not isinstance(label, bool):
        raise _Bad("label", f"{label!r} is not true or false", "write true for a good answer, false for a bad one")
    extra = {key: value for key, value in row.items() if key not in ("prompt", "completion", "label")}
    return Completion(prompt=prompt, completion=completion, row=place, label=label, extra=extra)


def _from_messages(row: Row, place: int) -> Completion:
    messages = _text(row, "messages")
    if isinstance(messages, str):
        raise _Bad("messages", "is a string", "write a list of {role, content}", "content type")
    if messages[-1]["role"] != "assistant":
        raise _Bad(
            "messages",
            "does not end with an assistant turn",
            "cut what follows the last answer",
            "role order",
        )
    prompt, answer = list(messages[:-1]), list(messages[-1:])
    _ordered(prompt, {"messages": answer})
    extra = {key: value for key, value in row.items() if key != "messages"}
    return Completion(prompt=prompt, completion=answer, row=place, extra=extra)


def _from_text(row: Row, place: int) -> Completion:
    text = _text(row, "text")
    if not isinstance(text, str):
        raise _Bad("text", "is a conversation", "name the column messages", "content type")
    extra = {key: value for key, value in row.items() if key != "text"}
    return Completion(prompt="", completion=text, row=place, extra=extra)


def _prompt(row: Row, place: int) -> Prompt:
    field = "prompt" if row.get("prompt") is not None else "messages"
    prompt = _text(row, field)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _Bad(field, "is empty", "drop the row or fill it", "empty")
    else:
        prompt = list(prompt)
        while prompt and prompt[-1]["role"] == "assistant":
            prompt.pop()
        complaint = turn_order(prompt, []) or ("" if prompt else "holds no user turn")
        if complaint:
            raise _Bad(field, complaint, "alternate user and assistant, the user last", "role order")
    extra = {key: value for key, value in row.items() if key not in ("prompt", "messages")}
    return Prompt(prompt=prompt, row=place, extra=extra)
