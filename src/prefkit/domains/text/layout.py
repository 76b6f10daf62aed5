"""How a batch of groups is laid out for one forward pass: padded rows, or one packed row with each prompt once.

    padded   prompt a        one right-padded row per answer, the model's own causal attention
             prompt b

    packed   prompt a  b     each group's prompt once, no padding; position ids of b continue the prompt

The token that ends an answer predicts nothing that is scored, so it is left out unless `last` asks for it (a reward is
read there). Only the places that predict answer tokens reach the output head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prefkit.domains.text.attention import ENDED, Block, FlexPlan, Plan, SdpaPlan
from prefkit.records import Group

Backend = Literal["sdpa", "flex", "padded"]

CALL = 2**14
"""query-key pairs that one more attention call costs as much as: segments are padded to one another up to that"""
FEW = 0.9
"""of all places: if more are read, leaving the others out of the last layer saves no more than sorting them costs"""


@dataclass(frozen=True)
class Layout:
    """Where each answer token of a batch stands. n answers, m answer tokens in all, r rows of s places."""

    ids: Tensor
    """(r, s) token ids"""
    before: Tensor
    """(m,) flat place, in (r * s), of the token that predicts each answer token"""
    targets: Tensor
    """(m,) the answer tokens"""
    slots: Tensor
    """(m,) flat place of each answer token in the padded (n, t) result"""
    ends: Tensor
    """(n,) flat place of the last token of each answer that was laid out"""
    num_answers: int
    longest_answer: int
    num_tokens: int
    """tokens that are no padding"""
    positions: Tensor | None = None
    """(r, s) position ids; None where they count up from 0"""
    plan: Plan | None = None
    """who sees whom, in a packed layout"""
    attention_pairs: tuple[int, int] = (0, 0)
    """query-key pairs of one head and layer without a window: needed, and multiplied"""
    rows: Tensor | None = None
    """(k,) the places that are read in the end, ascending; None where they are nearly all"""


def lay_out(
    groups: Sequence[Group],
    pad: int,
    device: torch.device | str = "cpu",
    *,
    backend: Backend = "padded",
    last: bool = False,
) -> Layout:
    """Arrange groups for one forward pass, on `device`.

    Raises ValueError for an empty prompt (nothing predicts the first answer token) or an empty answer.
    """
    for index, group in enumerate(groups):
        if not group.prompt or not group.answers or not all(group.answers):
            missing = "prompt" if not group.prompt else "answer" if group.answers else "list of answers"
            raise ValueError(f"group {index} of the batch has an empty {missing}")
    if backend == "padded":
        return _padded(groups, pad, device, int(last))
    return _packed(groups, device, int(last), flex=backend == "flex")


def _padded(groups: Sequence[Group], pad: int, device: Any, last: int) -> Layout:
    rows = [(g.prompt, a) for g in groups for a in g.answers]
    sizes = [len(p) + len(a) - 1 + last for p, a in rows]
    length = max(sizes)
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    firsts: list[int] = []
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : sizes[i]] = torch.tensor([*prompt, *answer][: sizes[i]])
        firsts.append(i * length + len(prompt) - 1)
    before = torch.cat([torch.arange(f, f + len(a)) for f, (_, a) in zip(firsts, rows, strict=True)])
    return _layout(
        groups,
        device,
        last,
        ids=ids,
        before=before,
        ends=torch.tensor([i * length + size - 1 for i, size in enumerate(sizes)]),
        num_tokens=sum(sizes),
        attention_pairs=(sum(size * (size + 1) // 2 for size in sizes), len(rows) * length * (length + 1) // 2),
    )


@dataclass(frozen=True)
class _Segment:
    """A run of tokens that attention takes as one row: a prompt with its trunk answer, or a branch."""

    group: int
    answer: int
    """of the group's answers"""
    first: int
    """position id of the first token"""
    tokens: Sequence[int]

    @property
    def keys(self) -> int:
        return self.first + len(self.tokens)


def _packed(groups: Sequence[Group], device: Any, last: int, *, flex: bool) -> Layout:
    trunks, branches = _segments(groups, last)
    blocks = [*_alike(trunks), *_alike(branches)]
    places: dict[tuple[int, int], int] = {}  # (group, answer) -> place of the segment's first token
    total = 0
    for segment in (segment for block in blocks for segment in block):
        places[segment.group, segment.answer] = total
        total += len(segment.tokens)
    ordered = [segment for block in blocks for segment in block]
    ids = torch.tensor([token for segment in ordered for token in segment.tokens])[None]
    positions = torch.cat([torch.arange(segment.first, segment.keys) for segment in ordered])[None]
    roots = {segment.group: segment.answer for segment in trunks}
    before: list[Tensor] = []
    ends: list[int] = []
    for g, group in enumerate(groups):
        prompt_end = places[g, roots[g]] + len(group.prompt) - 1
        for a, answer in enumerate(group.answers):
            first = prompt_end + 1 if a == roots[g] else places.get((g, a), prompt_end + 1)
            before.append(torch.cat([torch.tensor([prompt_end]), torch.arange(first, first + len(answer) - 1)]))
            ends.append(first + len(answer) - 2 + last if len(answer) - 1 + last else prompt_end)
    plan, pairs = _plan(groups, blocks, places, roots, positions[0], device, flex=flex)
    return _layout(
        groups,
        device,
        last,
        ids=ids,
        before=torch.cat(before),
        ends=torch.tensor(ends),
        num_tokens=total,
        positions=positions.to(device),
        plan=plan,
        attention_pairs=pairs,
    )


def _segments(groups: Sequence[Group], last: int) -> tuple[list[_Segment], list[_Segment]]:
    """Trunks and branches. A group's longest answer goes with the prompt: a branch pays for its prompt's keys again."""
    trunks: list[_Segment] = []
    branches: list[_Segment] = []
    for g, group in enumerate(groups):
        root = max(range(len(group.answers)), key=lambda a: (len(group.answers[a]), -a))
        for a, answer in enumerate(group.answers):
            kept = list(answer[: len(answer) - 1 + last])
            if a == root:
                trunks.append(_Segment(g, a, 0, [*group.prompt, *kept]))
            elif kept:
                branches.append(_Segment(g, a, len(group.prompt), kept))
    return trunks, branches


def _alike(segments: Sequence[_Segment]) -> list[list[_Segment]]:
    """Segments grouped into attention calls: joined while padding them to one another costs less than a call."""
    blocks: list[list[_Segment]] = []
    tall = wide = 0
    for segment in sorted(segments, key=lambda s: (-s.keys, -len(s.tokens), s.group, s.answer)):
        length = len(segment.tokens)
        if blocks:
            rows = len(blocks[-1])
            grown = (rows + 1) * max(tall, length) * wide - rows * tall * wide
            if grown <= length * segment.keys + CALL:
                blocks[-1].append(segment)
                tall = max(tall, length)
                continue
        blocks.append([segment])
        tall, wide = length, segment.keys
    return blocks


def _plan(
    groups: Sequence[Group],
    blocks: Sequence[Sequence[_Segment]],
    places: dict[tuple[int, int], int],
    roots: dict[int, int],
    positions: Tensor,
    device: Any,
    *,
    flex: bool,
) -> tuple[Plan, tuple[int, int]]:
    """The plan of a packed batch, and its query-key pairs, needed and multiplied."""
    needed = sum(len(s.tokens) * s.first + len(s.tokens) * (len(s.tokens) + 1) // 2 for block in blocks for s in block)
    if flex:
        ordered = [segment for block in blocks for segment in block]
        numbers = torch.cat([torch.full((len(s.tokens),), s.group) for s in ordered])
        answers = torch.cat([torch.full((len(s.tokens),), s.answer) for s in ordered])
        sizes = torch.tensor([len(group.prompt) for group in groups])
        answers[positions < sizes[numbers]] = -1
        flex_plan = FlexPlan(numbers.to(device), answers.to(device), positions.to(device))
        return flex_plan, (needed, len(positions) ** 2)
    made: list[Block] = []
    order: list[Tensor] = []
    rows_before = start = multiplied = 0
    for block in blocks:
        tall, wide = max(len(s.tokens) for s in block), max(s.keys for s in block)
        trunk = block[0].first == 0
        made.append(_block(groups, block, places, roots, tall, wide, start, device))
        firsts = range(rows_before, rows_before + len(block) * tall, tall)
        order += [torch.arange(first, first + len(s.tokens)) for first, s in zip(firsts, block, strict=True)]
        multiplied += len(block) * (tall * (tall + 1) // 2 if trunk else tall * wide)
        rows_before += len(block) * tall
        start += sum(len(s.tokens) for s in block)
    ragged = rows_before != start
    return SdpaPlan(made, torch.cat(order).to(device) if ragged else None), (needed, multiplied)


def _block(
    groups: Sequence[Group],
    block: Sequence[_Segment],
    places: dict[tuple[int, int], int],
    roots: dict[int, int],
    tall: int,
    wide: int,
    start: int,
    device: Any,
) -> Block:
    trunk = block[0].first == 0
    queries = torch.zeros(len(block), tall, dtype=torch.long)
    query_positions = torch.full((len(block), tall), ENDED)
    keys = torch.zeros(len(block), wide, dtype=torch.long)
    key_positions = torch.full((len(block), wide), 2 * ENDED)
    for i, segment in enumerate(block):
        place, length = places[segment.group, segment.answer], len(segment.tokens)
        queries[i] = torch.arange(place, place + tall).clamp(max=place + length - 1)
        query_positions[i, :length] = torch.arange(segment.first, segment.keys)
        if trunk:
            keys[i] = queries[i]
        else:
            prompt = places[segment.group, roots[segment.group]]
            keys[i, : segment.first] = torch.arange(prompt, prompt + segment.first)
            keys[i, segment.first :] = torch.arange(place, place + wide - segment.first).clamp(max=place + length - 1)
        key_positions[i, : segment.keys] = torch.arange(segment.keys)
    even = all(len(segment.tokens) == tall for segment in block)
    return Block(
        queries=queries.to(device),
        keys=keys.to(device),
        query_positions=query_positions.to(device),
        key_positions=key_positions.to(device),
        trunk=trunk,
        start=start if even else -1,
        reach=wide - 1,
    )


def _layout(
    groups: Sequence[Group], device: Any, last: int, *, ids: Tensor, before: Tensor, ends: Tensor, **rest: Any
) -> Layout:
    answers = [answer for group in groups for answer in group.answers]
    longest = max(map(len, answers))
    slots = torch.cat([torch.arange(i * longest, i * longest + len(a)) for i, a in enumerate(answers)])
    rows = (ends if last else before).unique()
    return Layout(
        ids=ids.to(device),
        before=before.to(device),
        targets=torch.tensor([token for answer in answers for token in answer], device=device),
        slots=slots.to(device),
        ends=ends.to(device),
        num_answers=len(answers),
        longest_answer=longest,
        rows=rows.to(device) if len(rows) <= FEW * ids.numel() else None,
        **rest,
    )
