"""Pieces that pages are made of: tables, figures, and prompts as text. `parts.html` has their markup."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from typing import Any

from prefkit.report.canvas import Figure

Table = dict[str, Any]
"""title, columns, numeric (names of right-aligned columns), rows, kind"""


def embedded(figure: Figure) -> dict[str, Any]:
    """A figure as a data URI with its size in CSS pixels (drawn at two pixels each)."""
    content = figure.path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])  # the IHDR chunk stands first in every PNG
    uri = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return {"uri": uri, "alt": figure.alt, "width": width // 2, "height": height // 2}


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    kind: str = "",
    numeric: Sequence[str] | None = None,
) -> Table:
    """A table whose columns after the first are numbers unless `numeric` names others."""
    chosen = columns[1:] if numeric is None else numeric
    return {"title": title, "columns": columns, "numeric": chosen, "rows": rows, "kind": kind}


def pairs(rows: Sequence[tuple[str, str]], *, title: str = "") -> Table:
    """A table of names and values without a head."""
    return {"title": title, "columns": (), "numeric": (), "rows": rows, "kind": "pairs"}


def text_of(prompt: Any) -> str:
    """A prompt as text: a conversation shows who says what."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in prompt)
    return json.dumps(prompt, ensure_ascii=False)
