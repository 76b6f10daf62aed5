"""A Config and its options: names, groups and meanings, and the way to and from JSON (standard library only).

A Config is a frozen dataclass whose fields are all options; the class that declares a field is its group.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from prefkit import foreign
from prefkit.errors import InputError

C = TypeVar("C")

PRESET: ContextVar[str] = ContextVar("preset", default="")
"""the preset named on the command line, which a run records"""

GROUPS = {
    "Model": ("policy",),
    "Lora": ("lora", "peft"),
    "Data": ("data",),
    "Sampling": ("sampling",),
    "Parts": ("rounds",),
    "Rounds": ("rounds",),
    "Judging": ("judge",),
    "Optimisation": ("optim",),
    "Selection": ("evaluation",),
    "Output": ("run",),
}
"""First part of dotted flags, by the class that declares the options; any other class uses its own name."""

ALIASES = {
    "policy.model": "model_name_or_path",
    "run.steps": "max_steps",
    "run.dir": "output_dir",
    "eval_every": "eval_steps",
    "save_every": "save_steps",
    "keep_last": "save_total_limit",
    "torch_dtype": "dtype",
}
"""Second names of options, beside the `GROUP.NAME` which every option has."""


JOINED = ("report_to",)
"""Options that hold several names, with commas between them."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of a Config as the command line sees it."""

    name: str
    type: Any
    meaning: str
    groups: tuple[str, ...]
    """first parts of its dotted names; the first of them is its group in the parser"""
    title: str
    """heading in `--help`"""


@functools.cache
def options_of(config: type) -> tuple[Option, ...]:
    """The options of a Config class: the method's own first, then the inherited groups in order.

    A field belongs to the class that declares it first; a subclass may change its default and its meaning.
    """
    hints = typing.get_type_hints(config)
    owners: dict[str, type] = {}
    meanings: dict[str, str] = {}
    parents = [owner for owner in config.__mro__ if dataclasses.is_dataclass(owner)]
    for owner in reversed(parents):
        for name in inspect.get_annotations(owner):
            owners.setdefault(name, owner)
        meanings.update(_field_docstrings(owner))
    found: list[Option] = []
    for owner in parents:
        groups, title = _group(config, owner)
        found += [
            Option(
                name=field.name,
                type=hints[field.name],
                meaning=meanings[field.name],
                groups=groups,
                title=title,
            )
            for field in dataclasses.fields(config)
            if owners[field.name] is owner
        ]
    return tuple(found)


def _group(config: type, owner: type) -> tuple[tuple[str, ...], str]:
    if owner is config:
        method = config.__module__.rsplit(".", 1)[-1]
        return (method,), method
    groups = GROUPS.get(owner.__name__, (owner.__name__.lower(),))
    return groups, (inspect.getdoc(owner) or groups[0]).splitlines()[0]


def names_of(config: type) -> dict[str, str]:
    """Every spelling an option may have, with underscores, mapped to its field name."""
    options = options_of(config)
    names = {option.name: option.name for option in options}
    names |= {alias: name for alias, name in ALIASES.items() if name in names}
    for option in options:
        names |= {f"{group}.{option.name}": option.name for group in option.groups}
    return names


def to_json(config: Any) -> dict[str, Any]:
    """The fields of a Config as JSON values (tuples become lists, paths strings)."""
    return {field.name: _plain(getattr(config, field.name), field.name) for field in dataclasses.fields(config)}


def from_json(config: type[C], values: Mapping[str, Any], *, where: str = "") -> C:
    """A Config from JSON or YAML values; what is not given takes its default. See `update` for errors."""
    return update(config(), values, where=where)


def update(base: C, values: Mapping[str, Any], *, where: str = "") -> C:
    """`base` with the given values in place of its own.

    Keys may use dashes, dotted names or nested mappings. Raises InputError naming the key for an unknown name
    (with the nearest one), a name given twice, or a value of the wrong type.
    """
    config = type(base)
    names = names_of(config)
    types_by_name = {option.name: option.type for option in options_of(config)}
    changes: dict[str, Any] = {}
    for key, value in _flatten(values):
        name = names.get(key.replace("-", "_"))
        if name is None:
            raise unknown_option(config, key, where=where)
        if name in changes:
            raise InputError(f"option {name} is given twice (once as {key})", where=where, mend="keep one of them")
        kind = types_by_name[name]
        changes[name] = convert(_single(value, name, kind), kind, key=key, where=where)
    return dataclasses.replace(typing.cast(Any, base), **changes)


def _single(value: object, name: str, to: Any) -> Any:
    """What a list stands for where one value is meant, as other projects' files have it: its only element.

    Several trackers are one text with commas. Any other list is left to `convert`, which refuses it.
    """
    if not isinstance(value, list) or typing.get_origin(to) in (tuple, list):
        return typing.cast(Any, value)
    items = typing.cast("list[Any]", value)
    if name in JOINED and all(isinstance(item, str) for item in items):
        return ",".join(items) or "none"
    return items[0] if len(items) == 1 else items


def unknown_option(
    config: type, key: str, *, where: str = "", prefix: str = "", more: Iterable[str] = ()
) -> InputError:
    """The error for an option that a Config lacks: what another project's option is called here, else the nearest.

    `more`: names that exist beside the options.
    """
    method = config.__module__.rsplit(".", 1)[-1]
    mend = foreign.mend(key.replace("-", "_").rpartition(".")[2], method, prefix=prefix)
    if mend:
        return InputError(f"unknown option {prefix}{key}", where=where, mend=mend)
    return unknown("option", key, [*names_of(config), *more], where=where, prefix=prefix)


def unknown(kind: str, name: str, known: Iterable[str], *, where: str = "", prefix: str = "") -> InputError:
    """The error for a name that does not exist, with the nearest one that does."""
    plain = name.replace("-", "_")
    near = difflib.get_close_matches(plain, sorted(known), n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else "see --help for what there is"
    return InputError(f"unknown {kind} {prefix}{name}", where=where, mend=hint)


def convert(value: Any, to: Any, *, key: str, where: str = "") -> Any:
    """A JSON or YAML value as the declared type; InputError naming the key where it does not fit."""
    origin, arguments = typing.get_origin(to), typing.get_args(to)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        raise unknown_choice(key, value, arguments, where=where)
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, key=key, where=where)
    if origin in (tuple, list):
        return _convert_sequence(value, origin, arguments, key=key, where=where)
    return _convert_scalar(value, to, key=key, where=where)


def unknown_choice(key: str, value: Any, choices: Iterable[Any], *, where: str = "") -> InputError:
    """The error for a value outside a fixed list."""
    listed = list(choices)
    near = difflib.get_close_matches(str(value), [str(choice) for choice in listed], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? choices: " if near else "choices: "
    return InputError(f"{key} cannot be {value!r}", where=where, mend=hint + ", ".join(map(str, listed)))


def _convert_scalar(value: Any, to: Any, *, key: str, where: str) -> Any:
    if to in (int, float):
        number = _number(value)
        if number is not None and (to is float or _whole(value)):
            return to(value)
    elif to is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif isinstance(value, to):
        return value
    raise InputError(
        f"{key} must be {_named(to)}, not {value!r} ({type(value).__name__})",
        where=where,
        mend="remove the key to keep the default" if value is None else f"write {_example(to)}",
    )


def _number(value: Any) -> float | None:
    """A number, also where YAML read `1e-6` as text; None for anything else, truth values and NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _convert_union(value: Any, members: tuple[Any, ...], *, key: str, where: str) -> Any:
    exact = [member for member in members if isinstance(member, type) and type(value) is member]
    for member in exact + [member for member in members if member not in exact]:
        try:
            return convert(value, member, key=key, where=where)
        except InputError:
            continue
    named = " or ".join(_named(member) for member in members)
    raise InputError(f"{key} must be {named}, not {value!r}", where=where, mend=f"write {_example(members[0])}")


def _convert_sequence(value: Any, origin: type, arguments: tuple[Any, ...], *, key: str, where: str) -> Any:
    items: Any = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise InputError(f"{key} must be a list, not {value!r}", where=where, mend="write [first, second]")
    inner = typing.cast("list[Any] | tuple[Any, ...]", items)
    fixed = origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis)
    if fixed and len(inner) != len(arguments):
        raise InputError(f"{key} must have {len(arguments)} values, not {len(inner)}", where=where)
    kinds = arguments if fixed else (arguments[0],) * len(inner)
    return typing.cast(Any, origin)(
        convert(item, kind, key=f"{key}[{index}]", where=where)
        for index, (item, kind) in enumerate(zip(inner, kinds, strict=True))
    )


def _named(to: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return words.get(to) or str(getattr(to, "__name__", to))


def _example(to: Any) -> str:
    return {bool: "true or false", int: "a number such as 8", float: "a number such as 0.1"}.get(to, 'text in "quotes"')


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in typing.cast("list[Any]", value)]
    raise TypeError(f"option {name} holds a {type(value).__name__}, which has no JSON form")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(typing.cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def _field_docstrings(owner: type) -> dict[str, str]:
    """The string under each annotated field of a class, read from its source (the language keeps none)."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]).body
    meanings: dict[str, str] = {}
    for field, after in itertools.pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            meanings[field.target.id] = inspect.cleandoc(after.value.value)
    return meanings
