import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from prefkit.domains.text.load import evaluation_split, load, splits
from prefkit.errors import InputError

ROWS = [
    {"prompt": "a", "chosen": " b", "rejected": " c", "score_chosen": 1.5},
    {
        "prompt": "d\u2028e",
        "chosen": ' "quoted", with comma\nand a line',
        "rejected": " f",
        "score_chosen": 2.0,
    },
]


def write(path: Path, kind: str) -> Path:
    file = path / f"rows.{kind}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    if kind in ("jsonl", "ndjson"):
        file.write_text(lines, encoding="utf-8")
    elif kind == "jsonl.gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        file.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "jsonl.gz", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    assert list(load(write(tmp_path, kind)).rows) == ROWS


def test_json_lines_under_a_json_name_and_a_wrapped_list(tmp_path: Path) -> None:
    lines = tmp_path / "a.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(load(lines).rows) == ROWS
    wrapped = tmp_path / "b.json"
    wrapped.write_text(json.dumps({"data": ROWS}, indent=1))
    assert list(load(wrapped).rows) == ROWS


def test_rows_remember_their_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\r\n')
    source = load(file)
    assert source.path_of_row(1) == f"{file} line 3"
    assert source.rows[1] == {"a": 2}
    table = load(write(tmp_path, "csv"))
    assert table.path_of_row(1).endswith("line 3")
    assert [row["a"] for row in source.take(1).rows] == [1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl line 2: broken JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl line 2: holds a list"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "a.json line 2: broken JSON"),
        ("a.json", "[1]", "a.json row 1: holds a number"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", 'a,b\n1,2\n"x\ny",2\n3\n', "a.csv line 5: has 1 cells where the header has 2"),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.jsonl", " \n", "is empty"),
        ("a.txt", "hello", "unknown kind of file .txt"),
        ("a.parquet", "not parquet", "cannot be read"),
        ("a.jsonl.gz", "not gzip", "cannot be read"),
    ],
)
def test_broken_files_name_the_place(name: str, text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load(file)


def test_other_encodings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"a": "Zwölf"}'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load(file)


def test_a_missing_file_suggests_what_was_meant(tmp_path: Path) -> None:
    write(tmp_path, "jsonl")
    with pytest.raises(InputError, match=r"did you mean rows\.jsonl"):
        load(tmp_path / "row.jsonl")
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "nowhere" / "rows.jsonl")
    with pytest.raises(InputError, match="no train data given"):
        load("")


def test_a_name_neither_here_nor_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"neither an existing file or folder nor .* no network"):
        load("somebody/some-pairs")


def test_a_hub_data_set_gives_the_split_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = datasets.DatasetDict(
        train_prefs=datasets.Dataset.from_list(ROWS), test_prefs=datasets.Dataset.from_list(ROWS[:1])
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: loaded)
    assert len(load("owner/name").rows) == 2
    assert len(load("owner/name", what="evaluation").rows) == 1
    assert load("owner/name", split="test_prefs").path_of_row(0) == "owner/name row 1"


def test_saved_folders_and_their_splits(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    assert list(load(tmp_path / "one").rows) == ROWS
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(tmp_path / "two")
    assert splits(tmp_path / "two") == ("train", "test")
    assert len(load(tmp_path / "two", split="test").rows) == 1
    assert len(load(tmp_path / "two").rows) == 2
    assert len(load(tmp_path / "two", what="evaluation").rows) == 1
    with pytest.raises(InputError, match=r"no split 'tset'(.|\n)*did you mean test"):
        load(tmp_path / "two", split="tset")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(InputError, match="saved data set cannot be read"):
        load(tmp_path / "one")


def test_a_folder_with_one_file_per_split(tmp_path: Path) -> None:
    write(tmp_path, "jsonl").rename(tmp_path / "train.jsonl")
    for shard in range(2):
        write(tmp_path, "parquet").rename(tmp_path / f"test-0000{shard}-of-00002.parquet")
    assert set(splits(tmp_path)) == {"train", "test"}
    assert len(load(tmp_path, split="test").rows) == 4
    assert len(load(tmp_path).rows) == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="folder holds no data set"):
        load(empty)


def test_rows_in_memory() -> None:
    data = datasets.Dataset.from_list(ROWS)
    assert list(load(ROWS).rows) == list(load(data).rows) == ROWS
    by_split = datasets.DatasetDict(train=data, test=data.select([1]))
    assert list(load(by_split, split="test").rows) == ROWS[1:]
    assert list(load({"train": ROWS, "test": ROWS[:1]}, what="evaluation").rows) == ROWS[:1]
    assert splits(by_split) == ("train", "test")
    assert splits(ROWS) == ()
    assert evaluation_split(("train", "validation")) == "validation"
    with pytest.raises(InputError, match="row 1: is a str"):
        load(["a"])
    with pytest.raises(InputError, match="has no rows"):
        load([])
    with pytest.raises(InputError, match="is a int"):
        load(3)


def test_a_file_has_no_test_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this has no splits"):
        load(write(tmp_path, "jsonl"), split="test")
    with pytest.raises(InputError, match="this has no splits"):
        load(ROWS, split="test")
