"""Gold sentiment: a small classifier that stands in for the critics when answers are judged.

TF-IDF of words and word pairs with logistic regression (scikit-learn, imported when fitted).
Deterministic. Fit it on films that the preference data never sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefkit.records import Text

STRENGTH = 4.0
"""inverse regularisation of the logistic regression"""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How well the classifier does on groups it was not fitted on."""

    accuracy: float
    num_texts: int
    num_groups: int
    majority: float
    """accuracy of always giving the more frequent label"""


class GoldSentiment:
    """P(fresh) of a text, by a classifier fitted on texts with labels 1 (fresh) and 0 (rotten)."""

    def __init__(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        if len(texts) != len(labels) or set(labels) != {0, 1}:
            raise ValueError("texts and labels must be equally long, with both labels 0 and 1 among them")
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        self._features: Any = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        self._classifier: Any = LogisticRegression(C=STRENGTH, solver="liblinear", random_state=0)
        self._classifier.fit(self._features.fit_transform(list(texts)), list(labels))

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """P(fresh) of each text, in [0, 1]. An empty text says nothing and gets what no known word gives."""
        if not texts:
            return []
        return [float(row[1]) for row in self._classifier.predict_proba(self._features.transform(list(texts)))]


def held_out(texts: Sequence[str], labels: Sequence[int], groups: Sequence[str], *, folds: int = 5) -> HeldOut:
    """Accuracy on one fold of groups (films) by a classifier fitted on the others."""
    from sklearn.model_selection import GroupKFold

    splits: Any = GroupKFold(n_splits=folds).split(list(texts), groups=list(groups))
    fit, rest = ([int(i) for i in part] for part in next(splits))
    judge = GoldSentiment([texts[i] for i in fit], [labels[i] for i in fit])
    truth = [labels[i] for i in rest]
    right = [(p >= 0.5) == bool(label) for p, label in zip(judge([texts[i] for i in rest]), truth, strict=True)]
    share = sum(truth) / len(truth)
    return HeldOut(
        accuracy=sum(right) / len(right),
        num_texts=len(truth),
        num_groups=len({groups[i] for i in rest}),
        majority=max(share, 1 - share),
    )


def brevity(prompts: Sequence[Text], completions: Sequence[str]) -> list[float]:
    """Minus the number of characters: a judge without a model, to try the machinery with."""
    return [-float(len(completion)) for completion in completions]
