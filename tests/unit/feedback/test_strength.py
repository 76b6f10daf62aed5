from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from prefkit.feedback.ranking import Ranked
from prefkit.feedback.strength import RankedPairing, compose, stored_pairs
from prefkit.records import Comparison, Question, Verdict

REWARDS = {"base": 0.3, "a": 1.2, "b": -0.7, "c": 0.1, "d": 2.0, "e": 0.31}
MODES = ("adjacent", "all", "best_worst", "vs_baseline")


class Rated:
    """A judge by a function of two texts; counts what it is asked: one comparison is two passes, one in each order."""

    name = "rated"

    def __init__(self, prob: Callable[[str, str], float | None]) -> None:
        self.prob, self.passes, self.times = prob, 0, 0

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        self.times += 1
        found: list[Verdict] = []
        for question in questions:
            wanted = question.wanted()
            self.passes += 2 * len(wanted)
            told = [self.prob(question.answers[i], question.answers[j]) for i, j in wanted]
            comparisons = [
                Comparison(first=i, second=j, prob_first=p, reason="" if p is not None else "unsure")
                for (i, j), p in zip(wanted, told, strict=True)
            ]
            found.append(Verdict(judge=self.name, comparisons=comparisons, calls=2 * len(wanted)))
        return found


def bradley_terry(rewards: Mapping[str, float] = REWARDS) -> Rated:
    return Rated(lambda one, other: 1 / (1 + math.exp(rewards[other] - rewards[one])))


def asked(*answers: str) -> Question:
    return Question(prompt="x", answers=("base", *answers))


def told(question: Question, found: Ranked) -> dict[tuple[str, str], tuple[float, float]]:
    """(better text, worse text) -> (strength, weight)."""
    texts = question.answers
    return {(texts[m.chosen], texts[m.rejected]): (m.strength, m.weight) for m in found.matches}


@pytest.mark.parametrize(("pairs", "count"), [("adjacent", 3), ("all", 6), ("best_worst", 1), ("vs_baseline", 4)])
@pytest.mark.parametrize("composition", ["direct", "logit", "linear"])
def test_number_of_pairs_and_of_judge_passes(pairs, count, composition):
    judge = bradley_terry()
    (found,) = RankedPairing(pairs=pairs, composition=composition)(judge, [asked("a", "b", "c", "d")])
    assert len(found.matches) == count and not found.dropped
    again = 2 * count if composition == "direct" and pairs != "vs_baseline" else 0
    assert judge.passes == 2 * 4 + again == sum(verdict.calls for verdict in found.verdicts)
    assert sum(match.weight for match in found.matches) == pytest.approx(1)


def test_the_better_ranked_answer_is_chosen():
    question = asked("a", "b", "c", "d")
    (found,) = RankedPairing(pairs="adjacent")(bradley_terry(), [question])
    assert list(told(question, found)) == [("d", "a"), ("a", "c"), ("c", "b")]
    assert [question.answers[i] for i in found.order] == ["d", "a", "base", "c", "b"]
    (found,) = RankedPairing(pairs="best_worst")(bradley_terry(), [question])
    assert list(told(question, found)) == [("d", "b")]
    (found,) = RankedPairing(pairs="vs_baseline")(bradley_terry(), [question])
    assert set(told(question, found)) == {("d", "base"), ("a", "base"), ("base", "c"), ("base", "b")}
    assert all(match.strength > 0.5 for match in found.matches)


@pytest.mark.parametrize("pairs", MODES)
@pytest.mark.parametrize("composition", ["direct", "logit", "linear"])
def test_the_order_of_the_candidates_changes_nothing(pairs, composition):
    rng = random.Random(0)
    answers = ["a", "b", "c", "d", "e"]
    made = RankedPairing(pairs=pairs, composition=composition)
    first = told(asked(*answers), made(bradley_terry(), [asked(*answers)])[0])
    for _ in range(5):
        rng.shuffle(answers)
        (found,) = made(bradley_terry(), [asked(*answers)])
        assert told(asked(*answers), found) == first


def test_ties_are_broken_by_the_texts():
    even = Rated(lambda one, other: 0.5)
    for answers in itertools.permutations(["a", "b", "c"]):
        (found,) = RankedPairing(pairs="adjacent", composition="logit")(even, [asked(*answers)])
        assert told(asked(*answers), found) == {("a", "b"): (0.5, 0.5), ("b", "c"): (0.5, 0.5)}


def test_duplicates_are_judged_once_and_left_out():
    judge, question = bradley_terry(), asked("a", "b", "a", "b", "a")
    (found,) = RankedPairing(pairs="all", composition="logit")(judge, [question])
    assert judge.passes == 4 and [(m.chosen, m.rejected) for m in found.matches] == [(1, 2)]
    assert len(question.answers) - len(found.order) == 3


def test_a_candidate_equal_to_the_baseline_is_even_with_it_unasked():
    judge, question = bradley_terry(), asked("base", "a")
    (found,) = RankedPairing(pairs="all", composition="logit")(judge, [question])
    assert judge.passes == 2
    assert told(question, found) == {("a", "base"): (pytest.approx(1 / (1 + math.exp(0.3 - 1.2))), 1.0)}
    (found,) = RankedPairing(pairs="vs_baseline")(judge, [question])
    assert len(found.matches) == 1


@pytest.mark.parametrize(
    ("answers", "why"),
    [(("a", "a", "a"), "identical"), (("base", "base"), "identical"), (("a",), "alone"), ((), "alone")],
)
def test_nothing_to_pair_is_dropped_with_the_reason_and_costs_nothing(answers, why):
    judge = bradley_terry()
    (found,) = RankedPairing()(judge, [asked(*answers)])
    assert (found.matches, found.dropped, judge.passes) == ((), why, 0)


def test_a_judge_that_is_unsure_leaves_candidates_out():
    judge = Rated(lambda one, other: None if "b" in (one, other) else 0.7 if one < other else 0.3)
    question = asked("a", "b", "c")
    (found,) = RankedPairing(pairs="all")(judge, [question])
    assert list(told(question, found)) == [("a", "c")] and found.order[-1] == 2
    (found,) = RankedPairing(pairs="all")(Rated(lambda one, other: None), [question])
    assert (found.matches, found.dropped) == ((), "unsure")
    (found,) = RankedPairing(pairs="vs_baseline")(judge, [question])
    assert len(found.matches) == 2 and found.matches[0].weight == 0.5


def test_pairs_the_judge_is_unsure_of_when_asked_directly_are_left_out_and_weights_still_add_up():
    judge = Rated(lambda one, other: None if {one, other} == {"a", "b"} else 0.6 if one < other else 0.4)
    question = asked("a", "b", "c")
    (found,) = RankedPairing(pairs="all")(judge, [question])
    assert set(told(question, found)) == {("a", "c"), ("b", "c")}
    assert [match.weight for match in found.matches] == [0.5, 0.5]


@pytest.mark.parametrize("pairs", MODES)
def test_logit_composition_is_what_a_bradley_terry_judge_says_directly(pairs):
    question = asked("a", "b", "c", "d", "e")
    direct, logit, linear = (
        told(question, RankedPairing(pairs=pairs, composition=how)(bradley_terry(), [question])[0])
        for how in ("direct", "logit", "linear")
    )
    assert direct.keys() == logit.keys() == linear.keys()
    for key, (strength, _) in direct.items():
        assert logit[key][0] == pytest.approx(strength, abs=1e-12)
    if pairs != "vs_baseline":
        assert max(abs(linear[key][0] - direct[key][0]) for key in direct) > 0.05
        assert all(abs(linear[key][0] - 0.5) < abs(direct[key][0] - 0.5) for key in direct)


def test_an_intransitive_judge_needs_direct():
    """a > base > b, but asked directly b beats a: the ranks say otherwise, and the strength falls below 1/2."""
    rigged = {("a", "base"): 0.8, ("b", "base"): 0.2, ("a", "b"): 0.1}

    def prob(one: str, other: str) -> float:
        return rigged[one, other] if (one, other) in rigged else 1 - rigged[other, one]

    question = asked("a", "b")
    direct = told(question, RankedPairing(composition="direct")(Rated(prob), [question])[0])
    logit = told(question, RankedPairing(composition="logit")(Rated(prob), [question])[0])
    assert direct == {("a", "b"): (0.1, 1.0)}
    assert logit == {("a", "b"): (pytest.approx(0.8 * 0.8 / (0.8 * 0.8 + 0.2 * 0.2)), 1.0)}


def test_equal_ranks_stand_as_the_judge_says_directly():
    """A judge that only says who wins puts all that beat the baseline on one rank."""
    certain = Rated(lambda one, other: float(REWARDS[one] > REWARDS[other]))
    question = asked("a", "d", "b")
    (found,) = RankedPairing(pairs="all")(certain, [question])
    assert {key: strength for key, (strength, _) in told(question, found).items()} == {
        ("d", "a"): 1.0,
        ("a", "b"): 1.0,
        ("d", "b"): 1.0,
    }


def test_questions_are_judged_together_and_kept_apart():
    judge = bradley_terry()
    questions = [asked("a", "b"), asked("a"), asked("c", "d", "e")]
    found = RankedPairing(pairs="all")(judge, questions)
    assert judge.times == 2 and [len(one.matches) for one in found] == [1, 0, 3]
    for question, one in zip(questions, found, strict=True):
        (alone,) = RankedPairing(pairs="all")(bradley_terry(), [question])
        assert one == alone


@pytest.mark.parametrize("pairs", MODES)
def test_a_question_whose_answers_were_all_left_out_is_dropped(pairs):
    """All may have been cut off by the token limit (`--unfinished drop`)."""
    judge = bradley_terry()
    none, some = RankedPairing(pairs=pairs)(judge, [Question(prompt="x", answers=()), asked("a", "b")])
    assert (none.order, none.matches, none.dropped) == ((), (), "alone")
    assert some.matches and not some.dropped


def test_compose_stays_in_its_range():
    for better, worse in itertools.product([0.0, 1e-15, 0.3, 0.5, 1.0], repeat=2):
        assert 0 <= compose(better, worse, "logit") <= 1 and 0 <= compose(better, worse, "linear") <= 1
    assert compose(0.7, 0.7, "logit") == compose(0.7, 0.7, "linear") == 0.5
    assert compose(0.8, 0.5, "logit") == pytest.approx(0.8)


def test_stored_pairs_get_the_strength_of_the_judge():
    judge = bradley_terry()
    questions = [Question(prompt="x", answers=answers) for answers in (("a", "b"), ("b", "a"), ("a", "a"))]
    one, other, same = stored_pairs(judge, questions)
    strength = 1 / (1 + math.exp(-0.7 - 1.2))
    assert [(m.chosen, m.rejected, m.strength) for m in one.matches] == [(0, 1, pytest.approx(strength))]
    assert [(m.chosen, m.rejected, m.strength) for m in other.matches] == [(1, 0, pytest.approx(strength))]
    assert same.dropped == "identical" and judge.passes == 4
    (unsure,) = stored_pairs(Rated(lambda one, other: None), questions[:1])
    assert unsure.dropped == "unsure" and not unsure.matches
