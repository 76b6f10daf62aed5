"""One training run from prepared data to a finished run directory. It knows no model and no domain.

check data -> open the run -> measure the start model -> steps -> select -> measure -> write -> report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from prefkit.engine.files import read_json, write_json, write_text
from prefkit.engine.learner import Learner
from prefkit.engine.run import Run
from prefkit.evaluation.stats import bootstrap
from prefkit.evaluation.winrate import from_scores
from prefkit.protocols import Staged, Task
from prefkit.records import HeldOut, Result

INTERVALS = {
    "margin": "eval_rewards/margins",
    "accuracy": "eval_rewards/accuracies",
    "nll": "eval_loss",
    "reward_chosen": "eval_rewards/chosen",
    "reward_rejected": "eval_rewards/rejected",
    "log_ratio": "eval_objective/kl",
    "length": "eval_completions/mean_length",
    "finished": "eval_val/contain_eos_token",
    "gold": "eval_gold",
    "reward_model": "eval_objective/scores",
}
"""columns of evaluation rows that get a bootstrap interval, and the metric each is the mean of"""


class Prepared(Protocol):
    """Checked and tokenized data, whatever the domain."""

    @property
    def fingerprint(self) -> str:
        """sha256 of what is trained and evaluated on."""
        ...

    def report(self) -> dict[str, Any]:
        """What was found in the data, for data.json."""
        ...

    def describe(self) -> Sequence[str]:
        """Lines on what was found in the data."""
        ...

    def forecast(self) -> Sequence[str]:
        """Lines on the memory, time and disk the run will need."""
        ...

    def rows(self, step: int, rank: int, size: int) -> tuple[list[int], int]:
        """A process's training rows at a step, and the place of the first in the global batch."""
        ...

    def num_tokens(self, step: int, size: int) -> int:
        """Stored tokens that a step trains on, over all processes."""
        ...

    def total_steps(self, size: int) -> int:
        """Optimizer steps of the whole run over `size` processes."""
        ...

    def steps_per_epoch(self, size: int) -> float: ...


def run_task(config: Any, method: str, data: Prepared, make: Callable[[Run], Task]) -> Result:
    """Train, evaluate and report. `make` builds the task (model included) once the run directory is open.

    With `config.dry_run` only the forecasts are printed. Raises InputError for input that cannot be used.
    """
    if config.dry_run:
        for line in [*data.describe(), *data.forecast()]:
            print(line)
        return Result(directory=Path(config.output_dir), metrics={}, model=None, tokenizer=None)
    with Run(config, method=method) as run:
        run.fingerprint(data=data.fingerprint)
        for line in data.describe():
            run.say(line)
        task = make(run)
        final = train(run, task, data)
    if run.world.is_main:
        _report(run.directory)
    run.world.barrier()
    policy: Any = task.tracked()["policy"]
    return Result(directory=run.directory, metrics=final.metrics, model=policy.model, tokenizer=policy.tokenizer)


def train(run: Run, task: Task, data: Prepared) -> HeldOut:
    """The steps themselves, between two evaluations. Returns the final one."""
    config, world = run.config, run.world
    total = data.total_steps(world.size)
    learner = Learner(task.module, config, total_steps=total, world=world)
    run.track(**task.tracked(), learner=learner)
    if world.is_main:  # only now: the data of a run that goes on has been found to be the data it began with
        write_json(run.directory / "data.json", data.report())
    start = _start(run, task)
    selecting = bool(config.keep_best or config.patience or config.stop_at_kl)
    tokens = sum(data.num_tokens(step, world.size) for step in range(1, run.resumed_step + 1))
    rounds = task if isinstance(task, Staged) else None
    for step in run.steps(total, per_epoch=data.steps_per_epoch(world.size)):
        rows, first = data.rows(step, world.rank, world.size)
        tokens += data.num_tokens(step, world.size)
        run.log({"num_tokens": float(tokens)})
        if rounds is not None:
            rounds.before(step, learner)
        values = learner.update(task.batches(step, rows, first), task.compute, weight=task.weight)
        run.log(values)
        if rounds is not None:
            rounds.after(step, values)
        round_ends = rounds is not None and rounds.ends_round(step)
        if round_ends:
            run.keep()
        if round_ends or (config.eval_steps and run.due(config.eval_steps)):
            run.evaluated(task.evaluate(selecting=selecting).metrics)
    run.select()
    task.finish()
    run.say("measuring the trained model")
    final = task.evaluate()
    saved = task.save_final(run.directory)
    if world.is_main:
        _write(run, start, final)
    run.finish(**saved)
    return final


def _start(run: Run, task: Task) -> HeldOut:
    """The start model's evaluation: measured once, before the first step, and kept for resumed runs."""
    path = run.directory / "evaluation" / "start.json"
    if run.resumed_step:
        return HeldOut(**read_json(path))
    run.say("measuring the start model")
    start = task.evaluate()
    run.evaluated(start.metrics)
    if run.world.is_main:
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"metrics": dict(start.metrics), "pairs": list(start.pairs), "samples": list(start.samples)})
    return start


def _write(run: Run, start: HeldOut, final: HeldOut) -> None:
    """evaluation.json with grouped bootstrap intervals, and the rows behind it."""
    folder = run.directory / "evaluation"
    samples = [_side_by_side(before, after) for before, after in zip(start.samples, final.samples, strict=True)]
    rows = "completions.jsonl" if _has(final.pairs, "nll") else "pairs.jsonl"
    write_text(folder / rows, _jsonl(final.pairs))
    write_text(folder / "samples.jsonl", _jsonl(samples))
    intervals = _intervals(final.pairs, run.config.seed) | _intervals(final.samples, run.config.seed)
    wins = _win_rates(samples, run.config.seed)
    metrics = {**final.metrics, **{name: interval["mean"] for name, interval in wins.items()}}
    report = {"start": dict(start.metrics), "final": metrics, "intervals": intervals | wins}
    write_json(run.directory / "evaluation.json", report)


def _win_rates(samples: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Win rates of the final answers by the judge configured: over the start model's, and over the data set's own."""
    found: dict[str, Any] = {}
    for judge in ("gold", "reward_model"):
        if not _has(samples, f"{judge}_final"):
            continue
        groups = [row["group"] for row in samples]
        final = [row[f"{judge}_final"] for row in samples]
        for against, column in (("start", "start"), ("data", "reference")):
            other = [row[f"{judge}_{column}"] for row in samples]
            name = f"eval_win_rate_over_{against}/{judge}"
            found[name] = from_scores(final, other, groups, seed=seed).rate.to_json()
    return found


def _intervals(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    groups = [row["group"] for row in rows]
    return {
        name: bootstrap([row[key] for row in rows], groups, seed=seed).to_json()
        for key, name in INTERVALS.items()
        if _has(rows, key)
    }


def _has(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return bool(rows) and key in rows[0]


def _side_by_side(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """One row with both answers; every judge's score carries _start and _final."""
    row = {key: after[key] for key in ("index", "row", "group", "prompt")}
    row |= {"answer_start": before["answer"], "answer_final": after["answer"]}
    row |= {key: after[key] for key in ("log_ratio", "length", "finished") if key in after}
    for key in sorted(set(after) - set(row) - {"answer"}):
        if key.endswith("_reference"):
            row[key] = after[key]
        else:
            row |= {f"{key}_start": before[key], f"{key}_final": after[key]}
    return row


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)


def _report(directory: Path) -> None:
    """The model card, the page, and on the terminal: answers before and after, and the summary."""
    from prefkit.report import card, page, table
    from prefkit.report.read import read

    card.write(directory)
    page.write(directory)
    table.print_samples(read(directory).samples)
    table.print_summary(directory)
