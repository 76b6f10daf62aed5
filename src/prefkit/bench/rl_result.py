"""Runs a bench of reinforcement learning, and shows what came out: tables, a line, JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

from prefkit.bench import rollouts
from prefkit.bench.result import AGREE, around, line_of
from prefkit.bench.rl_workloads import Episodes
from prefkit.bench.rollouts import RolloutBlock, Setup
from prefkit.errors import InputError
from prefkit.report.table import print_rows

PARTS = ("seconds", "sampling", "scoring", "updating")
TIMES = (*PARTS, "processor")
Blocks = Mapping[str, Sequence[RolloutBlock]]
Found = dict[str, Any]


def timed(episodes: Episodes, names: Sequence[str], repeats: int) -> Found:
    """Interleaved blocks of the sides. Raises InputError where the two do not compute the same."""
    setup = rollouts.prepare(episodes)
    sides: dict[str, Callable[[], RolloutBlock]] = {}
    apart: Found = {}
    for name in names:
        if name == "trl":
            from prefkit.bench.rl_peer import RolloutPeer

            peer = RolloutPeer(setup)
            apart = agreement(setup, peer)
            sides[name] = peer.block
        else:
            sides[name] = partial(rollouts.block, setup)
    found: dict[str, list[RolloutBlock]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, block in sides.items():
            found[name].append(block())
    check_lengths(episodes, found)
    return {
        "mode": "rollouts",
        **described(setup),
        "repeats": repeats,
        "arms": summary(found, episodes.per_batch),
        "ratios": ratios(found),
        "agreement": apart,
    }


def agreement(setup: Setup, peer: Any) -> Found:
    """How far losses, gradient norms and rewards are apart where the peer is given the answers that ours drew.

    Every loss holds advantages that sum to about 0, so losses are compared absolutely, the others relatively. Raises
    InputError where they are not those of the same computation.
    """
    drawn: list[list[list[int]]] = []
    ours = rollouts.block(setup, drawn.append)
    answers = iter(drawn)
    other = peer.block(lambda _prompts: next(answers))
    found = {
        "losses": max(abs(a - b) for a, b in zip(ours.losses, other.losses, strict=True)),
        "grad_norms": max(
            abs(a - b) / max(a, b, 1e-12) for a, b in zip(ours.grad_norms, other.grad_norms, strict=True)
        ),
        "scores": max(abs(a - b) / max(a, b, 1e-12) for a, b in zip(ours.scores, other.scores, strict=True)),
    }
    if not max(found.values()) <= AGREE[str(setup.policy.dtype).removeprefix("torch.")]:
        raise InputError(f"trl and engine do not compute the same: {found}", where="--against trl")
    return found


def check_lengths(episodes: Episodes, found: Blocks) -> None:
    """InputError where an answer of a side without resets is not as long as it was to be."""
    if episodes.method == "drpo":
        return
    due = episodes.per_batch * episodes.lengths()[1]
    for name, blocks in found.items():
        counts = {count for block in blocks for count in block.tokens}
        if counts != {due}:
            raise InputError(f"{name} drew {sorted(counts)} tokens a batch instead of {due}", where="--shape")


def summary(found: Blocks, episodes: int) -> Found:
    """Per side: episodes and tokens a second, where the time went, and every block."""
    result: Found = {}
    for name, blocks in found.items():
        spent = {part: middle(blocks, part) for part in TIMES}
        tokens = median([count for block in blocks for count in block.tokens[1:]])
        result[name] = {
            "episodes_per_second": episodes / spent["seconds"],
            "tokens_per_second": tokens / spent["seconds"],
            "tokens_per_second_of_sampling": tokens / spent["sampling"],
            "seconds_per_batch": spent["seconds"],
            "processor_seconds_per_batch": spent["processor"],
            "shares": {part: spent[part] / spent["seconds"] for part in PARTS[1:]},
            "blocks": [asdict(block) for block in blocks],
        }
    return result


def times(block: RolloutBlock, part: str) -> list[float]:
    """Seconds of a part of each batch of a block, the first left out."""
    if part == "updating":
        three = zip(block.seconds, block.sampling, block.scoring, strict=True)
        return [whole - sampling - scoring for whole, sampling, scoring in three][1:]
    return getattr(block, part)[1:]


def middle(blocks: Sequence[RolloutBlock], part: str) -> float:
    """Mean over a block's batches of each one's median over the blocks."""
    per_batch = [median(found) for found in zip(*(times(block, part) for block in blocks), strict=True)]
    return sum(per_batch) / len(per_batch)


def ratios(found: Blocks) -> Found:
    """How many times longer the peer takes, as a whole and in parts: one ratio for each round of blocks."""
    if len(found) < 2:
        return {}
    result: Found = {}
    for part in TIMES:
        pairs = zip(found["trl"], found["engine"], strict=True)
        each = [sum(times(a, part)) / sum(times(b, part)) for a, b in pairs]
        result[part] = {"median": median(each), "low": min(each), "high": max(each), "each": each}
    return result


def described(setup: Setup) -> Found:
    """What was trained on what."""
    episodes, model = setup.episodes, setup.policy.model
    prompts, answer = episodes.lengths()
    found = around(episodes.workload, bench=episodes.method)
    about = {
        "num_generations": episodes.num_generations,
        "epochs": episodes.epochs,
        "kl_coef": setup.config.kl_coef,
        "kl_in": setup.config.kl_in,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "vocabulary": model.config.get_text_config().vocab_size,
        "scoring": setup.policy.module.how,
        "prompts": prompts,
        "answer": answer,
    }
    return {**found, "workload": {**found["workload"], **about}}


def show(found: dict[str, Any]) -> None:
    """Tables and a line for the terminal."""
    work = found["workload"]
    title = (
        f"{found['bench'].upper()} on {work['model']}, {work['shape']}, {work['batch']} prompts x "
        f"{work['num_generations']} answers, {work['epochs']} pass(es)"
    )
    columns = ("Arm", "Episodes / s", "Tokens / s", "Tokens / s of sampling", "Seconds / batch", "Sampling", "Scoring")
    rows = [
        (
            name,
            f"{arm['episodes_per_second']:.2f}",
            f"{arm['tokens_per_second']:.0f}",
            f"{arm['tokens_per_second_of_sampling']:.0f}",
            f"{arm['seconds_per_batch']:.3f}",
            *(f"{arm['shares'][part]:.0%}" for part in ("sampling", "scoring")),
        )
        for name, arm in found["arms"].items()
    ]
    print_rows(columns, rows, title=title)
    titles = {"seconds": "whole", "processor": "whole, processor time"}
    lines = [
        (str(titles.get(part, part)), f"{ratio['median']:.2f}", f"{ratio['low']:.2f} to {ratio['high']:.2f}")
        for part, ratio in found["ratios"].items()
    ]
    if lines:
        print_rows(("trl/engine", "Median", "Range"), lines)
    print(line_of(found))
