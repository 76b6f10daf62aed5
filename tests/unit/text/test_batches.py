from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkit.domains.text.batches import (
    hold_out,
    micro_batches,
    num_steps,
    order,
    process_slice,
    step_batches,
)

sizes = st.integers(min_value=1, max_value=60)


@given(sizes, st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_permutation(rows: int, seed: int, epoch: int) -> None:
    assert sorted(order(rows, seed, epoch)) == list(range(rows))


@given(sizes, st.integers(1, 25), st.integers(0, 3))
def test_batches_are_full_and_every_row_comes_once_per_epoch(rows: int, batch: int, seed: int) -> None:
    steps = num_steps(rows, epochs=3, global_batch=batch)
    batches = [step_batches(rows, step=step, global_batch=batch, seed=seed) for step in range(1, steps + 1)]
    assert all(len(one) == batch for one in batches)
    seen = [row for one in batches for row in one]
    for epoch in range(3):
        assert seen[epoch * rows : (epoch + 1) * rows] == order(rows, seed, epoch)


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_fewer_rows_than_a_batch_repeat_evenly() -> None:
    counts = Counter(step_batches(3, step=1, global_batch=9, seed=0))
    assert counts == {0: 3, 1: 3, 2: 3}


@given(st.integers(1, 40), st.integers(1, 5))
def test_process_slices_join_to_the_batch(rows: int, size: int) -> None:
    batch = step_batches(rows, step=2, global_batch=4 * size, seed=1)
    parts = [process_slice(batch, rank=rank, size=size) for rank in range(size)]
    assert [len(part) for part in parts] == [4] * size
    assert [row for part in parts for row in part] == batch
    assert [row for micro in micro_batches(batch, 3) for row in micro] == batch


def test_an_epoch_share_rounds_up_to_whole_steps() -> None:
    assert num_steps(10, epochs=1, global_batch=4) == 3
    assert num_steps(10, epochs=0.3, global_batch=3) == 1
    assert num_steps(30, epochs=0.1, global_batch=1) == 3


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="rows, step and batch"):
        step_batches(0, step=1, global_batch=1, seed=0)
    with pytest.raises(ValueError, match="rank"):
        process_slice([1], rank=1, size=1)


def test_hold_out_never_splits_a_key() -> None:
    rows = [f"film {number % 40} sentence {number}" for number in range(200)]

    def film(row: str) -> str:
        return row.split(" sentence")[0]

    train, held = hold_out(rows, film, share=0.05, seed=3)
    assert {film(row) for row in train}.isdisjoint(film(row) for row in held)
    assert sorted(train + held) == sorted(rows)
    assert len(held) == 10
    assert set(hold_out(rows[::-1], film, share=0.05, seed=3)[1]) == set(held)
    assert set(hold_out(rows, film, share=0.05, seed=4)[1]) != set(held)
    with pytest.raises(ValueError, match="share one prompt"):
        hold_out(rows, lambda row: "same")
