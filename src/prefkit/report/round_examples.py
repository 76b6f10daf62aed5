"""Prompts of a run's rounds with every candidate answer, as the judge ordered them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefkit.errors import InputError
from prefkit.report.metrics import number
from prefkit.report.parts import text_of
from prefkit.report.read import Row
from prefkit.report.round_counts import MEND, Rounds
from prefkit.report.round_plots import ORIGINS

MOST_TOLD = 6
"""comparisons of a prompt that are written out"""


def examples(rounds: Rounds, *, baseline: bool = False) -> list[dict[str, Any]]:
    """The first prompts of the first, the middle and the last round; of fewer rounds, the first few of each.

    `baseline`: the first answer of a prompt is the one that the others are compared with.
    """
    shown = rounds.online or rounds.each
    numbers = sorted(shown[place * (len(shown) - 1) // 2].first for place in range(3))
    found: list[dict[str, Any]] = []
    for place, t in enumerate(numbers):
        row = rounds.item(t, numbers[:place].count(t))
        if row is not None:
            found.append(_example(row, t, rounds, baseline))
    return found


def _example(row: Row, t: int, rounds: Rounds, baseline: bool) -> dict[str, Any]:
    try:
        answers, order = row["answers"], list(row["order"])
        places = [*order, *(place for place in range(len(answers)) if place not in order)]
        ranks = {place: rank for rank, place in enumerate(order, 1)}
        return {
            "round": f"{t:,}",
            "prompt": text_of(row["prompt"]),
            "candidates": [_candidate(row, place, ranks, baseline and place == 0) for place in places],
            "remarks": " · ".join(_remarks(row, ranks)),
        }
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"has an item of an unexpected shape ({type(error).__name__}: {error})",
            where=str(rounds.folder / f"{t:05d}.jsonl"),
            mend=MEND,
        ) from None


def _candidate(row: Row, place: int, ranks: Mapping[int, int], baseline: bool) -> dict[str, str]:
    answer = row["answers"][place]
    chosen = sum(match["chosen"] == place for match in row["matches"])
    rejected = sum(match["rejected"] == place for match in row["matches"])
    tags = [ORIGINS.get(answer["origin"], str(answer["origin"])) + (", the baseline" if baseline else "")]
    tags.append(f"{len(answer['tokens'])} tokens" + ("" if answer["finished"] else ", cut at the limit"))
    if answer["log_prob"] is not None:
        tags.append(f"log-prob {number(answer['log_prob'], digits=1)}")
    if place not in ranks:
        tags.append("not ranked: left out, or the same text as another")
    roles = [f"{role}{f' {times}×' if times > 1 else ''}" for role, times in _roles(chosen, rejected) if times]
    return {
        "rank": str(ranks.get(place, "–")),
        "text": str(answer["text"]),
        "tags": " · ".join(tags),
        "score": _score(row["verdicts"], place),
        "role": " and ".join(roles),
        "kind": "chosen" if chosen > rejected else "rejected" if rejected > chosen else "",
    }


def _roles(chosen: int, rejected: int) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("chosen", chosen), ("rejected", rejected)


def _score(verdicts: Sequence[Row], place: int) -> str:
    """The judge's score of an answer, or its mean probability of beating those it was compared with."""
    for verdict in verdicts:
        scores = verdict["scores"]
        if scores is not None and place < len(scores) and scores[place] is not None:
            return f"score {number(float(scores[place]), digits=2)}"
    wins = [
        found["prob_first"] if found["first"] == place else 1 - found["prob_first"]
        for verdict in verdicts
        for found in verdict["comparisons"]
        if place in (found["first"], found["second"]) and found["prob_first"] is not None
    ]
    return f"wins {number(sum(wins) / len(wins), digits=2)}" if wins else ""


def _remarks(row: Row, ranks: Mapping[int, int]) -> list[str]:
    """Why there is no pair, and what the judge said of every two answers, by their ranks."""
    found = [f"no pair: {row['dropped']}"] if row["dropped"] else []
    comparisons = [one for verdict in row["verdicts"] for one in verdict["comparisons"]]
    if not comparisons:
        return [*found, "nobody was asked"]
    told: list[str] = []
    for one in comparisons[:MOST_TOLD]:
        prob = one["prob_first"]
        first, second = (ranks.get(one[name], 0) for name in ("first", "second"))
        if prob is not None and 0 < second < first:
            first, second, prob = second, first, 1 - prob
        said = number(float(prob), digits=2) if prob is not None else one["reason"] or "unsure"
        told.append(f"{first or 'another'} over {second or 'another'}: {said}")
    more = f", and {len(comparisons) - MOST_TOLD} more" if len(comparisons) > MOST_TOLD else ""
    found.append(f"probability of {', '.join(told)}{more}")
    matches = row["matches"]
    if any(float(match["strength"]) != 1 for match in matches):
        strengths = [
            f"{ranks.get(match['chosen'], 'another')} over {ranks.get(match['rejected'], 'another')} "
            f"{number(float(match['strength']), digits=2)}"
            for match in matches[:MOST_TOLD]
        ]
        more = f", and {len(matches) - MOST_TOLD} more" if len(matches) > MOST_TOLD else ""
        found.append(f"trained on with strength {', '.join(strengths)}{more}")
    return found
