"""The command line: what it lists, how flags, files and presets become a Config, and how errors look."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefkit
from prefkit import cli, flags
from prefkit.errors import InputError

STUB = '''"""Stub: a method that only remembers its config.

More about it.
"""
from dataclasses import dataclass
from prefkit.domains.text.config import Data, Lora, Model, Sampling
from prefkit.engine.config import Optimisation, Output, Selection


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Sampling, Optimisation, Selection, Output):
    beta: float = 0.1
    """temperature of the implicit reward"""
    margin: float | None = None
    """margin"""


PRESETS = {"demo": Config(model_name_or_path="tiny", max_steps=60, use_peft=True)}
SEEN = []
FAIL = []


def run(config):
    SEEN.append(config)
    for error in FAIL:
        raise error
'''


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A method module that exists only as a file dropped beside the others."""
    import prefkit.methods

    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "stub_method.py").write_text(STUB)
    monkeypatch.setattr(prefkit.methods, "__path__", [*prefkit.methods.__path__, str(tmp_path / "extra")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "prefkit.methods.stub_method", raising=False)
    monkeypatch.delattr(prefkit.methods, "stub_method", raising=False)
    return cli.load("methods", "stub_method")


@pytest.fixture
def parsed(stub: Any) -> Callable[..., Any]:
    """Runs `prefkit stub-method ...` and returns the Config that arrived."""

    def run(*words: str) -> Any:
        assert cli.run(["stub-method", *words]) == 0
        return stub.SEEN[-1]

    return run


def fails(*words: str) -> int:
    """Exit code of a failing command line, whether it returns or raises it."""
    try:
        return cli.run(words)
    except SystemExit as left:
        return int(left.code or 0)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, prefkit, prefkit.cli\n"
        "assert prefkit.cli.run(['--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tyro', 'yaml', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert "prefkit METHOD" in done.stdout and "resume" in done.stdout
    assert min(seconds) < 0.5


def test_a_file_is_a_method(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    assert re.search(r"stub_method +Stub: a method that only remembers its config\.", capsys.readouterr().out)


def test_every_method_and_command_has_a_summary() -> None:
    for package in ("methods", "commands"):
        for name, file in cli.modules(package).items():
            assert cli.summary(file), f"{package}/{name}.py has no docstring"
    assert not set(cli.modules("methods")) & set(cli.modules("commands"))


def test_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads(Path(__file__, "../../../pyproject.toml").resolve().read_text())["project"]
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"prefkit {project['version']}\n"


def test_public_names_are_lazy_and_closed() -> None:
    assert {"dpo", "hypo", "sft", "reward", "__version__"} <= set(dir(prefkit))
    with pytest.raises(AttributeError, match="dop"):
        _ = prefkit.dop  # pyright: ignore[reportAttributeAccessIssue]


def test_method_help_groups_options_and_shows_presets(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails("stub_method", "--help") == 0
    page = capsys.readouterr().out
    assert page.index("--beta FLOAT") < page.index("--model_name_or_path STR") < page.index("--lora_r INT")
    assert "temperature of the implicit reward (default: 0.1)" in page
    assert "LoRA (also --lora.NAME)" in page
    flat = " ".join(page.split())
    assert "preset demo: " in flat and "max_steps=60" in flat and "model_name_or_path=tiny" in flat


@pytest.mark.parametrize(
    ("words", "field", "expected"),
    [
        (["--beta", "0.3"], "beta", 0.3),
        (["--learning-rate=1e-5"], "learning_rate", 1e-5),
        (["--policy.model", "m"], "model_name_or_path", "m"),
        (["--optim.learning-rate", "2"], "learning_rate", 2.0),
        (["--run.steps", "7"], "max_steps", 7),
        (["--run.dir", "out"], "output_dir", "out"),
        (["--eval_every", "7"], "eval_steps", 7),
        (["--stub_method.beta", "0.4"], "beta", 0.4),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--keep_best", "-eval_loss"], "keep_best", "-eval_loss"),
        (["--use_peft"], "use_peft", True),
        (["--use-peft", "True"], "use_peft", True),
        (["--use_peft=false"], "use_peft", False),
        (["demo", "--use_peft", "false"], "use_peft", False),
        (["demo", "--no_use_peft"], "use_peft", False),
        (["demo", "--no-lora.use-peft"], "use_peft", False),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ("q_proj", "v_proj")),
        (["--margin", "2"], "margin", 2.0),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["demo"], "max_steps", 60),
        (["demo", "--max_steps", "5"], "max_steps", 5),
        (["demo"], "output_dir", "runs/stub_method-demo"),
        ([], "output_dir", "runs/stub_method"),
        (["--dataset_name", "my data.jsonl"], "dataset_name", "my data.jsonl"),
    ],
)
def test_flags(parsed: Callable[..., Any], words: list[str], field: str, expected: object) -> None:
    found = getattr(parsed(*words), field)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--eval_step", "5"], "did you mean --eval_steps?"),
        (["--eval_strategy", "steps"], "write --eval_steps N"),
        (["--bta", "1"], "did you mean --beta?"),
        (["--policy.modle", "x"], "did you mean --policy.model?"),
        (["demp"], "did you mean demo?"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "1", "2"], "unexpected argument '2'"),
        (["--use_peft", "maybe"], "--use_peft must be true or false"),
        (["--no_use_peft", "1"], "takes no value"),
        (["--seed", "x"], "--seed"),
        (["--dtype", "bf16"], "--dtype"),
        (["--from", "absent.yaml"], "absent.yaml: there is no such file"),
        (["--from", "."], "not a prefkit run"),
    ],
)
def test_bad_flags_exit_with_2(stub: Any, words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails("stub_method", *words) == 2
    said = capsys.readouterr()
    assert told in " ".join((said.err + said.out).split())
    assert "Traceback" not in said.err
    assert not stub.SEEN


def test_unknown_method_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["resum"]) == 2
    assert "did you mean resume?" in capsys.readouterr().err


def test_flags_win_over_file_and_file_over_preset(parsed: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("max_steps: 7\nseed: 3\nlearning_rate: 1e-5\nlora_target_modules: [q, v]\n")
    config = parsed("demo", "--from", "a.yaml", "--seed", "4")
    assert (config.max_steps, config.seed, config.learning_rate, config.use_peft) == (7, 4, 1e-5, True)
    assert config.lora_target_modules == ("q", "v")
    assert parsed("--config", "a.yaml").seed == 3


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.yaml", "sed: 1\n", "a.yaml: unknown option sed\n  mend: did you mean seed?"),
        ("a.yaml", "seed: [1\nbeta: 2", "a.yaml line 2: broken YAML"),
        ("a.yaml", "seed: one\n", "a.yaml: seed must be a whole number, not 'one'"),
        ("a.yaml", "- 1\n", "`option: value` lines"),
        ("a.json", '{\n"seed": 1,\n}', "a.json line 3: broken JSON"),
        ("a.json", '{"beta": "x"}', "a.json: beta must be a number"),
    ],
)
def test_bad_files_name_place_and_mend(
    stub: Any, tmp_path: Path, name: str, text: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert fails("stub_method", "--from", name) == 2
    assert told in capsys.readouterr().err


def write_run(folder: Path, stub: Any, **changes: object) -> None:
    from prefkit.options import to_json

    folder.mkdir(parents=True)
    values = to_json(stub.PRESETS["demo"]) | changes
    record = {"method": "stub_method", "preset": "demo", "prefkit": "0.1.0", "config": values}
    (folder / "config.json").write_text(json.dumps(record))


def test_a_run_directory_reruns_the_run(stub: Any, parsed: Callable[..., Any], tmp_path: Path) -> None:
    write_run(tmp_path / "r", stub, seed=9, overwrite=True)
    for given in ("r", "r/config.json"):
        config = parsed("--from", given, "--output_dir", "other")
        assert (config.seed, config.max_steps, config.output_dir) == (9, 60, "other")
        assert not config.overwrite, "a rerun must not delete what the first run asked to delete"


def test_resume_runs_the_method_in_the_directory(stub: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "moved", stub, seed=9, overwrite=True, output_dir="elsewhere")
    assert cli.run(["resume", "moved", "--max_steps", "90"]) == 0
    config = stub.SEEN[-1]
    assert (config.seed, config.output_dir, config.overwrite, config.max_steps) == (9, "moved", False, 90)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "not a prefkit run"),
        ("{", "not the config of a run"),
        ('{"method": "gone", "config": {}}', "'gone' is not in this prefkit"),
        ('{"method": "stub_method", "config": {"sed": 1}}', "did you mean seed?"),
    ],
)
def test_resume_refuses_other_folders(
    stub: Any, tmp_path: Path, content: str | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r").mkdir()
    if content is not None:
        (tmp_path / "r" / "config.json").write_text(content)
    assert cli.run(["resume", "r"]) == 2
    assert told in capsys.readouterr().err
    assert cli.run(["resume", "nowhere"]) == 2


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            InputError("bad row", where="a.jsonl line 3", mend="fix it"),
            2,
            "a.jsonl line 3: bad row\n  mend: fix it",
        ),
        (OSError(errno.ENOSPC, "No space left", "model.safetensors"), 2, "no space left on the disk (model"),
        (MemoryError(), 1, "--per_device_train_batch_size"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "--gradient_checkpointing"),
        (ValueError("odd"), 1, "ValueError: odd"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_messages(
    stub: Any, error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.FAIL.append(error)
    assert cli.run(["stub_method"]) == code
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said
    assert cli.run(["stub_method", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(stub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "r", stub)
    stub.FAIL.append(KeyboardInterrupt())
    for words in (["stub_method", "demo", "--output_dir", "r"], ["resume", "r"]):
        assert cli.run(words) == 130
        assert "prefkit resume r" in capsys.readouterr().err


def test_the_first_docstring_line_is_read_without_import(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text('"""One line.\n\nMore."""\nraise SystemExit("imported")\n')
    assert cli.summary(tmp_path / "x.py") == "One line."


def test_env_names_versions_and_devices_but_no_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["env", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["versions"]["prefkit"] == prefkit.__version__
    assert found["cpu"]["cores"] >= 1 and found["devices"]
    assert str(Path.home()) not in text and sys.prefix not in text
    assert cli.run(["env"]) == 0
    assert "torch" in capsys.readouterr().out


def test_read_file_accepts_an_empty_yaml(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("# nothing yet\n")
    assert flags.read_file(str(tmp_path / "e.yaml"))[1] == {}
