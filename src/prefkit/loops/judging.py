"""Who judges a policy's own answers in evaluation, from a Config's `gold_reward` and `reward_model`."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from typing import Any

from prefkit import assets
from prefkit.domains.text.reward import RewardModel
from prefkit.errors import InputError
from prefkit.protocols import Gold


def judges(config: Any) -> dict[str, Gold]:
    """Scoring functions by metric name: `gold`, `reward_model`. Empty where none is configured."""
    found: dict[str, Gold] = {}
    if config.gold_reward:
        found["gold"] = gold(config.gold_reward, config.seed)
    if config.reward_model:
        found["reward_model"] = _reward_model(config.reward_model)
    return found


def _reward_model(name: str) -> Gold:
    try:
        return RewardModel.load(name).judge
    except InputError as error:
        raise InputError(error.what, where=f"--reward_model {name}", mend=error.mend) from error


def gold(name: str, seed: int) -> Gold:
    """A packaged gold reward by its data's name, or any Python callable as module:function.

    The packaged one is P(fresh) by a classifier fit on films that neither training nor evaluation sees. A callable gets
    the keywords `prompts` (as in the data: strings or lists of messages) and `completions` (strings), equally long, and
    nothing else; it returns as many finite numbers. Raises InputError for one that cannot be imported or called so.
    """
    if name in assets.ASSETS:
        from prefkit.domains.text.packaged import review_pairs
        from prefkit.feedback.gold import GoldSentiment

        reviews = review_pairs(seed)
        sentiment = GoldSentiment(reviews.gold_texts, reviews.gold_labels)
        return lambda prompts, completions: sentiment(completions)
    return _callable(name)


def _callable(name: str) -> Gold:
    """The function `module:function`, its scores checked at every call."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(
            f"{name!r} is neither a packaged gold reward nor module:function",
            where="--gold_reward",
            mend="for example my_rewards:politeness, a function (prompts, completions) -> list of numbers",
        )
    folder = os.getcwd()
    if folder not in sys.path:
        # The installed command, unlike `python -m`, does not look in the working folder. Last, and for good: nothing
        # installed is hidden, and the function may import its own helpers when it is called.
        sys.path.append(folder)
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise InputError(
            f"{name} cannot be imported: {type(error).__name__}: {error}",
            where="--gold_reward",
            mend="check the module's name; it is looked for among installed packages and in the working folder",
        ) from error
    _check_signature(name, found)
    return lambda prompts, completions: _numbers(
        name, found(prompts=prompts, completions=completions), len(completions)
    )


def _check_signature(name: str, found: Any) -> None:
    """InputError, before any training, for what cannot be called with the keywords `prompts` and `completions`."""
    mend = "write def NAME(prompts, completions): ..., with these two names"
    if not callable(found):
        raise InputError(f"{name} is {found!r}, not a function", where="--gold_reward", mend=mend)
    try:
        signature = inspect.signature(found)
    except ValueError:  # some built-in functions do not tell theirs
        return
    try:
        signature.bind(prompts=[], completions=[])
    except TypeError as error:
        what = f"{name}{signature} cannot be called with prompts=..., completions=...: {error}"
        raise InputError(what, where="--gold_reward", mend=mend) from error


def _numbers(name: str, scores: Any, count: int) -> list[float]:
    """The scores of `count` answers as floats; InputError for anything but that many finite numbers."""
    where, mend = f"--gold_reward {name}", "return one finite number for each of the completions, in order"
    if isinstance(scores, str):
        raise InputError(f"returned {scores!r}", where=where, mend=mend)
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise InputError(f"returned what is no list of numbers: {error}", where=where, mend=mend) from error
    if len(numbers) != count:
        raise InputError(f"returned {len(numbers)} numbers for {count} completions", where=where, mend=mend)
    for place, value in enumerate(numbers):
        if not math.isfinite(value):
            raise InputError(f"returned {value} for completion {place + 1}", where=where, mend=mend)
    return numbers
