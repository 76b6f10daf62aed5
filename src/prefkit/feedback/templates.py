"""Questions put to a judge that reads: named, versioned templates for two answers shown as A and B.

A template is a TOML file; `tldr`, `hh` and `chat` are packaged. How the judge has to reply is added by `messages`, so
that the question and the parser never disagree.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

from prefkit.errors import InputError
from prefkit.records import Text

ReplyForm = Literal["structured", "text", "letter"]
"""structured: a JSON object by schema; text: two lines; letter: one token, for judges whose next token is read"""

PACKAGED = ("chat", "hh", "tldr")
PLACEHOLDERS = ("prompt", "answer_a", "answer_b")
DECODING: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 512}
"""fields of the request that a template without [decoding] sends"""
LENGTH_FIELDS = ("max_completion_tokens", "max_tokens")
"""fields of a request that bound the reply's length"""
PREFIX = "Preferred: "
"""what stands before the letter in the forms text and letter"""

_FOLDER = Path(__file__).parent / "judge_templates"
_FIELDS: Mapping[str, type] = {
    "name": str,
    "base": str,
    "version": str,
    "system": str,
    "user": str,
    "reply": str,
    "ties": bool,
    "decoding": dict,
}
_OURS = {"model", "messages", "response_format", "stream", "n"}
"""fields of a request that a template must not set"""
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_ROLES = {"user": "User", "assistant": "Assistant", "system": "System"}
_CHOICES = 'Write "tie" if neither is better, and "unsure" if you cannot tell.'


@dataclass(frozen=True, kw_only=True)
class Template:
    """A question about two answers. `version` is declared by a packaged template, and a hash of a user's own."""

    name: str
    version: str
    user: str
    system: str = ""
    reply: ReplyForm = "structured"
    ties: bool = True
    """whether the judge may also say "tie" and "unsure" """
    decoding: Mapping[str, Any] = field(default_factory=lambda: dict(DECODING))

    @classmethod
    def load(cls, spec: str) -> Self:
        """A packaged template by name, or a user's TOML file.

        Raises InputError for a file that is missing or no TOML, unknown keys, and placeholders that are missing or not
        known.
        """
        if spec in PACKAGED:
            values = tomllib.loads((_FOLDER / f"{spec}.toml").read_text(encoding="utf-8"))
            return cls(**_fields(values, spec, name=spec, version=values["version"]))
        path = Path(spec)
        if not path.is_file():
            raise InputError(
                f"{spec!r} is neither a packaged template nor a file",
                where="--judge_template",
                mend=f"one of {', '.join(PACKAGED)}, or the path of a TOML file",
            )
        values = _read(path)
        made = cls(**_fields(values, spec, name=values.get("name", path.stem), version=""))
        _check(made, where=spec)
        return dataclasses.replace(made, version=_hash(made))

    @property
    def full_name(self) -> str:
        """Name and version, as they stand in records."""
        return f"{self.name}-{self.version}"

    @property
    def choices(self) -> tuple[str, ...]:
        """What the judge may prefer."""
        return ("A", "B", "tie", "unsure") if self.ties else ("A", "B")

    @property
    def longest_reply(self) -> int:
        """Tokens of the longest reply that a request allows; 1024 where it does not say."""
        return next((int(self.decoding[name]) for name in LENGTH_FIELDS if name in self.decoding), 1024)

    def messages(
        self, prompt: Text, first: str, second: str, *, reply: ReplyForm | None = None
    ) -> list[dict[str, str]]:
        """The conversation that asks about `first` as A and `second` as B.

        Values go in as they are, in one pass: braces, letters or placeholders inside an answer stay text.
        """
        values = {"prompt": readable(prompt), "answer_a": first, "answer_b": second}
        turns = [("system", self.system), ("user", f"{self.user.strip()}\n\n{self._instruction(reply or self.reply)}")]
        return [{"role": role, "content": _fill(text.strip(), values)} for role, text in turns if text.strip()]

    def request_fields(self) -> dict[str, Any]:
        """The fields of a chat-completions request beside model and messages."""
        return {**self.decoding, **({"response_format": self._schema()} if self.reply == "structured" else {})}

    def _instruction(self, reply: ReplyForm) -> str:
        if reply == "letter":
            return f'Reply with one line and nothing else: "{PREFIX}A" or "{PREFIX}B".'
        options = " or ".join(f'"{choice}"' for choice in self.choices)
        note = f" {_CHOICES}" if self.ties else ""
        if reply == "text":
            bare = " or ".join(self.choices)
            return (
                "First compare the two in one sentence, then say which you prefer. Reply with two lines and nothing "
                f"else:\nComparison: <one sentence>\n{PREFIX}<{bare}>{f'{chr(10)}{_CHOICES}' if self.ties else ''}"
            )
        return (
            "First compare the two in one sentence, then say which you prefer. Reply with one JSON object and nothing "
            f'else: {{"comparison": "<one sentence>", "preferred": {options}}}.{note}'
        )

    def _schema(self) -> dict[str, Any]:
        properties = {"comparison": {"type": "string"}, "preferred": {"type": "string", "enum": list(self.choices)}}
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        return {"type": "json_schema", "json_schema": {"name": "preference", "strict": True, "schema": schema}}


def readable(text: Text) -> str:
    """A prompt as a judge reads it: a string as it is, one user turn by its content, a conversation turn by turn."""
    if isinstance(text, str):
        return text
    turns = [(str(turn.get("role", "user")), content_of(turn)) for turn in text]
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n\n".join(f"{_ROLES.get(role, role)}: {content}" for role, content in turns)


def content_of(turn: Mapping[str, Any]) -> str:
    """The text of a message, whose content is a string or a list of parts; parts that are no text are named."""
    content = turn.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [cast("Mapping[str, Any]", part) for part in cast("Sequence[Any]", content)]
        return "\n".join(str(part["text"]) if "text" in part else f"[{part.get('type', 'part')}]" for part in parts)
    return "" if content is None else str(content)


def _fill(text: str, values: Mapping[str, str]) -> str:
    """`text` with its placeholders replaced, each once; nothing that was put in is looked at again."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text)


def _read(path: Path) -> dict[str, Any]:
    """The values of a user's file, on those of the packaged template it names as `base`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # tomllib's and unicode's errors are ValueErrors
        raise InputError(f"is no TOML file ({error})", where=str(path), mend="see docs/judges.md") from error
    if "version" in values:
        raise InputError(
            "version is not the file's to say", where=f"{path} version", mend="remove it: it is a hash of the contents"
        )
    base = values.get("base")
    if base is None:
        return values
    if base not in PACKAGED:
        raise InputError(f"base is {base!r}", where=f"{path} base", mend=f"one of {', '.join(PACKAGED)}")
    return {**tomllib.loads((_FOLDER / f"{base}.toml").read_text(encoding="utf-8")), **values}


def _fields(values: Mapping[str, Any], where: str, **given: str) -> dict[str, Any]:
    """The fields of a Template: those among `values`, and those given.

    Raises InputError for keys and types that are not known.
    """
    for key, value in values.items():
        if key not in _FIELDS:
            raise InputError(f"{key!r} is not known", where=where, mend=f"keys are {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[key]):
            raise InputError(f"{key} is {value!r}", where=f"{where} {key}", mend=f"give a {_FIELDS[key].__name__}")
    if "user" not in values:
        raise InputError("has no question", where=f"{where} user", mend='add user = """..."""')
    if values.get("reply", "structured") not in get_args(ReplyForm)[:2]:
        raise InputError(f"reply is {values['reply']!r}", where=f"{where} reply", mend="structured or text")
    return {**{key: values[key] for key in ("system", "user", "reply", "ties", "decoding") if key in values}, **given}


def _check(template: Template, *, where: str) -> None:
    if not re.fullmatch(r"[\w.-]+", template.name):
        raise InputError(f"name is {template.name!r}", where=f"{where} name", mend="letters, digits, - _ and . only")
    found = set(_PLACEHOLDER.findall(template.user)) | set(_PLACEHOLDER.findall(template.system))
    for word in sorted(found - set(PLACEHOLDERS)):
        raise InputError(
            f"{{{word}}} is no placeholder",
            where=where,
            mend=f"placeholders are {', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}; "
            f"write {{ {word} }} with spaces for text in braces",
        )
    for word in PLACEHOLDERS:
        if word not in set(_PLACEHOLDER.findall(template.user)):
            raise InputError(f"{{{word}}} does not stand in user", where=f"{where} user", mend=f"add {{{word}}}")
    for name in sorted(_OURS & set(template.decoding)):
        raise InputError(f"{name} cannot be set here", where=f"{where} decoding.{name}", mend="remove it")
    for name in LENGTH_FIELDS:
        length = template.decoding.get(name, 1)
        if type(length) is not int or length < 1:
            raise InputError(f"is {length!r}", where=f"{where} decoding.{name}", mend="a whole number, 1 or more")


def _hash(template: Template) -> str:
    """What tells a template from every other one; `version` is "" while it is taken."""
    whole = json.dumps(dataclasses.asdict(template), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(whole.encode()).hexdigest()[:12]
