"""The model card: valid front matter, results with intervals, nobody's folders."""

import pytest
import yaml

import run_directory
from prefkit.errors import InputError
from prefkit.report import card
from prefkit.report.method import bibtex, describe


@pytest.fixture
def run(tmp_path):
    folder = run_directory.build(tmp_path / "run", steps=3, num_pairs=40)
    (folder / "model").mkdir()
    (folder / "adapter").mkdir()
    return folder


def parts(path):
    _, front, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter_and_results(run):
    model, adapter = card.write(run)
    front, body = parts(model)
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert "hypo" in front["tags"] and "datasets" not in front
    assert "| Preference accuracy | 0.500 |" in body and "0.5 is excluded" in body
    assert "arxiv.org/abs/2406.01462" in body and "eprint = {2406.01462}" in body
    assert "torch 2.13.0+cpu" in body and "| `kl_weight` | 0.01 |" in body
    assert parts(adapter)[0]["library_name"] == "peft"


def test_given_facts_win(run):
    front, _ = parts(card.write(run, licence="MIT", base_model="me/base")[0])
    assert (front["license"], front["base_model"]) == ("mit", "me/base")


def test_no_folders_of_the_user_reach_the_card(tmp_path):
    secret = "/home/someone/private"
    folder = run_directory.build(
        tmp_path / "run",
        steps=3,
        config={
            "model_name_or_path": f"{secret}/weights",
            "dataset_name": "~/private/pairs.jsonl",
            "eval_dataset": "./private/held_out.jsonl",
            "adapter_name_or_path": "C:\\Users\\someone\\private\\adapter",
            "output_dir": f"{secret}/run",
            "extra_paths": [f"{secret}/x.csv"],
        },
    )
    environment = {
        "command": f"prefkit hypo --dataset_name={secret}/pairs.jsonl --out '{secret}/run a'",
        "versions": {},
    }
    run_directory.write(folder / "environment.json", environment)
    (folder / "model").mkdir()
    (path,) = card.write(folder)
    front, body = parts(path)
    for word in ("private", "someone", str(tmp_path)):
        assert word not in path.read_text()
    assert "base_model" not in front and "license" not in front
    assert "pairs.jsonl" in body and "--dataset_name=pairs.jsonl" in body


def test_a_run_below_the_current_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    folder = run_directory.build(tmp_path / "run", steps=3, config={"model_name_or_path": "runs/sft"})
    (folder / "model").mkdir()
    assert "base_model" not in parts(card.write(folder)[0])[0]


def test_hub_ids_stay(tmp_path):
    names = {"model_name_or_path": "org/model-1.5b", "dataset_name": "org/pairs"}
    folder = run_directory.build(tmp_path / "run", steps=3, config=names)
    (folder / "model").mkdir()
    front, _ = parts(card.write(folder)[0])
    assert front["base_model"] == "org/model-1.5b" and front["datasets"] == ["org/pairs"]


def test_an_unfinished_run_has_no_card(tmp_path):
    folder = run_directory.build(tmp_path / "run", steps=3, finished=False)
    with pytest.raises(InputError, match=r"not finished.*\n  mend: prefkit resume"):
        card.write(folder)


def test_methods_describe_themselves():
    assert describe("hypo").title == "HyPO" and "2406.01462" in describe("hypo").papers
    assert "2305.18290" in describe("dpo").papers
    assert [describe(name).title for name in ("selm", "sdpo", "online_dpo")] == ["SELM", "sDPO", "Online DPO"]
    for name in ("selm", "osp", "xpo", "sdpo", "online_dpo", "iterative_dpo", "ranker"):
        assert all("title" in bibtex(paper) for paper in describe(name).papers) and describe(name).papers
    unknown = describe("method_of_another_version")
    assert (unknown.summary, unknown.papers) == ("", ())
    assert "title" not in bibtex("9999.12345") and "eprint = {9999.12345}" in bibtex("9999.12345")
