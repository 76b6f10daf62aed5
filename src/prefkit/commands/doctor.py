"""Check the engine on your own model, data and device, measure each backend, and recommend a setting.

prefkit doctor MODEL                        with built-in rows
prefkit doctor MODEL --data pairs.jsonl     with rows of your preference data
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefkit.domains.text.diagnosis import Finding, Start, diagnose, load_policy, read_rows, refusals
from prefkit.domains.text.diagnosis_speed import MEMORY, Advice, Cost, advise, measure
from prefkit.errors import InputError
from prefkit.report.page import save

COLOUR = {"pass": "green", "FAIL": "bold red", "skipped": "yellow"}
EPILOG = """All weights train unless --use_peft is given. Their gradients are held twice, beside a copy of the model as
the reference: about 16 bytes a weight, and the activations of all rows at once. For a large model take --use_peft,
and fewer or shorter rows (--num_rows, --max_length). The exit code is 0 when no check fails, and 1 when one does."""


def main(argv: Sequence[str]) -> int:
    """Prints both tables and the recommendation; 1 if a check fails. Raises InputError for a bad model or data."""
    options = _parser().parse_args([_underscored(word) for word in argv])
    for name in ("num_rows", "max_length"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}", where=f"--{name}", mend="1 or more")
    console = Console(highlight=False)
    start = Start(model_name_or_path=options.model, dtype=options.dtype, use_peft=options.use_peft, seed=options.seed)
    policy = load_policy(start)
    rows = read_rows(options.data, policy, count=options.num_rows, max_length=options.max_length, seed=options.seed)
    device, cuda = _device(policy.world.device), policy.world.device.type == "cuda"
    for name, text in (("model", f"{options.model}: {policy.describe()}"), ("rows", rows.source), ("device", device)):
        console.print(Text(f"{name:<8}{text}"), soft_wrap=True)
    refused = refusals(policy)
    findings = diagnose(policy, rows, refused, seed=options.seed)
    console.print(checks_table(findings))
    costs = measure(policy, rows.groups, refused, findings)
    console.print(costs_table(costs, cuda=cuda))
    if policy.dtype == torch.bfloat16:
        console.print("bfloat16 rounds, and its tolerances are wide: --dtype float32 checks more sharply")
    advice = advise(policy, rows.groups, costs, max_length=options.max_length)
    console.print(Text(f"recommended: {advice.flags} ({advice.why})"), soft_wrap=True)
    failed = sum(finding.state == "FAIL" for finding in findings)
    if failed:
        console.print(Text(f"{failed} of {len(findings)} checks failed: please report them", "bold red"))
    if options.json:
        about = {
            "model": options.model,
            "dtype": str(policy.dtype).removeprefix("torch."),
            "use_peft": options.use_peft,
            "rows": rows.source,
            "device": device,
            "memory": MEMORY[cuda],
            "auto": policy.module.how,
        }
        content = to_json(about, findings, costs, advice)
        console.print(Text(str(save(content + "\n", Path(options.json)))), soft_wrap=True)
    return int(failed > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefkit doctor",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id, folder, run directory, or packaged asset")
    add(
        "--data",
        default="",
        metavar="FILE",
        help="preference data, as --dataset_name takes it (default: built-in rows)",
    )
    add("--num_rows", type=int, default=8, metavar="N", help="rows drawn from the data (8)")
    add("--max_length", type=int, default=1024, metavar="N", help="prompt + answer tokens (1024)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="compute dtype (auto)")
    add("--use_peft", action="store_true", help="train a LoRA adapter instead of all weights")
    add("--seed", type=int, default=0, metavar="N", help="seed of the rows drawn and the answers sampled (0)")
    add("--json", default="", metavar="FILE", help="also write everything as JSON")
    return parser


def _underscored(word: str) -> str:
    """--max-length and --max_length are the same option."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def checks_table(findings: Sequence[Finding]) -> Table:
    """One row for each check."""
    table = Table(title="Checks (layouts against padded rows)", title_justify="left")
    table.add_column("Check", no_wrap=True)
    for column in ("Result", "Deviation", "Tolerance", "Note"):
        table.add_column(column, justify="right" if column in ("Deviation", "Tolerance") else "left", overflow="fold")
    for finding in findings:
        deviation = "" if finding.deviation is None else f"{finding.deviation:.2g}"
        tolerance = "" if finding.tolerance is None else f"{finding.tolerance:g} {finding.unit}".strip()
        state = Text(finding.state, COLOUR[finding.state])
        table.add_row(Text(finding.check), state, deviation, tolerance, Text(finding.note))
    return table


def costs_table(costs: Sequence[Cost], *, cuda: bool) -> Table:
    """One row for each backend."""
    table = Table(title="Forward and backward pass over these rows", title_justify="left")
    table.add_column("Backend")
    for column in ("Pairs/s", "Tokens", f"MiB {MEMORY[cuda]}"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("Note", overflow="fold")
    for cost in costs:
        speed = "" if cost.pairs_per_second is None else f"{cost.pairs_per_second:.3g}"
        memory = "" if cost.memory is None else f"{cost.memory / 2**20:,.1f}"
        table.add_row(cost.backend, speed, str(cost.tokens or ""), memory, Text(cost.note))
    return table


def to_json(about: dict[str, Any], findings: Sequence[Finding], costs: Sequence[Cost], advice: Advice) -> str:
    """Everything found, as JSON; a deviation that is no number is null."""
    checks = [dataclasses.asdict(finding) for finding in findings]
    for entry in checks:
        if entry["deviation"] is not None and not math.isfinite(entry["deviation"]):
            entry["deviation"] = None
    content = {**about, "checks": checks, "backends": [dataclasses.asdict(cost) for cost in costs]}
    content["recommended"] = {**dataclasses.asdict(advice), "flags": advice.flags}
    return json.dumps(content, indent=2, ensure_ascii=False)
