"""Resets: where they cut, how often, and that they depend on their seed and visit and on nothing else."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prefkit.domains.text.resets import Offline, ResetSampler, finished_only
from prefkit.domains.text.rollout_maker import offline_answer
from prefkit.errors import InputError
from prefkit.records import Completion, Example, Pair, Preference

END = 2
ANSWER = Offline([11, 12, 13, 14, 15, END])


def draws(sampler: ResetSampler, answer: Offline = ANSWER, count: int = 600, **how: Any) -> list[int]:
    """One visit of many rollouts."""
    return sampler.draw([answer] * count, **how)


def chi_square(found: Counter[int], cuts: list[int]) -> float:
    expected = found.total() / len(cuts)
    assert set(found) <= set(cuts)
    return sum((found[k] - expected) ** 2 / expected for k in cuts)


@pytest.mark.parametrize(("k_min", "limit"), [(0, None), (1, None), (3, None), (1, 4)])
def test_cuts_are_uniform_between_k_min_and_the_token_before_the_last(k_min: int, limit: int | None) -> None:
    cuts = list(range(k_min, (limit or len(ANSWER.tokens))))
    cuts = [k for k in cuts if k < len(ANSWER.tokens)]
    found = Counter(draws(ResetSampler(k_min=k_min, seed=1), count=3000, limit=limit))
    assert set(found) == set(cuts)  # so the end token is never forced, and a budget is never filled
    assert chi_square(found, cuts) < 20.5  # 5 degrees of freedom at most: p = 0.001


@pytest.mark.parametrize("prob", [0.25, 0.6])
def test_the_share_of_resets_is_the_probability(prob: float) -> None:
    count = 3000
    resets = sum(k > 0 for k in draws(ResetSampler(prob=prob, k_min=1, seed=3), count=count))
    assert abs(resets - prob * count) < 3.3 * math.sqrt(count * prob * (1 - prob))


def test_probability_0_and_1() -> None:
    assert not any(draws(ResetSampler(prob=0.0, k_min=1)))
    assert all(draws(ResetSampler(prob=1.0, k_min=1)))


@pytest.mark.parametrize("tokens", [[], [END], [7]])
@pytest.mark.parametrize("law", ["uniform", "fixed", "curriculum"])
def test_an_answer_of_fewer_than_two_tokens_is_never_reset(tokens: list[int], law: Any) -> None:
    for k_min in (0, 1):
        assert not any(draws(ResetSampler(k_min=k_min, law=law), Offline(tokens), 50))
    assert ResetSampler(k_min=1).draw([None, ANSWER])[0] == 0


def test_an_answer_too_short_for_k_min_is_not_reset() -> None:
    assert not any(draws(ResetSampler(k_min=6)))
    assert set(draws(ResetSampler(k_min=5))) == {5}


def test_a_cut_is_drawn_anew_at_every_visit_and_for_every_rollout() -> None:
    sampler = ResetSampler(seed=4)
    first, second = draws(sampler, count=40), draws(sampler, count=40)
    assert first != second
    assert len(set(first)) > 2


def test_a_draw_depends_on_seed_visit_and_place_alone() -> None:
    other = Offline([5, 6, 7, END])
    alone, among = ResetSampler(seed=4), ResetSampler(seed=4)
    for _ in range(3):
        one = alone.draw([None, None, ANSWER])
        assert among.draw([other, ANSWER, ANSWER, other])[2] == one[2]
    assert draws(ResetSampler(seed=4)) != draws(ResetSampler(seed=5))


def test_the_global_generators_are_left_alone() -> None:
    import torch

    before = torch.get_rng_state()
    draws(ResetSampler())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sampler_that_was_saved_goes_on(tmp_path: Path) -> None:
    whole = ResetSampler(seed=9)
    expected = [draws(whole, count=20) for _ in range(4)]
    part = ResetSampler(seed=9)
    for _ in range(2):
        draws(part, count=20)
    part.save(tmp_path)
    again = ResetSampler(seed=9)
    again.load(tmp_path)
    assert [draws(again, count=20) for _ in range(2)] == expected[2:]
    with pytest.raises(InputError, match="seed 9, this run has 8"):
        ResetSampler(seed=8).load(tmp_path)


def test_one_process_writes(tmp_path: Path) -> None:
    ResetSampler(writes=False).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_fixed_law() -> None:
    assert set(draws(ResetSampler(law="fixed", cut=0.5))) == {3}
    assert set(draws(ResetSampler(law="fixed", cut=2.0))) == {2}
    assert set(draws(ResetSampler(law="fixed", cut=100.0))) == {5}
    assert set(draws(ResetSampler(law="fixed", cut=0.01, k_min=1))) == {1}


def test_the_curriculum_begins_late_and_ends_with_all_cuts() -> None:
    def cuts(progress: float) -> set[int]:
        return set(draws(ResetSampler(law="curriculum"), progress=progress))

    assert cuts(0.0) == {5}
    assert cuts(0.5) == {3, 4, 5}
    assert cuts(1.0) == {0, 1, 2, 3, 4, 5}
    assert min(draws(ResetSampler(law="curriculum", k_min=2), progress=1.0)) == 2


def test_a_filter_leaves_answers_out() -> None:
    cut = Offline([11, 12, 13], finished=False)
    sampler = ResetSampler(k_min=1, filter=finished_only)
    assert [k > 0 for k in sampler.draw([cut, ANSWER, cut])] == [False, True, False]
    assert all(draws(ResetSampler(k_min=1), cut))


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"k_min": 1}, True),
        ({"k_min": 0}, False),
        ({"k_min": 1, "prob": 0.9}, False),
        ({"law": "fixed"}, True),
        ({"law": "curriculum"}, True),
        ({"k_min": 1, "filter": finished_only}, True),
    ],
)
def test_a_starved_first_token_is_warned_of(options: dict[str, Any], warns: bool) -> None:
    assert ("no gradient" in ResetSampler(**options).warning()) is warns


@pytest.mark.parametrize("options", [{"prob": 1.2}, {"k_min": -1}, {"cut": 0.0}, {"law": "no"}, {"source": "no"}])
def test_wrong_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ResetSampler(**options)


def test_the_offline_answer_of_a_row() -> None:
    source = Preference(prompt="", chosen="", rejected="", row=7)
    pair = Pair(prompt=[5], chosen=[6, END], rejected=[7, 8], rejected_truncated=True, source=source)
    chosen, rejected = Offline([6, END], True, 7), Offline([7, 8], False, 7)
    assert offline_answer(pair, "chosen", 0, ends=[END]) == chosen
    assert offline_answer(pair, "rejected", 0, ends=[END]) == rejected
    assert [offline_answer(pair, "both", drawn, ends=[END]) for drawn in (4, 5)] == [chosen, rejected]
    example = Example(prompt=[5], completion=[9, 8], truncated=True, source=Completion(prompt="", completion="", row=3))
    assert offline_answer(example, "reference", 0, ends=[END]) == Offline([9, 8], False, 3)


def test_an_offline_answer_ends_with_its_first_end_token() -> None:
    turns = Example(prompt=[5], completion=[6, 7, END, 8, 9, END], source=Completion(prompt="", completion=""))
    found = offline_answer(turns, "chosen", 0, ends=[END])
    assert found == Offline([6, 7, END])
    for _ in range(50):
        assert END not in found.tokens[: ResetSampler().draw([found])[0]]
