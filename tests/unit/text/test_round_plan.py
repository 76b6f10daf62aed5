"""Which rows and steps make a round."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prefkit.domains.text.batches import step_batches
from prefkit.domains.text.round_plan import RoundData
from prefkit.errors import InputError


class Data:
    """Training rows without content."""

    def __init__(self, rows: int, config: Any) -> None:
        self.train = list(range(rows))
        self.config = config

    def global_batch(self, size: int) -> int:
        return self.config.per_device_train_batch_size * size

    def step_rows(self, step: int, size: int) -> list[int]:
        return step_batches(len(self.train), step=step, global_batch=self.global_batch(size), seed=self.config.seed)

    def total_steps(self, size: int) -> int:
        return self.config.max_steps

    def describe(self) -> list[str]:
        return []


def plan(rows: int, size: int = 1, **options: Any) -> RoundData:
    config = {
        "num_rounds": 3,
        "prompts_per_round": 0,
        "steps_per_round": 0,
        "replay_rounds": 0,
        "offline_rounds": 0,
        "num_train_epochs": 1.0,
        "max_steps": -1,
        "per_device_train_batch_size": 4,
        "seed": 0,
        "candidates": "both",
    }
    return RoundData(data=Data(rows, SimpleNamespace(**{**config, **options})), size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rounds", "part", "over"), [(3, 20_378, 1), (4, 15_283, 3)])
def test_the_published_portions(rounds: int, part: int, over: int) -> None:
    found = plan(61_135, num_rounds=rounds)
    assert [len(one.rows) for one in found.rounds] == [part] * rounds
    assert found.left_over == over
    rows = [row for one in found.rounds for row in one.rows]
    assert rows == list(range(rounds * part))  # disjoint, contiguous, in order
    assert f"{over} rows are left over" in found.describe()[-1]


def test_steps_follow_one_another_and_every_step_has_its_round() -> None:
    found = plan(33, num_rounds=3)
    assert [(one.first_step, one.num_steps) for one in found.rounds] == [(1, 3), (4, 3), (7, 3)]
    assert found.total_steps(1) == 9
    assert [found.round_of(step).number for step in range(1, 10)] == [1] * 3 + [2] * 3 + [3] * 3


def test_a_round_shows_each_of_its_items_once_an_epoch() -> None:
    found = plan(24, num_rounds=2, num_train_epochs=2.0)
    items = [item for step in range(1, 7) for item in found.step_items(step)]
    assert sorted(items) == sorted([*range(12)] * 2)
    other = [item for step in range(7, 13) for item in found.step_items(step)]
    assert sorted(other) == sorted(items) and other != items


def test_two_processes_share_a_step() -> None:
    one, two = plan(24, per_device_train_batch_size=4), plan(24, size=2, per_device_train_batch_size=2)
    for step in range(1, 7):
        first, second = two.rows(step, 0, 2), two.rows(step, 1, 2)
        assert first[0] + second[0] == one.rows(step, 0, 1)[0]
        assert (first[1], second[1]) == (0, 2)


def test_replay_adds_the_rounds_before() -> None:
    found = plan(24, num_rounds=3, replay_rounds=1)
    assert [one.before for one in found.rounds] == [(), (1,), (2,)]
    assert [found.pool_size(one) for one in found.rounds] == [8, 16, 16]
    assert [one.num_steps for one in found.rounds] == [2, 4, 4]


def test_a_limit_of_steps_cuts_the_run_and_leaves_the_rounds_as_they_are() -> None:
    short, long = plan(24, num_rounds=2, max_steps=4), plan(24, num_rounds=2, max_steps=9)
    assert short.rounds[:2] == long.rounds[:2]
    assert (short.total_steps(1), long.total_steps(1)) == (4, 9)
    assert long.rounds[2].rows == long.rounds[0].rows, "used up, the parts come again"


def test_rounds_of_one_step_take_the_rows_of_that_step() -> None:
    found = plan(10, steps_per_round=1, max_steps=7)
    for step in range(1, 8):
        one = found.round_of(step)
        assert one.number == step and one.num_steps == 1
        assert list(one.rows) == step_batches(10, step=step, global_batch=4, seed=0)
        assert found.step_items(step) == [0, 1, 2, 3]


def test_rounds_of_three_steps_are_whole_where_the_run_ends() -> None:
    found = plan(10, steps_per_round=3, max_steps=7)
    assert [one.num_steps for one in found.rounds] == [3, 3, 3] and found.total_steps(1) == 7
    assert found.rounds == plan(10, steps_per_round=3, max_steps=9).rounds
    assert [item for step in (4, 5, 6) for item in found.step_items(step)] == list(range(12))


@pytest.mark.parametrize("options", [{"num_rounds": 30}, {"prompts_per_round": 25}])
def test_more_rounds_than_rows_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="cannot be cut"):
        _ = plan(24, **options).rounds
