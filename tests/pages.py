"""The code blocks of the documentation."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?P<mark><!-- parse only -->\n+)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language and its text without the page's indentation."""

    page: str
    line: int
    language: str
    code: str
    parse_only: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in BLOCK.finditer(text):
        if match["language"] in languages:
            line = text[: match.start("code")].count("\n") + 1
            name, code = str(page.relative_to(ROOT)), textwrap.dedent(match["code"])
            found.append(Block(name, line, match["language"], code, bool(match["mark"])))
    return found


def commands(block: Block) -> list[str]:
    """The commands of a shell block, one a line, continued lines joined and comments left out."""
    text = block.code.replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
