"""What `--dry_run` prints: exact numbers where they are arithmetic, plausible ones where measured; and no files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from prefkit import cli
from prefkit.domains.text import forecast as module
from prefkit.domains.text.forecast import (
    Load,
    Speed,
    drawing_seconds,
    forecast,
    load_of,
    total_steps,
    training_products,
)
from prefkit.domains.text.memory import shape_of
from prefkit.errors import InputError
from prefkit.methods import dpo, hypo, reward, sft
from prefkit.records import Completion, Example, Pair, Preference

PAIRS = [
    Pair(prompt=[1] * 10, chosen=[2] * (5 + i), rejected=[2] * 3, source=Preference(prompt="", chosen="", rejected=""))
    for i in range(4)
]
EXAMPLES = [Example(prompt=[1] * 8, completion=[2] * 4, source=Completion(prompt="", completion=""))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("base"))


def options(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def lines(config: Any, base: Path, rows: Any = PAIRS) -> dict[str, str]:
    """What is printed, by the word a line begins with (further lines of it joined)."""
    found: dict[str, str] = {}
    name = ""
    for line in forecast(dataclasses.replace(config, model_name_or_path=str(base)), rows, held_out=rows):
        name = line.split()[0] if line[0] != " " else name
        found[name] = found.get(name, "") + " " + line.removeprefix(name).strip()
    return found


def test_the_work_of_a_step_is_counted() -> None:
    load = load_of(options(hypo.Config(per_device_train_batch_size=3, gradient_accumulation_steps=2)), PAIRS)
    assert (load.rows, load.drawn, load.drawn_length) == (12, 12, 10 + 64)
    assert (load.longest, load.longest_answer, load.reference) == (18, 8, True)
    assert load.length == pytest.approx(10 + (5 + 6 + 7 + 8 + 4 * 3) / 8)
    assert load_of(options(hypo.Config(kl_weight=0.0)), PAIRS).drawn == 0
    assert load_of(options(dpo.Config()), PAIRS).drawn == 0
    assert not load_of(options(reward.Config()), PAIRS).reference
    alone = load_of(options(sft.Config()), EXAMPLES)
    assert (alone.rows, alone.length, alone.reference) == (8, 12, False)


def test_steps_follow_the_options() -> None:
    config = options(dpo.Config(per_device_train_batch_size=3, num_train_epochs=2))
    assert total_steps(config, 10, 1) == 7
    assert total_steps(config, 10, 2) == 4
    assert total_steps({**config, "max_steps": 5}, 10, 1) == 5


def test_products_are_those_of_the_passes(base: Path) -> None:
    shape = shape_of(str(base))
    load = Load(rows=4, length=10, answer=3, longest=10, longest_answer=3, drawn=0, drawn_length=0, reference=True)
    forward = 4 * (10 * shape.body + 3 * 32 * 320)
    assert training_products(shape, load, lora=False, cached=False) == 4 * forward
    assert training_products(shape, load, lora=True, cached=False) == 3 * forward
    assert training_products(shape, load, lora=True, cached=True) == 2 * forward
    drawn = dataclasses.replace(load, drawn=2, drawn_length=20)
    own = 2 * 20 * (shape.body + 32 * 320)
    assert training_products(shape, drawn, lora=True, cached=True) == 2 * forward + 3 * own


def test_a_token_takes_the_time_to_read_the_weights_or_to_multiply_them(base: Path) -> None:
    shape = shape_of(str(base))
    weights = shape.body + 32 * 320
    reading = Speed(products=1e30, bytes=1e6)
    took = drawing_seconds(shape, reading, answers=64, tokens=7, prompt=1)
    assert took == pytest.approx(7 * 4 * weights / (1e6 * module.DRAWING))
    assert drawing_seconds(shape, reading, answers=65, tokens=7, prompt=1) == pytest.approx(2 * took)
    computing = Speed(products=1e6, bytes=1e30)
    assert drawing_seconds(shape, computing, answers=8, tokens=7, prompt=0) == pytest.approx(
        7 * 8 * weights / (1e6 * computing.reached)
    )


def test_the_device_is_measured() -> None:
    speed = module.measure(torch.device("cpu"), torch.float32, seconds=0.02)
    assert 1e8 < speed.products < 1e15 and 1e7 < speed.bytes < 1e14


def test_every_line_is_there_and_follows_the_options(base: Path, tmp_path: Path) -> None:
    plain = lines(dpo.Config(dtype="float32", max_steps=10, save_steps=2, output_dir=str(tmp_path / "run")), base)
    assert list(plain) == ["data", "steps", "model", "memory", "disk", "time", "Nothing"]
    assert "4 pairs to train on, 4 held out; 118 tokens a pass" in plain["data"]
    assert "10 of 8 rows: 20 passes over the data" in plain["steps"]
    assert "all weights" in plain["model"] and "reference" in plain["memory"]
    assert "2 checkpoints" in plain["disk"] and "free" in plain["disk"]
    assert "10 steps" in plain["time"] and "2 evaluations" in plain["time"]
    assert not (tmp_path / "run").exists()


def test_lora_bits_and_the_optimizer_show(base: Path) -> None:
    lora = lines(
        dpo.Config(dtype="bfloat16", use_peft=True, load_in_8bit=True, keep_best="eval_loss", eval_steps=1), base
    )
    assert "LoRA of rank 16" in lora["model"] and "base in 8 bit" in lora["model"]
    assert "reference" not in lora["memory"]
    assert "1 evaluations" not in lora["time"] and "3 evaluations" in lora["time"]


def test_the_modules_lora_adapts_are_counted(base: Path) -> None:
    def trained(*targets: str) -> str:
        return lines(dpo.Config(use_peft=True, lora_r=10, lora_target_modules=targets), base)["model"]

    assert "1.28 k trained" in trained("q_proj")  # two layers, rank 10, 32 inputs and 32 outputs
    assert "2.24 k trained" in trained("q_proj", "v_proj")
    with pytest.raises(InputError, match="nonsense"):
        trained("nonsense")


def test_methods_without_samples_or_reference(base: Path) -> None:
    assert "cache" not in lines(reward.Config(dtype="float32"), base)["memory"]
    assert "1 answers to train on" in lines(sft.Config(dtype="float32"), base, EXAMPLES)["data"]
    accumulated = lines(dpo.Config(per_device_train_batch_size=2, gradient_accumulation_steps=4), base)["steps"]
    assert "of 8 rows (2 a forward pass, 4 accumulated)" in accumulated


def test_too_little_memory_or_disk_is_said(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_gib", lambda: 1e-6)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5})())
    found = lines(dpo.Config(), base)
    assert "more than there is: try --use_peft" in found["memory"]
    assert "more than is free" in found["disk"]


def test_a_model_in_memory_has_no_forecast_of_its_own() -> None:
    told = forecast(dpo.Config(), PAIRS)
    assert told[-2].startswith("model     given in memory") and told[0].startswith("data")


@pytest.mark.parametrize("method", ["dpo", "hypo", "sft", "reward"])
def test_a_dry_run_writes_nothing(
    method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    data = tiny.jsonl(tmp_path / "pairs.jsonl", tiny.pairs())
    words = [method, "tiny", "--model_name_or_path", str(base), "--dataset_name", str(data), "--dry_run"]
    assert cli.run(words) == 0
    out = capsys.readouterr().out
    assert "memory" in out and "roughly" in out and "nothing was written" in out
    assert list((tmp_path / "work").iterdir()) == []
