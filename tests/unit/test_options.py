"""Config to JSON and back; wrong names and values are refused with the key and a mend."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from prefkit import options
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
    ],
)
def test_wrong_values_name_the_key_and_the_file(values: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        options.from_json(Config, values, where="my.yaml")
    for word in ("my.yaml", *words):
        assert word in str(caught.value)
