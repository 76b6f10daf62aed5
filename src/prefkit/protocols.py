"""What the packages ask of one another: protocols only, no implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from prefkit.records import HeldOut, Question, Text, Verdict

Metrics = dict[str, Tensor]
"""per-example values, (b,) each"""

Gold = Callable[[Sequence[Text], Sequence[str]], Sequence[float]]
"""scores answers given their prompts, higher is better: (prompts, completions) -> as many finite numbers

Prompts are as in the data, strings or lists of messages; completions are strings."""


class Judge(Protocol):
    """Who prefers what. A judge knows texts only: whatever it needs of a model is given to it as callables."""

    @property
    def name(self) -> str:
        """Kind, name and version; stands in every record of what it judged."""
        ...

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict per question, in order.

        Raises InputError when it cannot go on (a spent budget, an endpoint that is gone); what it was told until then
        is not lost.
        """
        ...


class Trackable(Protocol):
    """Something a checkpoint holds. Both are called on every process; only the main one writes."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Task(Protocol):
    """What a training loop needs to know of a method on its data: the loop itself knows no model and no domain."""

    num_rows: int
    """training rows"""

    module: nn.Module
    """what is optimised"""

    def tracked(self) -> Mapping[str, Trackable]:
        """What checkpoints hold besides the optimizer, by name."""
        ...

    def batches(self, step: int, rows: Sequence[int], first: int) -> Sequence[Sequence[Any]]:
        """This process's micro-batches of a step.

        rows: the training rows of this process; first: place of the first of them in the global batch, so that
        sample seeds do not depend on the number of processes.
        """
        ...

    def compute(self, batch: Sequence[Any]) -> tuple[Tensor, Metrics]:
        """Losses (b,) of one micro-batch, to minimise, and metrics without gradient, (b,) each."""
        ...

    def weight(self, batch: Sequence[Any]) -> float:
        """What a micro-batch counts for in the mean: its examples, or its tokens."""
        ...

    def evaluate(self, *, selecting: bool = False) -> HeldOut:
        """Measure on held-out data; `selecting` uses the part that may choose checkpoints."""
        ...

    def finish(self) -> None:
        """What training leaves to be done once its weights are final (centring rewards, say)."""
        ...

    def save_final(self, directory: Path) -> Mapping[str, str | None]:
        """Write the final model into the run directory; {"model": folder, "adapter": folder or None}."""
        ...


@runtime_checkable
class Staged(Protocol):
    """What a task with rounds adds to `Task`: things to do between steps."""

    def before(self, step: int, learner: Any) -> None:
        """Called before a step's batches are made: begin its round where it is the first of one."""
        ...

    def after(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Called with what the step measured; raises InputError where training must not go on."""
        ...

    def ends_round(self, step: int) -> bool:
        """Whether an evaluation and a checkpoint are due because a round ends with this step."""
        ...
