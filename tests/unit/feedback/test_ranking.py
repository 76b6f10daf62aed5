"""From verdicts to matches: order, ties, unsure judges, equal texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkit.feedback.ranking import all_pairs, best_random, best_worst, order_of, pairing_of
from prefkit.records import Comparison, Match, Question, Verdict


class ByProbability:
    """A judge whose probability is a function of the two texts; None is unsure."""

    name = "by-probability"

    def __init__(self, prob: Callable[[str, str], float | None], scores: Callable[[str], float] | None = None) -> None:
        self.prob, self.scores = prob, scores
        self.asked: list[Question] = []

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        self.asked += questions
        return [
            Verdict(
                judge=self.name,
                comparisons=tuple(
                    Comparison(first=i, second=j, prob_first=self.prob(q.answers[i], q.answers[j]))
                    for i, j in q.wanted()
                ),
                scores=None if self.scores is None else [self.scores(answer) for answer in q.answers],
            )
            for q in questions
        ]


def longer(first: str, second: str) -> float:
    return 0.5 if len(first) == len(second) else 0.9 if len(first) > len(second) else 0.1


def question(*answers: str, row: int = 0) -> Question:
    return Question(prompt="p", answers=answers, row=row)


def test_best_meets_worst() -> None:
    found = best_worst(ByProbability(longer), [question("bb", "a", "ccc")])[0]
    assert found.order == (2, 0, 1)
    assert found.matches == (Match(chosen=2, rejected=1, strength=0.9),)
    assert found.dropped == ""


def test_all_pairs_share_the_weight() -> None:
    found = all_pairs(ByProbability(longer), [question("bb", "a", "ccc")])[0]
    assert {(m.chosen, m.rejected) for m in found.matches} == {(2, 0), (2, 1), (0, 1)}
    assert sum(m.weight for m in found.matches) == pytest.approx(1.0)


def test_a_tie_among_some_leaves_the_other_pairs() -> None:
    found = all_pairs(ByProbability(longer), [question("aa", "bb", "ccc")])[0]
    assert {(m.chosen, m.rejected) for m in found.matches} == {(2, 0), (2, 1)}
    assert [m.weight for m in found.matches] == [0.5, 0.5]


@pytest.mark.parametrize("pairing", ["best_worst", "best_random", "all"])
@pytest.mark.parametrize(
    ("answers", "judge", "reason"),
    [
        (("same", "same", "same"), longer, "identical"),
        (("one",), longer, "alone"),
        ((), longer, "alone"),
        (("aa", "bb"), longer, "tie"),
        (("aa", "b"), lambda first, second: None, "unsure"),
    ],
)
def test_nothing_is_guessed(pairing: str, answers: tuple[str, ...], judge, reason: str) -> None:
    found = pairing_of(pairing, seed=0)(ByProbability(judge), [question(*answers)])[0]
    assert found.matches == ()
    assert found.dropped == reason


def test_equal_texts_are_asked_about_once_and_keep_their_places() -> None:
    judge = ByProbability(longer)
    found = best_worst(judge, [question("a", "a", "ccc", "ccc", "bb"), question("x", "x")])[0]
    assert [list(q.answers) for q in judge.asked] == [["a", "ccc", "bb"]]
    assert found.matches == (Match(chosen=2, rejected=0, strength=0.9),)
    assert {(c.first, c.second) for c in found.verdicts[0].comparisons} == {(0, 2), (0, 4), (2, 4)}


def test_an_unsure_judge_of_best_and_worst_drops_the_prompt_though_the_others_order_them() -> None:
    judge = ByProbability(lambda a, b: None if {a, b} == {"a", "ccc"} else longer(a, b))
    assert best_worst(judge, [question("bb", "a", "ccc")])[0].dropped == "unsure"
    assert {(m.chosen, m.rejected) for m in all_pairs(judge, [question("bb", "a", "ccc")])[0].matches} == {
        (2, 0),
        (0, 1),
    }


def test_scores_go_before_probabilities() -> None:
    judge = ByProbability(longer, scores=lambda text: -len(text))
    assert order_of(question("bb", "a", "ccc"), judge.judge([question("bb", "a", "ccc")])[0]) == (1, 0, 2)


def test_best_random_is_repeatable_and_spreads() -> None:
    answers = ["a" * n for n in range(1, 9)]
    drawn = [best_random(ByProbability(longer), [question(*answers, row=row)], seed=3)[0] for row in range(60)]
    again = best_random(ByProbability(longer), [question(*answers, row=7)], seed=3)[0]
    assert drawn[7].matches == again.matches
    assert all(found.matches[0].chosen == 7 for found in drawn)
    assert len({found.matches[0].rejected for found in drawn}) == 7


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=2, max_size=5), st.randoms())
def test_the_order_of_candidates_never_matters(texts: list[str], random) -> None:
    shuffled = list(texts)
    random.shuffle(shuffled)
    for name in ("best_worst", "best_random", "all"):
        pairing = pairing_of(name, seed=1)
        found = [pairing(ByProbability(longer), [question(*given)])[0] for given in (texts, shuffled)]
        pairs = [
            {(given[m.chosen], given[m.rejected], round(m.strength, 9), m.weight) for m in result.matches}
            for given, result in zip((texts, shuffled), found, strict=True)
        ]
        assert pairs[0] == pairs[1], name
        assert found[0].dropped == found[1].dropped


def test_the_middle_one_is_never_in_the_match() -> None:
    for answers in itertools.permutations(["a", "bb", "ccc"]):
        match = best_worst(ByProbability(longer), [question(*answers)])[0].matches[0]
        assert (answers[match.chosen], answers[match.rejected]) == ("ccc", "a")
