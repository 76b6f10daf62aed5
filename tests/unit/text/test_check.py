import json
from typing import Any

import pytest
from tests.tiny_tokenizers import byte_bpe, chatml

from prefkit.domains.text.check import check, fingerprint
from prefkit.domains.text.columns import parse_preferences
from prefkit.domains.text.load import load
from prefkit.errors import InputError
from prefkit.records import Completion, Preference

PROMPT = "What is the capital of France?"


def row(number: int, prompt: str = "", chosen: str = " Paris", rejected: str = " London", **more: Any) -> Preference:
    return Preference(prompt=prompt or f"{number}: {PROMPT}", chosen=chosen, rejected=rejected, row=number, **more)


def kinds(report: Any) -> list[tuple[str, str, int]]:
    return [(problem.level, problem.kind, problem.row) for problem in report.problems]


def test_good_rows_have_no_problems() -> None:
    report = check([row(number) for number in range(5)], tokenizer=byte_bpe())
    assert report.problems == [] and report.kept == report.rows == 5
    assert [example.source.row for example in report.examples] == list(range(5))
    assert report.lengths["total"].unit == "tokens"
    report.raise_errors()


def test_what_the_rows_are_accused_of() -> None:
    rows = [
        row(0),
        row(1, f"0: {PROMPT}"),
        row(2, chosen=" same", rejected=" same"),
        row(3, chosen=" \n"),
        row(4, score_chosen=1.0, score_rejected=1.0),
        row(5, score_chosen=1.0, score_rejected=2.0),
        row(6, chosen=f"6: {PROMPT} Paris"),
    ]
    report = check(rows, where=lambda number: f"a.jsonl line {number + 1}")
    assert kinds(report) == [
        ("error", "empty", 3),
        ("warning", "duplicate", 1),
        ("warning", "identical", 2),
        ("warning", "tie", 4),
        ("warning", "score order", 5),
        ("warning", "leaked prompt", 6),
    ]
    assert report.counts == {
        "duplicates": 1,
        "identical": 1,
        "empty": 1,
        "ties": 1,
        "truncated": 0,
        "leaked": 1,
        "apart": 0,
    }
    assert report.dropped == {"identical": 1, "empty": 1}
    assert report.keep == [0, 1, 4, 5, 6] and report.kept == 5
    assert all(problem.mend and problem.where for problem in report.problems)
    with pytest.raises(InputError, match=r"a\.jsonl line 4, field 'chosen': the answer is empty"):
        report.raise_errors()


def test_answers_that_always_repeat_the_prompt_are_an_error() -> None:
    rows = [row(n, chosen=f"{n}: {PROMPT} Paris", rejected=f"{n}: {PROMPT} London") for n in range(3)]
    report = check(rows)
    assert [problem.what for problem in report.errors] == ["in 3 of 3 rows every answer repeats the prompt"]
    short = [row(n, prompt="The", chosen="The sky", rejected="The sea") for n in range(3)]
    assert not check(short).errors


def test_tokenization_finds_cuts_long_prompts_and_pairs_that_become_identical() -> None:
    tokenizer = byte_bpe()
    rows = [
        row(0),
        row(1, chosen=" yes" * 30, rejected=" yes" * 31),
        row(2, prompt="France? " * 40),
        row(3, chosen=" yes" * 30),
    ]
    report = check(rows, tokenizer=tokenizer, max_length=30)
    assert [(problem.kind, problem.row) for problem in report.errors] == [("long prompt", 2)]
    assert report.counts["truncated"] == 2 and report.counts["identical"] == 1
    dropped = check(rows, tokenizer=tokenizer, max_length=30, long_prompts="drop")
    assert not dropped.errors
    assert dropped.dropped == {"identical": 1, "long prompt": 1}
    assert [example.source.row for example in dropped.examples] == [0, 3]
    assert dropped.keep == [0, 3]


def test_overlap_with_the_evaluation_data() -> None:
    rows = [row(number) for number in range(4)]
    report = check(rows, evaluation=[row(9, prompt=rows[0].prompt, chosen=" Lyon"), row(1)])
    assert report.overlap == {"rows": 1, "prompts": 2}
    assert {problem.kind for problem in report.problems} == {"overlap"} and not report.errors
    assert check(rows, evaluation=[row(77)]).overlap == {"rows": 0, "prompts": 0}
    assert check(rows).overlap == {}


def test_problems_found_while_reading_are_part_of_the_report() -> None:
    source = load([{"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "a", "chosen": 3, "rejected": " c"}])
    rows, problems = parse_preferences(source)
    report = check(rows, problems=problems, where=source.path_of_row)
    assert (report.rows, report.kept) == (2, 1)
    assert [problem.where for problem in report.errors] == ["train data row 2"]


def test_completions_are_checked_too() -> None:
    rows = [Completion(prompt="a", completion=" b", row=0), Completion(prompt="a", completion="", row=1)]
    report = check(rows, tokenizer=byte_bpe())
    assert kinds(report) == [("error", "empty", 1)]
    assert [example.source.row for example in report.examples] == [0]
    assert set(report.lengths) == {"prompt", "completion", "total"}


def test_an_empty_chat_answer_is_found() -> None:
    empty = Preference(
        prompt=[{"role": "user", "content": "a"}],
        chosen=[{"role": "assistant", "content": " "}],
        rejected=[{"role": "assistant", "content": "b"}],
    )
    assert kinds(check([empty], tokenizer=chatml())) == [("error", "empty", 0)]


def test_the_report_is_json_with_a_histogram_that_counts_every_row() -> None:
    rows = [row(number, chosen=" word" * (number % 7 + 1)) for number in range(40)]
    report = check([*rows, *(row(n, chosen=" a", rejected=" a") for n in range(40, 120))], tokenizer=byte_bpe())
    content = json.loads(json.dumps(report.to_json()))
    assert len(content["problems"]) == 50
    assert content["problem_counts"] == {"warning: identical": 80}
    lengths = content["lengths"]["chosen"]
    assert sum(lengths["counts"]) == 120 and len(lengths["edges"]) == len(lengths["counts"]) + 1
    assert lengths["quantiles"]["1"] == max(len(example.chosen) for example in report.examples)


def test_the_fingerprint_sees_every_field_and_the_order() -> None:
    rows = [row(0), row(1)]
    base = fingerprint(rows)
    assert base == fingerprint([row(0), row(1)])
    others = [rows[::-1], [row(0), row(1, margin=1.0)], [row(0), row(1, extra={"group": "a"})], rows[:1]]
    assert len({base, *map(fingerprint, others)}) == 5


def test_no_rows_at_all() -> None:
    report = check([], tokenizer=byte_bpe())
    assert report.rows == report.kept == 0 and report.lengths == {}
