"""Who judges a policy's own answers in evaluation, from a Config's `gold_reward` and `reward_model`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
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

    The packaged one is P(fresh) by a classifier fit on films that neither training nor evaluation sees.
    """
    if name in assets.ASSETS:
        from prefkit.domains.text.packaged import review_pairs
        from prefkit.feedback.gold import GoldSentiment

        reviews = review_pairs(seed)
        sentiment = GoldSentiment(reviews.gold_texts, reviews.gold_labels)
        return lambda prompts, completions: sentiment(completions)
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(
            f"{name!r} is neither a packaged gold reward nor module:function",
            where="--gold_reward",
            mend="for example my_rewards:politeness, a function (prompts, completions) -> list of numbers",
        )
    try:
        found: Callable[..., Sequence[float]] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(str(error), where="--gold_reward", mend="check the module's name and that it can be imported") from error
    return lambda prompts, completions: found(prompts=prompts, completions=completions)
