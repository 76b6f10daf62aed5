"""The strict parser: what was asked for is read, everything else says nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkit.feedback.parsing import REASONS, WORTH, Unusable, parse
from prefkit.feedback.templates import Template

CHAT, TLDR = Template.load("chat"), Template.load("tldr")
TEXT = dataclasses.replace(CHAT, reply="text")
A = '{"comparison": "x", "preferred": "A"}'

GOOD = {
    A: "A",
    ' \n{"preferred":"B","comparison":""}\n': "B",
    '{"comparison": "x", "preferred": "tie"}': "tie",
    '{"comparison": "x", "preferred": "unsure"}': "unsure",
    f"```json\n{A}\n```": "A",
    f"```\n{A}\n```": "A",
    f'<think>maybe {{"preferred": "B"}}?</think>\n{A}': "A",
    '{"comparison": "Preferred: B", "preferred": "A"}': "A",
}
BAD = [
    "A",
    "I prefer A.",
    f"Here you are: {A}",
    f"{A} {A}",
    '{"preferred": "A"}',
    '{"comparison": "x", "preferred": "a"}',
    '{"comparison": "x", "preferred": "A "}',
    '{"comparison": "x", "preferred": "A or B"}',
    '{"comparison": "x", "preferred": ["A"]}',
    '{"comparison": 1, "preferred": "A"}',
    '{"comparison": "x", "preferred": "A", "preferred": "B"}',
    '{"comparison": "x", "preferred": "A", "confidence": 1}',
    f"[{A}]",
    f"<think>{A}",
    "null",
    "[" * 100_000,
    "Comparison: x\nPreferred: A",
]


@pytest.mark.parametrize("content", GOOD)
def test_json_replies(content: str) -> None:
    assert parse(content, CHAT) == GOOD[content]


@pytest.mark.parametrize("content", BAD, ids=lambda content: content[:40])
def test_json_replies_that_say_nothing(content: str) -> None:
    assert parse(content, CHAT) == Unusable("unparsable")


def test_ties_only_where_they_were_asked_for() -> None:
    for word in ("tie", "unsure"):
        assert parse(A.replace('"A"', f'"{word}"'), TLDR) == Unusable("unparsable")
    assert parse(A, TLDR) == "A"


@pytest.mark.parametrize(
    ("content", "choice"),
    [
        ("Comparison: A is clearer.\nPreferred: A", "A"),
        ("Comparison: one\nand two\n\n  Preferred: tie\n", "tie"),
        ("<think>\nPreferred: A\n</think>Comparison: x\nPreferred: B", "B"),
        ("Comparison: x\nPreferred: A.", None),
        ("Comparison: x\nPreferred: A or B", None),
        ("Comparison: x\nPreferred: C", None),
        ("Comparison: x\nPreferred: A\nPreferred: B", None),
        ("Comparison: x\nPreferred: A\nI hope this helps", None),
        ("Comparison:\nPreferred: A", None),
        ("Preferred: A", None),
        ("Sure! Comparison: x\nPreferred: A", None),
        (A, None),
    ],
)
def test_text_replies(content: str, choice: str | None) -> None:
    assert parse(content, TEXT) == (choice or Unusable("unparsable"))


def test_what_the_endpoint_says_of_a_reply_goes_first() -> None:
    assert parse(A, CHAT, finish="length") == Unusable("truncated")
    assert parse(A, CHAT, finish="content_filter") == Unusable("filtered")
    assert parse(A, CHAT, refusal="no") == Unusable("refused")
    assert parse(" <think>hm</think>\n", CHAT) == Unusable("empty")


@given(st.text(), st.sampled_from(["structured", "text"]))
def test_arbitrary_text_is_never_a_choice_by_accident(content: str, form: str) -> None:
    found = parse(content, CHAT if form == "structured" else TEXT)
    assert isinstance(found, Unusable) and found.reason in REASONS


@given(st.text(), st.sampled_from(sorted(WORTH)))
def test_a_comparison_may_say_anything(comparison: str, word: str) -> None:
    assert parse(json.dumps({"comparison": comparison, "preferred": word}), CHAT) == word


@given(st.sampled_from(sorted(WORTH)), st.integers(0, 40), st.characters())
def test_a_broken_reply_is_never_another_choice(word: str, place: int, letter: str) -> None:
    """Overwrite one character anywhere: the choice stays, or there is none."""
    content = json.dumps({"comparison": "xx", "preferred": word})
    broken = content[:place] + letter + content[place + 1 :]
    found = parse(broken, CHAT)
    swapped = {"A": {"A", "B"}, "B": {"A", "B"}}.get(word, {word})  # only the letter itself can turn into the other
    assert isinstance(found, Unusable) or found in swapped
