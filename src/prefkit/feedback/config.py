"""Options that say who judges; the group is shared by every method and command that ranks answers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from prefkit.options import options_of


@dataclass(frozen=True, kw_only=True)
class Judging:
    """judge"""

    judge: str = ""
    """who ranks answers: gold:NAME or gold:module:function, reward:MODEL, ranker:MODEL, llm:MODEL (an endpoint),
    transformers:MODEL, stored:FILE, self:MODEL"""
    judge_template: str = "chat"
    """question put to an llm, transformers or self judge: chat | hh | tldr, or a template file"""
    judge_base_url: str = ""
    """endpoint of an llm judge, e.g. http://localhost:8000/v1; the key is read from PREFKIT_JUDGE_API_KEY or
    OPENAI_API_KEY"""
    judge_concurrency: int = 8
    """requests in flight at once"""
    judge_timeout: float = 60.0
    """seconds to wait for one reply"""
    judge_retries: int = 5
    """times a failed request is sent again, waiting longer each time"""
    judge_max_calls: int = 0
    """budget: most requests paid for; 0 has no limit"""
    judge_max_tokens: int = 0
    """budget: most tokens read and written by the judge; 0 has no limit"""
    judge_price_in: float = 0.0
    """price of a million tokens read, for the cost forecast and the report"""
    judge_price_out: float = 0.0
    """price of a million tokens written"""
    judge_cache: str = ""
    """folder of paid replies; empty takes judge-cache in the run directory, or beside the output file"""
    judge_batch_size: int = 16
    """rows of a forward pass of a judge that runs here"""
    judge_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """compute dtype of a judge that runs here"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a command every option of the group, with the same names, meanings and defaults."""
    defaults = Judging()
    group = parser.add_argument_group("judge")
    for option in options_of(Judging):
        value: Any = getattr(defaults, option.name)
        meaning = " ".join(option.meaning.split()).replace("%", "%%")
        more: dict[str, Any] = {"type": option.type, "metavar": _METAVARS.get(option.type)}
        if get_origin(option.type) is Literal:
            more = {"choices": get_args(option.type)}
        shown = f" ({value})" if value != "" else ""
        group.add_argument(f"--{option.name}", default=value, help=meaning + shown, **more)


@dataclass(frozen=True, kw_only=True)
class SeededJudging(Judging):
    """The group as a command has it, which has no run's seed."""

    seed: int = 0
    """seed of a packaged gold reward"""


def from_arguments(found: argparse.Namespace) -> SeededJudging:
    """The group's options, and the seed, as a command line gave them."""
    names = [*(option.name for option in options_of(Judging)), "seed"]
    return SeededJudging(**{name: getattr(found, name) for name in names})


_METAVARS: dict[Any, str] = {str: "TEXT", int: "N", float: "X"}
