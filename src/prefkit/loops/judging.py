"""Who judges, made from options: scores for evaluation (`gold_reward`, `reward_model`), and judges that rank answers.

gold:NAME | gold:module:function | reward:MODEL | ranker:MODEL | llm:MODEL | transformers:MODEL | stored:FILE | self
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefkit import assets
from prefkit.domains.text.classifier import label, load_scorer
from prefkit.engine import limits
from prefkit.engine.files import sha256
from prefkit.errors import InputError
from prefkit.feedback.scored import ScoredJudge
from prefkit.options import unknown
from prefkit.protocols import Gold, Judge
from prefkit.records import Message, Text

CACHE = "judge-cache"
"""folder of paid replies where no other is named"""
Say = Callable[[str], None]


def judges(config: Any) -> dict[str, Gold]:
    """Scoring functions by metric name: `gold`, `reward_model`. Empty where none is configured."""
    found: dict[str, Gold] = {}
    if config.gold_reward:
        found["gold"] = gold(config.gold_reward, config.seed)
    if config.reward_model:
        found["reward_model"] = _scorer(config.reward_model, where="--reward_model").judge
    return found


def judge_of(config: Any, *, directory: Path, policy: Any = None, say: Say | None = None) -> Judge:
    """The judge that a Config's `Judging` group names.

    Args:
        directory: where a folder of paid replies is made if --judge_cache names none.
        policy: the policy in training, whose reference `self` asks; `self:MODEL` needs none.
        say: told what a judge has to say for itself.

    Raises InputError for a kind that does not exist, and for a model, file or function that cannot be used.
    """
    kind, _, rest = config.judge.partition(":")
    if kind not in _KINDS:
        listed = ", ".join(_KINDS)
        near = unknown("judge", kind, _KINDS).mend
        raise InputError(f"{config.judge!r} names no judge", where="--judge", mend=f"{near}; kinds are {listed}")
    if not rest and not (kind == "self" and policy is not None):
        raise InputError(f"{kind} alone names no judge", where="--judge", mend=f"write {kind}:{_WHAT[kind]}")
    limits.check(config, {"judge_batch_size": limits.AT_LEAST_1})
    return _KINDS[kind](rest, config, Path(directory), policy, say)


def _gold_judge(name: str, config: Any, directory: Path, policy: Any, say: Say | None) -> Judge:
    seed = getattr(config, "seed", 0)
    score = gold(name, seed, where="--judge")
    return ScoredJudge(score, f"gold:{name}@{_gold_version(name, seed)}")


def _reward_judge(name: str, config: Any, directory: Path, policy: Any, say: Say | None) -> Judge:
    scorer = _scorer(name, where="--judge reward:", dtype=config.judge_dtype)
    score = partial(scorer.judge, batch_size=config.judge_batch_size)
    return ScoredJudge(score, f"reward:{label(name)}@{scorer.fingerprint[:12]}", scale=1.0)


def _ranker_judge(name: str, config: Any, directory: Path, policy: Any, say: Say | None) -> Judge:
    from prefkit.feedback.ranker import PairRanker, RankerJudge

    ranker = PairRanker.load(name, dtype=config.judge_dtype)
    return RankerJudge(ranker, batch_size=config.judge_batch_size, say=say)


def _stored_judge(name: str, config: Any, directory: Path, policy: Any, say: Say | None) -> Judge:
    from prefkit.domains.text.load import load
    from prefkit.feedback.stored import StoredJudge

    source = load(name, what="labels")
    version = sha256(Path(name).expanduser())[:12] if Path(name).expanduser().is_file() else ""
    full_name = f"stored:{label(name)}@{version}" if version else f"stored:{name}"
    return StoredJudge(source.rows, full_name, source.path_of_row)


def _llm_judge(name: str, config: Any, directory: Path, policy: Any, say: Say | None) -> Judge:
    from prefkit.feedback.llm import llm_judge

    return llm_judge(name, config, Path(config.judge_cache or directory / CACHE), say=say)


def _transformers_judge(name: str, config: Any, directory: Path, policy: Any, say: Say | None) -> Judge:
    from prefkit.domains.text.choice import LetterReader
    from prefkit.feedback.llm import TransformersJudge
    from prefkit.feedback.templates import PREFIX, Template

    template = Template.load(config.judge_template)
    model = _pretrained(name, config)
    read = LetterReader(model, batch_size=config.judge_batch_size)
    chat = bool(model.tokenizer.chat_template)

    def ask(conversations: Sequence[list[dict[str, str]]]) -> list[tuple[float, float]]:
        prompts = [_begun(messages, PREFIX.rstrip(), chat) for messages in conversations]
        # A question the model has no room for says nothing: both letters are impossible, and that is counted.
        return [(-math.inf, -math.inf) if found is None else found[:2] for found in read(prompts)]

    return TransformersJudge(ask, template, model=f"{label(name)}@{_weights(model)}")


def _begun(messages: Sequence[Message], reply: str, chat: bool) -> Text:
    """The judge's conversation with its reply begun; in plain text for a model without a chat template."""
    if chat:
        return [*messages, {"role": "assistant", "content": reply}]
    return "\n\n".join([*(str(message["content"]) for message in messages), reply])


def _self_judge(name: str, config: Any, directory: Path, policy: Any, say: Say | None) -> Judge:
    """The model itself by OSP's question, untempered: a model of its own, or the reference of the one in training."""
    from prefkit.domains.text.choice import LetterReader
    from prefkit.feedback.self_judge import SelfJudge, choice_template

    template = choice_template(config.judge_template)
    if name:
        judge, active = _pretrained(name, config), None
        who = f"self:{label(name)}@{_weights(judge)}"
    else:
        judge, active = policy, policy.reference.active
        who = f"self:{policy.fingerprint[:12]}"
    return SelfJudge(LetterReader(judge, active=active, batch_size=config.judge_batch_size), template, who)


def reward_of(name: str, config: Any) -> Any:
    """The reward that `--reward` names, to learn from: a scorer model (reward:MODEL) or a function (gold:NAME).

    Raises InputError for another kind, and for what cannot be loaded.
    """
    kind, _, rest = name.partition(":")
    if kind == "reward" and rest:
        return _scorer(rest, where="--reward reward:", dtype=config.dtype)
    if kind == "gold" and rest:
        return gold(rest, config.seed, where="--reward")
    raise InputError(
        f"{name!r} names no reward",
        where="--reward",
        mend="write reward:MODEL (a run of `prefkit reward`, any sequence classifier) or gold:module:function",
    )


_Maker = Callable[[str, Any, Path, Any, "Say | None"], Judge]
_KINDS: dict[str, _Maker] = {
    "gold": _gold_judge,
    "reward": _reward_judge,
    "ranker": _ranker_judge,
    "llm": _llm_judge,
    "transformers": _transformers_judge,
    "stored": _stored_judge,
    "self": _self_judge,
}
_WHAT = {**dict.fromkeys(_KINDS, "MODEL"), "gold": "NAME or gold:module:function", "stored": "FILE"}
"""what stands behind the colon"""


def _scorer(name: str, *, where: str, dtype: str = "auto") -> Any:
    try:
        return load_scorer(name, dtype=dtype)
    except InputError as error:
        raise InputError(
            error.what, where=f"{where}{'' if where.endswith(':') else ' '}{name}", mend=error.mend
        ) from error


def _pretrained(name: str, config: Any) -> Any:
    from prefkit.domains.text.policy import TextPolicy

    return TextPolicy.pretrained(name, dtype=config.judge_dtype)


def _weights(policy: Any) -> str:
    from prefkit.domains.text.cache import weights_fingerprint

    return weights_fingerprint(policy.module)[:12]


def gold(name: str, seed: int, *, where: str = "--gold_reward") -> Gold:
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
    return _callable(name, where)


def _gold_version(name: str, seed: int) -> str:
    """What changes when the gold reward does: the seed of its films, or a hash of the function's source, of its
    module's where it has none of its own (an object with __call__).
    """
    if name in assets.ASSETS:
        return f"seed{seed}"
    module, _, function = name.partition(":")
    found: Any = getattr(sys.modules[module], function)
    for one in (found, sys.modules[module]):
        try:
            return hashlib.sha256(inspect.getsource(one).encode()).hexdigest()[:12]
        except (OSError, TypeError):
            continue
    return "0"  # compiled code


def _callable(name: str, option: str) -> Gold:
    """The function `module:function`, its scores checked at every call."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(
            f"{name!r} is neither a packaged gold reward nor module:function",
            where=option,
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
            where=option,
            mend="check the module's name; it is looked for among installed packages and in the working folder",
        ) from error
    _check_signature(name, found, option)
    return lambda prompts, completions: _numbers(
        name, found(prompts=prompts, completions=completions), len(completions), option
    )


def _check_signature(name: str, found: Any, option: str) -> None:
    """InputError, before any training, for what cannot be called with the keywords `prompts` and `completions`."""
    mend = "write def NAME(prompts, completions): ..., with these two names"
    if not callable(found):
        raise InputError(f"{name} is {found!r}, not a function", where=option, mend=mend)
    try:
        signature = inspect.signature(found)
    except ValueError:  # some built-in functions do not tell theirs
        return
    try:
        signature.bind(prompts=[], completions=[])
    except TypeError as error:
        what = f"{name}{signature} cannot be called with prompts=..., completions=...: {error}"
        raise InputError(what, where=option, mend=mend) from error


def _numbers(name: str, scores: Any, count: int, option: str) -> list[float]:
    """The scores of `count` answers as floats; InputError for anything but that many finite numbers."""
    where, mend = f"{option} {name}", "return one finite number for each of the completions, in order"
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
