"""Which judges are refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from prefkit.errors import InputError
from prefkit.feedback.self_judge import TEMPLATES, SelfJudge
from prefkit.loops.judge_quality import JudgeQuality, fault, measured, refuse
from prefkit.records import Preference, Text

Say = Callable[[str, str], float]
"""(shown as A, shown as B) -> log-odds of A"""


def quality(say: Say, num: int, *, labelled: bool = True, mass: float = 0.8) -> JudgeQuality:
    def ask(prompts: Sequence[Text]) -> list[tuple[float, float, float]]:
        shown = [str(p).split("Assistant A: ")[1].split("\n\nAssistant B: ") for p in prompts]
        return [(say(first, second.split("\n\n")[0]), 0.0, mass) for first, second in shown]

    rows = [Preference(prompt=f"p{i}", chosen=f"{i} good", rejected=f"{i} bad", row=i) for i in range(num)]
    return measured(SelfJudge(ask, TEMPLATES["chat"], "self"), rows, labelled=labelled, seed=0)


def right(first: str, second: str) -> float:
    return 2.0 if "good" in first else -2.0


def test_a_judge_that_is_right_is_taken_and_one_that_is_wrong_or_guesses_is_refused():
    assert fault(quality(right, 20)) == ""
    assert "not better than chance" in fault(quality(lambda first, second: -right(first, second), 20))
    guess = random.Random(0)
    assert "not better than chance" in fault(quality(lambda first, second: guess.uniform(-2, 2), 60))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_few_pairs_that_all_agree_may_be_chance(labelled: bool):
    """Their interval has no width; a judge that guesses is right on all of three pairs once in eight times."""
    few, more = (quality(right, num, labelled=labelled) for num in (3, 6))
    assert few.agreement.low == 1 and few.chance_p == 0.25
    assert "chance" in fault(few) and fault(more) == ""
    with pytest.raises(InputError, match=r"p = 0\.25") as error:
        refuse(few, stage1=False)
    assert "--judge_pairs" in error.value.mend and "--force_judge" in error.value.mend


def test_without_labels_agreement_and_mass_decide():
    assert fault(quality(lambda first, second: -right(first, second), 20, labelled=False)) == "", "nobody can tell"
    by_place = quality(lambda first, second: 3.0, 20, labelled=False)
    assert by_place.agreement.mean == 0 and "both orders name the same" in fault(by_place)
    assert "not understood" in fault(quality(right, 20, labelled=False, mass=0.05))
    assert by_place.accuracy is None and by_place.temperature == 1
