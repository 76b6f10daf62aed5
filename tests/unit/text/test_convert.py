import json
from pathlib import Path
from typing import Any

import pytest

from prefkit.domains.text.columns import read_preferences
from prefkit.domains.text.convert import Conversion, Options, convert_file, convert_rows, detect, transcript
from prefkit.domains.text.load import load
from prefkit.errors import InputError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ULTRAFEEDBACK = {
    "prompt": "Why?",
    "prompt_id": "p1",
    "chosen": [user("Why?"), assistant("Because.")],
    "rejected": [user("Why?"), assistant("No.")],
    "messages": [user("Why?"), assistant("Because.")],
    "score_chosen": 8.0,
    "score_rejected": 3.0,
}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: I see: because.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: I see: no.",
}
TLDR = {
    "info": {"id": "t3_1", "post": "He left.\nShe stayed.", "title": "Home", "subreddit": "life"},
    "summaries": [{"text": " He left", "policy": "sup1"}, {"text": " She stayed", "policy": "sup2"}],
    "choice": 1,
    "worker": "w1",
    "split": "train",
}
NECTAR = {
    "prompt": "\n\nHuman: Why?\n\nAssistant: ",
    "answers": [
        {"answer": "third", "model": "c", "rank": 3.0},
        {"answer": "first", "model": "a", "rank": 1.0},
        {"answer": "second", "model": "b", "rank": 2.0},
        {"answer": "second too", "model": "d", "rank": 2.0},
    ],
    "source": ["sharegpt"],
}
OPENRLHF = {"input": "Why?", "good": " Because.", "bad": " No.", "margin": 0.5}
ALPACA = {
    "instruction": "Add",
    "input": "2 and 2",
    "chosen": "4",
    "rejected": "5",
    "history": [["Hi", "Hello"]],
    "system": "Be brief",
}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Why?"}],
    "chosen": {"from": "gpt", "value": "Because."},
    "rejected": {"from": "gpt", "value": "No."},
}
NEMO = {
    "context": [user("Why?")],
    "completions": [
        {"rank": 1, "completion": [assistant("No.")]},
        {"rank": 0, "completion": [assistant("Because.")]},
    ],
    "task_name": "math",
}


def convert(shape: str, *rows: dict[str, Any], **options: Any) -> tuple[list[dict[str, Any]], Conversion]:
    done = Conversion(shape)
    return list(convert_rows(load(list(rows)), done, Options(**options))), done


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("ultrafeedback", ULTRAFEEDBACK),
        ("hh", HH),
        ("tldr", TLDR),
        ("nectar", NECTAR),
        ("llama-factory", ALPACA),
        ("llama-factory", SHAREGPT),
        ("nemo-rl", NEMO),
        ("", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("", {"chosen": "Q: a A: b", "rejected": "Q: a A: c"}),
        ("", OPENRLHF),
    ],
)
def test_shapes_are_detected(shape: str, row: dict[str, Any]) -> None:
    assert detect(row) == shape


def test_ultrafeedback() -> None:
    (row,), _ = convert("ultrafeedback", ULTRAFEEDBACK)
    assert row == {
        "prompt": [user("Why?")],
        "chosen": [assistant("Because.")],
        "rejected": [assistant("No.")],
        "prompt_id": "p1",
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    }


def test_hh_splits_at_the_last_common_turn() -> None:
    (row,), _ = convert("hh", HH)
    assert row["prompt"] == [user("Hi"), assistant("Hello."), user("Why?")]
    assert (row["chosen"], row["rejected"]) == ([assistant("I see: because.")], [assistant("I see: no.")])


def test_hh_rows_without_a_usable_pair_are_counted() -> None:
    early = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: Q\n\nAssistant: B",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Z\n\nHuman: Q\n\nAssistant: B",
    }
    empty = {"chosen": "\n\nHuman: Hi\n\nAssistant:", "rejected": "\n\nHuman: Hi\n\nAssistant: A"}
    same = {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: A"}
    other = {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Ho\n\nAssistant: B"}
    rows, done = convert("hh", HH, early, empty, same, other)
    assert len(rows) == done.written == 1 and done.read == 5
    assert done.skipped == {
        "differs before the last turn": 1,
        "empty answer": 1,
        "identical answers": 1,
        "no common prompt": 1,
    }


def test_transcripts_keep_line_breaks_inside_turns() -> None:
    assert transcript("\n\nHuman: a\n\nb\n\nAssistant: c\nHuman: d") == [user("a\n\nb"), assistant("c\nHuman: d")]
    with pytest.raises(ValueError, match="does not begin"):
        transcript("hello")


def test_tldr() -> None:
    (row,), _ = convert("tldr", TLDR)
    assert row["prompt"] == "SUBREDDIT: r/life\n\nTITLE: Home\n\nPOST: He left.\nShe stayed.\n\nTL;DR:"
    assert (row["chosen"], row["rejected"]) == (" She stayed", " He left")
    assert (row["group"], row["judge"], row["policy_chosen"]) == ("t3_1", "w1", "sup2")
    news = {**TLDR, "info": {"id": "1", "article": "News."}}
    assert convert("tldr", news)[0][0]["prompt"] == "ARTICLE: News.\n\nTL;DR:"


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("best", ["first>second", "first>second too", "first>third"]),
        ("adjacent", ["first>second", "second too>third"]),
        ("all", ["first>second", "first>second too", "first>third", "second>third", "second too>third"]),
    ],
)
def test_nectar_ranks_lower_is_better_and_ties_give_no_pair(pairs: str, expected: list[str]) -> None:
    rows, _ = convert("nectar", NECTAR, pairs=pairs)
    assert [f"{row['chosen'][0]['content']}>{row['rejected'][0]['content']}" for row in rows] == expected
    assert rows[0]["prompt"] == [user("Why?")]
    assert (rows[0]["model_chosen"], rows[0]["rank_rejected"]) == ("a", 2.0)


def test_openrlhf_keys_and_conversations() -> None:
    (row,), _ = convert("openrlhf", OPENRLHF, prompt_key="input", chosen_key="good", rejected_key="bad")
    assert row == {"prompt": "Why?", "chosen": " Because.", "rejected": " No.", "margin": 0.5}
    whole = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    (row,), _ = convert("openrlhf", whole)
    assert (row["prompt"], row["chosen"]) == ([user("a")], [assistant("b")])
    (row,), _ = convert("openrlhf", {"chosen": "Q A: b", "rejected": "Q A: c"})
    assert row == {"chosen": "Q A: b", "rejected": "Q A: c"}


def test_llama_factory_alpaca_and_sharegpt() -> None:
    (row,), _ = convert("llama-factory", ALPACA)
    system = {"role": "system", "content": "Be brief"}
    assert row["prompt"] == [system, user("Hi"), assistant("Hello"), user("Add\n2 and 2")]
    assert row["chosen"] == [assistant("4")]
    (row,), _ = convert("llama-factory", SHAREGPT)
    assert row == {"prompt": [user("Why?")], "chosen": [assistant("Because.")], "rejected": [assistant("No.")]}


def test_nemo_lower_rank_is_better() -> None:
    (row,), _ = convert("nemo-rl", NEMO)
    assert (row["chosen"], row["rejected"]) == ([assistant("Because.")], [assistant("No.")])
    assert row["task_name"] == "math"
    tie = {**NEMO, "completions": [{"rank": 0, "completion": "a"}, {"rank": 0, "completion": "b"}]}
    assert convert("nemo-rl", tie)[1].skipped == {"only ties": 1}


@pytest.mark.parametrize("row", [ULTRAFEEDBACK, HH, TLDR, NECTAR, ALPACA, SHAREGPT, NEMO])
def test_what_is_written_can_be_read(row: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.jsonl"
    done = convert_file(load([row]), out)
    read = read_preferences(load(out))
    assert len(read) == done.written > 0
    assert [file.name for file in out.parent.iterdir()] == ["out.jsonl"]


def test_broken_rows_name_file_row_and_field(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    bad = {key: value for key, value in TLDR.items() if key != "choice"}
    file.write_text(json.dumps(TLDR) + "\n" + json.dumps(bad) + "\n")
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=r"in\.jsonl line 2, field 'choice'"):
        convert_file(load(file), out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]
    with pytest.raises(InputError, match="row 1: is not a hh row: the transcript does not begin"):
        convert("hh", {"chosen": "a", "rejected": "b"})


def test_refusals(tmp_path: Path) -> None:
    source = load([{"a": 1}])
    with pytest.raises(InputError, match="no known shape has the columns a"):
        convert_file(source, tmp_path / "out.jsonl")
    with pytest.raises(InputError, match=r"must end in \.jsonl"):
        convert_file(load([NEMO]), tmp_path / "out.csv")
    tie = {**TLDR, "choice": None}
    with pytest.raises(InputError, match=r"gives no pair \(1 no choice\)"):
        convert_file(load([tie]), tmp_path / "out.jsonl")
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(NEMO) + "\n")
    with pytest.raises(InputError, match="is the input file"):
        convert_file(load(file), file)
    assert json.loads(file.read_text()) == NEMO
