"""What an endpoint's answer means: a reply, a failure that may pass, or something the user has to mend."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, cast

from prefkit.errors import InputError
from prefkit.feedback.endpoint import KEYS, Endpoint
from prefkit.feedback.replies import Reply
from prefkit.feedback.templates import content_of

LONGEST_WAIT = 600.0
"""seconds; an endpoint that asks for a longer pause is taken to be gone"""
SHOWN = 300
"""characters of the other side's words that a message repeats"""
CHARACTERS_PER_TOKEN = 4
"""of English text, about; for estimates where the endpoint does not count"""


@dataclass(frozen=True)
class Failed:
    """Why there is no reply to a request."""

    reason: str
    """failed | malformed | rejected"""
    detail: str
    again: bool = False
    """whether another attempt may help"""
    endpoint: bool = False
    """whether it is the endpoint's doing, and not the question's"""
    gone: bool = False
    """whether the endpoint cannot be reached at all"""
    charged: bool = False
    """whether the attempt may have to be paid for"""
    wait: float = 0.0
    """seconds that the endpoint asks to wait"""


def read(end: Endpoint, status: int, headers: Mapping[str, str], content: bytes) -> Reply | Failed | InputError:
    """A chat-completions response. An InputError is returned, not raised: the caller has accounts to close."""
    body = _json(content)
    said = _message(end, body, content)
    if status == 200:
        return _reply(end, body)
    if status in (408, 425, 429) or status >= 500:
        if _code(body) == "insufficient_quota":
            return InputError(f"has no quota left: {said}", where=end.url, mend="pay, or use another key or endpoint")
        wait = _retry_after(headers.get("retry-after", ""))
        if wait > LONGEST_WAIT:
            return Failed("failed", f"HTTP {status}, to be asked again in {wait:.0f} s", endpoint=True, gone=True)
        return Failed("failed", f"HTTP {status} {said}", again=True, endpoint=True, gone=status == 429, wait=wait)
    if status in (401, 403):
        given = "the key given is not accepted" if end.key else "no key is given"
        return InputError(
            f"HTTP {status}: {given} ({said})",
            where=f"--judge_base_url {end.base_url}",
            mend=f"set the environment variable {' or '.join(KEYS)} to a key for this address",
        )
    if status == 404:
        return InputError(
            f"HTTP 404: no model {end.model!r}, or no chat completions at this address ({said})",
            where=f"--judge_base_url {end.base_url}",
            mend="check the model's name and the base URL, which usually ends in /v1",
        )
    if status in (400, 413, 422):
        if any(word in said for word in ("response_format", "json_schema", "guided")):
            return InputError(
                f"structured replies are refused (HTTP {status}: {said})",
                where=end.url,
                mend='name a template file with `base = "chat"` and `reply = "text"` as --judge_template',
            )
        return Failed("rejected", f"HTTP {status} {said}")
    moved = 300 <= status < 400 and "location" in headers
    where = f" to {end.blacked_out(headers['location'])}" if moved else ""
    return InputError(
        f"HTTP {status}{where} ({said})",
        where=f"--judge_base_url {end.base_url}",
        mend="check the base URL and the account",
    )


def measured(reply: Reply, tokens_in: int, seconds: float) -> Reply:
    """The reply with its time, and with estimates where the endpoint counts no tokens."""
    words = len(reply.content) // CHARACTERS_PER_TOKEN + 1
    return dataclasses.replace(
        reply,
        tokens_in=reply.tokens_in or tokens_in,
        tokens_out=reply.tokens_out or words,
        seconds=round(seconds, 3),
    )


def tokens_in(messages: Sequence[Mapping[str, str]]) -> int:
    """Estimated tokens of a conversation: a quarter of its characters, and four a message for the chat template."""
    return sum(math.ceil(len(message["content"]) / CHARACTERS_PER_TOKEN) + 4 for message in messages)


def _reply(end: Endpoint, body: Any) -> Reply | Failed | InputError:
    """The reply in a body; malformed where it is not one. Raises nothing."""
    try:
        choice = body["choices"][0]
        message: Mapping[str, Any] = choice["message"]
        text = content_of(message)
        finish, refusal = str(choice.get("finish_reason") or ""), str(message.get("refusal") or "")
        usage: Mapping[str, Any] = body.get("usage") or {}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        model = end.blacked_out(str(body.get("model") or ""))
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        return Failed("malformed", "the body is no chat completion", again=True, charged=True)
    if not end.is_served_by(model):
        return InputError(
            f"model {end.model!r} was asked for and {model!r} answered",
            where=end.url,
            mend=f"ask for the model by the name it is served under (--judge llm:{model}), or mend the endpoint",
        )
    return Reply(
        content=end.blacked_out(text),
        finish=end.blacked_out(finish),
        refusal=end.blacked_out(refusal),
        model=model,
        tokens_in=max(0, counts[0]),
        tokens_out=max(0, counts[1]),
    )


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _error(body: Any) -> Any:
    return cast("dict[str, Any]", body).get("error") if isinstance(body, dict) else None


def _code(body: Any) -> str:
    error = _error(body)
    return str(cast("dict[str, Any]", error).get("code")) if isinstance(error, dict) else ""


def _message(end: Endpoint, body: Any, content: bytes) -> str:
    """What the other side says went wrong, on one short line and without the key."""
    error = _error(body)
    said = cast("dict[str, Any]", error).get("message") if isinstance(error, dict) else error
    text = str(said) if said else content.decode(errors="replace")
    return end.blacked_out(" ".join(text.split()))[:SHOWN] or "no message"


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; 0 where it says nothing."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
