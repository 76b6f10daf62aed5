"""Prompts and conversations: where the prompt ends, and whether the turns are in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefkit.records import Message, Text

ROLES = ("system", "developer", "user", "assistant", "tool")
MARKERS = (
    "\n\nAssistant:",
    "\nTL;DR:",
    "### Response:\n",
    "### Assistant:",
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<start_of_turn>model\n",
    "[/INST]",
    "<|assistant|>\n",
)
"""Ends of prompts in rendered text: what follows the last of them is the answer."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt without answers, from a prompt file."""

    prompt: Text
    row: int = 0
    where: str = ""
    """the place a user can open, e.g. "prompts.jsonl line 12"; empty where there is no file"""
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


def split_strings(chosen: str, rejected: str) -> int:
    """Characters of the prompt that both strings begin with; 0 where no sensible prompt is found.

    After the last turn marker both share, else at the last word boundary of the common prefix that leaves
    text on all three sides. A word is what stands between white space, so neither 14 nor 3.14 is ever cut. A
    blank at the border goes to the answer (tokenizers join it to the next word), a line break to the prompt.
    """
    shared = _common(chosen, rejected)
    prefix = chosen[:shared]
    ends = [place + len(mark) for mark in MARKERS if (place := prefix.rfind(mark)) >= 0]
    if ends and _leaves_text(chosen, rejected, max(ends)):
        return max(ends)
    for end in range(shared, 0, -1):
        if _is_border(chosen, rejected, end) and _leaves_text(chosen, rejected, end):
            return end
    return 0


def _common(first: str, second: str) -> int:
    for place, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return place
    return min(len(first), len(second))


def _is_border(chosen: str, rejected: str, end: int) -> bool:
    if end >= len(chosen) or end >= len(rejected):
        return False
    before, after = chosen[end - 1], (chosen[end], rejected[end])
    if before.isspace():
        return before != " " and not any(char.isspace() for char in after)
    return all(char.isspace() for char in after)


def _leaves_text(chosen: str, rejected: str, end: int) -> bool:
    return bool(chosen[:end].strip() and chosen[end:].strip() and rejected[end:].strip())


def split_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Messages of the prompt that both conversations begin with; 0 where they share none.

    The border is the end of the last common turn that is not the assistant's, so that answers begin with the
    assistant and none is empty.
    """
    shared = 0
    for left, right in zip(chosen[:-1], rejected[:-1], strict=False):
        if dict(left) != dict(right):
            break
        shared += 1
    while shared and chosen[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    return shared


def turn_order(prompt: Sequence[Message], answer: Sequence[Message]) -> str:
    """What is wrong with the order of roles; "" if nothing.

    A conversation is an optional system turn, then user and assistant in turn (tool results follow an
    assistant); the prompt ends with the user's (or a tool's) turn, the answer is the assistant's side.
    """
    previous = ""
    for place, message in enumerate([*prompt, *answer]):
        role = message["role"]
        complaint = _follows(previous, role)
        if complaint:
            part = "prompt" if place < len(prompt) else "answer"
            inside = place if part == "prompt" else place - len(prompt)
            return f"{part} message {inside + 1}: {complaint}"
        if place >= len(prompt) and role not in ("assistant", "tool"):
            return f"answer message {place - len(prompt) + 1}: a {role} turn inside the answer"
        previous = role if role != "developer" else "system"
    if answer and answer[-1]["role"] != "assistant":
        return "the answer does not end with an assistant turn"
    return ""


def _follows(previous: str, role: str) -> str:
    allowed = {
        "": ("system", "developer", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("tool", "assistant", "user"),
    }
    if role in allowed[previous]:
        return ""
    if role == previous:
        return f"two {role} turns in a row"
    return f"{_article(role)} {role} turn {f'after the {previous} turn' if previous else 'comes first'}"


def plain(text: Text) -> str:
    """The words of a prompt or answer without template: for comparisons and displays, never for training."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in text)


def last_content(text: Text) -> str:
    """The string itself, or what the last message says."""
    return text if isinstance(text, str) else (text[-1].get("content") or "" if text else "")


def _article(word: str) -> str:
    return "an" if word[0] in "aeio" else "a"


def group_of(row: Any) -> str:
    """What a row's cluster is called: its `group` column, else its prompt.

    Rows of one cluster are not independent: intervals resample clusters, and none stands on two sides of a split.
    """
    return str(row.extra["group"]) if "group" in row.extra else plain(row.prompt)
