"""Which numbers an option may have, checked before anything is read, loaded or written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefkit.errors import InputError


@dataclass(frozen=True)
class Limit:
    """A range: `low` and `high` belong to it unless `above` or `below` says otherwise. NaN is never in it."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        return " and ".join(words for words, end in ((low, self.low), (high, self.high)) if math.isfinite(end))


ABOVE_0, NOT_BELOW_0, AT_LEAST_1 = Limit(0, above=True), Limit(0), Limit(1)

SHARED: dict[str, Limit] = {
    "learning_rate": NOT_BELOW_0,
    "warmup_ratio": Limit(0, 1),
    "weight_decay": NOT_BELOW_0,
    "adam_beta1": Limit(0, 1, below=True),
    "adam_beta2": Limit(0, 1, below=True),
    "adam_epsilon": ABOVE_0,
    "max_grad_norm": NOT_BELOW_0,
    "per_device_train_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "eval_steps": NOT_BELOW_0,
    "num_eval_samples": NOT_BELOW_0,
    "num_eval_prompts": NOT_BELOW_0,
    "stop_at_kl": NOT_BELOW_0,
    "patience": NOT_BELOW_0,
    "seed": NOT_BELOW_0,
    "save_steps": NOT_BELOW_0,
    "save_total_limit": NOT_BELOW_0,
    "logging_steps": AT_LEAST_1,
}
"""the options of engine/config.py"""


def check(config: Any, limits: Mapping[str, Limit]) -> None:
    """InputError naming the first option of `config` that is out of its range; options it lacks are passed over."""
    options = {field.name for field in dataclasses.fields(config)}
    for name, limit in limits.items():
        if name in options and not limit.holds(value := getattr(config, name)):
            raise InputError(f"{name} is {value:g}", where=f"--{name}", mend=f"give {limit}")
