"""The gold classifier: separates what it was fitted to separate, on groups it has not seen."""

from __future__ import annotations

import random

import pytest

from prefkit import assets
from prefkit.feedback import gold

GOOD, BAD = ["wonderful", "moving", "fresh", "warm"], ["dull", "tired", "clumsy", "empty"]


def sentences(count: int) -> tuple[list[str], list[int], list[str]]:
    rng = random.Random(0)
    labels = [i % 2 for i in range(count)]
    texts = [f"a {rng.choice(GOOD if label else BAD)} film about {rng.choice('abcd')} things" for label in labels]
    return texts, labels, [f"film {i % 13}" for i in range(count)]


def test_scores_are_probabilities_of_fresh() -> None:
    texts, labels, _ = sentences(200)
    judge = gold.GoldSentiment(texts, labels)
    good, bad, unknown = judge(["a wonderful film", "a dull film", "zzz"])
    assert 0 <= bad < 0.2 < 0.8 < good <= 1
    assert 0.2 < unknown < 0.8
    assert judge([]) == []
    assert judge(texts) == gold.GoldSentiment(texts, labels)(texts), "the same data gives the same judge"


def test_held_out_accuracy_is_by_group() -> None:
    texts, labels, films = sentences(260)
    found = gold.held_out(texts, labels, films)
    assert found.accuracy == 1.0 and found.num_groups == 3 and found.num_texts == 60
    random.Random(1).shuffle(labels)
    assert gold.held_out(texts, labels, films).accuracy < 0.7


def test_one_label_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="both labels"):
        gold.GoldSentiment(["a b", "a c"], [1, 1])


def test_it_tells_real_reviews_apart() -> None:
    asset = assets.get("rotten-tomatoes")
    if assets.check(asset) == "absent":
        pytest.skip(f"{asset.distribution} is not installed: {asset.install}")
    from prefkit.domains.text.packaged import review_pairs

    found = review_pairs(0)
    sample = random.Random(0).sample(range(len(found.gold_texts)), 2000)
    judge = gold.GoldSentiment([found.gold_texts[i] for i in sample], [found.gold_labels[i] for i in sample])
    chosen, rejected = (judge([row[side][0]["content"] for row in found.evaluation]) for side in ("chosen", "rejected"))
    right = sum(one > other for one, other in zip(chosen, rejected, strict=True)) / len(chosen)
    assert right > 0.65
