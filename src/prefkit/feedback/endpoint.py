"""Where an LLM judge is reached, and what its answers must look like: address, key, limits, names of models."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from prefkit.errors import InputError

OPENAI = "https://api.openai.com/v1"
KEYS = ("PREFKIT_JUDGE_API_KEY", "OPENAI_API_KEY")
"""environment variables that may hold the key, the first one that is set"""
SECRET = 8
"""a key of fewer letters is a placeholder ("none", "EMPTY") and is not blacked out in texts"""

_DATED = re.compile(r"[-@:](?:\d{4}-\d{2}-\d{2}|\d{8}|\d{4}|latest)\Z")
_FLOATING = re.compile(r"[-@:]latest\Z")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint and how it may be used. The key never shows in its repr."""

    base_url: str
    model: str
    key: str = field(default="", repr=False)
    concurrency: int = 8
    """requests in flight at once"""
    timeout: float = 60.0
    """seconds for one reply, from connecting to its last byte"""
    retries: int = 5
    """times a failed request is sent again"""
    max_calls: int = 0
    """budget: most requests paid for in the folder of replies; 0 has no limit"""
    max_tokens: int = 0
    """budget: most tokens read and written, likewise"""
    backoff: float = 0.5
    """seconds before the first repetition at most; each later one waits up to twice as long"""
    served_as: str = ""
    """name of the model in the replies, where it is not the one asked for (deployments with names of their own)"""

    def __post_init__(self) -> None:
        """Raises InputError for what cannot be used."""
        _check_url(self.base_url)
        if not self.model:
            raise InputError("names no model", where="--judge", mend="llm:MODEL, as the endpoint calls it")
        if not self.key.isascii() or not self.key.isprintable():
            raise InputError(
                "the key holds characters that no header can carry", where=" or ".join(KEYS), mend="set it anew"
            )
        limits = {"concurrency": 1, "retries": 0, "max_calls": 0, "max_tokens": 0}
        for name, low in limits.items():
            if getattr(self, name) < low:
                raise InputError(f"is {getattr(self, name)}", where=f"--judge_{name}", mend=f"{low} or more")
        if not self.timeout > 0:
            raise InputError(f"is {self.timeout}", where="--judge_timeout", mend="above 0")

    @property
    def url(self) -> str:
        return f"{self.base_url.rstrip('/')}/chat/completions"

    @property
    def identity(self) -> str:
        """What tells this judge from another one in the folder of replies: host, path and model."""
        parts = urlsplit(self.base_url)
        return f"{parts.netloc.lower()}{parts.path.rstrip('/')}#{self.model}"

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def blacked_out(self, text: str) -> str:
        """`text` without the key, should the other side have repeated it."""
        return text.replace(self.key, "[key]") if len(self.key) >= SECRET else text

    def is_served_by(self, model: str) -> bool:
        """Whether a reply by `model` is one by the model asked for. A reply that names no model is taken to be."""
        return not model or same_model(self.served_as or self.model, model)


def key_from(environment: Mapping[str, str] = os.environ) -> str:
    """The key that the environment holds, empty where it holds none (many local servers want none)."""
    return next((value for name in KEYS if (value := environment.get(name, "").strip())), "")


def same_model(asked: str, given: str) -> bool:
    """Whether `given` is `asked` or, where no date was asked for, a dated version of it."""
    asked, given = asked.lower(), given.lower()
    if asked == given:
        return True
    if _DATED.search(asked) and not _FLOATING.search(asked):
        return False
    return _DATED.sub("", asked) == _DATED.sub("", given)


def _check_url(url: str) -> None:
    where, mend = "--judge_base_url", f"for example {OPENAI} or http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        raise InputError("is no address", where=where, mend=mend) from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        # Not shown: it may be a secret.
        raise InputError(
            "holds more than host and path (a user name, a password or a query)",
            where=where,
            mend=f"{mend}; keys are read from the environment only ({' or '.join(KEYS)})",
        )
    if not known:
        raise InputError(f"{url!r} is no address", where=where, mend=mend)
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise InputError(f"{url} names one method", where=where, mend="leave out /chat/completions")
