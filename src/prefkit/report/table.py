"""Results in the terminal: a short summary table, and answers before and after side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefkit.report import rounds, wording
from prefkit.report.metrics import metric, number
from prefkit.report.parts import text_of
from prefkit.report.read import Row, read

COLOUR = {"good": "green", "bad": "red", "open": "yellow", "few": "yellow"}


def print_summary(directory: Path | str, *, console: Console | None = None) -> None:
    """Prints start and final values, what the main results exclude, what rounds took, and where the report is."""
    run = read(directory)
    console = console or Console()
    rows = wording.change_rows(run.main_evaluation)
    if rows:
        console.print(_grid(("Metric", "Start", "Final", "Change", "Interval of final"), rows))
    for verdict in wording.verdicts(run.main_evaluation):
        text = Text(f"{verdict.label} {verdict.value}, {verdict.interval}: {verdict.sentence}", COLOUR[verdict.kind])
        if metric(verdict.name).neutral is not None:
            console.print(text)
    if line := rounds.summary(run):
        console.print(Text(line))  # Text: a judge's name with [brackets] is no markup
    if run.result:
        console.print(wording.selection(run))
        for label, folder in (("Model", run.result.model), ("Adapter", run.result.adapter)):
            if folder and (run.directory / folder).is_dir():
                console.print(_place(label, run.directory / folder))
    page = run.directory / "report.html"
    if page.is_file():
        console.print(_place("Report", page))


def print_samples(rows: Sequence[Row], limit: int = 3, *, console: Console | None = None) -> None:
    """Prints the first `limit` rows of evaluation/samples.jsonl, start beside final; nothing for no rows."""
    if not rows or limit < 1:
        return
    console = console or Console()
    table = Table(title=f"Held-out answers, first {min(limit, len(rows))} of {len(rows)}", title_justify="left")
    table.add_column("Prompt", ratio=2, overflow="fold")
    table.add_column("Before", ratio=3, overflow="fold")
    table.add_column("After", ratio=3, overflow="fold")
    for row in rows[:limit]:
        before = _answer(row.get("answer_start"), row.get("gold_start"))
        table.add_row(Text(text_of(row["prompt"])), before, _answer(row["answer_final"], row.get("gold_final")))
        table.add_section()
    console.print(table)


def print_rows(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", console: Console | None = None
) -> None:
    """Prints a table whose columns after the first are numbers."""
    (console or Console()).print(_grid(columns, rows, title=title))


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> Table:
    table = Table(title=title or None, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: cells with [brackets] are no markup
    return table


def _answer(answer: object, gold: float | None) -> Text:
    text = Text(str(answer or "(empty)"))
    if gold is not None:
        text.append(f"\ngold {number(gold, digits=2)}", style="dim")
    return text


def _place(label: str, path: Path) -> Text:
    text = Text(f"{label}: {path}", overflow="fold", no_wrap=False)
    text.stylize("bold", len(label) + 2)
    return text
