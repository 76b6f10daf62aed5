"""The model card: README.md of a run's model folder, in the Hub's format, without anybody's paths."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from prefkit.assets import ASSETS
from prefkit.errors import InputError
from prefkit.report import judges, wording
from prefkit.report.method import bibtex, describe
from prefkit.report.metrics import metric, plain
from prefkit.report.page import save
from prefkit.report.read import Run, read
from prefkit.report.round_counts import Rounds, read_rounds
from prefkit.report.rounds import cost

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
BASE_OF_ASSET = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub ids of packaged models, for the card's `base_model`"""

KINDS = {
    "text-generation": (
        "sft",
        "dpo",
        "hypo",
        "sdpo",
        "iterative_dpo",
        "online_dpo",
        "selm",
        "xpo",
        "osp",
        "drpo",
        "ppo",
    ),
    "text-classification": ("reward", "ranker"),
}


def write(directory: Path | str, *, licence: str = "", base_model: str = "", replace: bool = True) -> list[Path]:
    """Writes README.md into the run's model folder (and adapter folder). Returns the paths written.

    With `replace` False a card that is there stays: somebody may have edited it.

    `base_model` (Hub id) and `licence` (SPDX name) replace what the run's configuration tells.
    """
    run = read(directory)
    if run.result is None:
        raise InputError(
            "the run has not finished, so there is no model to describe",
            where=str(directory),
            mend=f"prefkit resume {shlex.quote(str(directory))}",
        )
    folders = [run.directory / name for name in (run.result.model, run.result.adapter) if name]
    return [
        save(
            render(run, licence=licence, base_model=base_model, adapter=folder.name == run.result.adapter),
            folder / "README.md",
        )
        for folder in folders
        if folder.is_dir() and (replace or not (folder / "README.md").exists())
    ]


def render(run: Run, *, licence: str = "", base_model: str = "", adapter: bool = False) -> str:
    """The card's text."""
    method = describe(run.method)
    model = public(run.config.get("model_name_or_path"))
    base = base_model or BASE_OF_ASSET.get(model, model if HUB_ID.fullmatch(model) else "")
    data = public(run.config.get("dataset_name"))
    rounds = read_rounds(run)
    known = licence or (ASSETS[model].licence_content if model in ASSETS else "")
    environment = Environment(
        loader=PackageLoader("prefkit", "report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    return environment.get_template("card.md").render(
        front=_front(run, base, data, known, adapter).strip(),
        name=base.rpartition("/")[2] or model or "model",
        run=run,
        method=method,
        adapter=adapter,
        base=base or model or "a model given in memory",
        data=data or "data given in memory",
        evaluation_data=public(run.config.get("eval_dataset")),
        rows=[[_cell(cell) for cell in row] for row in wording.change_rows(run.main_evaluation)],
        verdicts=wording.verdicts(run.main_evaluation),
        split_note=wording.split_note(run),
        selection=wording.selection(run),
        labels=_labels(run, rounds),
        limitations=_limitations(run, rounds),
        command=public_command(str(run.environment.get("command") or "")),
        config=[(name, _cell(public(value))) for name, value in _config(run)],
        versions=[(name, str(value)) for name, value in (run.environment.get("versions") or {}).items()],
        citations=[bibtex(paper) for paper in method.papers],
    )


def public(value: Any) -> str:
    """A setting without places on somebody's disk: a path keeps its last part."""
    if isinstance(value, (list, tuple)):
        return ", ".join(public(item) for item in value)
    return wording.named(value) if isinstance(value, str) else wording.shown(value)


def public_command(command: str) -> str:
    """A command line whose paths keep their last part."""
    words: list[str] = []
    for word in shlex.split(command):
        flag, equals, value = word.partition("=")
        words.append(f"{flag}={public(value)}" if equals and flag.startswith("-") else public(word))
    return shlex.join(words)


def _front(run: Run, base: str, data: str, licence: str, adapter: bool) -> str:
    tags = ["prefkit", run.method, "preference-optimization"]
    fields: dict[str, Any] = {"base_model": base} if HUB_ID.fullmatch(base) else {}
    if licence:
        fields["license"] = licence.lower()
    fields["library_name"] = "peft" if adapter else "transformers"
    kind = next((kind for kind, methods in KINDS.items() if run.method in methods), "")
    if kind:
        fields["pipeline_tag"] = kind
    if HUB_ID.fullmatch(data):
        fields["datasets"] = [data]
    fields["tags"] = [*tags, "lora"] if run.config.get("use_peft") else tags
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _config(run: Run) -> list[tuple[str, Any]]:
    hidden = ("output_dir", "overwrite", "dry_run", "report_to")
    changed = {name for name, _, _ in wording.settings(run)[0]}
    named = {name: value for name, value in run.config.items() if name not in hidden and value not in ("", None)}
    return sorted(named.items(), key=lambda item: item[0] not in changed)


def _labels(run: Run, rounds: Rounds | None) -> list[str]:
    """Who judged, in how many rounds, for how many labels."""
    if rounds is None:
        return []
    total = rounds.total
    lines = [f"Rounds: {len(rounds.each):,}, with {total.answers:,} answers drawn and {total.matches:,} pairs"]
    if not rounds.judge:
        return [*lines, "Judge: none; the rounds train on stored pairs"]
    what, whose = judges.described(rounds.judge), judges.provenance(rounds.judge)
    lines.append(f"Judge: `{rounds.judge}`" + (f", {what}. {whose}" if what else ""))
    tokens = f", {total.tokens:,} tokens" if total.tokens else ""
    lines.append(f"Label budget: {total.comparisons:,} comparisons asked, {total.calls:,} calls of the judge{tokens}")
    if price := cost(run, rounds):
        lines.append(f"Cost of the judge: {price}, at the prices given to the run")
    return lines


def _limitations(run: Run, rounds: Rounds | None) -> list[str]:
    evaluation = run.main_evaluation
    lines = [
        f"{verdict.label}: {verdict.sentence}"
        for verdict in wording.verdicts(evaluation)
        if verdict.kind in ("open", "few") and metric(verdict.name).neutral is not None
    ]
    sizes = [estimate.n for estimate in evaluation.intervals.values()]
    if sizes:
        lines.append(f"Held-out results rest on at most {max(sizes)} rows of data like the training data.")
    else:
        lines.append("No held-out result with an interval was stored.")
    if rounds is not None and judges.kind_of(rounds.judge) not in ("", "stored"):
        lines.append(
            f"The preferences it learned from are simulated by {judges.described(rounds.judge)}, with its mistakes; "
            "they are not the judgment of people."
        )
    if option := judges.same_as_evaluation(run.config):
        lines.append(judges.NOT_INDEPENDENT[option])
    if any(plain(name).startswith("gold") for name in evaluation.final):
        lines.append("The gold reward is a classifier or rule: optimising towards it can exploit its mistakes.")
    lines.append("Preference training changes style and content together; it was not checked for safety or facts.")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
