"""Files that several processes fill: what is there is taken up, what a kill cut is dropped, the end is in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prefkit.engine.parts import Parts, dealt
from prefkit.engine.world import World
from prefkit.errors import InputError


class Alone(World):
    """One of several processes, without the others: barriers and broadcasts are free."""

    def barrier(self) -> None: ...

    def broadcast(self, value: Any) -> Any:
        return value


def world(rank: int = 0, size: int = 1) -> World:
    return Alone(rank=rank, size=size, device=torch.device("cpu"))


def key(row: Any, where: str) -> tuple[int, ...]:
    if "n" not in row:
        raise InputError("is no row", where=where)
    return (row["n"],)


def parts(path: Path, rank: int = 0, size: int = 1) -> Parts:
    return Parts(path=path, world=world(rank, size), key=key)


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_several_processes_leave_one_file_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.jsonl"
    assert parts(path).open() == set()
    for rank in (1, 2, 0):
        parts(path, rank, 3).append([{"n": n} for n in (rank + 6, rank + 3, rank)])
    assert not path.exists() and len(list(path.parent.iterdir())) == 3
    parts(path, 0, 3).finish()
    assert numbers(path) == list(range(9)) and list(path.parent.iterdir()) == [path]
    assert parts(path).rows() == [{"n": n} for n in range(9)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_killed_start_is_taken_up_by_any_number_of_processes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"n": 7}\n{"n": 1}\n{"n"')
    (tmp_path / "out.jsonl.part-0").write_text('{"n": 3}\n{"n": 2')
    (tmp_path / "out.jsonl.part-4").write_text('{"n": 0}\n{"n": 7}\n')
    assert parts(path, 0, size).open() == {(0,), (1,), (3,), (7,)}
    assert numbers(path) == [0, 1, 3, 7] and list(tmp_path.iterdir()) == [path]
    parts(path, size - 1, size).append([{"n": 2}])
    parts(path, 0, size).finish()
    assert numbers(path) == [0, 1, 2, 3, 7]


def test_one_process_keeps_its_file_and_orders_it_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text('{"n": 5, "text": "a\u2028b"}\n{"n": 6')
    out = parts(path)
    assert out.open() == {(5,)}
    assert path.read_text() == '{"n": 5, "text": "a\u2028b"}\n'
    out.append([{"n": 1}])
    out.finish()
    assert [row["n"] for row in out.rows()] == [1, 5]


@pytest.mark.parametrize("name", ["out", "out.part-1"])
@pytest.mark.parametrize("line", ["{", "[1]", '{"m": 1}'])
def test_a_strange_file_is_refused_and_left_as_it_was(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / "out").write_text('{"n": 1}\n')
    text = '{"n": 2}\n' + line + '\n{"n": 3'
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        parts(tmp_path / "out").open()
    assert caught.value.where == f"{tmp_path / name} line 2"
    assert (tmp_path / name).read_text() == text
    with pytest.raises(InputError, match="folder"):
        parts(tmp_path).open()


def test_pieces_are_dealt_once_each() -> None:
    shares = [dealt("abcdefg", world(rank, 3)) for rank in range(3)]
    assert shares == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    assert dealt("abc", world()) == ["a", "b", "c"]
