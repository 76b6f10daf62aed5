"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "objective/kl")
"""metrics shown beside the bar, where a run has them"""

QUIET_SECONDS = 10.0
"""without a terminal: at most this long between lines, unless 5 % of the steps pass sooner"""


@dataclass
class Bar:
    """Shows steps done of `total`, a few metrics, steps per second and the time left.

    The rate counts the steps of this session only, so that it is right after a resume.
    """

    total: int
    done: int
    visible: bool = True
    _console: Console = field(default_factory=lambda: Console(stderr=True))
    _progress: Progress | None = None
    _task: TaskID | None = None
    _metrics: str = ""
    _said_at: float = 0.0
    _said_step: int = 0

    def __post_init__(self) -> None:
        self._first = self.done
        self._started = time.monotonic()
        self._said_at, self._said_step = self._started, self.done
        if self.visible and self.total and self._console.is_terminal:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self._console, transient=False, refresh_per_second=4)
            self._task = self._progress.add_task("", total=self.total, completed=self.done)
            self._progress.start()

    def update(self, step: int, metrics: Mapping[str, object]) -> None:
        """Step `step` is done; `metrics` may be empty on steps whose values were not read."""
        self.done = step
        if metrics:
            self._metrics = "  ".join(
                f"{name.split('/')[-1]} {value:.4g}" for name in SHOWN if isinstance(value := metrics.get(name), float)
            )
        if not self.visible:
            return
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, description=self._text())
            return
        now = time.monotonic()
        passed = (step - self._said_step) >= 0.05 * self.total and now - self._said_at >= 1.0
        if passed or now - self._said_at >= QUIET_SECONDS or step == self.total:
            self._said_at, self._said_step = now, step
            self.say(f"step {step}/{self.total}  {self._text()}")

    def note(self, text: str) -> None:
        """What is being done within a step, in place of the metrics; without a terminal a line now and then."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)
        elif self.visible and time.monotonic() - self._said_at >= QUIET_SECONDS:
            self._said_at = time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.visible:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _text(self) -> str:
        seconds = time.monotonic() - self._started
        steps = self.done - self._first
        if steps == 0 or seconds == 0:
            return self._metrics
        rate = steps / seconds
        return f"{self._metrics}  {rate:.3g} steps/s  {duration((self.total - self.done) / rate)} left".strip()


class Stage:
    """Progress of long work between two steps, such as drawing or judging a round's answers."""

    def __init__(self, bar: Bar, title: str, total: int, done: int = 0) -> None:
        self._bar, self._title, self._total, self._first = bar, title, total, done
        self._started = time.monotonic()

    def update(self, done: int) -> None:
        """`done` of the stage's items are done, with the rate of this session and the time left."""
        seconds, new = time.monotonic() - self._started, done - self._first
        rest = f", {new / seconds:.3g}/s, {duration((self._total - done) * seconds / new)} left" if new > 0 else ""
        self._bar.note(f"{self._title}: {done}/{self._total}{rest if seconds > 0 else ''}")


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`.

    >>> duration(200)
    '3 min 20 s'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
