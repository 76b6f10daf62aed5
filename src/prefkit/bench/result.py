"""Runs a bench in one of its modes, and shows what came out: tables, a line, JSON."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from prefkit.bench import arms, counts, memory
from prefkit.bench.blocks import Block, agreement, interleave, ratios, summary
from prefkit.bench.workloads import Workload
from prefkit.domains.text.scoring import causal_lm
from prefkit.engine import environment
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.report.table import print_rows

AGREE = {"float32": 1e-3, "bfloat16": 5e-2}
"""how far the log-probs of two arms may be apart, relatively: beyond it they do not train on the same thing"""

Found = dict[str, Any]


def timed(workload: Workload, names: Sequence[str], repeats: int) -> Found:
    """Interleaved blocks of the arms. Raises InputError where two arms do not compute the same."""
    setup = arms.prepare(workload)
    blocks: dict[str, Callable[[], Block]] = {}
    for name in names:
        if name == "trl":
            from prefkit.bench.peer import Peer

            blocks[name] = Peer(setup).block
        else:
            blocks[name] = partial(arms.block, setup, name)
    found = interleave(blocks, repeats)
    apart = agreement(found)
    dtype = str(setup.policy.dtype).removeprefix("torch.")
    for name, distance in apart.items():
        if not max(distance["losses"], distance["log_probs"]) <= AGREE[dtype]:
            raise InputError(f"{names[0]} and {name} do not compute the same: {distance}", where="--arms")
    return {
        "mode": "time",
        **described(setup),
        "repeats": repeats,
        "arms": summary(found, workload.batch),
        "ratios": ratios(found),
        "agreement": apart,
    }


def counted(workload: Workload, names: Sequence[str]) -> Found:
    """Operation counts of our arms."""
    setup = arms.prepare(workload)
    ours = [name for name in names if name in arms.OURS]
    return {"mode": "counts", **described(setup), **counts.counts(setup, ours)}


def weighed(workload: Workload, names: Sequence[str], argv: Sequence[str]) -> Found:
    """Peak memory of the arms, each in its own process."""
    found = {name: memory.apart(name, argv) for name in names}
    return {"mode": "memory", **around(workload), **memory.compared(found)}


def described(setup: arms.Setup) -> Found:
    """What was trained on what."""
    config = causal_lm(setup.policy.model).config.get_text_config()
    about = {
        "parameters": sum(weight.numel() for weight in setup.policy.model.parameters()),
        "trained_parameters": sum(weight.numel() for _, weight in arms.trained(setup.policy.model)),
        "vocabulary": config.vocab_size,
        "scoring": setup.policy.module.how,
        "lengths": [[len(p.prompt), len(p.chosen), len(p.rejected)] for p in setup.pairs],
    }
    found = around(setup.workload)
    return {**found, "workload": {**found["workload"], **about}}


def around(workload: Workload, *, bench: str = "dpo") -> Found:
    """The workload's options, the command, and the machine and versions it ran on."""
    found = environment.environment(World.start(), dtype=workload.dtype)
    try:
        found["versions"]["trl"] = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        found["versions"]["trl"] = None
    found["mkl"] = torch.backends.mkl.is_available()
    return {"bench": bench, "workload": asdict(workload), "environment": found}


def show(found: Found) -> None:
    """Tables and a line for the terminal."""
    {"time": _show_time, "counts": _show_counts, "memory": _show_memory}[found["mode"]](found)
    print(line_of(found))


def line_of(found: Found) -> str:
    """The machine and the versions."""
    place = found["environment"]
    versions = place["versions"]
    peer = f", trl {versions['trl']}" if versions["trl"] else ""
    return (
        f"{place['cpu']}, {place['device']}, {place['threads']} threads, {place['dtype']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}{peer}"
    )


def _title(found: Found) -> str:
    work = found["workload"]
    how = "LoRA" if work["use_peft"] else "all weights"
    order = ", sorted by length" if work["sort"] else ""
    return f"DPO on {work['model']}, {work['shape']}{order}, {work['batch']} pairs a step, {how}"


def _show_time(found: Found) -> None:
    columns = ("Arm", "Pairs / s", "Seconds / step")
    rows = [
        (name, f"{arm['pairs_per_second']:.2f}", f"{arm['seconds_per_step']:.3f}")
        for name, arm in found["arms"].items()
    ]
    print_rows(columns, rows, title=_title(found))
    lines = [
        (name, f"{ratio['median']:.2f}", f"{ratio['low']:.2f} to {ratio['high']:.2f}", ratio["meaning"])
        for name, ratio in found["ratios"].items()
    ]
    if lines:
        print_rows(("Ratio", "Median", "Range", "What it is"), lines)
    for name in ("trl/engine", "padded/engine"):
        if name in found["ratios"]:
            ratio = found["ratios"][name]
            print(f"engine: {ratio['median']:.2f}x {name.split('/')[0]} ({ratio['low']:.2f} to {ratio['high']:.2f})")
            break


def _show_counts(found: Found) -> None:
    columns = ("Arm", "Linear GFLOP", "Head rows", "Attention pairs needed", "Multiplied")
    rows = [
        (
            name,
            f"{arm['linear_flops'] / 1e9:.4g}",
            str(arm["head_rows"]),
            str(arm["attention_pairs_needed"]),
            str(arm["attention_pairs_multiplied"]),
        )
        for name, arm in found["arms"].items()
    ]
    print_rows(columns, rows, title=f"{_title(found)}: one forward pass over every row")
    if "bound_held" in found:
        print(
            f"linear layers {found['linear_packed/engine']:.3f}x, token bound {found['token_bound']:.3f} "
            f"({found['bound_deviation']:+.1%}, {'held' if found['bound_held'] else 'NOT held'}); "
            f"head rows {'are' if found['head_rows_exact'] else 'ARE NOT'} the {found['answer_tokens']} answer tokens; "
            f"{found['attention_wasted']:.1%} of attention's pairs wasted"
        )


def _show_memory(found: Found) -> None:
    columns = ("Arm", "Above the floor, MiB", "Floor, MiB", "Peak, MiB")
    rows = [
        (name, *(f"{arm[key] / 2**20:.0f}" for key in ("bytes_above_floor", "floor", "peak")))
        for name, arm in found["arms"].items()
    ]
    print_rows(columns, rows, title=f"{_title(found)}: peak memory of a step")
    for name in ("engine/trl", "engine/naive", "engine/padded"):
        if name in found:
            print(f"the engine takes {found[name]:.0%} of what {name.split('/')[1]} takes above its floor")
