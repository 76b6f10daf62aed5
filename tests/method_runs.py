"""Running methods in tests: tiny inputs on disk, the command line in this process, and what a run left behind."""

from __future__ import annotations

import dataclasses
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefkit.methods
import tiny
from prefkit import cli

METHODS = sorted(path.stem for path in Path(prefkit.methods.__path__[0]).glob("[a-z]*.py"))
TIMES = ("seconds",)


@dataclass(frozen=True)
class Inputs:
    """A model folder, training pairs and held-out pairs."""

    model: Path
    train: Path
    held_out: Path

    @classmethod
    def make(cls, folder: Path, family: str = "llama") -> Inputs:
        return cls(
            model=tiny.folder(folder / "model", family),
            train=tiny.jsonl(folder / "train.jsonl", tiny.pairs(16)),
            held_out=tiny.jsonl(folder / "held_out.jsonl", tiny.pairs(8, seed=5)),
        )

    def arguments(self, method: str, output: Path, **options: Any) -> list[str]:
        """`prefkit METHOD tiny ...` on these inputs, in float32."""
        values = {
            "model_name_or_path": self.model,
            "dataset_name": self.train,
            "eval_dataset": self.held_out,
            "output_dir": output,
            "dtype": "float32",
            **options,
        }
        return [method, "tiny", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def run(inputs: Inputs, method: str, output: Path, *flags: str, **options: Any) -> Path:
    """A run by the command line, which must succeed."""
    code = cli.run([*inputs.arguments(method, output, **options), *flags, "--debug"])
    assert code == 0
    return output


def call(inputs: Inputs, method: str, output: Path, **options: Any) -> Any:
    """The method's own `run` with the tiny preset's Config changed by `options`."""
    module = importlib.import_module(f"prefkit.methods.{method}")
    values = {
        "model_name_or_path": str(inputs.model),
        "dataset_name": str(inputs.train),
        "eval_dataset": str(inputs.held_out),
        "output_dir": str(output),
        "dtype": "float32",
        **options,
    }
    return module.run(dataclasses.replace(module.PRESETS["tiny"], **values))


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in TIMES}


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [timeless(json.loads(line)) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def column(directory: Path, name: str) -> list[float]:
    return [row[name] for row in metrics(directory) if name in row]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def state(directory: Path) -> dict[str, Any]:
    """Everything a run leaves that must be the same bits when it is done again."""
    found: dict[str, Any] = {"metrics": metrics(directory), "result": timeless(read(directory / "result.json"))}
    for path in sorted(directory.rglob("*.safetensors")):
        found[path.relative_to(directory).as_posix()] = path.read_bytes()
    for name in ("evaluation.json", "data.json"):
        found[name] = read(directory / name)
    for path in sorted((directory / "evaluation").iterdir()):
        found[path.name] = path.read_text()
    found["names"] = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))
    return found


def assert_same_state(first: Path, second: Path) -> None:
    one, two = state(first), state(second)
    assert one["metrics"] == two["metrics"]
    assert one["names"] == two["names"]
    different = [name for name in one if one[name] != two[name]]
    assert not different


def weights(directory: Path, folder: str = "model") -> dict[str, Any]:
    from safetensors.torch import load_file

    name = "adapter_model.safetensors" if folder == "adapter" else "model.safetensors"
    return load_file(directory / folder / name)
