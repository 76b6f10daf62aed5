"""Config to JSON and back; wrong names and values are refused with the key and a mend."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from prefkit import cli, flags, foreign, options
from prefkit.domains.text.config import Lora, Model
from prefkit.engine.config import Optimisation, Output
from prefkit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Optimisation, Output):
    beta: float = 0.1
    """temperature"""
    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    """loss"""
    margin: float | None = None
    """margin"""
    weights: tuple[float, ...] = (1.0, 0.5)
    """weights"""
    span: tuple[int, int] = (0, 1)
    """two numbers"""
    folder: Path = Path("here")
    """a path"""
    learning_rate: float = 5e-7


METHODS = {name: cli.load("methods", name).Config for name in cli.modules("methods")}


def through_json(config: Config) -> Config:
    return options.from_json(Config, json.loads(json.dumps(options.to_json(config))))


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(beta=1e-9, kind="ipo", margin=2.0, weights=(), span=(3, 4), folder=Path("a/b"), use_peft=True),
        Config(lora_target_modules=("q_proj", "v_proj"), learning_rate=float("inf"), margin=0.0, seed=2**40),
    ],
)
def test_a_config_survives_json(config: Config) -> None:
    assert through_json(config) == config


def test_options_are_grouped_by_the_class_that_declares_them() -> None:
    found = {option.name: option for option in options.options_of(Config)}
    assert found["beta"].groups == ("test_options",)
    assert (found["learning_rate"].groups, found["learning_rate"].meaning) == (
        ("optim",),
        "peak learning rate",
    )
    assert found["lora_r"].title == "LoRA"
    assert next(iter(found)) == "beta", "the method's own options come first"
    assert all(option.meaning for option in found.values())


def test_every_option_has_a_dotted_name_and_aliases_reach_their_field() -> None:
    names = options.names_of(Config)
    for option in options.options_of(Config):
        for group in option.groups:
            assert names[f"{group}.{option.name}"] == option.name
    assert names["peft.lora_r"] == "lora_r"
    assert names["policy.model"] == "model_name_or_path"
    assert names["run.dir"] == "output_dir"
    assert "eval_every" not in names, "an alias of an option this Config lacks does not exist"


@pytest.mark.parametrize(
    ("values", "field", "expected"),
    [
        ({"learning-rate": "1e-6"}, "learning_rate", 1e-6),  # YAML 1.1 reads 1e-6 as text
        ({"learning_rate": 1}, "learning_rate", 1.0),
        ({"max_steps": 10.0}, "max_steps", 10),
        ({"lora_target_modules": "all-linear"}, "lora_target_modules", ("all-linear",)),
        ({"policy": {"model": "m"}}, "model_name_or_path", "m"),
        ({"margin": None}, "margin", None),
        ({"margin": 3}, "margin", 3.0),
        ({"weights": [1, 2, 3]}, "weights", (1.0, 2.0, 3.0)),
        ({"weights": [2]}, "weights", (2.0,)),
        ({"kind": ["ipo"]}, "kind", "ipo"),
        ({"beta": [0.3]}, "beta", 0.3),
        ({"margin": [2]}, "margin", 2.0),
        ({"report_to": ["wandb", "tensorboard"]}, "report_to", "wandb,tensorboard"),
        ({"run": {"report-to": ["wandb"]}}, "report_to", "wandb"),
        ({"report_to": []}, "report_to", "none"),
    ],
)
def test_values_as_people_write_them(values: dict[str, object], field: str, expected: object) -> None:
    found = getattr(options.from_json(Config, values), field)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learing_rate": 1e-6}, ("learing_rate", "did you mean learning_rate?")),
        ({"optim.weight_decya": 0.1}, ("weight_decya", "did you mean optim.weight_decay?")),
        ({"max_steps": "ten"}, ("max_steps", "whole number")),
        ({"max_steps": 1.5}, ("max_steps", "whole number")),
        ({"max_steps": True}, ("max_steps", "whole number")),
        ({"beta": "big"}, ("beta", "number")),
        ({"beta": float("nan")}, ("beta", "number")),
        ({"use_peft": "yes"}, ("use_peft", "true or false")),
        ({"use_peft": 1}, ("use_peft", "true or false")),
        ({"dtype": "bf16"}, ("dtype", "bfloat16")),
        ({"output_dir": None}, ("output_dir", "remove the key")),
        ({"model_name_or_path": 7}, ("model_name_or_path", "text")),
        ({"span": [1]}, ("span", "2 values")),
        ({"weights": 1.0}, ("weights", "list")),
        ({"weights": [1, "x"]}, ("weights[1]", "number")),
        ({"margin": "x"}, ("margin", "a number or null")),
        ({"run.steps": 1, "max_steps": 2}, ("max_steps", "twice")),
        ({"kind": ["ipo", "sigmoid"]}, ("kind", "cannot be")),
        ({"kind": []}, ("kind", "cannot be")),
        ({"output_dir": ["a", "b"]}, ("output_dir", "text")),
        ({"report_to": [1, "wandb"]}, ("report_to", "text")),
        ({"bf16": True}, ("bf16", "write dtype bfloat16")),
        ({"evaluation-strategy": "steps"}, ("evaluation-strategy", "write eval_steps N")),
        ({"push_to_hub": False}, ("push_to_hub", "nothing is sent anywhere")),
        ({"max_new_tokens": 3}, ("max_new_tokens", "test_options has no use for it, as it draws no answers")),
    ],
)
def test_wrong_values_name_the_key_and_the_file(values: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        options.from_json(Config, values, where="my.yaml")
    for word in ("my.yaml", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", [*foreign.RENAMED, *foreign.UNNEEDED])
def test_names_of_other_projects_lead_to_options_that_exist(name: str) -> None:
    known = {option for config in METHODS.values() for option in options.names_of(config)}
    assert name not in known, "a name that exists needs no mend"
    told = foreign.mend(name, "dpo", prefix="--")
    assert set(re.findall(r"(?<!RUN )--(\w+)", told)) <= known
    page = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page, "docs/coming-from.md tells it too"


@pytest.mark.parametrize("method", METHODS)
def test_options_that_a_method_has_no_use_for(method: str) -> None:
    names = options.names_of(METHODS[method])
    pages = Path(__file__).parents[2] / "docs" / "methods"
    for name in foreign.NO_USE:
        if name in names:
            continue
        with pytest.raises(InputError, match=f"unknown option --{name}") as caught:
            flags.parse(METHODS[method], [f"--{name}", "1"], prog=method, presets={})
        assert f"{method} has no use for it" in str(caught.value)
        assert f"`--{name}`" in (pages / "index.md").read_text(encoding="utf-8")


def test_every_name_that_has_no_use_somewhere_has_one_elsewhere() -> None:
    for name in foreign.NO_USE:
        having = {method for method, config in METHODS.items() if name in options.names_of(config)}
        assert having and having != set(METHODS), name


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--bf16", ("unknown option --bf16", "write --dtype bfloat16")),
        ("--lr=1e-5", ("unknown option --lr", "write --learning_rate")),
        ("--max-completion-length", ("write --max_new_tokens", "--max_length")),
        ("--push_to_hub", ("leave it out", "`prefkit export RUN --to FOLDER`")),
    ],
)
def test_foreign_flags_get_their_mend(flag: str, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        flags.parse(METHODS["dpo"], [flag], prog="dpo", presets={})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("words", [["wandb,tensorboard"], ["wandb", "tensorboard"]])
def test_trackers_by_flag(words: list[str]) -> None:
    config, _ = flags.parse(METHODS["dpo"], ["--report_to", *words], prog="dpo", presets={})
    assert config.report_to == "wandb,tensorboard"
