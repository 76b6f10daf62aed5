"""The command line of one method: argv, presets and files to a Config, and its help page (parsed by tyro)."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from prefkit import options
from prefkit.errors import InputError

C = TypeVar("C")

FILE_FLAGS = ("from", "config")
YES, NO = ("true", "yes", "1", "on"), ("false", "no", "0", "off")
ONE_RUN_ONLY = ("overwrite", "dry_run")
"""options of the invocation, not of the run: never taken over from a run's config.json"""

ORDER = (
    "Flags win over `--from FILE` (a run, YAML or JSON with the same names), and that over",
    "the preset. Underscores and dashes are equal; `--no_NAME` switches an option off.",
)


def parse(
    config: type[C], argv: Sequence[str], *, prog: str, presets: Mapping[str, C], description: str = ""
) -> tuple[C, str]:
    """The Config that `argv` asks for and the name of its preset ("" for none).

    A preset comes first in argv. Flags win over `--from` files, files over the preset, that over defaults.
    InputError for unknown presets, flags and keys; exits with 0 after `--help`, 2 on a malformed value.
    """
    rest, preset = list(argv), ""
    if rest and not rest[0].startswith("-"):
        preset = rest.pop(0)
        if preset not in presets:
            raise options.unknown("preset", preset, presets)
    base = presets[preset] if preset else config()
    return from_flags(base, rest, prog=prog, description=_describe(config, description, presets)), preset


def from_flags(base: C, argv: Sequence[str], *, prog: str, description: str = "") -> C:
    """`base` changed by the `--from` files and the flags in `argv`; errors as in `parse`."""
    config = type(base)
    files, flags = _normalise(config, argv)
    for file in files:
        where, values = read_file(file)
        base = options.update(base, values, where=where)
    import tyro

    form = _form(base)
    filled = tyro.cli(form, args=flags, prog=prog, description=description, use_underscores=True)
    values = {
        option.name: getattr(getattr(filled, option.groups[0]), option.name) for option in options.options_of(config)
    }
    return dataclasses.replace(typing.cast(Any, base), **values)


def read_file(name: str) -> tuple[str, dict[str, Any]]:
    """The file read and the options in it: a run directory, its config.json, YAML or JSON."""
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise InputError("this folder is not a prefkit run: it has no config.json", where=name)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("there is no such file", where=name, mend="check the path given to --from") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"not a text file ({error})", where=name) from None
    values = _read_json(text, str(path)) if path.suffix == ".json" else _read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError("must hold `option: value` lines at its top level", where=str(path))
    values = typing.cast("dict[str, Any]", values)
    if isinstance(values.get("method"), str) and isinstance(values.get("config"), dict):
        values = {key: value for key, value in values["config"].items() if key not in ONE_RUN_ONLY}
    for key in values:
        if not isinstance(key, str):
            raise InputError(f"key {key!r} is not a name", where=str(path))
    return str(path), values


def _read_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"broken JSON: {error.msg}", where=f"{where} line {error.lineno}") from None


def _read_yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"broken YAML: {problem}", where=where + line) from None


def _normalise(config: type, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits argv into `--from` files and flags in tyro's form: field names, every bool with its value."""
    names = options.names_of(config)
    kinds = {option.name: option.type for option in options.options_of(config)}
    files: list[str] = []
    flags: list[str] = []
    for key, values in _tokens(argv):
        if key == "help":
            flags.append("--help")
        elif key in FILE_FLAGS:
            files.append(_single(key, values))
        elif key not in names and key.startswith("no_") and kinds.get(names.get(key[3:], "")) is bool:
            if values:
                raise InputError(f"--{key} takes no value", mend=f"write --{key} or --{key[3:]} false")
            flags.append(f"--{names[key[3:]]}=False")
        elif key not in names:
            raise options.unknown_option(config, key, prefix="--", more=FILE_FLAGS)
        else:
            flags += _flag(names[key], kinds[names[key]], key, values)
    return files, flags


def _tokens(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Groups argv into (name with underscores, values that follow it)."""
    found: list[tuple[str, list[str]]] = []
    for token in argv:
        if token in ("-h", "--help"):
            found.append(("help", []))
        elif token.startswith("--") and len(token) > 2:
            name, equals, value = token[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
        elif found:
            found[-1][1].append(token)
        else:
            raise InputError(f"unexpected argument {token!r}", mend="options look like --name value")
    return found


def _flag(name: str, kind: Any, key: str, values: list[str]) -> list[str]:
    if kind is bool:
        word = _single(key, values).lower() if values else "true"
        if word not in YES + NO:
            raise InputError(f"--{key} must be true or false, not {values[0]!r}")
        return [f"--{name}={word in YES}"]
    if typing.get_origin(kind) in (tuple, list):
        return [f"--{name}", *values]
    if name in options.JOINED and values:
        return [f"--{name}={','.join(values)}"]
    return [f"--{name}={_single(key, values)}"]


def _single(key: str, values: list[str]) -> str:
    if not values:
        raise InputError(f"--{key} needs a value", mend=f"write --{key} VALUE")
    if len(values) > 1:
        hint = f"--{key} takes one value; quote it if it holds spaces. A preset stands right after the method"
        raise InputError(f"unexpected argument {values[1]!r} after --{key} {values[0]}", mend=hint)
    return values[0]


def _form(base: Any) -> type:
    """A dataclass of dataclasses, one per group, with the values of `base`: tyro's headed groups."""
    import tyro

    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    titles: dict[str, str] = {}
    for option in options.options_of(type(base)):
        value = getattr(base, option.name)
        kind = Annotated[option.type, tyro.conf.arg(help=option.meaning)]
        groups.setdefault(option.groups[0], []).append((option.name, kind, dataclasses.field(default=value)))
        titles[option.groups[0]] = f"{option.title} (also --{option.groups[0]}.NAME)"
    fields: list[tuple[str, Any, Any]] = []
    for group, members in groups.items():
        shape = dataclasses.make_dataclass(group, members, frozen=True, kw_only=True)
        shape.__doc__ = titles[group]
        kind = tyro.conf.FlagConversionOff[tyro.conf.OmitArgPrefixes[shape]]
        fields.append((group, kind, dataclasses.field(default_factory=shape)))
    return dataclasses.make_dataclass("options", fields, frozen=True, kw_only=True)


def _describe(config: type[C], description: str, presets: Mapping[str, C]) -> str:
    """The head of the help page: what the method is, its presets and how they differ from the defaults."""
    lines = [description, "", *ORDER]
    for name, preset in presets.items():
        names = [option.name for option in options.options_of(config)]
        old, new = options.to_json(config()), options.to_json(preset)
        changed = " ".join(f"{key}={new[key]}" for key in names if new[key] != old[key]) or "the defaults"
        lines += [
            "",
            textwrap.fill(f"preset {name}: {changed}", 80, subsequent_indent="    ", break_on_hyphens=False),
        ]
    return "\n".join(lines)
