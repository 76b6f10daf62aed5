"""A judge made of scores: a gold reward, which is taken at its word, or a reward model, whose scores are log-odds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prefkit.errors import InputError
from prefkit.protocols import Gold
from prefkit.records import Comparison, Question, Text, Verdict


class ScoredJudge:
    """Compares answers by their scores.

    Without `scale` the higher score wins for certain and equal scores tie. With it,

        P(i beats j) = σ(scale · (s_i - s_j)),

    the Bradley-Terry model that reward models are trained under (scale 1). P(i, j) + P(j, i) is 1 exactly.
    """

    def __init__(self, score: Gold, name: str, *, scale: float | None = None) -> None:
        """Raises ValueError for a scale that is not above 0."""
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"scale must be above 0, got {scale}")
        self._score, self._scale = score, scale
        self.name = name

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict per question, with scores; `calls` are the answers scored, equal ones of a prompt once.

        Raises InputError where a score is not finite, naming the row.
        """
        distinct = [list(dict.fromkeys(question.answers)) for question in questions]
        prompts: list[Text] = [q.prompt for q, texts in zip(questions, distinct, strict=True) for _ in texts]
        scores = iter(self._score(prompts, [text for texts in distinct for text in texts]) if prompts else ())
        verdicts: list[Verdict] = []
        for question, texts in zip(questions, distinct, strict=True):
            found = {text: float(next(scores)) for text in texts}
            if not all(math.isfinite(score) for score in found.values()):
                raise InputError(
                    f"{self.name} gives an answer a score that is not finite",
                    where=f"row {question.row + 1}",
                    mend="check the model or function that scores",
                )
            verdicts.append(self._verdict(question, [found[answer] for answer in question.answers], len(found)))
        return verdicts

    def _verdict(self, question: Question, scores: list[float], calls: int) -> Verdict:
        comparisons = [
            Comparison(first=i, second=j, prob_first=self._prob(scores[i] - scores[j])) for i, j in question.wanted()
        ]
        return Verdict(judge=self.name, comparisons=comparisons, scores=scores, calls=calls)

    def _prob(self, difference: float) -> float:
        if self._scale is None:
            return 0.5 + 0.5 * ((difference > 0) - (difference < 0))
        return 0.5 + 0.5 * math.tanh(0.5 * self._scale * difference)
