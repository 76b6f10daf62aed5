"""Write one self-contained HTML page about a run, or about several side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from prefkit.commands.compare import compared, tables
from prefkit.errors import InputError
from prefkit.report import card, comparison, page
from prefkit.report.comparison import Differences
from prefkit.report.read import Run, read


def main(argv: Sequence[str]) -> int:
    """Parses the command line, writes the page and prints its path."""
    parser = argparse.ArgumentParser(prog="prefkit report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory; others are held against the first")
    parser.add_argument("--out", metavar="FILE", help="page to write (RUN/report.html; comparison.html for several)")
    options = parser.parse_args(list(argv))
    if len(options.runs) == 1:
        print(one(options.runs[0], options.out))
    else:
        print(several(options.runs, Path(options.out or "comparison.html")))
    return 0


def one(directory: str, out: str | None = None) -> Path:
    """The page, the figures and, for a finished run without one, the model card."""
    path = page.write(directory, out)
    if read(directory).result is not None:
        card.write(directory, replace=False)
    return path


def several(directories: Sequence[str], out: Path) -> Path:
    """The comparison page; runs evaluated on other rows than the first are shown without paired differences."""
    runs = [read(directory) for directory in directories]
    places = [run.directory.resolve() for run in runs]
    if len(set(places)) < len(places):
        raise InputError("the same run stands twice", where="prefkit report", mend="name each run once")
    labels = comparison.names(runs)
    differences: list[Differences] = []
    warnings: list[str] = []
    for run, label in zip(runs[1:], labels[1:], strict=True):
        found = _differences(runs[0], run, labels[0], label)
        if isinstance(found, str):
            warnings.append(found)
        else:
            differences += found
    return comparison.write(runs, out, differences=differences, warnings=warnings)


def _differences(a: Run, b: Run, first: str, second: str) -> list[Differences] | str:
    try:
        result = compared(a, b)
    except InputError as error:
        return f"No paired differences between {first} and {second}: {error.what}."
    return [
        Differences(title=title, columns=head, rows=tuple(rows))
        for title, (head, rows) in zip((f"{first} minus {second}", ""), tables(result, (first, second)), strict=False)
    ]
