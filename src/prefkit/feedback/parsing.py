"""What a judge's reply says, read strictly: a reply that does not say it in the form asked for says nothing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, cast

from prefkit.feedback.templates import Template

Choice = Literal["A", "B", "tie", "unsure"]
WORTH: dict[Choice, float | None] = {"A": 1.0, "B": 0.0, "tie": 0.5, "unsure": None}
"""probability that the answer shown as A is the better one"""

REASONS = {
    "unparsable": "unparsable",
    "empty": "unparsable",
    "truncated": "unparsable",
    "refused": "refused",
    "filtered": "refused",
    "failed": "failed",
}
"""why a reply says nothing -> the reason that a Comparison gives"""

_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n(.*)\n```\Z", re.DOTALL)
_TEXT = re.compile(r"\AComparison:[ \t]*(\S.*?)\s*\n[ \t]*Preferred:[ \t]*(\S+)\Z", re.DOTALL)
_PREFERRED = re.compile(r"^[ \t]*Preferred:", re.MULTILINE)


@dataclass(frozen=True)
class Unusable:
    """A reply without a choice. `reason` is a key of REASONS."""

    reason: str


def parse(content: str, template: Template, *, finish: str = "", refusal: str = "") -> Choice | Unusable:
    """The choice that a reply states, or why it states none.

    finish, refusal: what the endpoint says of the reply's end (`length`: cut off; `content_filter`) and of a refusal.
    A leading <think>...</think> is no part of the reply; a JSON object may stand in one code fence. Everything else
    must be as it was asked for: a letter found somewhere in a sentence is not a choice.
    """
    if refusal:
        return Unusable("refused")
    if finish == "content_filter":
        return Unusable("filtered")
    if finish == "length":
        return Unusable("truncated")
    text = _THOUGHT.sub("", content).strip()
    if not text:
        return Unusable("empty")
    word = _from_text(text) if template.reply == "text" else _from_json(text)
    if word not in template.choices:
        return Unusable("unparsable")
    return cast("Choice", word)


def _from_json(text: str) -> str:
    """`preferred` of an object with exactly the two fields asked for; empty for anything else."""
    fenced = _FENCE.match(text)
    try:
        found: Any = json.loads(fenced[1] if fenced else text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(found, dict):
        return ""
    values = cast("dict[str, Any]", found)
    if set(values) != {"comparison", "preferred"} or not all(isinstance(value, str) for value in values.values()):
        return ""
    return str(values["preferred"])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of two contradicting `preferred`, json would keep the last."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _from_text(text: str) -> str:
    """The word after the only `Preferred:`, which ends the reply; empty for anything else."""
    match = _TEXT.match(text)
    return match[2] if match and len(_PREFERRED.findall(text)) == 1 else ""
