"""Stages before reinforcement learning: their options, their answers, and what is refused before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from prefkit.domains.text.tokenize import tokenize_completions, tokenize_pairs
from prefkit.errors import InputError
from prefkit.loops import stages
from prefkit.loops.stages import RewardStage, SftStage, answers, continued, prepare, stage
from prefkit.methods import drpo
from prefkit.records import Completion, Preference


def config(**options: Any) -> drpo.Config:
    return drpo.Config(**{"max_new_tokens": 8, **options})


def prepared(how: Any, model: Any = None, train: Any = None) -> Any:
    return prepare(
        how,
        model=tiny.model() if model is None else model,
        tokenizer=tiny.tokenizer(),
        train=tiny.pairs() if train is None else train,
        evaluation=tiny.pairs(4, 9),
    )


@pytest.mark.parametrize("kind", [SftStage, RewardStage])
def test_a_stage_takes_the_runs_options_but_not_its_cadence(kind: Any, tmp_path: Path) -> None:
    how = config(
        output_dir=str(tmp_path),
        model_name_or_path="some/model",
        use_peft=True,
        seed=5,
        max_steps=7,
        eval_steps=3,
        keep_best="eval_gold",
        patience=2,
        overwrite=True,
        reward_model="some/judge",
        num_train_epochs=9.0,
        reset_prob=0.5,
    )
    found = stage(how, kind, tmp_path, "part", max_steps=11, learning_rate=0.25)
    assert (found.model_name_or_path, found.use_peft, found.seed) == ("some/model", True, 5)
    assert (found.max_steps, found.learning_rate, found.num_train_epochs) == (11, 0.25, 1.0)
    assert (found.eval_steps, found.keep_best, found.patience, found.overwrite) == (0, "", 0, False)
    assert found.output_dir == str(tmp_path / "part")
    assert getattr(found, "reward_model", "") == ""


def test_sft_reads_the_chosen_answers_token_for_token() -> None:
    tokenizer, rows = tiny.tokenizer(), tiny.pairs(4)
    preferences = [
        Preference(prompt=r["prompt"], chosen=r["chosen"], rejected=r["rejected"], row=i) for i, r in enumerate(rows)
    ]
    completions = [Completion(prompt=r["prompt"], completion=r["chosen"], row=i) for i, r in enumerate(rows)]
    found = answers(tokenize_pairs(tokenizer, preferences, max_length=128))
    expected = tokenize_completions(tokenizer, completions, max_length=128)
    for one, other in zip(found, expected, strict=True):
        assert list(one.prompt) == list(other.prompt) and list(one.completion) == list(other.completion)
        assert one.source.row == other.source.row and one.truncated == other.truncated
    assert answers(expected) == expected


@pytest.mark.parametrize("source", ["chosen", "reference", "rejected", "both", "policy"])
def test_offline_answers_are_there_for_every_source(source: Any) -> None:
    data = prepared(config(reset_source=source))
    assert hasattr(data.train[0], "rejected") is (source in ("rejected", "both"))
    assert len(data.train) == 24


def test_a_reset_to_a_rejected_answer_needs_pairs() -> None:
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in tiny.pairs()]
    assert len(prepared(config(), train=rows).train) == 24
    with pytest.raises(InputError):
        prepared(config(reset_source="both"), train=rows)


def test_a_prompt_without_room_for_an_answer_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match="leaves no room for 250 new ones in the model's context of 256"):
        prepared(config(max_new_tokens=250))


def test_what_follows_sft_starts_from_its_model(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"model": "model", "adapter": None}))
    how = config(model_name_or_path="some/model", model_revision="v2", adapter_name_or_path="some/adapter")
    found = continued(how, tmp_path)
    assert (found.model_name_or_path, found.model_revision, found.adapter_name_or_path) == (str(tmp_path), "main", "")
    (tmp_path / "result.json").write_text(json.dumps({"model": None, "adapter": "adapter"}))
    with pytest.raises(InputError, match="quantised base"):
        continued(how, tmp_path)


def test_without_sft_the_options_stay() -> None:
    how: Any = config(sft_steps=0)
    given: Any = None
    assert stages.run_sft(how, given, given, given, given) is how


@pytest.mark.parametrize("options", [{"sft_steps": -2}, {"reward_steps": -2}, {"sft_learning_rate": -1.0}])
def test_options_of_stages_are_checked(options: dict[str, Any]) -> None:
    given: Any = None
    with pytest.raises(InputError, match=next(iter(options))):
        stages.before(config(**options), given, given, given, model=None, train=None)
