"""What a method's own file says about it: read as text, so that a report needs neither torch nor the method."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

PAPERS: dict[str, tuple[str, str, int]] = {
    "2305.10425": (
        "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        "Yao Zhao and Rishabh Joshi and Tianqi Liu and Misha Khalman and Mohammad Saleh and Peter J. Liu",
        2023,
    ),
    "2305.18290": (
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Rafael Rafailov and Archit Sharma and Eric Mitchell and Stefano Ermon and Christopher D. Manning "
        "and Chelsea Finn",
        2023,
    ),
    "2310.12036": (
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "Mohammad Gheshlaghi Azar and Mark Rowland and Bilal Piot and Daniel Guo and Daniele Calandriello "
        "and Michal Valko and R{\\'e}mi Munos",
        2023,
    ),
    "2406.01462": (
        "The Importance of Online Data: Understanding Preference Fine-tuning via Coverage",
        "Yuda Song and Gokul Swamy and Aarti Singh and J. Andrew Bagnell and Wen Sun",
        2024,
    ),
}
"""arXiv number -> title, authors, year; a number that is missing here is cited by number alone"""


@dataclass(frozen=True)
class Method:
    """First docstring line of `methods/NAME.py` and the arXiv numbers its docstring names."""

    name: str
    summary: str
    papers: tuple[str, ...]

    @property
    def title(self) -> str:
        """The name as its docstring spells it (HyPO), else capitals for a short name, else a plain word."""
        spelled = self.summary.partition(":")[0]
        if spelled.lower() == self.name:
            return spelled
        return self.name.upper() if len(self.name) <= 4 else self.name.replace("_", " ").capitalize()


@cache
def describe(name: str) -> Method:
    """The method's summary and papers; a name without a file (another version's run) has neither."""
    source = resources.files("prefkit").joinpath("methods", f"{name}.py")
    if not name.isidentifier() or not source.is_file():
        return Method(name, "", ())
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    numbers = dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", text))
    return Method(name, text.split("\n", 1)[0].strip(), tuple(numbers))


def bibtex(number: str) -> str:
    """A BibTeX entry for an arXiv number."""
    fields = {"eprint": number, "archivePrefix": "arXiv"}
    if number in PAPERS:
        title, authors, year = PAPERS[number]
        fields = {"title": "{" + title + "}", "author": authors, "year": str(year)} | fields
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{arxiv-{number},\n{lines}\n}}"
