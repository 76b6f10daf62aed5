"""`prefkit sample`: answers on the terminal, to a file that can be continued, and in a conversation."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from prefkit import cli
from prefkit.commands import sample
from prefkit.domains.text.columns import read_completions
from prefkit.domains.text.load import load
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.tokenize import tokenize_prompt
from prefkit.records import Group

SHORT = ("--max_new_tokens", "6", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without a chat template."""
    folder = tiny.folder(tmp_path_factory.mktemp("bare"))
    (folder / "chat_template.jinja").unlink()
    return folder


def run(model: Path, *words: str) -> int:
    return cli.run(["sample", str(model), *SHORT, *words])


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(text + "\n" for text in texts))
    return path


def test_one_prompt_prints_the_answer_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "-p", "red dog") == 0
    first = capsys.readouterr().out
    assert run(model, "-p", "red dog") == 0
    assert capsys.readouterr().out == first != ""
    assert run(model, "-p", "red dog", "--seed", "1") == 0
    assert capsys.readouterr().out != first


def test_several_prompts_and_answers_are_told_apart(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "-p", "red dog", "-p", "cat", "--num", "2") == 0
    out = capsys.readouterr().out
    assert out.index("> red dog") < out.index("1. ") < out.index("2. ") < out.index("> cat")
    assert "[cut off at --max_new_tokens]" in out


def test_plain_text_goes_into_the_template_unless_told_otherwise(
    model: Path, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, place, words in (("chat", model, ()), ("plain", model, ("--no-chat",)), ("bare", bare, ())):
        assert run(place, "-p", "red dog", "--out", str(tmp_path / name), *words) == 0
    chat, plain, without = (rows(tmp_path / name)[0] for name in ("chat", "plain", "bare"))
    assert chat["prompt"] == [{"role": "user", "content": "red dog"}]
    assert chat["completion"][0]["role"] == "assistant"
    assert plain["prompt"] == without["prompt"] == "red dog"
    assert plain["completion"] == without["completion"] != chat["completion"][0]["content"]
    capsys.readouterr()
    assert run(bare, "-p", "red dog", "--chat") == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_file_of_answers_holds_what_is_needed_to_use_them(model: Path, tmp_path: Path) -> None:
    file, out = prompts(tmp_path / "p.txt", ["red dog", "", "cat"]), tmp_path / "deep" / "out.jsonl"
    assert run(model, "--prompts", str(file), "--out", str(out), "--num", "2", "--seed", "5") == 0
    found = rows(out)
    assert [(row["row"], row["index"]) for row in found] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert {row["seed"] for row in found} == {5} and len({row["policy_version"] for row in found}) == 1
    assert all(row["finished"] is False and row["tokens"] == 6 for row in found)
    policy = TextPolicy.pretrained(str(model), dtype="float32")
    drawn = sample._Answerer(policy, sample.Decoding(max_new_tokens=6), 5)
    ids = tokenize_prompt(policy.tokenizer, found[0]["prompt"])
    answer = drawn.answer([ids], [0], 1)[0][0]
    assert answer.text == found[0]["completion"][0]["content"]
    assert float(policy.log_probs([Group(ids, [answer.tokens])]).detach()) == pytest.approx(
        found[0]["log_prob"], abs=1e-3
    )
    assert len(read_completions(load(str(out)))) == 4, "the answers can be trained on"


def test_killed_work_goes_on_where_it_stopped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "MAX_ROWS", 4)
    file = prompts(tmp_path / "p.txt", [f"dog {i}" for i in range(6)])
    words = ("--prompts", str(file), "--num", "2", "--out")
    assert run(model, *words, str(tmp_path / "whole")) == 0
    text = (tmp_path / "whole").read_text()
    for cut in (0, 30, len(text) // 2, len(text) - 1):
        (tmp_path / "cut").write_text(text[:cut])
        assert run(model, *words, str(tmp_path / "cut")) == 0
        assert sorted((tmp_path / "cut").read_text().splitlines()) == sorted(text.splitlines())
    drawn: list[int] = []
    original = sample._Answerer.answer
    monkeypatch.setattr(
        sample._Answerer, "answer", lambda self, ids, *rest: drawn.append(len(ids)) or original(self, ids, *rest)
    )
    (tmp_path / "cut").write_text("".join(text.splitlines(keepends=True)[:9]))
    capsys.readouterr()
    assert run(model, *words, str(tmp_path / "cut")) == 0
    assert drawn == [2] and "9 answers are in" in capsys.readouterr().err
    assert run(model, *words, str(tmp_path / "cut")) == 0
    assert drawn == [2], "nothing is drawn twice"
    assert (tmp_path / "cut").read_text() == text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 1}, "seed 1 (now 0)"),
        ({"policy_version": "x"}, "policy_version 'x'"),
        ({"temperature": 0.5}, "temperature 0.5 (now 1.0)"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16' (now 'float32')"),
        ({"stop_strings": ["dog"]}, "stop_strings ['dog'] (now [])"),
        ({"prompt": "another"}, "answers another prompt than row 1"),
        ({"row": None}, "is no answer by prefkit sample"),
    ],
)
def test_a_file_never_mixes_models_settings_or_prompts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], complaint: str
) -> None:
    out = tmp_path / "out"
    assert run(model, "-p", "red dog", "--out", str(out)) == 0
    text = json.dumps(rows(out)[0] | change) + "\n"
    out.write_text(text)
    capsys.readouterr()
    assert run(model, "-p", "red dog", "--out", str(out)) == 2
    error = capsys.readouterr().err
    assert complaint in error and f"{out} line 1" in error
    assert out.read_text() == text, "a refused file is left as it was"


def test_a_file_with_stop_strings_goes_on_only_with_the_same(model: Path, tmp_path: Path) -> None:
    words = ("-p", "red dog", "--out", str(tmp_path / "out"))
    assert run(model, *words, "--stop_strings", "sun", "dog") == 0
    assert rows(tmp_path / "out")[0]["stop_strings"] == ["sun", "dog"]
    assert run(model, *words, "--stop_strings", "sun", "dog") == 0
    assert run(model, *words) == 2
    assert run(model, *words, "--stop_strings", "sun", "dog", "--dtype", "bfloat16") == 2


def test_a_prompt_file_that_cannot_be_answered_is_named_with_its_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = prompts(tmp_path / "p.txt", ["red", "dog " * 300])
    assert run(model, "--prompts", str(file)) == 2
    assert f"{file} line 2: a prompt of" in capsys.readouterr().err


def test_a_conversation_remembers_until_told_not_to(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    original = sample._Answerer.tokens

    def tokens(self: Any, given: Any) -> Any:
        asked.append(given[0].prompt)
        return original(self, given)

    monkeypatch.setattr(sample._Answerer, "tokens", tokens)
    monkeypatch.setattr("sys.stdin", _Terminal("red\n\ncat\n" + "dog " * 300 + "\n/new\nsun\n/exit\nnever\n"))
    assert run(model) == 0
    assert [len(turns) for turns in asked] == [1, 3, 5, 1]
    assert asked[1][0]["content"] == "red" and asked[1][1]["role"] == "assistant"
    assert asked[3] == [{"role": "user", "content": "sun"}]
    printed = capsys.readouterr()
    assert "pass the model's context of 256 tokens" in printed.err
    assert asked[1][1]["content"] in printed.out


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "no prompt given"),
        (("--out", "x.jsonl"), "--out needs prompts"),
        (("-p", "a", "--prompts", "b.txt"), "exclude each other"),
        (("-p", "a", "--num", "0"), "num is 0"),
        (("-p", "a", "--seed", "-1"), "seed is -1"),
        (("-p", "a", "--temperature", "-1"), "cannot sample with temperature -1"),
        (("-p", "dog " * 300), "prompt 1: a prompt of"),
        (("--prompts", "missing.jsonl"), "missing.jsonl"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], complaint: str
) -> None:
    assert run(model, *words) == 2
    assert complaint in capsys.readouterr().err


def test_several_processes_answer_into_a_file_only(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = TextPolicy.pretrained(str(model), dtype="float32")
    policy.world = dataclasses.replace(policy.world, size=2)
    monkeypatch.setattr(TextPolicy, "pretrained", lambda name, dtype: policy)
    assert run(model, "-p", "red dog") == 2
    assert "add --out" in capsys.readouterr().err


def test_dashes_and_underscores_are_equal(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for words in (("--top_p", "0.5", "--max_new_tokens", "3"), ("--top-p=0.5", "--max-new-tokens", "3")):
        assert cli.run(["sample", str(model), "-p", "a-b --c", "--dtype", "float32", *words]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
