"""The documentation says what the code does: its blocks run, its commands parse, its options exist."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pages
import prefkit
import tiny
from pages import PAGES, ROOT, Block
from prefkit import cli, flags, objectives, options

WRITTEN_OUT = ROOT / "docs" / "add-a-method.md"
"""its blocks are files; test_add_a_method.py runs them"""
PYTHON = [page for page in PAGES if page != WRITTEN_OUT and pages.blocks(page, "python")]
SHELL = [block for page in PAGES for block in pages.blocks(page, "bash")]
METHODS = sorted(cli.modules("methods"))
FOREIGN = {
    # of accelerate, torchrun, pip, pytest and this repository's tools
    "config_file", "cpu", "nproc_per_node", "num_processes", "no_deps", "check", "force_reinstall", "add_data",
    # of prefkit, everywhere
    "debug", "help", "version", "from", "config", "NAME", "GROUP",
}  # fmt: skip
OTHERS = {"coming-from.md", "add-a-method.md", "cli.md"}
"""pages that name other projects' options, those of an example, or are generated"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with what the pages name: MODEL and pairs.jsonl; blocks of a page run in it in turn."""
    folder = tmp_path_factory.mktemp("docs")
    tiny.folder(folder / "MODEL")
    tiny.jsonl(folder / "pairs.jsonl", tiny.pairs(40))
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs started from a page take two steps, overwrite, and sample little."""
    from prefkit.domains.text import config as text
    from prefkit.engine import config as engine

    for name in METHODS:
        method = cli.load("methods", name)
        plain = method.run

        def run(config: Any, *, plain: Any = plain, **objects: Any) -> Any:
            less: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "num_eval_prompts": 2}
            less |= {"overwrite": True}
            if isinstance(config, text.Sampling):
                less |= {"max_new_tokens": 4}
            assert isinstance(config, engine.Output)
            return plain(dataclasses.replace(config, **less), **objects)

        monkeypatch.setattr(method, "run", run)


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
@pytest.mark.usefixtures("short")
def test_python_blocks_run(page: Path, workplace: Path) -> None:
    if page.name == "quickstart.md":  # its Python tabs load the run of its command-line tabs
        _shell(pages.blocks(page, "bash")[1])
    for block in pages.blocks(page, "python"):
        code = compile(block.code, str(block), "exec")
        if not block.parse_only:
            exec(code, {"__name__": "page"})


@pytest.mark.usefixtures("short")
def test_the_commands_of_the_readme_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in pages.blocks(ROOT / "README.md", "bash"):
        _shell(block)
    assert "runs/first" in capsys.readouterr().out


def _shell(block: Block) -> None:
    """Run a block's commands in this process."""
    for command in pages.commands(block):
        words = shlex.split(command)
        assert words[0] == "prefkit" and cli.run(words[1:]) == 0, command


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_parse(block: Block) -> None:
    for command in pages.commands(block):
        words = shlex.split(command, comments=True)
        if "prefkit" not in words:
            assert words[0] in ("pip", "make", "python", "git", "accelerate", "torchrun"), command
            continue
        name, *rest = words[words.index("prefkit") + 1 :]
        if name.startswith("-"):
            continue
        name = name.replace("-", "_")
        if name in METHODS:
            method = cli.load("methods", name)
            given = [word for word in rest if word not in ("...", "--help", "--debug")]
            config, _ = flags.parse(method.Config, _without_files(given), prog=name, presets=method.PRESETS)
            assert isinstance(config, method.Config)
        else:
            assert name in cli.modules("commands"), command
            known = _flags_of(name)
            for word in rest:
                if word.startswith("--") and name != "resume":
                    assert word.partition("=")[0] in known, command


def _without_files(words: list[str]) -> list[str]:
    """argv without `--from FILE`: the page's file does not exist here."""
    found, skip = [], False
    for word in words:
        skip_this, skip = skip, word in ("--from", "--config")
        if not skip and not skip_this:
            found.append(word)
    return found


def _flags_of(command: str) -> set[str]:
    """Every long option of a command and its subcommands, by its help pages."""
    texts = [text for _, text in _cli_page().help_pages(command)]
    return {flag for text in texts for flag in re.findall(r"--\w[\w-]*", text)} | {"--debug"}


def _cli_page() -> Any:
    """tools/cli_page.py as a module."""
    spec = importlib.util.spec_from_file_location("cli_page", ROOT / "tools" / "cli_page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_option_a_page_names_exists() -> None:
    known = set(FOREIGN)
    for name in METHODS:
        known |= set(options.names_of(cli.load("methods", name).Config))
    for name in cli.modules("commands"):
        known |= {flag[2:].replace("-", "_") for flag in _flags_of(name)}
    for page in PAGES:
        if page.name in OTHERS:
            continue
        for flag in re.findall(r"(?<![\w-])--([A-Za-z][\w.-]*)", page.read_text(encoding="utf-8")):
            name = flag.rstrip(".-").replace("-", "_")
            named = name in known or name.removeprefix("no_") in known or name.endswith(".NAME")
            assert named, f"{page.name} names --{flag}"


def test_the_options_that_peers_are_mapped_to_exist() -> None:
    known = set(FOREIGN)
    for name in METHODS:
        known |= set(options.names_of(cli.load("methods", name).Config))
    known |= {"prompt_key", "chosen_key", "rejected_key"}
    text = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    rows = [line.split("|")[-2] for line in text.splitlines() if line.startswith("|")]
    for cell in rows:
        for flag in re.findall(r"--(\w+)", cell):
            assert flag in known, f"coming-from.md maps to --{flag}"


def test_the_command_line_page_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page.split() == _cli_page().page().split(), "run `make docs`"


@pytest.mark.parametrize("name", METHODS)
def test_the_command_line_page_has_every_option_of_the_real_help(name: str) -> None:
    code = f"import sys; from prefkit import cli; sys.exit(cli.run(['{name}', '--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown = set(re.findall(r"│ --(\w+)", done.stdout))
    method = cli.load("methods", name)
    assert shown == {option.name for option in options.options_of(method.Config)}
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"| `--{option}` |" in page for option in shown)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page(name: str) -> None:
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.is_file()
    text = page.read_text(encoding="utf-8")
    for heading in ("Equations", "In your own trainer", "Metrics", "Where we differ", "Presets"):
        assert f"## {heading}" in text, f"{page.name} has no section {heading}"
    assert f"methods/{name}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for preset in cli.load("methods", name).PRESETS:
        assert f"`{preset}`" in text.partition("## Presets")[2], f"{page.name} does not tell of preset {preset}"


def test_links_between_pages_hold() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == prefkit.__version__
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"[{prefkit.__version__}]" in log or "[Unreleased]" in log


def test_every_extra_is_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for extra in project["optional-dependencies"]:
        assert f"| `{extra}` |" in page


@pytest.mark.parametrize("name", [found.name for found in pkgutil.iter_modules(objectives.__path__)])
def test_the_numbers_in_the_docstrings_of_losses(name: str) -> None:
    module = importlib.import_module(f"prefkit.objectives.{name}")
    assert doctest.testmod(module).failed == 0
