"""What a run's numbers say, in plain sentences: shared by the page, the terminal summary and the model card."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefkit.report import judges
from prefkit.report.canvas import interval_text
from prefkit.report.method import describe
from prefkit.report.metrics import UNIMPORTANT, duration, metric, number, plain, rank, signed
from prefkit.report.read import Estimate, Evaluation, Run

FEW_GROUPS = 10
"""below so many independent groups a bootstrap interval covers too little, so no verdict is given"""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One held-out result: `sentence` says whether the value of 'nothing learned' is excluded."""

    name: str
    label: str
    value: str
    interval: str
    sentence: str
    kind: str
    """good | bad | open | few: excluded on the good side or the bad side, not excluded, or too few groups to tell"""


def verdicts(evaluation: Evaluation) -> list[Verdict]:
    """A verdict per metric that has an interval, the most telling first."""
    return [_verdict(plain(name), evaluation.intervals[name]) for name in sorted(evaluation.intervals, key=rank)]


def _verdict(name: str, estimate: Estimate) -> Verdict:
    kind, sentence = judge(name, estimate)
    return Verdict(
        name=name,
        label=metric(name).label,
        value=number(estimate.mean),
        interval=f"{round(100 * estimate.level)} % {interval_text(estimate)}",
        sentence=sentence,
        kind=kind,
    )


def judge(name: str, estimate: Estimate) -> tuple[str, str]:
    """(kind as in Verdict, sentence) for an estimate against the metric's neutral value."""
    known = metric(name)
    over = f"{estimate.n} rows in {estimate.groups} groups" if estimate.groups != estimate.n else f"{estimate.n} rows"
    if not estimate.bounded:
        return "few", f"Measured on one group of {estimate.n} rows: too little for an interval."
    if known.neutral is None:
        meaning = f"{known.meaning[0].upper()}{known.meaning[1:]}, over" if known.meaning else "Over"
        return "open", f"{meaning} {over}."
    neutral = number(known.neutral, digits=1) if known.neutral else "0"
    if not estimate.excludes(known.neutral):
        return "open", f"{neutral} is not excluded: over {over} this may be chance."
    side = "above" if estimate.mean > known.neutral else "below"
    sentence = f"{neutral} is excluded: the whole interval lies {side} it, over {over}."
    if estimate.groups < FEW_GROUPS:
        return "few", f"{sentence} With fewer than {FEW_GROUPS} groups an interval is too narrow to be trusted."
    if not known.better:
        return "open", sentence
    return ("good" if (side == "above") == (known.better == "higher") else "bad"), sentence


def change_rows(evaluation: Evaluation) -> list[tuple[str, str, str, str, str]]:
    """(metric, start, final, change, interval of the final value), every metric that was measured."""
    names = dict.fromkeys([*evaluation.start, *evaluation.final])
    rows: list[tuple[str, str, str, str, str]] = []
    for name in sorted(names, key=rank):
        if plain(name) in UNIMPORTANT:
            continue
        start, final = evaluation.start.get(name), evaluation.final.get(name)
        difference = signed(final - start) if start is not None and final is not None else "–"
        estimate = evaluation.intervals.get(name)
        span = interval_text(estimate) if estimate else "–"
        rows.append((metric(name).label, number(start), number(final), difference, span))
    return rows


def named(value: Any) -> str:
    """A model, data or judge's name for people: a Hub id or asset as it is, a path (of any system) as its last part."""
    text = str(value or "")
    kind, colon, rest = text.partition(":")
    if colon and kind in judges.ON_DISK:
        return f"{kind}:{named(rest)}"
    if judges.kind_of(text):
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if is_path(text) else text


def is_path(text: str) -> bool:
    """True for what looks like a place on a disk, as against a Hub id, an asset or another plain word."""
    if text.startswith(("/", "~", ".", "\\")) or "\\" in text or text[1:3] in (":/", ":\\"):
        return True
    if text.count("/") > 1 or text.endswith((".json", ".jsonl", ".csv", ".parquet", ".yaml", ".yml", ".txt", "/")):
        return True
    return "/" in text and Path(text).exists()  # runs/sft has the shape of a Hub id


def lede(run: Run) -> str:
    """One sentence: what was trained, from which model, on what data, by how many steps."""
    model = named(run.config.get("model_name_or_path")) or "a model given in memory"
    data = named(run.config.get("dataset_name")) or "data given in memory"
    how = "a LoRA adapter on " if run.config.get("use_peft") else ""
    steps = run.result.steps if run.result else max((int(row.get("step", 0)) for row in run.metrics), default=0)
    return f"{describe(run.method).title} trained {how}{model} on {data} for {steps:,} optimizer steps."


def headline(run: Run) -> str:
    """The result in a few words, for the page's title line."""
    found = verdicts(run.main_evaluation)
    if not found:
        return f"{describe(run.method).title} on {named(run.config.get('dataset_name')) or 'data given in memory'}"
    first = found[0]
    verb = {
        "good": "learned beyond chance",
        "bad": "moved the wrong way",
        "open": "no difference beyond chance",
        "few": "too few groups to tell",
    }
    name = f"{first.label} {first.value} on held‑out rows"
    return name if metric(first.name).neutral is None else f"{name}: {verb[first.kind]}"


def split_note(run: Run) -> str:
    """Which rows the headline was measured on, and whether they had a say in choosing the model."""
    if not (run.result and run.result.selected_by_held_out):
        return "Measured on held-out rows that chose nothing. Intervals resample whole groups of rows."
    if run.test is not None or run.data.get("parts", {}).get("selection"):
        return "Measured on held-out rows that chose nothing: others chose the step. Intervals resample whole groups."
    return (
        "Measured on the same held-out rows that chose the step, so these numbers are somewhat optimistic; "
        "separate rows would not be."
    )


def selection(run: Run) -> str:
    """The selected step, the rule that chose it, and how the run ended."""
    result = run.result
    if result is None:
        return "The run has not finished: nothing is selected yet."
    parts = [f"Step {result.selected_step:,} of {result.steps:,}, by the rule: {result.rule or 'last step'}."]
    if result.status != "complete":
        parts.append(f"The run ended early: {result.reason or result.status}.")
    elif result.reason:
        parts.append(f"{result.reason[0].upper()}{result.reason[1:]}.")
    return " ".join(parts)


def facts(run: Run) -> list[tuple[str, str]]:
    """Short facts beside the headline."""
    found: list[tuple[str, str]] = []
    if run.result:
        found.append(("Steps", f"{run.result.steps:,}"))
        found.append(("Time", duration(run.result.seconds)))
    if run.environment.get("device"):
        found.append(("Device", str(run.environment["device"])))
    for name, label in (
        ("beta", "β"),
        ("alpha", "α"),
        ("kl_weight", "KL weight"),
        ("learning_rate", "Learning rate"),
        ("seed", "Seed"),
    ):
        if name in run.config:
            found.append((label, f"{run.config[name]:g}"))
    return found


def place(run: Run) -> str:
    """The run directory as it should be typed: relative when it lies below the current folder."""
    path = run.directory.resolve()
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


def commands(run: Run) -> list[tuple[str, str]]:
    """Exact commands for this run: (what it does, line)."""
    folder = place(run)
    quoted, again = shlex.quote(folder), shlex.quote(f"{folder}-again")
    lines = [("How it was started", str(run.environment["command"]))] if run.environment.get("command") else []
    lines += [
        (
            "Run it again with exactly these settings",
            f"prefkit {run.method} --from {quoted} --output_dir {again}",
        ),
        ("Resume it if it was interrupted", f"prefkit resume {quoted}"),
        ("Ask the model something", f'prefkit sample {quoted} -p "…"'),
        ("Export a plain Hugging Face folder", f"prefkit export {quoted} --to FOLDER"),
        ("Compare with another run on the same held-out rows", f"prefkit compare {quoted} OTHER_RUN"),
        ("Write this page again", f"prefkit report {quoted}"),
    ]
    return lines


def settings(run: Run) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """(name, value, default) of every option that is not at its default, and (name, value) of the others.

    A run that stored no defaults has all its options in the second list.
    """
    changed = [
        (name, shown(value), shown(run.defaults[name]))
        for name, value in run.config.items()
        if name in run.defaults and not same(value, run.defaults[name])
    ]
    names = {name for name, _, _ in changed}
    return changed, [(name, shown(value)) for name, value in run.config.items() if name not in names]


def same(a: Any, b: Any) -> bool:
    """Equal as JSON: a tuple equals a list, 1 equals 1.0, but true does not equal 1."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def shown(value: Any) -> str:
    """A setting for people: words for true and false, commas in lists, a dash for empty."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ("", [], ()):
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(item)}" for name, item in value.items())
    return str(value)
