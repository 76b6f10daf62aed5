"""Cached reference log-probs: the live ones bit for bit, computed again when anything they rest on has changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from prefkit.domains.text.cache import reference_table, tokens_fingerprint, weights_fingerprint
from prefkit.domains.text.policy import TextPolicy
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.loops.pairs import cached_reference
from prefkit.methods import dpo
from prefkit.records import Group, Pair, Preference

SOURCE = Preference(prompt="", chosen="", rejected="")


def pairs(count: int = 7, last: int = 9) -> list[Pair]:
    return [
        Pair(prompt=[5 + i] * (1 + i % 4), chosen=[6, 7 + i, last], rejected=[8] * (1 + i), source=SOURCE)
        for i in range(count)
    ]


def policy(dtype: str = "float32", seed: int = 0, use_peft: bool = False) -> TextPolicy:
    config = dpo.Config(dtype=dtype, use_peft=use_peft)  # pyright: ignore
    return TextPolicy.create(config, World.start(), model=tiny.model(seed=seed), tokenizer=tiny.tokenizer())


class Calls:
    """A scorer that counts."""

    def __init__(self, made: TextPolicy) -> None:
        self.made, self.sizes = made, []  # type: ignore[var-annotated]

    def __call__(self, groups: Sequence[Group]) -> Tensor:
        self.sizes.append(len(groups))
        return self.made.reference_log_probs(groups)


@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_equals_live_bit_for_bit(tmp_path: Path, dtype: str, use_peft: bool) -> None:
    made, rows, said = policy(dtype, use_peft=use_peft), pairs(), []
    path = tmp_path / "reference.safetensors"
    first = cached_reference(made, rows, path, batch_size=3, say=said.append)
    assert not said, "nothing to say when it is made"
    second = cached_reference(made, rows, path, batch_size=3, say=said.append)
    assert said == [f"reference log-probs read from {path}"]
    assert first.dtype == torch.float32 and first.shape == (7, 2)
    for start in range(0, 7, 3):
        live = made.reference_log_probs([pair.group for pair in rows[start : start + 3]])
        assert torch.equal(first[start : start + 3], live)
        assert torch.equal(second[start : start + 3], live)


CHANGES = {
    "model": lambda: (policy(seed=1), pairs(), 3),
    "dtype": lambda: (policy("bfloat16"), pairs(), 3),
    "batch size": lambda: (policy(), pairs(), 2),
    "data, tokenizer or template": lambda: (policy(), pairs(last=10), 3),
    "reference": lambda: (policy(use_peft=True), pairs(), 3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_is_named_and_computed_again(tmp_path: Path, what: str) -> None:
    path, said = tmp_path / "reference.safetensors", []
    old = cached_reference(policy(), pairs(), path, batch_size=3, say=said.append)
    made, rows, size = CHANGES[what]()
    new = cached_reference(made, rows, path, batch_size=size, say=said.append)
    assert len(said) == 1 and what in said[0] and "again" in said[0]
    assert torch.equal(new[:size], made.reference_log_probs([pair.group for pair in rows[:size]]))
    assert what in ("batch size", "reference") or not torch.equal(new, old)
    cached_reference(made, rows, path, batch_size=size, say=said.append)
    assert said[1:] == [f"reference log-probs read from {path}"]


def test_more_rows_are_computed_again(tmp_path: Path) -> None:
    path, made = tmp_path / "table", policy()
    scorer, groups = Calls(made), [pair.group for pair in pairs()]
    key = {"model": "a"}
    reference_table(path, groups[:4], key, score=scorer, batch_size=4, say=print, world=World.start())
    table = reference_table(path, groups, key, score=scorer, batch_size=4, say=print, world=World.start())
    assert scorer.sizes == [4, 4, 3] and len(table) == 7
    reference_table(path, groups, key, score=scorer, batch_size=4, say=print, world=World.start())
    assert scorer.sizes == [4, 4, 3]


class SecondProcess(World):
    """Not the main process; the main one found no file."""

    def on_main(self, work: Any) -> Any:
        return None, ""


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    groups, scorer = [pair.group for pair in pairs()], Calls(policy())
    second = SecondProcess(rank=1, size=2, device=torch.device("cpu"))
    reference_table(tmp_path / "table", groups, {}, score=scorer, batch_size=4, say=print, world=second)
    assert scorer.sizes == [4, 3] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "not ours", "other table"])
def test_a_damaged_cache_is_refused(tmp_path: Path, damage: str) -> None:
    path, made = tmp_path / "reference.safetensors", policy()
    cached_reference(made, pairs(), path, batch_size=3, say=print)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-3]
    elif damage == "flipped":
        content[-1] ^= 1
    elif damage == "emptied":
        content = bytearray()
    path.write_bytes(content)
    if damage == "not ours":
        save_file({"log_probs": torch.zeros(7, 2)}, path)
    elif damage == "other table":
        save_file({"weights": load_file(path)["log_probs"]}, path, metadata={"about": "{}"})
    with pytest.raises(InputError, match="damaged") as error:
        cached_reference(made, pairs(), path, batch_size=3, say=print)
    assert error.value.where == str(path) and "delete" in error.value.mend


def test_fingerprints_see_every_token_and_every_border() -> None:
    base = tokens_fingerprint([Group([1, 2], [[3], [4]])])
    others = ([1], [[2, 3], [4]]), ([1, 2], [[3, 4], []]), ([1, 2], [[4], [3]]), ([12], [[3], [4]]), ([1, 2], [[3]])
    assert len({base, *(tokens_fingerprint([Group(*other)]) for other in others)}) == 1 + len(others)


def test_a_models_fingerprint_is_that_of_its_values() -> None:
    assert weights_fingerprint(tiny.model()) == weights_fingerprint(tiny.model())
    changed = tiny.model()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-6
    assert weights_fingerprint(changed) != weights_fingerprint(tiny.model())
    assert weights_fingerprint(tiny.model().bfloat16()) != weights_fingerprint(tiny.model())
