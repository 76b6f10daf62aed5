"""What is logged of a judge on a round's answers."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from prefkit.domains.text.contests import Answer, Contest, Origin
from prefkit.loops.judge_watch import watched
from prefkit.records import Comparison, Verdict

PAIRS: list[Any] = [SimpleNamespace(source=SimpleNamespace(prompt="x"))]


def contest(
    texts: Sequence[str], probs: dict[tuple[int, int], float | None], origins: Sequence[Origin] = ("own",) * 4
) -> Contest:
    """Answers of as many tokens as letters; own ones unless told."""
    answers = [
        Answer(
            text=text,
            tokens=tuple(range(len(text))),
            origin=origin,
            log_prob=-1.0 if origin in ("own", "reference") else None,
        )
        for text, origin in zip(texts, origins, strict=False)
    ]
    comparisons = [Comparison(first=i, second=j, prob_first=p) for (i, j), p in probs.items()]
    verdict = Verdict(judge="self", comparisons=comparisons)
    return Contest(position=0, row=0, answers=tuple(answers), verdicts=(verdict,))


def shorter(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [-float(len(text)) for text in completions]


def test_accuracy_length_and_calibration_against_the_gold_reward():
    item = contest(["aaa", "b", "cc", "dd"], {(0, 1): 0.9, (1, 2): 0.8, (2, 3): 0.7, (0, 2): 0.5, (0, 3): None})
    found = watched([item], PAIRS, shorter)
    assert found["judge/prefers_longer"] == 0.5, "of two with different lengths and a preference"
    assert found["judge/gold_pairs"] == 2 and found["judge/gold_accuracy"] == 0.5
    assert found["judge/gold_calibration_error"] == pytest.approx((0.9 + 0.2) / 2)
    assert watched([item], PAIRS, None) == {"judge/prefers_longer": 0.5}


def test_stored_answers_have_no_say():
    """A judge that is right on the data set's answers may be wrong on the policy's own."""
    origins: list[Origin] = ["own", "reference", "chosen", "rejected"]
    texts = ["aaa", "b", "cc", "dddd"]
    item = contest(texts, {(0, 1): 0.9, (2, 3): 0.9, (1, 2): 0.9}, origins)
    found = watched([item], PAIRS, shorter)
    assert (found["judge/gold_pairs"], found["judge/gold_accuracy"], found["judge/prefers_longer"]) == (1, 0, 1)
    assert watched([contest(texts[2:], {(0, 1): 0.9}, origins[2:])], PAIRS, shorter) == {}
    assert watched([], PAIRS, shorter) == {}
