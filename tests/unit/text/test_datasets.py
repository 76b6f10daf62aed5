"""From names or objects to the rows a run uses: sources, held-out rows, parts, limits, fingerprints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

import tiny
from prefkit.domains.text import datasets
from prefkit.domains.text.datasets import TextData, prepare_completions, prepare_pairs
from prefkit.errors import InputError
from prefkit.methods import dpo, sft
from prefkit.records import Pair

ROWS, HELD = tiny.pairs(40), tiny.pairs(10, seed=5)


def prepare(train: Any = None, evaluation: Any = None, **options: Any) -> TextData[Pair]:
    config = dpo.Config(**options)
    return prepare_pairs(config, model=tiny.model(), tokenizer=tiny.tokenizer(), train=train, evaluation=evaluation)


def prompts(rows: Any) -> set[str]:
    return {row.source.prompt[-1]["content"] for row in rows}


def test_every_form_of_the_same_data_is_the_same(tmp_path: Path) -> None:
    train, held = tiny.jsonl(tmp_path / "train.jsonl", ROWS), tiny.jsonl(tmp_path / "held.jsonl", HELD)
    both = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(HELD)})
    both.save_to_disk(str(tmp_path / "saved"))
    forms = [
        prepare(dataset_name=str(train), eval_dataset=str(held)),
        prepare(ROWS, HELD),
        prepare(Dataset.from_list(ROWS), Dataset.from_list(HELD)),
        prepare(both),
        prepare(dataset_name=str(tmp_path / "saved")),
        prepare(both["train"], eval_dataset=str(held)),
    ]
    for form in forms:
        assert len(form.train) == 40 and len(form.test) == 10 and not form.selection
        assert [row.group for row in form.train] == [row.group for row in forms[0].train]
        assert [row.group for row in form.test] == [row.group for row in forms[0].test]


def test_without_held_out_data_prompts_are_held_out_whole() -> None:
    found = prepare(ROWS)
    assert len(found.train) + len(found.test) == 40
    assert 2 <= len(found.test) <= 4, "5 % of the rows, in whole groups of two"
    groups = [{row.source.extra["group"] for row in part} for part in (found.train, found.test)]
    assert not groups[0] & groups[1]
    again = prepare(list(reversed(ROWS)))
    assert prompts(again.test) == prompts(found.test), "the choice does not depend on the order of the rows"
    assert prompts(prepare(ROWS, seed=1).test) != prompts(found.test)


def test_one_prompt_cannot_be_held_out() -> None:
    with pytest.raises(InputError, match="no held-out rows can be made"):
        prepare([{**row, "prompt": ROWS[0]["prompt"], "group": "a"} for row in ROWS])


@pytest.mark.parametrize("option", [{"keep_best": "rewards/margins"}, {"stop_at_kl": 1.0}])
def test_selection_and_test_share_no_group(option: dict[str, Any]) -> None:
    found = prepare(ROWS, HELD, eval_steps=1, **option)
    assert len(found.selection) + len(found.test) == 10 and min(len(found.selection), len(found.test)) >= 4
    assert not {r.source.extra["group"] for r in found.selection} & {r.source.extra["group"] for r in found.test}
    assert found.report()["parts"] == {"train": 40, "test": len(found.test), "selection": len(found.selection)}


def test_numbers_of_rows_are_limited() -> None:
    found = prepare(ROWS, HELD, num_train_samples=7, num_eval_samples=3)
    assert len(found.train) == 7 and len(found.test) == 3
    assert [row.group for row in found.train] == [row.group for row in prepare(ROWS, HELD).train[:7]]


def test_fingerprints_see_rows_order_and_limits() -> None:
    base = prepare(ROWS, HELD).fingerprint
    assert prepare(ROWS, HELD).fingerprint == base
    changed = [{**ROWS[0], "chosen": [{"role": "assistant", "content": "sun"}]}, *ROWS[1:]]
    others = [
        prepare(changed, HELD),
        prepare(ROWS[::-1], HELD),
        prepare(ROWS, HELD[:-1]),
        prepare(ROWS, HELD, num_train_samples=39),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 5


def test_steps_follow_from_rows_and_processes() -> None:
    found = prepare(ROWS, HELD, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert found.total_steps(1) == 5 and found.total_steps(2) == 3
    assert found.steps_per_epoch(1) == 5.0
    assert prepare(ROWS, HELD, max_steps=3).total_steps(1) == 3
    whole, first = found.rows(2, 0, 1)
    halves = [found.rows(2, rank, 2) for rank in (0, 1)]
    assert len(whole) == 8 and first == 0
    assert [first for _, first in halves] == [0, 8] and all(len(rows) == 8 for rows, _ in halves)
    seen = [row for step in range(1, 6) for row in found.rows(step, 0, 1)[0]]
    assert sorted(seen) == list(range(40)), "every row once an epoch"


def test_the_context_limits_rows_below_max_length() -> None:
    long = [{**ROWS[0], "chosen": [{"role": "assistant", "content": "red blue " * 200}]}, *ROWS[1:]]
    found = prepare(long, HELD, max_length=1024)
    assert len(found.train[0].prompt) + len(found.train[0].chosen) == 256 and found.train[0].chosen_truncated
    assert found.train[0].chosen[-1] != tiny.tokenizer().eos_token_id
    assert max(len(row.prompt) + len(row.chosen) for row in prepare(long, HELD, max_length=64).train) <= 64


def test_preferences_serve_sft() -> None:
    found = prepare_completions(
        sft.Config(), model=tiny.model(), tokenizer=tiny.tokenizer(), train=ROWS, evaluation=HELD
    )
    assert [row.completion for row in found.train] == [row.chosen for row in prepare(ROWS, HELD).train]


def test_what_is_missing_is_said() -> None:
    with pytest.raises(InputError, match="no training data given"):
        prepare()
    with pytest.raises(InputError, match="neither max_steps nor num_train_epochs"):
        prepare(ROWS, HELD, num_train_epochs=0)
    same = [{**row, "rejected": row["chosen"]} for row in ROWS]
    with pytest.raises(InputError, match="no row is left"):
        prepare(same, HELD)


def test_prompt_files(tmp_path: Path) -> None:
    found = prepare(ROWS, HELD, max_length=100)
    assert found.online_prompts("") == []
    file = tiny.jsonl(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS[:3]])
    assert found.online_prompts(str(file)) == [list(row.prompt) for row in found.train[:3]]
    long = [{"role": "user", "content": "red " * 60}]
    file = tiny.jsonl(tmp_path / "prompts.jsonl", [{"prompt": ROWS[0]["prompt"]}, {"prompt": long}])
    with pytest.raises(InputError, match="max_length is 100") as caught:
        found.online_prompts(str(file))
    assert caught.value.where == f"{file} line 2"


def test_template_options_of_a_prompt_file_reach_the_template(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ mood }}{% if tools %}{{ tools[0].name }}{% endif %}" + tokenizer.chat_template
    config = dpo.Config()
    found = prepare_pairs(config, model=tiny.model(), tokenizer=tokenizer, train=ROWS, evaluation=HELD)
    calm = {"prompt": ROWS[0]["prompt"], "chat_template_kwargs": {"mood": "sun"}, "tools": [{"name": "moon"}]}
    ids = found.online_prompts(str(tiny.jsonl(tmp_path / "prompts.jsonl", [calm])))[0]
    assert tokenizer.decode(ids).startswith("sunmoon")


def test_a_refused_prompt_names_file_and_line(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0]['content'] == 'bad' }}" + tokenizer.chat_template
    found = prepare_pairs(dpo.Config(), model=tiny.model(), tokenizer=tokenizer, train=ROWS, evaluation=HELD)
    content = [{"prompt": [{"role": "user", "content": text}]} for text in ("red", "bad")]
    file = tiny.jsonl(tmp_path / "prompts.jsonl", content)
    with pytest.raises(InputError, match=r"prompts\.jsonl line 2, field 'prompt': the chat template refuses"):
        found.online_prompts(str(file))


def test_packaged_data_gives_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "packaged_dataset", lambda name, seed: {"train": ROWS[seed:], "test": HELD})
    found = prepare(ROWS, HELD, seed=3)
    assert found.online_prompts("rotten-tomatoes") == [list(row.prompt) for row in found.train[3:]]


def test_online_prompts_without_room_are_refused_with_their_row(tmp_path: Path) -> None:
    long = [*ROWS[:2], {**ROWS[2], "prompt": [{"role": "user", "content": "red " * 60}]}, *ROWS[3:]]
    file = tiny.jsonl(tmp_path / "pairs.jsonl", long)
    with pytest.raises(InputError, match="no room for 200 new ones in the model's context of 256") as caught:
        prepare(dataset_name=str(file), evaluation=HELD, max_new_tokens=200).online_prompts("")
    assert caught.value.where == f"{file} line 3"
    with pytest.raises(InputError) as caught:
        prepare(ROWS, HELD, max_new_tokens=200).online_prompts(str(file))
    assert caught.value.where == f"{file} line 3"


def test_held_out_prompts_without_room_are_counted_and_do_not_stop_the_run() -> None:
    held = [*HELD, {**HELD[0], "prompt": [{"role": "user", "content": "red " * 60}]}]
    counted = "1 of 11 held-out prompts leave no room for 200 new tokens in the model's context of 256"
    assert any(counted in line for line in prepare(ROWS, held, max_new_tokens=200).describe())
    assert not any("no room" in line for line in prepare(ROWS, held).describe())
    assert not any("no room" in line for line in prepare(ROWS, held, max_new_tokens=200, num_eval_prompts=0).describe())
