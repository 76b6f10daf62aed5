"""What holds for every packing and every layout: nothing lost, nothing twice, and no answer knows of another."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tiny
from prefkit.domains.text.layout import Backend, lay_out
from prefkit.domains.text.packing import num_tokens, pack
from prefkit.domains.text.policy import TextPolicy
from prefkit.engine.world import World
from prefkit.methods import dpo
from prefkit.records import Group

BACKENDS: tuple[Backend, ...] = ("padded", "sdpa", "flex")
sizes_and_budgets = st.lists(st.integers(1, 40), max_size=30).flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.integers(max(sizes, default=1), 100))
)
tokens = st.integers(3, 299)


def texts(longest: int) -> st.SearchStrategy[list[int]]:
    return st.lists(tokens, min_size=1, max_size=longest)


def some_groups(min_answers: int = 1) -> st.SearchStrategy[list[Group]]:
    one = st.builds(Group, texts(12), st.lists(texts(6), min_size=min_answers, max_size=4))
    return st.lists(one, min_size=1, max_size=4)


@functools.cache
def policy() -> TextPolicy:
    """One tiny model for all examples: nothing here changes it."""
    config = dpo.Config(dtype="float32", scoring_backend="sdpa")
    return TextPolicy.create(config, World.start(), model=tiny.model(), tokenizer=tiny.tokenizer())


@torch.no_grad()
def by_answer(batch: list[Group], backend: Any = "sdpa") -> list[list[torch.Tensor]]:
    """Token log-probs of every answer of every group."""
    made = policy()
    made.module.backend = backend
    rows = iter(made.token_log_probs(batch))
    return [[next(rows)[: len(answer)] for answer in group.answers] for group in batch]


@given(sizes_and_budgets, st.integers(1, 12))
def test_packing_loses_and_doubles_nothing_and_keeps_to_the_budget(case, at_least):
    sizes, budget = case
    bins = pack(sizes, budget, at_least)
    assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
    assert all(bins)
    assert all(sum(sizes[i] for i in found) <= budget for found in bins)
    assert len(bins) >= min(at_least, len(sizes))


@given(sizes_and_budgets, st.integers(1, 12))
def test_packing_is_the_same_every_time_and_in_order(case, at_least):
    sizes, budget = case
    bins = pack(sizes, budget, at_least)
    assert pack(tuple(sizes), budget, at_least) == bins
    assert bins == sorted(sorted(found) for found in bins)


@given(sizes_and_budgets)
def test_packing_leaves_no_two_bins_that_would_fit_in_one(case):
    sizes, budget = case
    loads = sorted(sum(sizes[i] for i in found) for found in pack(sizes, budget))
    assert len(loads) < 2 or loads[0] + loads[1] > budget
    if sizes and sum(sizes) <= budget:
        assert len(loads) == 1


@given(sizes_and_budgets, st.integers(2, 12))
def test_more_bins_are_made_only_where_they_are_asked_for(case, at_least):
    sizes, budget = case
    few = pack(sizes, budget)
    assert len(pack(sizes, budget, at_least)) == max(len(few), min(at_least, len(sizes)))
    if at_least <= len(few):
        assert pack(sizes, budget, at_least) == few


@given(sizes_and_budgets, st.integers(1, 50), st.integers(0, 30))
def test_what_is_over_the_budget_alone_is_refused(case, over, place):
    sizes, budget = case
    place = min(place, len(sizes))
    with pytest.raises(ValueError, match=f"size {budget + over} at index {place} is over the budget of {budget}"):
        pack([*sizes[:place], budget + over, *sizes[place:]], budget)


@given(some_groups(), st.booleans())
def test_a_packed_row_is_never_longer_than_what_packing_counts(batch, last):
    made = lay_out(batch, 0, backend="sdpa", last=last)
    counted = sum(num_tokens(group) for group in batch)
    assert made.num_tokens == made.ids.numel() == counted - (0 if last else sum(len(g.answers) for g in batch))


@given(some_groups(), st.booleans(), st.sampled_from(BACKENDS))
def test_every_layout_holds_every_token_once(batch, last, backend):
    made = lay_out(batch, pad=0, backend=backend, last=last)
    kept = [list(answer if last else answer[:-1]) for group in batch for answer in group.answers]
    prompts = [g.prompt for g in batch for _ in range(len(g.answers) if backend == "padded" else 1)]
    expected = Counter(itertools.chain(*prompts, *kept))
    found = Counter(token for token in made.ids.flatten().tolist() if token)
    assert found == expected and made.num_tokens == expected.total()
    answers = [answer for group in batch for answer in group.answers]
    assert made.targets.tolist() == list(itertools.chain(*answers))
    assert len(set(made.slots.tolist())) == len(made.targets) == len(made.before)
    assert made.attention_pairs[1] >= made.attention_pairs[0] >= made.num_tokens


@given(some_groups(min_answers=2), st.data())
@settings(max_examples=30)
def test_changing_an_answer_changes_no_other_log_prob(batch, data):
    before = by_answer(batch)
    g = data.draw(st.integers(0, len(batch) - 1))
    a = data.draw(st.integers(0, len(batch[g].answers) - 1))
    new = data.draw(texts(9))
    assume(new != batch[g].answers[a])
    answers = [*batch[g].answers[:a], new, *batch[g].answers[a + 1 :]]
    after = by_answer([*batch[:g], Group(batch[g].prompt, answers), *batch[g + 1 :]])
    for i, (old_group, new_group) in enumerate(zip(before, after, strict=True)):
        for j, (old_one, new_one) in enumerate(zip(old_group, new_group, strict=True)):
            if (i, j) != (g, a):
                torch.testing.assert_close(new_one, old_one, rtol=1e-5, atol=2e-5)


@given(some_groups(), st.data())
@settings(max_examples=20)
def test_changing_a_token_changes_what_follows_it_alone(batch, data):
    before = by_answer(batch)
    g = data.draw(st.integers(0, len(batch) - 1))
    a = data.draw(st.integers(0, len(batch[g].answers) - 1))
    answer = batch[g].answers[a]
    place = data.draw(st.integers(0, len(answer) - 1))
    changed = [*answer[:place], 3 + (answer[place] - 2) % 297, *answer[place + 1 :]]
    after = by_answer(
        [Group(x.prompt, [*x.answers[:a], changed, *x.answers[a + 1 :]]) if i == g else x for i, x in enumerate(batch)]
    )
    old, new = before[g][a], after[g][a]
    torch.testing.assert_close(new[:place], old[:place], rtol=1e-5, atol=2e-5)
    assert (new[place:] - old[place:]).abs().max() > 1e-4


@given(some_groups(), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_the_order_of_groups_and_answers_does_not_matter(batch, rng):
    expected = by_answer(batch)
    order = rng.sample(range(len(batch)), len(batch))
    inner = [rng.sample(range(len(group.answers)), len(group.answers)) for group in batch]
    found = by_answer([Group(batch[i].prompt, [batch[i].answers[j] for j in inner[i]]) for i in order])
    for place, i in enumerate(order):
        for number, j in enumerate(inner[i]):
            torch.testing.assert_close(found[place][number], expected[i][j], rtol=1e-5, atol=2e-5)


@given(some_groups())
@settings(max_examples=30)
def test_packed_rows_equal_padded_ones(batch):
    expected = by_answer(batch, "padded")
    for backend in ("sdpa", "flex"):
        for theirs, ours in zip(expected, by_answer(batch, backend), strict=True):
            for a, b in zip(theirs, ours, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-5)
