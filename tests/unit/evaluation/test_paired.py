"""Matching held-out rows of two runs, and what is compared on them."""

import pytest

from prefkit.errors import InputError
from prefkit.evaluation.paired import compare, match


def pair(row, margin, film="Heat", prompt="p"):
    return {
        "row": row,
        "group": film,
        "prompt": prompt,
        "margin": margin,
        "accuracy": float(margin > 0),
        "reward_chosen": margin,
        "reward_rejected": 0.0,
    }


def test_rows_match_in_any_order():
    a, b = [pair(0, 1.0), pair(1, 2.0)], [pair(1, 20.0), pair(0, 10.0)]
    assert [(x["margin"], y["margin"]) for x, y in match(a, b, "pairs")] == [(1.0, 10.0), (2.0, 20.0)]


def test_conversations_match_by_content():
    chat = [{"role": "user", "content": "hi"}]
    assert len(match([pair(0, 1.0, prompt=chat)], [pair(0, 2.0, prompt=[dict(chat[0])])], "pairs")) == 1


@pytest.mark.parametrize(
    "other",
    [[pair(0, 1.0)], [pair(0, 1.0), pair(2, 1.0)], [pair(0, 1.0), pair(1, 1.0, prompt="another")]],
)
def test_different_rows_are_refused_with_the_count(other):
    with pytest.raises(InputError, match=r"different held-out pairs: 1 match"):
        match([pair(0, 1.0), pair(1, 1.0)], other, "held-out pairs")


def test_a_row_that_stands_twice_is_refused():
    with pytest.raises(InputError, match="row 3 with the same prompt stands twice"):
        match([pair(3, 1.0), pair(3, 2.0)], [pair(3, 1.0)], "held-out pairs")


def test_differences_by_hand():
    a, b = [pair(0, 1.0, "x"), pair(1, 3.0, "y")], [pair(0, 0.5, "x"), pair(1, -1.0, "y")]
    found = compare(list(zip(a, b, strict=True)), [])
    margin, accuracy = found.differences[:2]
    assert (margin.metric, margin.a, margin.b, margin.difference.mean) == ("rewards/margins", 2.0, -0.25, 2.25)
    assert (margin.difference.low, margin.difference.high) == (0.5, 4.0)
    assert (accuracy.metric, accuracy.difference.mean, accuracy.p) == ("rewards/accuracies", 0.5, 1.0)
    assert (found.rows, found.samples, found.wins) == (2, 0, ())


def test_rows_without_a_group_stand_alone():
    rows = [(pair(i, 1.0, film=""), pair(i, 0.0, film="")) for i in range(5)]
    assert compare(rows, []).differences[0].difference.groups == 5
    films = [(pair(i, 1.0, film="Heat"), pair(i, 0.0, film="Heat")) for i in range(5)]
    assert compare(films, []).differences[0].difference.groups == 1


def sample(row, **values):
    return {"row": row, "group": str(row), "prompt": "p", "answer_final": "a", **values}


def test_wins_need_stored_scores():
    a = [sample(0, gold_final=0.9, gold_start=0.1, length=3), sample(1, gold_final=0.8, gold_start=0.9, length=4)]
    b = [sample(0, gold_final=0.5, gold_start=0.1, length=3), sample(1, gold_final=0.8, gold_start=0.9, length=5)]
    found = compare([], list(zip(a, b, strict=True)), names=("new", "old"))
    rates = {(win.first, win.second): win.outcome.rate.mean for win in found.wins}
    assert rates == {("new", "old"): 0.75, ("new", "new at its start"): 0.5, ("old", "old at its start"): 0.5}
    assert {difference.metric for difference in found.differences} == {"completions/mean_length", "gold"}


def test_every_judge_and_the_answers_of_the_data():
    scores = {"gold_final": 1.0, "reward_model_final": 2.0, "reward_model_reference": 3.0}
    rows = [(sample(i, **scores), sample(i, **scores)) for i in range(3)]
    found = {(win.judge, win.second): win.outcome.rate.mean for win in compare([], rows, names=("a", "b")).wins}
    assert found == {("gold", "b"): 0.5, ("reward_model", "b"): 0.5, ("reward_model", "the answers in the data"): 0.0}


def test_completions_compare_their_loss():
    rows = [({"row": i, "prompt": "p", "nll": 1.0}, {"row": i, "prompt": "p", "nll": 1.5}) for i in range(4)]
    (loss,) = compare(rows, []).differences
    assert (loss.metric, loss.difference.mean) == ("loss", -0.5)
