"""Write docs/cli.md from the code: every method's options and presets, every command's help page.

python tools/cli_page.py            write it
python tools/cli_page.py --check    exit code 1 when it is not what the code says
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefkit import cli, options

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# Command line

<!-- Written by tools/cli_page.py from the code (`make docs`); `make check` fails when it is out of date. -->

```text
{overview}
```

- A preset is a set of option values and stands right after the method. `--from FILE` takes a run directory, its
  `config.json`, or YAML or JSON with the same names. Flags win over files, files over the preset, the preset over the
  defaults. An unknown name is an error that suggests the nearest one.
- Underscores and dashes are equal. A switch is `--use_peft`, `--use_peft true` or `--no_use_peft`.
- Every option also has a dotted name, `--GROUP.NAME`, for instance `--optim.learning_rate`. Second names:
  {aliases}.
- Exit codes: 0 done, 1 a failure, 2 something in the input to mend, 130 interrupted. `--debug` anywhere shows the
  traceback.
"""


def main() -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8").split() != text.split():
        # Words are compared, for argparse breaks lines differently from one Python to the next.
        print("docs/cli.md is not what the code says; run `make docs`", file=sys.stderr)
        return 1
    return 0


def page() -> str:
    """The whole page."""
    aliases = ", ".join(f"`--{alias}` (`{name}`)" for alias, name in options.ALIASES.items())
    methods = {name: cli.load("methods", name) for name in cli.modules("methods")}
    parts = [HEAD.format(overview=cli.overview().strip(), aliases=aliases), "## Methods\n"]
    shared: dict[str, list[tuple[str, options.Option]]] = {}
    for name, method in methods.items():
        found = options.options_of(method.Config)
        own = [option for option in found if option.groups[0] == name]
        for option in found:
            if option not in own:
                shared.setdefault(option.title, []).append((name, option))
        parts += [*_method(name, method), *_table(own, {option.name: _default(method, option) for option in own})]
    parts.append("## Options that methods share\n")
    for title, members in shared.items():
        parts += _shared(title, members, methods)
    parts.append("## Commands\n")
    for name in cli.modules("commands"):
        for command, text in help_pages(name):
            parts.append(f"### prefkit {command}\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)


def _method(name: str, method: Any) -> Iterator[str]:
    yield f"### prefkit {name}\n\n{inspect.getdoc(method).partition(chr(10))[0]} [More](methods/{name}.md)\n"
    for preset, config in method.PRESETS.items():
        values = options.to_json(config)
        changed = [key for key, value in options.to_json(method.Config()).items() if values[key] != value]
        shown = ", ".join(f"{key} {_show(values[key])}" for key in changed) or "the defaults"
        yield f"- preset `{preset}`: {shown}"
    yield ""


def _shared(title: str, members: list[tuple[str, options.Option]], methods: dict[str, Any]) -> Iterator[str]:
    """One table of a group that several methods have; a default of its own is told beside its method."""
    first: dict[str, options.Option] = {}
    defaults: dict[str, dict[str, list[str]]] = {}
    for name, option in members:
        first.setdefault(option.name, option)
        defaults.setdefault(option.name, {}).setdefault(_default(methods[name], option), []).append(name)
    users = sorted({name for name, _ in members})
    yield f"### {title}\n\nDotted `--{members[0][1].groups[0]}.NAME`; in {', '.join(users)}.\n"
    told: dict[str, str] = {}
    for option, values in defaults.items():
        usual = max(values, key=lambda value: len(values[value]))
        rest = [f"{', '.join(names)}: {value}" for value, names in values.items() if value != usual]
        told[option] = "; ".join([usual, *rest])
    yield from _table(list(first.values()), told)


def _table(found: list[options.Option], defaults: dict[str, str]) -> Iterator[str]:
    if not found:
        yield "No options of its own.\n"
        return
    yield "| option | type | default | meaning |\n|---|---|---|---|"
    for option in found:
        meaning = " ".join(option.meaning.split()).replace("|", r"\|")
        yield f"| `--{option.name}` | {_type(option.type)} | {defaults[option.name]} | {meaning} |"
    yield ""


def _default(method: Any, option: options.Option) -> str:
    return _show(options.to_json(method.Config())[option.name])


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"`{item}`" for item in value) or "none"
    return {"": "empty", "None": "none", "True": "on", "False": "off"}.get(str(value), f"`{value}`")


def _type(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return r" \| ".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments if part is not type(None)) + " or none"
    if origin in (tuple, list):
        return f"{_type(arguments[0])} ..."
    return {bool: "switch", int: "int", float: "float", str: "text"}.get(kind, str(kind))


class _Found(BaseException):
    """Carries a command's parser out of its main, before it parses anything."""


def help_pages(name: str) -> list[tuple[str, str]]:
    """(command, help text) of a command and of its subcommands, 100 columns wide."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        raise _Found(self)

    argparse.ArgumentParser.parse_known_args = stop  # type: ignore[method-assign]
    try:
        cli.load("commands", name).main([])
    except _Found as found:
        parser = found.args[0]
    finally:
        argparse.ArgumentParser.parse_known_args = parse  # type: ignore[method-assign]
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    inner = [(f"{name} {verb}", sub.format_help()) for action in subparsers for verb, sub in action.choices.items()]
    return [(name, parser.format_help()), *inner]


if __name__ == "__main__":
    sys.exit(main())
