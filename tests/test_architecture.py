"""The shape of the code: sizes, names, and what every method offers. Import arrows are import-linter's."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefkit
from prefkit import cli, options

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "prefkit"
FILES = sorted(SOURCE.rglob("*.py"))
METHODS = sorted(cli.modules("methods"))
FILE, METHOD, CLASS, FUNCTION, LOSS = 500, 250, 250, 60, 25
"""most lines of each"""
GRANTED = {"Run": 300}
"""classes that are longer, and their ceiling, which may only fall"""
VAGUE_FILES = {"utils", "util", "misc", "common", "helpers", "base", "manager"}
VAGUE_NAMES = re.compile(r"Manager|Handler|^_?Base[A-Z]|Helper|Utils?$|Mixin")
PLACES = re.compile(r"(?<![\w.])/(?:home|root|Users|work|workspace|mnt|opt|tmp)/(?!someone|somebody|user\b|me\b)[\w.-]")
"""paths of somebody's machine"""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def lines(node: Function | ast.ClassDef, *, docstring: bool = True) -> int:
    """Lines of a definition, without its decorators; without its docstring if asked."""
    assert node.end_lineno is not None
    total = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if not docstring and ast.get_docstring(node) is not None and first.end_lineno is not None:
        total -= first.end_lineno - first.lineno + 1
    return total


@pytest.mark.parametrize("path", FILES, ids=named)
def test_sizes(path: Path) -> None:
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= (METHOD if path.parent.name == "methods" else FILE)
    for node in nodes(path):
        if isinstance(node, ast.ClassDef):
            assert lines(node) <= GRANTED.get(node.name, CLASS), node.name
        if isinstance(node, Function):
            assert lines(node) <= FUNCTION, node.name
            if path.parent.name == "objectives":
                # one line each for the parameters of a long signature is not length
                assert lines(node, docstring=False) - len(node.args.kwonlyargs) <= LOSS, node.name


@pytest.mark.parametrize("path", FILES, ids=named)
def test_names_and_docstrings(path: Path) -> None:
    assert path.stem not in VAGUE_FILES
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.stem != "__main__" and tree.body:
        assert ast.get_docstring(tree), "say in the first line what the file is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert not VAGUE_NAMES.search(node.name), node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "hasattr", f"line {node.lineno}: ask for a type or a protocol"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: name what is caught"


def test_losses_import_torch_and_math_only() -> None:
    allowed = {"__future__", "collections", "dataclasses", "math", "torch", "typing", "prefkit"}
    for path in sorted((SOURCE / "objectives").glob("*.py")):
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module is not None
                assert node.module.partition(".")[0] in allowed, (named(path), node.module)
                assert not node.module.startswith("prefkit") or node.module.startswith("prefkit.objectives")
            if isinstance(node, ast.Import):
                assert {name.name.partition(".")[0] for name in node.names} <= allowed - {"prefkit"}


def test_losses_neither_read_values_nor_print() -> None:
    for path in sorted((SOURCE / "objectives").glob("*.py")):
        for node in nodes(path):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert called not in {"item", "tolist", "print", "cpu", "cuda"}, (named(path), node.lineno)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_offers(name: str) -> None:
    method = cli.load("methods", name)
    summary = cli.summary(SOURCE / "methods" / f"{name}.py")
    assert 20 <= len(summary) <= 120 and summary.endswith(".")
    assert dataclasses.is_dataclass(method.Config) and method.Config.__dataclass_params__.frozen
    assert {"Config", "PRESETS", "run"} <= set(method.__all__)
    assert "tiny" in method.PRESETS and all(type(preset) is method.Config for preset in method.PRESETS.values())
    parameters = inspect.signature(method.run).parameters
    assert list(parameters) == ["config", "model", "tokenizer", "train", "evaluation"]
    assert all(parameters[key].kind is inspect.Parameter.KEYWORD_ONLY for key in list(parameters)[1:])
    assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()
    for option in options.options_of(method.Config):
        assert option.meaning, option.name
        assert not hasattr(option.type, "__dataclass_fields__"), f"{option.name}: options are flat"


@pytest.mark.parametrize("name", sorted(cli.modules("commands")))
def test_what_a_command_offers(name: str) -> None:
    summary = cli.summary(SOURCE / "commands" / f"{name}.py")
    assert 20 <= len(summary) <= 130
    assert list(inspect.signature(cli.load("commands", name).main).parameters) == ["argv"]


def test_public_names() -> None:
    assert sorted(prefkit.__all__) == sorted({"InputError", "METHODS", "__version__", *METHODS})
    for name in prefkit.__all__:
        assert getattr(prefkit, name) is not None
    with pytest.raises(AttributeError):
        _ = prefkit.nothing


def test_no_word_of_a_machine_is_in_the_tree() -> None:
    kept = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if kept.returncode:
        pytest.skip("not a git checkout")
    for name in kept.stdout.splitlines():
        path = ROOT / name
        if path == Path(__file__) or not path.is_file() or path.suffix in {".png", ".gz"}:
            continue
        found = PLACES.search(path.read_text(encoding="utf-8"))
        assert not found, f"{name} names {found[0]}" if found else ""
