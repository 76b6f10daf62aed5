"""The report of one run: a single self-contained HTML page, figures and all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prefkit.errors import InputError
from prefkit.report import curves, frontier, rounds, shapes, wording
from prefkit.report.canvas import Figure
from prefkit.report.metrics import number
from prefkit.report.parts import Table, embedded, pairs, table, text_of
from prefkit.report.read import Row, Run, read

MOST_SAMPLES = 40
"""samples on the page; the files hold all of them"""

QUANTILES = (("0", "shortest"), ("0.5", "median"), ("0.95", "95 %"), ("1", "longest"))


def write(directory: Path | str, out: Path | str | None = None) -> Path:
    """Draws RUN/plots/*.png and writes the report page (RUN/report.html unless `out` is given). Returns its
    path.
    """
    run = read(directory)
    plots = run.directory / "plots"
    figures = curves.draw(run, plots) + shapes.histograms(run, plots)
    path = Path(out) if out is not None else run.directory / "report.html"
    online = rounds.section(run, plots)
    values = context(run, figures, shapes.intervals(run, plots), online)
    values["frontier"] = [embedded(figure) for figure in frontier.draw(run, plots)]
    values["beside"] = (run.directory / frontier.ARM / "config.json").is_file()
    return save(render("run.html", values), path)


def context(
    run: Run, figures: Sequence[Figure], intervals: Figure | None, online: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Everything the template `run.html` shows; `online` is its section on rounds, where the run had any."""
    changed, unchanged = wording.settings(run)
    change = wording.change_rows(run.main_evaluation)
    return {
        "title": f"{run.name}: prefkit report",
        "version": run.version,
        "run": run,
        "heading": wording.headline(run),
        "lede": wording.lede(run),
        "facts": wording.facts(run),
        "warnings": [*_warnings(run), *run.notes],
        "verdicts_shown": wording.verdicts(run.main_evaluation),
        "intervals": [embedded(intervals)] if intervals else [],
        "split_note": wording.split_note(run),
        "change": table(("Metric", "Start", "Final", "Change", "Interval of final"), change) if change else None,
        "plots": [embedded(figure) for figure in figures],
        "rounds": online,
        "borders": curves.borders(run),
        "new_reference": bool(run.config.get("reset_reference")),
        "samples": [_sample(row) for row in run.samples[:MOST_SAMPLES]],
        "samples_note": _samples_note(run),
        "data": _data(run.data),
        "problems": _problems(run.data),
        "selection": wording.selection(run),
        "command_list": wording.commands(run),
        "environment": pairs(
            [(name.removeprefix("versions/"), wording.shown(value)) for name, value in _flat(run.environment)]
        ),
        "changed": table(("Changed from the default", "Value", "Default"), changed, kind="pairs", numeric=())
        if changed
        else None,
        "unchanged": pairs(unchanged) if unchanged else None,
        "unchanged_title": f"{len(unchanged)} options at their defaults" if changed else "All options",
    }


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page from one of this package's templates; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("prefkit", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = resources.files("prefkit").joinpath("report", "page.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(css=Markup(css), **values)


def save(html: str, path: Path) -> Path:
    """Writes the page; a half-written page never replaces a whole one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(html, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(path), mend="choose another --out") from None
    return path


def _warnings(run: Run) -> list[str]:
    if run.result is None:
        return ["This run has not finished. The page shows what it had written so far."]
    if run.result.status != "complete":
        return [f"This run ended early: {run.result.reason or run.result.status}."]
    return []


def _sample(row: Row) -> dict[str, str]:
    remarks: list[str] = []
    if row.get("group") not in (None, ""):
        remarks.append(str(row["group"]))
    if row.get("length") is not None:
        remarks.append(f"{row['length']} tokens")
    if row.get("finished") is False:
        remarks.append("cut at the token limit")
    if row.get("log_ratio") is not None:
        remarks.append(f"log-ratio to the reference {number(row['log_ratio'], digits=2)} nats")
    judge = next((judge for judge in ("gold", "reward_model") if row.get(f"{judge}_final") is not None), "")
    before, after = row.get(f"{judge}_start"), row.get(f"{judge}_final")
    return {
        "prompt": text_of(row["prompt"]),
        "start": str(row.get("answer_start") or ""),
        "final": str(row["answer_final"]),
        "judge": judge.replace("_", " "),
        "score_start": number(before, digits=2) if before is not None else "",
        "score_final": number(after, digits=2) if after is not None else "",
        "remarks": " · ".join(remarks),
    }


def _samples_note(run: Run) -> str:
    count, total = min(len(run.samples), MOST_SAMPLES), len(run.samples)
    which = f"The first {count} of {total} held-out prompts" if count < total else f"All {total} held-out prompts"
    return f"{which}, in their order: nothing is picked by hand."


def _data(data: Mapping[str, Any]) -> list[Table]:
    """Tables per part of the data report (train, held out): what was counted, and how long the answers are."""
    tables: list[Table] = []
    for title, part in _parts(data):
        counted = {name: value for name, value in part.items() if name not in ("problems", "lengths", "fingerprint")}
        rows = [(name.replace("_", " ").replace("/", ": "), wording.shown(value)) for name, value in _flat(counted)]
        if rows:
            tables.append(pairs(rows, title=title))
        lengths = _lengths(part.get("lengths") or {})
        if lengths:
            columns = ("Length", *(label for _, label in QUANTILES))
            tables.append(table(columns, lengths, title=f"{title}: lengths".removeprefix(": ")))
    return tables


def _lengths(lengths: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row per part of a data row (prompt, chosen, ...): its quantiles, with their unit."""
    return [
        (
            f"{name}, {spread.get('unit', '')}".removesuffix(", "),
            *(wording.shown(spread["quantiles"].get(key)) for key, _ in QUANTILES),
        )
        for name, spread in lengths.items()
        if isinstance(spread, Mapping) and isinstance(spread.get("quantiles"), Mapping)
    ]


def _problems(data: Mapping[str, Any]) -> Table | None:
    problems = [problem for _, part in _parts(data) for problem in part.get("problems", [])]
    rows = [
        (
            str(p.get("level", "")),
            str(p.get("where") or p.get("row", "")),
            str(p.get("what", "")),
            str(p.get("mend", "")),
        )
        for p in problems[:30]
    ]
    title = f"Problems ({len(problems)})" if len(problems) <= 30 else f"Problems (30 of {len(problems)})"
    return table(("Level", "Where", "What", "Mend"), rows, title=title, numeric=()) if rows else None


def _parts(data: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    if not data:
        return []
    nested = [(name, part) for name, part in data.items() if isinstance(part, dict) and "problems" in part]
    return [(name.replace("_", " ").capitalize(), part) for name, part in nested] or [("", data)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Scalars of nested mappings under joined names; lists of objects are left to those who know them."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}/")
        elif not (isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)):
            rows.append((f"{prefix}{name}", value))
    return rows
