"""A run: its directory, steps, metrics, checkpoints, and how it continues after being stopped anywhere.

    with Run(config, method="dpo") as run:
        learner = Learner(policy.module, config, total_steps=total, world=run.world)
        run.track(policy=policy, learner=learner)          # restores the newest whole checkpoint
        for step in run.steps(total):
            run.log(learner.update(batches(step), compute))
            if run.due(config.eval_steps):
                run.evaluated(evaluate(policy))
        run.finish()

Everything random must depend on (seed, step, row) alone; the global generators are reseeded before each step,
so that a step's numbers do not depend on what ran before it in this process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from prefkit.engine import checkpoint, directory, environment, files, seeds, trackers
from prefkit.engine.checkpoint import Tracked, rotate
from prefkit.engine.journal import Journal
from prefkit.engine.progress import Bar, Stage, duration
from prefkit.engine.row import Row, read
from prefkit.engine.selection import Selection
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.options import PRESET, to_json


class Run:
    """One training run in one directory. Every process calls every method; only the main one writes."""

    def __init__(self, config: Any, *, method: str) -> None:
        """Open the run directory, new or used.

        `config` is a dataclass with the fields of Optimisation, Selection and Output. Raises InputError when
        the directory cannot take this run, and for trackers that are not installed.
        """
        self.config, self.method = config, method
        self.world = World.start()
        self.directory = Path(config.output_dir or directory.default_path(method))
        self.resumed_step = 0
        self._values = to_json(config)
        self._selection = Selection(config.keep_best, config.patience, config.stop_at_kl)
        self._tracker_names = trackers.names_of(config.report_to)
        self._trackers: list[Any] = []
        self._journal = Journal(self.directory / directory.METRICS)
        self._tracked: dict[str, Tracked] = {}
        self._fingerprints: dict[str, str] = {}
        self._restored: dict[str, Any] | None = None
        self._step = self._total = 0
        self._in_step = self._keep_now = self._looked = False
        self._row = Row()
        self._per_epoch: float | None = None
        self._stop = ""
        self._last_saved = self._selected = -1
        self._started, self._seconds_before = time.monotonic(), 0.0
        self._bar = Bar(total=0, done=0, visible=self.world.is_main)
        self._used = self.world.on_main(self._open)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
        trackers.finish(self._trackers)
        self._trackers = []

    def say(self, text: str) -> None:
        """A line on stderr from the main process, above the progress bar."""
        self._bar.say(text)

    def stage(self, title: str, total: int, done: int = 0) -> Stage:
        """Progress of long work between two steps."""
        return Stage(self._bar, title, total, done)

    def keep(self) -> None:
        """Write a checkpoint after this step, whatever the cadence."""
        self._keep_now = True

    def track(self, **objects: Tracked) -> None:
        """Name the objects that checkpoints hold; they are restored from the newest whole checkpoint, if any.

        Raises InputError when no checkpoint is whole, when the run was started with another number of
        processes or other data (see `fingerprint`), and when the disk has no room for two checkpoints.
        """
        self._looked = True
        self._tracked.update(objects)
        step, damaged = self.world.on_main(lambda: checkpoint.newest_whole(self.directory))
        for line in damaged:
            self.say(f"{line}; continuing from checkpoint-{step} instead")
        if step is None:
            if self._used:
                self.say(f"{self.directory} has no checkpoint yet: starting from the beginning")
            self._cut_rows(0)
        else:
            self._restore(step)
            for later in checkpoint.steps_in(self.directory) if self.world.is_main else ():
                if later > step:
                    files.discard(checkpoint.path_of(self.directory, later))
        self.world.on_main(lambda: files.require_space(self.directory, 2 * self._checkpoint_bytes(), what="training"))

    def fingerprint(self, **names: str) -> None:
        """What the run depends on besides its options (`data=sha`); another value on resume is an InputError."""
        self._fingerprints.update(names)
        before = (self._restored or {}).get("fingerprints", {})
        for name, value in names.items():
            if name in before and before[name] != value:
                raise InputError(
                    f"the {name} is not what this run was started with ({before[name][:12]} -> {value[:12]})",
                    where=str(self.directory),
                    mend=f"give the same {name}, or choose another --output_dir",
                )

    def steps(self, total: int, *, per_epoch: float | None = None) -> Iterator[int]:
        """The steps to do, from 1 or after the restored one to `total`; `per_epoch` is the steps in an epoch.

        After each body values are checked to be finite, row and checkpoint written if due. Leave by `stop`, no `break`.
        """
        self._total, self._per_epoch = total, per_epoch
        if not self._looked:
            self.track()
        self._check_total(total)
        if self.world.is_main:
            if self._step < total:  # an earlier, shorter run's result is no longer true
                (self.directory / directory.RESULT).unlink(missing_ok=True)
            self._trackers = trackers.start(
                self._tracker_names,
                self.directory,
                title=f"prefkit-{self.method}",
                config=self._values,
                after=self.resumed_step,
            )
        self._bar = Bar(total=total, done=self._step, visible=self.world.is_main)
        if self._row.values and self.resumed_step == 0:
            self._write_row(self._row.values)
        while self._step < total and not self._stop:
            self._step += 1
            seeds.seed_everything(self.config.seed, "step", self._step, self.world.rank)
            self._row.clear()
            self._in_step = True
            yield self._step
            self._end_step()
        self._bar.close()

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Add values to the row of this step; 0-dim tensors are read only if the row is written.

        Before the loop the row is that of step 0 (left out when the run continues: it stands there already);
        after the loop each call writes a row of its own.
        """
        if self._in_step or self._total == 0:
            self._row.add(self._step, values)
        else:
            self._write_row(values)

    def due(self, every: int) -> bool:
        """True on multiples of `every` and on the last step; with 0, on the last step only."""
        return self._step >= self._total or bool(self._stop) or (every > 0 and self._step % every == 0)

    def evaluated(self, values: Mapping[str, float]) -> None:
        """Log an evaluation; inside the loop it also drives keep_best, patience and stop_at_kl."""
        values = self.world.broadcast(dict(values))
        self.log(values)
        if not self._in_step:
            if self._total == 0:
                self._selection.check(values)
            return
        improved, reason = self._selection.evaluated(self._step, values)
        self._keep_now = self._keep_now or improved
        self._row.evaluated = True
        if reason:
            self.stop(reason)

    def stop(self, reason: str) -> None:
        """End the loop after this step."""
        self._stop = self._stop or reason

    def select(self) -> int:
        """Load the selected checkpoint if it is not the last step's; gives the selected step."""
        selected = next(iter(self._selection.kept), self._step)
        if selected not in (self._step, self._selected):
            self._require_whole(folder := checkpoint.path_of(self.directory, selected))
            for item in self._tracked.values():
                item.load(folder)
            self.say(f"selected step {selected}: {self._selection.rule()}")
        self._selected = selected
        return selected

    def finish(self, *, model: str | None = "model", adapter: str | None = None) -> dict[str, Any]:
        """Select as `select` does, then write result.json and give its content: the run's files are whole."""
        result = {
            "status": "stopped" if self._stop else "complete",
            "reason": self._stop or f"all {self._step} steps done",
            "steps": self._step,
            "selected_step": self.select(),
            "rule": self._selection.rule(),
            "seconds": round(self._seconds(), 3),
            **{"model": model, "adapter": adapter},
        }
        # Once more: a kill may have come between the last checkpoint and the removal of an old one.
        self.world.on_main(lambda: rotate(self.directory, self.config.save_total_limit, self._selection.kept))
        self.world.on_main(lambda: files.write_json(self.directory / directory.RESULT, result))
        self.say(f"{result['status']}: {result['reason']}, {duration(self._seconds())}; run in {self.directory}")
        return result

    def _open(self) -> bool:
        used = directory.prepare(
            self.directory,
            method=self.method,
            preset=PRESET.get(),
            values=self._values,
            defaults=to_json(type(self.config)()),
            overwrite=self.config.overwrite,
        )
        now = environment.environment(self.world, dtype=str(self._values.get("dtype", "float32")))
        path = self.directory / directory.ENVIRONMENT
        if used and path.exists():
            different = environment.changed(files.read_json(path), now)
            if different:
                self.say(f"not bit for bit the earlier start's environment: {', '.join(different)}")
        else:
            files.write_json(path, now)
        return used

    def _restore(self, step: int) -> None:
        state = checkpoint.read_state(self.directory, step)
        if state["processes"] != self.world.size:
            raise InputError(
                f"this run was started with {state['processes']} process(es) and is continued with "
                f"{self.world.size}; sums would be taken in another order and the numbers would differ",
                where=str(self.directory),
                mend=f"launch {state['processes']} process(es), or choose another --output_dir",
            )
        self._restored = state
        self.fingerprint(**self._fingerprints)
        self._fingerprints = {**state["fingerprints"], **self._fingerprints}
        for item in self._tracked.values():
            item.load(checkpoint.path_of(self.directory, step))
        self._selection.restore(state["selection"])
        self._step = self.resumed_step = self._last_saved = step
        self._stop = state["stop"]
        self._seconds_before, self._started = state["seconds"], time.monotonic()
        self._cut_rows(state["rows"])
        self.say(f"continuing {self.directory} after step {step}")

    def _cut_rows(self, rows: int) -> None:
        found = self.world.on_main(lambda: self._journal.cut(rows))
        if found < rows:
            self.say(f"{directory.METRICS} lacks {rows - found} rows that were written: it was changed by hand")

    def _check_total(self, total: int) -> None:
        if total < 1:
            raise InputError(f"{total} steps are nothing to train", where="--max_steps")
        if total < self._step:
            raise InputError(
                f"{self._step} steps are done already, {total} are asked for",
                where="--max_steps",
                mend="ask for more, or choose another --output_dir",
            )
        if self._stop and self._restored is not None and total > self._restored["total"]:
            self.say(f"it had stopped ({self._stop}); more steps are asked for, so it goes on")
            self._stop = ""

    def _end_step(self) -> None:
        save = self._keep_now or self.due(self.config.save_steps)
        write = self._row.evaluated or self.due(self.config.logging_steps)
        if write or save:
            self._check_finite()
        self._in_step = False
        self._bar.update(self._step, self._write_row(self._row.values) if write else {})
        if save:
            self._save()

    def _check_finite(self) -> None:
        bad = self._row.first_bad()
        if bad:
            kept = f"checkpoint-{self._last_saved}" if self._last_saved > 0 else "none was written yet"
            raise InputError(
                f"{bad}: training has diverged (last checkpoint: {kept})",
                where=str(self.directory),
                mend="use another --output_dir with a lower --learning_rate, or look at that step's data",
            )

    def _write_row(self, values: Mapping[str, float | Tensor]) -> dict[str, float]:
        row = read(values)
        epoch = {} if self._per_epoch is None else {"epoch": round(self._step / self._per_epoch, 6)}
        if self.world.is_main:
            full = {"step": self._step, **epoch, **row, "seconds": round(self._seconds(), 3)}
            self._journal.append(full)
            trackers.log(self._trackers, full, self._step)
        return row

    def _save(self) -> None:
        if self.world.is_main:
            self._journal.force()
        rows = self.world.broadcast(self._journal.rows)
        state = {
            "step": self._step,
            "total": self._total,
            "rows": rows,
            "processes": self.world.size,
            "fingerprints": self._fingerprints,
            "selection": self._selection.state(),
            "stop": self._stop,
            "seconds": round(self._seconds(), 3),
        }
        need = self._checkpoint_bytes()
        self.world.on_main(lambda: files.require_space(self.directory, need, what=f"checkpoint-{self._step}"))
        checkpoint.write(self.directory, self._step, self._tracked, state, self.world)
        self._last_saved, self._keep_now = self._step, False
        self.world.on_main(lambda: rotate(self.directory, self.config.save_total_limit, self._selection.kept))

    def _checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: those of the last one, or what the tracked objects hold."""
        if self._last_saved > 0:
            return checkpoint.size_of(checkpoint.path_of(self.directory, self._last_saved))
        return sum(item.nbytes for item in self._tracked.values() if isinstance(item, checkpoint.Sized))

    def _require_whole(self, folder: Path) -> None:
        def check() -> None:
            wrong = checkpoint.problem(folder)
            if wrong:
                raise InputError(f"the selected checkpoint cannot be used: {wrong}", where=str(folder))

        self.world.on_main(check)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started
