"""Print what was found in data: tables, length bars, memory forecast; plain text when piped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefkit.domains.text.memory import GIB, Forecast, Shape, forecast

if TYPE_CHECKING:
    from prefkit.domains.text.check import Lengths, Report
    from prefkit.domains.text.convert import Conversion

EXAMPLES = 3
"""problems shown of each kind"""


def show_report(report: Report, *, every: bool = False, console: Console | None = None) -> None:
    """Counts, lengths and problems; `every` prints all problems instead of the first of each kind."""
    console = console or Console(highlight=False)
    table = Table(title=escape(report.name) or None, title_justify="left", show_header=False, box=None)
    table.add_row("rows", str(report.rows))
    table.add_row("used for training", str(report.kept))
    for reason, count in report.dropped.items():
        table.add_row(f"  left out: {reason}", str(count))
    for name, count in report.counts.items():
        table.add_row(_LABELS[name], str(count))
    for name, count in report.overlap.items():
        table.add_row(f"{name} also in the evaluation data", str(count))
    console.print(table)
    for part, lengths in report.lengths.items():
        _show_lengths(part, lengths, console)
    _show_problems(report, every, console)


_LABELS = {
    "duplicates": "duplicate rows",
    "identical": "identical pairs (never trained)",
    "empty": "empty answers",
    "ties": "ties (equal scores)",
    "truncated": "rows with a truncated answer",
    "leaked": "answers that repeat the prompt",
    "apart": "answers encoded apart from the prompt",
}


def _show_lengths(part: str, lengths: Lengths, console: Console) -> None:
    quantiles = lengths.quantiles
    console.print(
        f"\n[bold]{part}[/bold] in {lengths.unit}: median {quantiles['0.5']:.0f}, "
        f"95 % {quantiles['0.95']:.0f}, longest {quantiles['1']:.0f}"
    )
    top = max(lengths.counts)
    for low, high, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        span = f"{low}" if high == low + 1 else f"{low}-{high - 1}"
        bar = "█" * max(round(32 * count / top), int(count > 0))
        console.print(f"  {span:>13}  {bar:<32} {count}")


def _show_problems(report: Report, every: bool, console: Console) -> None:
    if not report.problems:
        console.print("\n[green]no problems[/green]")
        return
    counts = Counter((problem.level, problem.kind) for problem in report.problems)
    shown: Counter[tuple[str, str]] = Counter()
    console.print()
    for problem in report.problems:
        key = problem.level, problem.kind
        shown[key] += 1
        if not every and shown[key] > EXAMPLES:
            continue
        colour = "red" if problem.level == "error" else "yellow"
        place = ", ".join(filter(None, [problem.where, f"field {problem.field!r}" if problem.field else ""]))
        text = f"{place}: {problem.what}" if place else problem.what
        console.print(f"[{colour}]{problem.level}[/{colour}] {escape(text)}", soft_wrap=True)
        console.print(f"  mend: {escape(problem.mend)}", soft_wrap=True)
    for (level, kind), count in counts.items():
        if not every and count > EXAMPLES:
            console.print(f"... {count - EXAMPLES} more of kind {escape(kind)!r} ({level}); --all prints them")
    errors = len(report.errors)
    console.print(f"\n{errors} errors, {len(report.problems) - errors} warnings")


def show_memory(
    shape: Shape, lengths: Mapping[str, Lengths], *, rows: int, lora_r: int, console: Console | None = None
) -> None:
    """What training needs at the median and the longest sequence, for LoRA and for all weights."""
    console = console or Console(highlight=False)
    size = f"{shape.parameters / 1e6:.1f} M parameters, {rows} sequences a pass"
    table = Table("GiB", title=escape(f"memory for {shape.name}: {size}"), title_justify="left")
    columns: list[Forecast] = []
    for trained in ("lora", "all"):
        for name, share in (("median", "0.5"), ("longest", "1")):
            length = int(lengths["total"].quantiles[share])
            answer = max(int(lengths[part].quantiles[share]) for part in lengths if part not in ("prompt", "total"))
            label = f"LoRA r={lora_r}" if trained == "lora" else "all weights"
            table.add_column(f"{label}\n{name} {length}", justify="right")
            columns.append(forecast(shape, rows=rows, length=length, answer=answer, trained=trained, lora_r=lora_r))
    for use in ("weights", "reference", "gradients", "optimizer", "activations", "logits", "total"):
        table.add_row(use, *(f"{getattr(column, use) / GIB:.2f}" for column in columns))
    console.print()
    console.print(table)
    console.print("bfloat16, AdamW, no gradient checkpointing; an estimate (docs/data-formats.md)")
    if shape.context and lengths["total"].quantiles["1"] > shape.context:
        console.print(f"[yellow]warning[/yellow] the model's context is {shape.context} tokens")


def show_conversion(done: Conversion, out: str, console: Console | None = None) -> None:
    """Counts of a conversion and where the file is."""
    console = console or Console(highlight=False)
    table = Table(show_header=False, box=None)
    table.add_row("shape", done.shape)
    table.add_row("rows read", str(done.read))
    table.add_row("pairs written", str(done.written))
    for reason, count in done.skipped.most_common():
        table.add_row(f"  skipped: {escape(reason)}", str(count))
    console.print(table)
    console.print(f"wrote {escape(out)}", soft_wrap=True)
