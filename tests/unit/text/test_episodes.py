"""Batches of episodes and their minibatches: every prompt in turn, every place once a pass, nothing to remember."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from prefkit.domains.text.batches import step_batches
from prefkit.domains.text.episodes import EpisodeData


def data(rows: int = 10, *, size: int = 1, **options: Any) -> EpisodeData:
    """Over rows that are never looked into; two prompts a step, three steps a pass, two passes."""
    config = SimpleNamespace(
        **{
            "seed": 3,
            "num_mini_batches": 3,
            "num_ppo_epochs": 2,
            "num_generations": 2,
            "max_steps": -1,
            "num_train_epochs": 1.0,
            "total_episodes": 0,
        }
        | options
    )
    train = [SimpleNamespace(prompt=[5] * (i + 1)) for i in range(rows)]
    inner: Any = SimpleNamespace(config=config, train=train, global_batch=lambda size: 2 * size)
    return EpisodeData(data=inner, size=size)


def test_a_step_has_its_batch_pass_and_minibatch() -> None:
    found = data()
    assert [found.batch_of(step) for step in range(1, 8)] == [
        (1, 0, 0),
        (1, 0, 1),
        (1, 0, 2),
        (1, 1, 0),
        (1, 1, 1),
        (1, 1, 2),
        (2, 0, 0),
    ]
    assert [found.first_step(batch) for batch in (1, 2, 3)] == [1, 7, 13]
    assert all(found.batch_of(found.first_step(batch)) == (batch, 0, 0) for batch in range(1, 9))


def test_a_pass_trains_on_every_place_once_in_an_order_of_its_own() -> None:
    found = data(num_mini_batches=8)
    orders = [
        [place for part in range(8) for place in found.places(found.first_step(batch) + 8 * epoch + part)]
        for batch in (1, 2)
        for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    again = data(num_mini_batches=8)
    assert [again.places(step) for step in (1, 5, 20)] == [found.places(step) for step in (1, 5, 20)]
    assert data(num_mini_batches=8, seed=4).places(1) != found.places(1)


def test_every_row_comes_once_before_any_comes_again() -> None:
    found = data(rows=12)
    seen = [row for batch in (1, 2) for row in found.prompts(batch)]
    assert sorted(seen) == list(range(12))
    assert found.prompts(1) == step_batches(12, step=1, global_batch=6, seed=3)
    assert sorted(found.prompts(3) + found.prompts(4)) == list(range(12))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_a_step(size: int) -> None:
    found = data(size=size)
    for step in (1, 4, 8):
        parts = [found.rows(step, rank, size)[0] for rank in range(size)]
        assert [place for part in parts for place in part] == found.places(step)
        assert {len(part) for part in parts} == {2}


def test_how_long_a_run_is() -> None:
    assert data().steps_per_batch == 6 and data().prompts_per_batch == 6 and data().episodes_per_batch == 12
    assert data(max_steps=7).total_steps(1) == 7
    assert data(rows=20).total_steps(1) == math.ceil(20 / 6) * 6
    assert data(rows=20, num_train_epochs=2.0).total_steps(1) == math.ceil(40 / 6) * 6
    assert data(total_episodes=30).total_steps(1) == 2 * 6
    assert data(total_episodes=1).total_steps(1) == 6
    assert data(rows=12).steps_per_epoch(1) == 12


def test_prompt_tokens_are_counted_once_a_batch() -> None:
    found = data()
    expected = sum(row + 1 for row in found.prompts(2))
    assert [found.num_tokens(step, 1) for step in range(7, 13)] == [expected, 0, 0, 0, 0, 0]
