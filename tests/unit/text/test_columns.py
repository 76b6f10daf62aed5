import math
from pathlib import Path
from typing import Any

import pytest

from prefkit.domains.text.columns import (
    is_preference,
    parse_completions,
    parse_preferences,
    read_completions,
    read_preferences,
    read_prompts,
)
from prefkit.domains.text.load import load
from prefkit.errors import InputError
from prefkit.records import Preference

U = {"role": "user", "content": "Why?"}
A = {"role": "assistant", "content": "Because."}
B = {"role": "assistant", "content": "No."}
GOOD: dict[str, Any] = {"prompt": "Why?", "chosen": " Because.", "rejected": " No."}


def one(**row: Any) -> Preference:
    return read_preferences(load([row]))[0]


def complaint(*rows: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        read_preferences(load(list(rows)))
    return str(caught.value)


def test_explicit_strings_with_all_columns() -> None:
    row = one(
        **GOOD,
        score_chosen=2,
        score_rejected=1.5,
        strength=0.9,
        margin=0.5,
        source="offline",
        judge="me",
        policy_version=3,
        group="film",
        rating="x",
    )
    assert (row.prompt, row.chosen, row.rejected, row.row) == ("Why?", " Because.", " No.", 0)
    assert (row.score_chosen, row.score_rejected, row.strength, row.margin) == (2.0, 1.5, 0.9, 0.5)
    assert (row.source, row.judge, row.policy_version) == ("offline", "me", "3")
    assert row.extra == {"group": "film", "rating": "x"}


def test_explicit_and_implicit_conversations_are_the_same() -> None:
    explicit = one(prompt=[U], chosen=[A], rejected=[B])
    implicit = one(chosen=[U, A], rejected=[U, B])
    both = one(prompt="Why?", chosen=[U, A], rejected=[U, B])
    assert explicit == implicit == both


def test_nulls_that_arrow_adds_to_messages_are_dropped() -> None:
    assert one(prompt=[{**U, "tool_calls": None}], chosen=[A], rejected=[B]).prompt == [U]


def test_implicit_string_prompts() -> None:
    row = one(chosen="Q: hi A: 14", rejected="Q: hi A: 15")
    assert (row.prompt, row.chosen, row.rejected) == ("Q: hi A:", " 14", " 15")
    message = complaint({"chosen": "A: 1", "rejected": "A: 2"}, {"chosen": "Paris ", "rejected": "London"})
    assert "train data row 2, field 'chosen'" in message and "share no beginning" in message


def test_a_wrong_column_lists_what_there_is_and_what_was_meant() -> None:
    message = complaint({"question": "a", "choosen": "b", "rejected": "c"})
    assert "no column 'chosen'; found choosen, question, rejected; expected prompt, chosen, rejected" in message
    assert "rename choosen -> chosen" in message
    assert "data convert" in complaint({"context": "a", "completions": []})
    assert "no column 'chosen' nor 'rejected'" in complaint({"a": 1})


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ({**GOOD, "score_chosen": math.nan}, "score_chosen", "is nan"),
        ({**GOOD, "score_rejected": math.inf}, "score_rejected", "is inf"),
        ({**GOOD, "margin": "big"}, "margin", "'big' is not a number"),
        ({**GOOD, "margin": True}, "margin", "True is not a number"),
        ({**GOOD, "strength": 1.5}, "strength", "outside [0, 1]"),
        ({**GOOD, "judge": ["a"]}, "judge", "holds a list"),
        ({**GOOD, "chosen": 3}, "chosen", "holds a int"),
        ({**GOOD, "rejected": None}, "rejected", "is missing in this row"),
        ({"prompt": "a", "chosen": " b"}, "rejected", "is missing in this row"),
        ({**GOOD, "chosen": [A]}, "rejected", "chosen is a conversation, rejected is a string"),
        ({**GOOD, "prompt": [U]}, "rejected", "prompt is a conversation"),
        ({**GOOD, "prompt": []}, "prompt", "is an empty conversation"),
        ({"prompt": [U, U], "chosen": [A], "rejected": [B]}, "prompt", "two user turns in a row"),
        ({"prompt": [A], "chosen": [A], "rejected": [B]}, "prompt", "an assistant turn comes first"),
        ({"prompt": [U], "chosen": [U], "rejected": [B]}, "chosen", "two user turns in a row"),
        ({"prompt": [U], "chosen": [A, U], "rejected": [B]}, "chosen", "a user turn inside the answer"),
        (
            {"prompt": [{**U, "role": "human"}], "chosen": [A], "rejected": [B]},
            "prompt[0]",
            "unknown role 'human'",
        ),
        (
            {"prompt": [U], "chosen": [{**A, "content": [1]}], "rejected": [B]},
            "chosen[0]",
            "content is a list",
        ),
        (
            {"prompt": [{"from": "human", "value": "a"}], "chosen": [A], "rejected": [B]},
            "prompt[0]",
            "keys from",
        ),
        ({"prompt": ["hi"], "chosen": [A], "rejected": [B]}, "prompt[0]", "not a message but a str"),
    ],
)
def test_a_bad_row_is_named_with_its_field(row: dict[str, Any], field: str, what: str) -> None:
    plain = {"prompt": [U], "chosen": [A], "rejected": [B]} if isinstance(row["chosen"], list) else GOOD
    message = complaint(plain, row)
    assert f"train data row 2, field {field!r}: " in message
    assert what in message and "mend: " in message


def test_answers_that_repeat_an_explicit_conversation_say_so() -> None:
    assert "'chosen' repeats the prompt" in complaint({"prompt": [U], "chosen": [U, A], "rejected": [U, B]})


def test_conversations_that_part_early_are_refused() -> None:
    rows = {"chosen": [U, A, U, A], "rejected": [U, B, U, A]}
    assert "a user turn inside the answer" in complaint(rows)
    assert "share no first turns" in complaint({"chosen": [U, A], "rejected": [{**U, "content": "How?"}, A]})


def test_strings_among_conversations_are_errors() -> None:
    chats = [{"prompt": [U], "chosen": [A], "rejected": [B]}] * 2
    message = complaint(*chats, GOOD)
    assert "train data row 3, field 'chosen': is a string, unlike most rows" in message


def test_every_problem_is_collected_and_the_first_error_counts_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,chosen,rejected,score_chosen\na,b,c,x\na,b,c,1\na,b,c,nan\n")
    rows, problems = parse_preferences(load(file))
    assert [row.score_chosen for row in rows] == [1.0]
    assert [problem.where for problem in problems] == [f"{file} line 2", f"{file} line 4"]
    with pytest.raises(InputError, match="1 more errors"):
        read_preferences(load(file))


def test_completions_of_every_shape() -> None:
    (row,) = read_completions(load([{"prompt": "a", "completion": " b", "label": False, "x": 1}]))
    assert (row.prompt, row.completion, row.label, row.extra) == ("a", " b", False, {"x": 1})
    (row,) = read_completions(load([{"messages": [U, A, U, B]}]))
    assert (row.prompt, row.completion) == ([U, A, U], [B])
    (row,) = read_completions(load([{"text": "once"}]))
    assert (row.prompt, row.completion) == ("", "once")
    (row,) = read_completions(load([GOOD]))
    assert row.completion == " Because."


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "completion": " b", "label": "yes"}, "'yes' is not true or false"),
        ({"messages": [U]}, "does not end with an assistant turn"),
        ({"messages": "hello"}, "is a string"),
        ({"text": [U]}, "is a conversation"),
        ({"prompt": "a", "respones": "b"}, "no column 'completion'"),
    ],
)
def test_bad_completions(row: dict[str, Any], what: str) -> None:
    _, problems = parse_completions(load([row]))
    assert len(problems) == 1 and what in problems[0].what


def test_is_preference() -> None:
    assert is_preference(load([GOOD]))
    assert not is_preference(load([{"messages": [U, A]}]))


def test_prompts_from_rows_and_text_files(tmp_path: Path) -> None:
    assert [p.prompt for p in read_prompts([{"prompt": "a", "completion": "b"}, {"prompt": [U]}])] == [
        "a",
        [U],
    ]
    assert read_prompts([{"messages": [U, A]}])[0].prompt == [U]
    assert read_prompts([{"chosen": [U, A], "rejected": [U, B]}])[0].prompt == [U]
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo\n")
    assert [(p.prompt, p.row) for p in read_prompts(file)] == [("one", 0), ("two", 2)]
    file.write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read_prompts(file)
    with pytest.raises(InputError, match="field 'prompt': is empty"):
        read_prompts([{"prompt": " "}])
    with pytest.raises(InputError, match="two user turns"):
        read_prompts([{"prompt": [U, U]}])
