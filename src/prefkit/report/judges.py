"""What a judge's name says about it, in words: who or what stood behind the preferences of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = {
    "gold": "a gold reward (a program or a classifier)",
    "reward": "a reward model",
    "ranker": "a pairwise ranker",
    "llm": "a language model behind an endpoint",
    "transformers": "a language model",
    "self": "the trained model itself, or one of its kind",
    "stored": "labels looked up in a file",
}
"""kind, as it stands before the colon of a judge's name -> what it is"""
ON_DISK = ("reward", "ranker", "transformers", "self", "stored")
"""kinds whose name may be a place on a disk"""


def kind_of(name: str) -> str:
    """What stands before the colon where it is a kind of judge, else empty."""
    kind = name.partition(":")[0]
    return kind if kind in KINDS else ""


def described(name: str) -> str:
    """What the judge is; empty for a name of no known kind."""
    return KINDS.get(kind_of(name), "")


def provenance(name: str) -> str:
    """A sentence on whose preferences these are."""
    kind = kind_of(name)
    if kind == "stored":
        return "Who gave these labels is not recorded in the run."
    if not kind:
        return ""
    return "Its preferences are simulated: it stands in for a person, and no person was asked."


def same_as_evaluation(config: Mapping[str, Any]) -> str:
    """The option by which held-out answers are scored by the very judge that chose the training pairs, or empty."""
    kind, _, what = str(config.get("judge") or "").partition(":")
    option = {"gold": "gold_reward", "reward": "reward_model"}.get(kind, "")
    return option if option and what and config.get(option) == what else ""


NOT_INDEPENDENT = {
    "gold_reward": "The judge of the training pairs is the gold reward of the evaluation, too: a higher gold reward "
    "shows that the model learned from this judge, not that its answers are better by any other.",
    "reward_model": "The judge of the training pairs is the reward model of the evaluation, too: a higher score shows "
    "that the model learned from this judge, not that its answers are better by any other.",
}
"""option -> what follows from `same_as_evaluation`"""
