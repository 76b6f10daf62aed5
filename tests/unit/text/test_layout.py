"""Where every token of a batch is put, and who sees whom there: worked by hand and counted by brute force."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from prefkit.domains.text.attention import SdpaPlan
from prefkit.domains.text.layout import Backend, Layout, lay_out
from prefkit.records import Group

PACKED: tuple[Backend, ...] = ("sdpa", "flex")
HAND = [Group([1, 2, 3], [[4, 5, 6], [7], [8, 9]]), Group([10], [[11], [12, 13]])]


def numbered(*sizes: tuple[int, tuple[int, ...]]) -> list[Group]:
    """Groups of (prompt length, answer lengths) in which no token id comes twice."""
    ids = itertools.count(100)

    def take(count: int) -> list[int]:
        return [next(ids) for _ in range(count)]

    return [Group(take(prompt), [take(answer) for answer in answers]) for prompt, answers in sizes]


SHAPES: dict[str, list[Group]] = {
    "one of one": numbered((1, (1,))),
    "one answer": numbered((4, (3,)), (1, (6,)), (2, (1,))),
    "pairs": numbered((5, (3, 4)), (1, (1, 1)), (2, (6, 1)), (7, (2, 2))),
    "five": numbered((3, (2, 5, 1, 5, 3)), (6, (1, 1, 1, 1, 1)), (1, (4, 3, 2, 1, 2))),
    "mixed": numbered((3, (2,)), (4, (1, 2, 3)), (1, (2, 2, 2, 2, 9)), (2, (3, 1))),
    "far apart": numbered((150, (30, 3)), (2, (3, 30)), (9, (60, 40, 1))),
}


def identities(groups: list[Group]) -> dict[int, tuple[int, int, int]]:
    """Token id -> (group, answer or -1 in a prompt, position)."""
    found = {}
    for g, group in enumerate(groups):
        found.update({token: (g, -1, i) for i, token in enumerate(group.prompt)})
        for a, answer in enumerate(group.answers):
            found.update({token: (g, a, len(group.prompt) + i) for i, token in enumerate(answer)})
    return found


def visible(groups: list[Group], layout: Layout, window: int = 0) -> Tensor:
    """(T, T): whether the token of the row sees that of the column, from what the tokens are."""
    who = identities(groups)
    group, answer, place = torch.tensor([who[token] for token in layout.ids[0].tolist()]).T
    same = (group[:, None] == group) & ((answer == -1) | (answer[:, None] == answer))
    back = place[:, None] - place
    return same & (back >= 0) & (back < (window or 1 << 20))


def attended(layout: Layout, window: int = 0, soft_cap: float = 0.0, *, grad: bool = False) -> Tensor:
    """(T, T) weight that each token puts on each: even over what it sees, since all scores are 0.

    The values are one-hot, so that the output of attention is the matrix of its weights.
    """
    assert layout.plan is not None
    count = layout.ids.numel()
    zeros = torch.zeros(1, 1, count, count, requires_grad=grad)
    values = torch.eye(count)[None, None]
    found = layout.plan.attend(zeros, zeros, values, scale=None, window=window or None, soft_cap=soft_cap)
    assert found.shape == (1, count, 1, count)
    return found[0, :, 0].detach()


def test_a_packed_layout_worked_by_hand() -> None:
    made = lay_out(HAND, pad=0, backend="sdpa")
    # The longest answer follows its prompt; last tokens predict nothing, and so two one-token answers take no place.
    assert made.ids.tolist() == [[1, 2, 3, 4, 5, 10, 12, 8]]
    assert made.positions is not None and made.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 3]]
    assert made.before.tolist() == [2, 3, 4, 2, 2, 7, 5, 5, 6]
    assert made.targets.tolist() == [4, 5, 6, 7, 8, 9, 11, 12, 13]
    assert made.slots.tolist() == [0, 1, 2, 3, 6, 7, 9, 12, 13]
    assert made.ends.tolist() == [4, 2, 7, 5, 6]
    assert (made.num_answers, made.longest_answer, made.num_tokens) == (5, 3, 8)
    # trunks 1+2+3+4+5 and 1+2, the branch sees three prompt tokens and itself; the short trunk is padded to five
    assert made.attention_pairs == (15 + 3 + 4, 15 + 15 + 4)


def test_a_packed_layout_with_last_tokens_worked_by_hand() -> None:
    made = lay_out(HAND, pad=0, backend="sdpa", last=True)
    assert made.ids.tolist() == [[1, 2, 3, 4, 5, 6, 10, 12, 13, 8, 9, 7, 11]]
    assert made.positions is not None
    assert made.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 3, 1]]
    assert made.before.tolist() == [2, 3, 4, 2, 2, 9, 6, 6, 7]
    assert made.targets.tolist() == [4, 5, 6, 7, 8, 9, 11, 12, 13]
    assert made.ends.tolist() == [5, 11, 10, 12, 8]
    assert made.ids[0, made.ends].tolist() == [6, 7, 9, 11, 13]
    assert made.num_tokens == 13
    # branches: 2 tokens after 3, 1 after 3, 1 after 1; multiplied as three rows of 2 x 5
    assert made.attention_pairs == (21 + 6 + 9 + 4 + 2, 2 * 21 + 3 * 10)


def test_flex_lays_tokens_out_as_sdpa_does() -> None:
    for last in (False, True):
        ours, other = (lay_out(HAND, pad=0, backend=backend, last=last) for backend in PACKED)
        for name in ("ids", "positions", "before", "targets", "slots", "ends"):
            assert torch.equal(getattr(ours, name), getattr(other, name)), name
        assert other.attention_pairs == (ours.attention_pairs[0], other.num_tokens**2)


def test_a_padded_layout_worked_by_hand() -> None:
    made = lay_out(HAND, pad=99)
    assert made.ids.tolist() == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 99, 99],
        [1, 2, 3, 8, 99],
        [10, 99, 99, 99, 99],
        [10, 12, 99, 99, 99],
    ]
    assert made.positions is None and made.plan is None
    assert made.before.tolist() == [2, 3, 4, 7, 12, 13, 15, 20, 21]
    assert made.targets.tolist() == [4, 5, 6, 7, 8, 9, 11, 12, 13]
    assert made.slots.tolist() == [0, 1, 2, 3, 6, 7, 9, 12, 13]
    assert made.ends.tolist() == [4, 7, 13, 15, 21]
    assert (made.num_answers, made.longest_answer, made.num_tokens) == (5, 3, 15)
    assert made.attention_pairs == (15 + 6 + 10 + 1 + 3, 5 * 15)


def test_a_padded_layout_with_last_tokens_worked_by_hand() -> None:
    made = lay_out(HAND, pad=99, last=True)
    assert made.ids[1:3].tolist() == [[1, 2, 3, 7, 99, 99], [1, 2, 3, 8, 9, 99]]
    assert made.ids.flatten()[made.ends].tolist() == [6, 7, 9, 11, 13]
    assert made.before.tolist() == [2, 3, 4, 8, 14, 15, 18, 24, 25]
    assert made.num_tokens == 6 + 4 + 5 + 2 + 3


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("backend", ["padded", *PACKED])
@pytest.mark.parametrize("name", SHAPES)
def test_each_answer_token_is_predicted_by_the_one_before_it(name: str, backend: Backend, last: bool) -> None:
    groups = SHAPES[name]
    made, who = lay_out(groups, pad=0, backend=backend, last=last), identities(groups)
    flat, flat_positions = made.ids.flatten(), None if made.positions is None else made.positions.flatten()
    answers = [(g, answer) for g, group in enumerate(groups) for answer in group.answers]
    targets = iter(zip(made.before.tolist(), made.targets.tolist(), made.slots.tolist(), strict=True))
    for row, (g, answer) in enumerate(answers):
        previous = groups[g].prompt[-1]
        for i, token in enumerate(answer):
            place, target, slot = next(targets)
            assert (int(flat[place]), target, slot) == (previous, token, row * made.longest_answer + i)
            if flat_positions is not None:
                assert int(flat_positions[place]) == who[previous][2]
            previous = token
        whole = [*groups[g].prompt, *answer]
        assert int(flat[made.ends[row]]) == (whole[-1] if last else whole[-2])
    assert next(targets, None) is None
    assert made.num_answers == len(answers)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("backend", PACKED)
@pytest.mark.parametrize("name", SHAPES)
def test_a_packed_row_holds_every_token_once_and_no_padding(name: str, backend: Backend, last: bool) -> None:
    groups = SHAPES[name]
    made, who = lay_out(groups, pad=0, backend=backend, last=last), identities(groups)
    wanted = [token for g in groups for token in g.prompt]
    wanted += [token for g in groups for answer in g.answers for token in (answer if last else answer[:-1])]
    assert made.ids.shape == (1, len(wanted))
    assert Counter(made.ids[0].tolist()) == Counter(wanted)
    assert made.num_tokens == len(wanted)
    assert made.positions is not None
    assert made.positions[0].tolist() == [who[token][2] for token in made.ids[0].tolist()]


@pytest.mark.parametrize("window", [0, 1, 3, 64])
@pytest.mark.parametrize("backend", PACKED)
@pytest.mark.parametrize("name", SHAPES)
def test_every_token_sees_what_it_should_and_nothing_else(name: str, backend: Backend, window: int) -> None:
    groups = SHAPES[name]
    made = lay_out(groups, pad=0, backend=backend)
    expected = visible(groups, made, window)
    found = attended(made, window)
    assert torch.equal(found > 0, expected)
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))
    if not window:
        assert made.attention_pairs[0] == int(expected.sum())
        assert made.attention_pairs[1] >= made.attention_pairs[0]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("backend", PACKED)
def test_what_is_seen_depends_neither_on_gradient_nor_soft_cap(backend: Backend, soft_cap: float, last: bool) -> None:
    groups = SHAPES["five"]
    made = lay_out(groups, pad=0, backend=backend, last=last)
    for window, grad in itertools.product((0, 3), (False, True)):
        found = attended(made, window, soft_cap, grad=grad)
        assert torch.equal(found > 0, visible(groups, made, window))


def test_windows_go_by_positions_and_not_by_places_in_the_row() -> None:
    groups = numbered((4, (3, 3, 3)))
    made = lay_out(groups, pad=0, backend="sdpa")
    who = identities(groups)
    row = made.ids[0].tolist()
    first_of_last_branch = row.index(groups[0].answers[2][0])
    seen = [row[i] for i in attended(made, window=3)[first_of_last_branch].nonzero()[:, 0]]
    assert [who[token] for token in seen] == [(0, -1, 2), (0, -1, 3), (0, 2, 4)]
    assert first_of_last_branch - row.index(groups[0].prompt[3]) > 3, "further than the window in the row"


def test_segments_of_unlike_length_are_attended_apart() -> None:
    made = lay_out(numbered((300, (2,)), (9, (2,))), pad=0, backend="sdpa")
    assert isinstance(made.plan, SdpaPlan)
    assert [tuple(block.queries.shape) for block in made.plan.blocks] == [(1, 301), (1, 10)]
    assert made.plan.order is None
    assert made.attention_pairs == (301 * 302 // 2 + 55,) * 2
    alike = lay_out(numbered((12, (2,)), (9, (2,))), pad=0, backend="sdpa")
    assert isinstance(alike.plan, SdpaPlan)
    assert [tuple(block.queries.shape) for block in alike.plan.blocks] == [(2, 13)]


def test_pairs_multiplied_are_those_of_the_calls_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefkit.domains.text import attention

    made = lay_out(SHAPES["far apart"], pad=0, backend="sdpa")
    original, multiplied = attention.scaled_dot_product_attention, []

    def counted(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        rows, length, width = query.shape[0], query.shape[-2], key.shape[-2]
        causal = options["is_causal"]
        assert not causal or length == width
        multiplied.append(rows * (length * (length + 1) // 2 if causal else length * width))
        return original(query, key, *args, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    attended(made)
    assert len(multiplied) > 2
    assert sum(multiplied) == made.attention_pairs[1]


@pytest.mark.parametrize("backend", ["padded", *PACKED])
def test_what_has_no_tokens_is_refused(backend: Backend) -> None:
    good = Group([1], [[2]])
    with pytest.raises(ValueError, match="group 1 of the batch has an empty prompt"):
        lay_out([good, Group([], [[2]])], 0, backend=backend)
    with pytest.raises(ValueError, match="group 0 of the batch has an empty answer"):
        lay_out([Group([1], [[2], []]), good], 0, backend=backend)
    with pytest.raises(ValueError, match="group 2 of the batch has an empty list of answers"):
        lay_out([good, good, Group([1], [])], 0, backend=backend)


@pytest.mark.parametrize("backend", PACKED)
def test_shuffled_groups_and_answers_are_the_same_tokens(backend: Backend) -> None:
    groups = SHAPES["mixed"]
    rng = random.Random(0)
    whole = Counter(lay_out(groups, 0, backend=backend).ids[0].tolist())
    for _ in range(5):
        mixed = [Group(g.prompt, rng.sample(list(g.answers), len(g.answers))) for g in rng.sample(groups, len(groups))]
        made = lay_out(mixed, 0, backend=backend)
        assert made.targets.tolist() == [token for g in mixed for answer in g.answers for token in answer]
        assert Counter(made.ids[0].tolist()) == whole
        assert torch.equal(attended(made) > 0, visible(mixed, made))
