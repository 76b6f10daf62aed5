import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_tokenizers import chatml
from transformers import LlamaConfig

import tiny
from prefkit.commands.data import main
from prefkit.domains.text.datasets import prepare_pairs
from prefkit.errors import InputError
from prefkit.methods import dpo


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {number}?"}],
            "chosen": [{"role": "assistant", "content": "blue " * (number + 1)}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for number in range(count)
    ]


def test_check_of_good_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", write(tmp_path / "a.jsonl", rows(3))]) == 0
    shown = capsys.readouterr().out
    assert "used for training" in shown and "no problems" in shown and "█" in shown


def test_check_of_bad_data_prints_every_error_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = rows(3)
    bad[0]["chosen"][0]["content"] = ""
    bad[2]["prompt"].append({"role": "user", "content": "and?"})
    report = tmp_path / "report.json"
    assert main(["check", write(tmp_path / "a.jsonl", bad), "--json", str(report)]) == 2
    shown = capsys.readouterr().out
    assert "a.jsonl line 1, field 'chosen': the answer is empty" in shown
    assert "a.jsonl line 3, field 'prompt': prompt message 2: two user turns in a row" in shown
    assert "2 errors, 0 warnings" in shown
    assert json.loads(report.read_text())["problem_counts"] == {"error: empty": 1, "error: role order": 1}


def test_check_with_a_model_and_evaluation_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    chatml().save_pretrained(model)
    LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=400
    ).save_pretrained(model)
    train, held = write(tmp_path / "a.jsonl", rows(3)), write(tmp_path / "b.jsonl", rows(1))
    assert main(["check", train, "--model", str(model), "--eval", held, "--max-length", "30"]) == 0
    shown = capsys.readouterr().out
    assert "total in tokens" in shown and "LoRA r=16" in shown and "optimizer" in shown
    assert "prompts also in the evaluation data" in shown
    assert "the same row stands in the evaluation data" in shown
    assert main(["check", train, "--model", str(model), "--max_length=8"]) == 2
    assert "leaves no room for an answer in max_length 8" in capsys.readouterr().out


def test_check_with_a_model_is_the_check_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, report = tiny.folder(tmp_path / "model"), tmp_path / "report.json"
    made = tiny.pairs(12)
    made[3]["chosen"] = [{"role": "assistant", "content": "red blue " * 200}]  # past the context of 256, not 1024
    file = write(tmp_path / "a.jsonl", made)
    for words, options in (((), {}), (("--append-eos", "False"), {"append_eos": False})):
        assert main(["check", file, "--eval", file, "--model", str(model), "--json", str(report), *words]) == 0
        config = dpo.Config(model_name_or_path=str(model), dataset_name=file, eval_dataset=file, **options)
        trained = prepare_pairs(config, model=None, tokenizer=None, train=None, evaluation=None)
        assert json.loads(report.read_text()) == json.loads(json.dumps(trained.report()["train"]))
    assert "cut at the model's context of 256 tokens" in capsys.readouterr().out
    whole = json.loads(report.read_text())["lengths"]
    assert main(["check", file, "--model", str(model), "--json", str(report), "--no_append_eos"]) == 0
    assert json.loads(report.read_text())["lengths"] == whole
    assert main(["check", file, "--model", str(model), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["lengths"] != whole
    made[5]["prompt"] = [{"role": "user", "content": "red blue " * 200}]
    assert main(["check", write(tmp_path / "b.jsonl", made), "--model", str(model)]) == 2
    assert "leaves no room for an answer in the model's context of 256 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["check", file, "--append_eos", "maybe"])


def test_check_of_single_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", write(tmp_path / "a.jsonl", [{"text": "once upon a time"}])]) == 0
    assert "completion in characters" in capsys.readouterr().out


def test_problems_of_one_kind_are_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = rows(1) * 9
    file = write(tmp_path / "a.jsonl", same)
    main(["check", file])
    assert "5 more of kind 'duplicate'" in capsys.readouterr().out
    main(["check", file, "--all"])
    assert "more of kind" not in capsys.readouterr().out


def test_convert_writes_and_says_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transcripts = [
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: A"},
    ]
    out = tmp_path / "out.jsonl"
    assert main(["convert", write(tmp_path / "in.jsonl", transcripts), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "hh" in shown and "skipped: identical answers" in shown and "out.jsonl" in shown
    assert main(["check", str(out)]) == 0


def test_help_and_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check", "--help"])
    assert caught.value.code == 0 and "--max_length" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["convert", "a.jsonl", "--out", "b.jsonl", "--from", "nothing"])
    assert caught.value.code == 2
    with pytest.raises(InputError, match="no such file"):
        main(["check", "nowhere.jsonl"])
