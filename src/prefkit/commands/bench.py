"""Measure the speed of training, alone or against TRL on the same batches; of DPO, operation counts and memory too.

Every arm trains the same model on the same rows from the same weights, in blocks that take turns. `trl` is TRL's
trainer. For dpo the others are prefkit with its savings left out one by one: naive, padded, packed, engine with all.
For rloo and grpo, and for ppo and drpo, which have no peer, there is the engine alone: answers of a forced length are
drawn, scored by a function of the text and by the reference, and trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefkit.bench import arms, memory, peer, result, rl_result, rl_workloads
from prefkit.bench.rl_peer import PEERS
from prefkit.bench.workloads import MODELS, Workload, distributions
from prefkit.errors import InputError
from prefkit.options import unknown
from prefkit.report.page import save

PEER = "trl"
WIDE_VOCABULARY = 150_000
"""of --memory: that of recent models, where logits weigh most"""
LEAST = (("steps", 2), ("repeats", 1), ("batch", 0), ("vocabulary", 0), ("num_generations", 2), ("epochs", 1))


def main(argv: Sequence[str]) -> int:
    """Parses the command line, measures, prints tables and writes the JSON file."""
    options = _parser().parse_args(list(argv))
    names = _arms(options)
    if PEER in names:
        peer.version()
    if options.method in rl_workloads.METHODS:
        return _rollouts(options, names)
    work = _workload(options)
    work.lengths()  # an unknown shape is said before a model is built
    if options.alone:
        save(json.dumps(memory.alone(work, names[0])), Path(options.alone))
        return 0
    if options.memory:
        found = result.weighed(work, names, argv)
    elif options.counts:
        found = result.counted(work, names)
    else:
        found = result.timed(work, names, options.repeats)
    return _end(options, found, result.show)


def _rollouts(options: Any, names: Sequence[str]) -> int:
    """A bench of reinforcement learning."""
    for name in ("counts", "memory", "sorted"):
        if getattr(options, name):
            raise InputError(f"is measured of dpo alone, not of {options.method}", where=f"--{name}")
    episodes = rl_workloads.Episodes(
        method=options.method,
        workload=_workload(options),
        num_generations=options.num_generations,
        epochs=options.epochs,
    )
    return _end(options, rl_result.timed(episodes, names, options.repeats), rl_result.show)


def _end(options: Any, found: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> int:
    show(found)
    if options.json:
        print(save(json.dumps(found, indent=1) + "\n", Path(options.json)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefkit bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    shapes = ", ".join(distributions())
    add("method", choices=("dpo", *rl_workloads.METHODS), help="what is trained")
    add("--against", choices=(PEER, "none"), default="none", help='the peer (trl: pip install "prefkit[bench]")')
    add("--model", default="llama-16k", metavar="NAME", help=f"{', '.join(MODELS)} (random weights), or any model")
    add(
        "--shape",
        default="",
        metavar="S",
        help=f"prompt/answer tokens (256/64; rloo and its like: {rl_workloads.SHAPE}), or {shapes}",
    )
    add(
        "--steps",
        type=int,
        default=4,
        metavar="N",
        help="steps, or batches of episodes, in a block; one is warm-up (4)",
    )
    add("--repeats", type=int, default=3, metavar="N", help="blocks of every arm, taking turns (3)")
    add("--batch", type=int, default=0, metavar="N", help="pairs in a step, or prompts in a batch (8; with --memory 4)")
    add("--num_generations", type=int, default=4, metavar="K", help="of rloo and its like: answers to a prompt (4)")
    add("--epochs", type=int, default=1, metavar="N", help="of rloo and its like: passes over a batch of episodes (1)")
    add("--sorted", action="store_true", help="batches of similar length")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype (float32)")
    add("--use_peft", action="store_true", help="train a LoRA adapter on both sides")
    add("--arms", default="", metavar="A,B", help=f"which of {PEER}, {', '.join(arms.OURS)} (all)")
    add("--vocabulary", type=int, default=0, metavar="N", help=f"of a random model (--memory: {WIDE_VOCABULARY})")
    add("--seed", type=int, default=0, metavar="N", help="seed of weights and tokens (0)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--counts", action="store_true", help="count operations instead of timing")
    mode.add_argument("--memory", action="store_true", help="measure peak memory instead, each arm in its own process")
    add("--json", metavar="FILE", help="also write everything as JSON")
    add("--alone", metavar="FILE", help=argparse.SUPPRESS)
    return parser


def _workload(options: Any) -> Workload:
    """The workload of the options; InputError for numbers that cannot be."""
    for name, least in LEAST:
        if getattr(options, name) < least:
            raise InputError(f"must be at least {least}", where=f"--{name}")
    vocabulary = options.vocabulary
    if options.memory and not vocabulary and options.model in MODELS:
        vocabulary = WIDE_VOCABULARY
    return Workload(
        model=options.model,
        vocabulary=vocabulary,
        shape=options.shape or ("256/64" if options.method == "dpo" else rl_workloads.SHAPE),
        batch=options.batch or (4 if options.memory else 8),
        steps=2 if options.memory else options.steps,
        sort=options.sorted,
        dtype=options.dtype,
        use_peft=options.use_peft,
        seed=options.seed,
    )


def _arms(options: Any) -> list[str]:
    """The arms asked for, in the order they take turns in; InputError for unknown ones."""
    if options.against == PEER and options.method not in ("dpo", *PEERS):
        mend = "leave --against out; rloo and grpo have a peer"
        raise InputError(f"TRL has no trainer that does what {options.method} does", where="--against", mend=mend)
    ours = arms.OURS if options.method == "dpo" else arms.OURS[-1:]
    possible = [*([PEER] if options.against == PEER else []), *ours]
    if not options.arms:
        # Memory: the two that are compared, each takes a process.
        return [name for name in possible if not options.memory or name in (PEER, "engine")]
    asked = options.arms.split(",")
    for name in asked:
        if name == PEER and PEER not in possible:
            raise InputError("the peer is to run but not named", where="--arms", mend=f"add --against {PEER}")
        if name not in possible:
            raise unknown("arm", name, possible)
    return [name for name in possible if name in asked]
