"""Packaged models and data: the conversion cache, and review sentences as film-disjoint pairs."""

from __future__ import annotations

import bz2
import csv
import io
import json
from collections import Counter
from pathlib import Path

import pytest

from prefkit import assets
from prefkit.domains.text import packaged
from prefkit.errors import InputError

MODEL = "smollm2-135m-instruct"


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the slow conversion by one that writes two small files, and counts its calls."""
    calls: list[Path] = []

    def convert(source: Path, made: Path) -> None:
        calls.append(source)
        made.mkdir()
        (made / "config.json").write_text("{}")
        (made / "model.safetensors").write_bytes(b"0123456789")

    monkeypatch.setattr(packaged, "_convert", convert)
    monkeypatch.setattr(assets, "find", lambda name: Path("source.gguf"))
    monkeypatch.setenv("PREFKIT_CACHE", str(tmp_path / "cache"))
    return calls


def test_a_model_is_converted_once(conversions: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = packaged.model_folder(MODEL)
    assert capsys.readouterr().err == f"prefkit: converting {MODEL} once, about 20 seconds\n"
    assert packaged.model_folder(MODEL) == folder
    assert capsys.readouterr().err == ""
    assert len(conversions) == 1
    assert [path.name for path in folder.parent.iterdir()] == [MODEL], "nothing temporary stays behind"


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "stamp", "source", "form"])
def test_a_damaged_or_old_cache_is_made_anew(
    conversions: list[Path], harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packaged.model_folder(MODEL)
    weights, stamp = folder / "model.safetensors", folder / packaged.STAMP
    told = json.loads(stamp.read_text())
    {
        "flip": lambda: weights.write_bytes(b"0123456780"),
        "cut": lambda: weights.write_bytes(b"01234"),
        "remove": lambda: weights.unlink(),
        "stamp": lambda: stamp.write_text("{"),
        "source": lambda: stamp.write_text(json.dumps(told | {"source_sha256": "0"})),
        "form": lambda: stamp.write_text(json.dumps(told | {"form": 0})),
    }[harm]()
    capsys.readouterr()
    assert packaged.model_folder(MODEL) == folder
    assert f"the cached {MODEL} is {'old' if harm in ('source', 'form') else 'damaged'}" in capsys.readouterr().err
    assert weights.read_bytes() == b"0123456789"
    assert len(conversions) == 2


def test_a_failed_conversion_leaves_nothing(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(source: Path, made: Path) -> None:
        made.mkdir()
        (made / "half").write_text("half")
        raise OSError("disk")

    monkeypatch.setattr(packaged, "_convert", convert)
    with pytest.raises(OSError, match="disk"):
        packaged.model_folder(MODEL)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_faster_process_wins(conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = packaged._convert

    def convert(source: Path, made: Path) -> None:
        monkeypatch.setattr(packaged, "_convert", inner)
        packaged.model_folder(MODEL)  # the other process finishes while this one converts
        inner(source, made)

    monkeypatch.setattr(packaged, "_convert", convert)
    assert (packaged.model_folder(MODEL) / packaged.STAMP).is_file()
    assert len(conversions) == 2


def test_kinds_are_not_mixed_up() -> None:
    with pytest.raises(InputError, match="--dataset_name"):
        packaged.model_folder("rotten-tomatoes")
    with pytest.raises(InputError, match="--model_name_or_path"):
        packaged.dataset(MODEL)


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file of the same form: 40 films with both verdicts, one only fresh, plots, a repeat."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["category", "text", "movie_name", "has_plot_and_reviews"])
    for film in range(40):
        for i in range(6):
            writer.writerow(["fresh", f" good\n {film} {i} ", f"film_{film}_ii", "True"])
        for i in range(5):
            writer.writerow(["rotten", f"bad, {film} {i}", f"film_{film}_ii", "True"])
        writer.writerow(["plot", f"plot {film}", f"film_{film}_ii", "True"])
    writer.writerow(["fresh", "only praise", "praised", "False"])
    writer.writerow(["rotten", "Only  praise", "film_1_ii", "False"])
    path = tmp_path / "r.csv.bz2"
    path.write_bytes(bz2.compress(text.getvalue().encode()))
    monkeypatch.setattr(assets, "find", lambda name: path)
    return path


def check(found: packaged.Reviews) -> None:
    rows = found.train + found.evaluation
    films = [{row["group"] for row in part} for part in (found.train, found.evaluation)] + [set(found.gold_films)]
    for i, one in enumerate(films):
        assert one and not any(one & other for other in films[i + 1 :]), "the parts share a film"
    texts = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")] + found.gold_texts
    assert max(Counter(text.casefold() for text in texts).values()) == 1, "a sentence is used twice"
    assert all(text == " ".join(text.split()) and text for text in texts)
    for row in rows:
        (turn,) = row["prompt"]
        assert turn["role"] == "user" and f'"{row["group"]}"' in turn["content"]
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
    assert len(found.gold_texts) == len(found.gold_labels) == len(found.gold_films)
    assert set(found.gold_labels) == {0, 1}


def test_pairs_by_film(reviews: Path) -> None:
    found = packaged.review_pairs(0)
    check(found)
    assert len(found.train) == 18 * 5 and len(found.evaluation) == 4 * 5
    assert all(row["chosen"][0]["content"].startswith("good") for row in found.train)
    assert all(row["rejected"][0]["content"].startswith("bad") for row in found.train)
    assert {row["group"][-3:] for row in found.train} == {" II"}
    assert "only praise" in found.gold_texts and "Only praise" not in found.gold_texts
    assert not any(text.startswith("plot") for text in found.gold_texts)
    assert packaged.review_pairs(0) == found
    other = packaged.review_pairs(1)
    assert other.train != found.train
    assert (other.evaluation, other.gold_texts) == (found.evaluation, found.gold_texts), "the seed moves no film"


def test_dataset_has_train_and_test(reviews: Path) -> None:
    found = packaged.dataset("rotten-tomatoes")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 90, "test": 20}


def test_the_real_reviews() -> None:
    asset = assets.get("rotten-tomatoes")
    if assets.check(asset) == "absent":
        pytest.skip(f"{asset.distribution} is not installed: {asset.install}")
    found = packaged.review_pairs(0)
    check(found)
    assert len(found.evaluation) >= 200 and len({row["group"] for row in found.evaluation}) >= 30
    assert len(found.train) >= 1000 and len(found.gold_texts) >= 4000


@pytest.mark.slow
def test_the_real_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = assets.get(MODEL)
    if assets.check(asset) == "absent":
        pytest.skip(f"{asset.distribution} is not installed: {asset.install}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("PREFKIT_CACHE", str(tmp_path))
    folder = packaged.model_folder(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.eos_token_id == 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id
