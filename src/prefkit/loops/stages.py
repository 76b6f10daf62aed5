"""What comes before reinforcement learning, in runs of their own inside the run directory: SFT and a reward model.

    DIRECTORY/sft       supervised fine-tuning on the offline answers, where --sft_steps asks for it
    DIRECTORY/reward    a reward model fit to pairs, where --reward names none

Each is an ordinary run: it goes on after a kill, is made anew where its options were others, and can be named in place
of a model by later runs. The reward model starts from what SFT left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from prefkit.domains.text.config import Data, Lora, Model, Sampling
from prefkit.domains.text.datasets import TextData, prepare_completions, prepare_pairs
from prefkit.domains.text.generators import sampler_for
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.prompts import last_content
from prefkit.domains.text.reward import RewardModel
from prefkit.engine import checkpoint, limits
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.directory import CONFIG, RESULT, differences
from prefkit.engine.files import read_json
from prefkit.engine.run import Run
from prefkit.errors import InputError
from prefkit.options import to_json
from prefkit.protocols import Gold
from prefkit.records import Completion, Example, Pair, Result

SFT, REWARD = "sft", "reward"
LAST = "report.html"
"""what a run writes last"""
OTHER_DATA: dict[str, Any] = {
    "dataset_config": "",
    "dataset_train_split": "train",
    "dataset_eval_split": "",
    "eval_dataset": "",
}
"""options of the data of --reward_dataset: those given are of dataset_name"""
LIMITS = {
    "sft_steps": limits.Limit(-1),
    "reward_steps": limits.Limit(-1),
    "sft_learning_rate": limits.NOT_BELOW_0,
    "reward_learning_rate": limits.NOT_BELOW_0,
}


@dataclass(frozen=True, kw_only=True)
class SftStage(Model, Lora, Data, Sampling, Optimisation, Selection, Output):
    """Options of `prefkit sft`."""

    learning_rate: float = 2e-5


@dataclass(frozen=True, kw_only=True)
class RewardStage(Model, Lora, Data, Optimisation, Selection, Output):
    """Options of `prefkit reward`."""

    learning_rate: float = 1e-5


class RunTask(Protocol):
    def __call__(self, config: Any, method: str, data: Any, make: Callable[[Run], Any], /) -> Result: ...


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The loops that stages run: a loop does not know its siblings, so the method hands them over."""

    run_task: RunTask
    reward: Callable[..., Any]
    """makes the task of a reward model"""
    supervised: Callable[..., Any]
    """makes the task of SFT"""
    judges: Callable[[Any], dict[str, Gold]]
    reward_of: Callable[[str, Any], Any]
    """loads what --reward names"""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What reinforcement learning starts from, once the stages before are done."""

    config: Any
    """with the model that SFT left"""
    model: Any
    """a model in memory that is still the start; None once a stage has trained"""
    reward: Any
    """a RewardModel, or a function of prompts and answers"""
    reward_model: str
    """the reward model's folder or Hub id; empty where a function scores"""


def prepare(config: Any, *, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> TextData[Any]:
    """Prompts with their offline answers: prompt/completion rows, or the pairs that a reset to a rejected one needs.

    Raises InputError, as those do, and for a prompt that leaves no room for an answer.
    """
    kind = prepare_pairs if config.reset_source in ("rejected", "both") else prepare_completions
    data = kind(config, model=model, tokenizer=tokenizer, train=train, evaluation=evaluation)
    data.online_prompts("")  # the training rows' own
    return data


def before(config: Any, data: TextData[Any], run: Run, tools: Tools, *, model: Any, train: Any) -> Ready:
    """Run the stages that are asked for, or take up what they left."""
    limits.check(config, LIMITS)
    # First what is named: a name that means nothing should not cost a stage.
    reward = tools.reward_of(config.reward, config) if config.reward else None
    ready = run_sft(config, data, run, tools, model)
    start = model if ready is config else None
    if reward is not None:
        kind, _, rest = config.reward.partition(":")
        return Ready(config=ready, model=start, reward=reward, reward_model=rest if kind == "reward" else "")
    folder = str(run_reward(ready, data, run, tools, start, train))
    reward = tools.reward_of(f"reward:{folder}", config)
    return Ready(config=ready, model=start, reward=reward, reward_model=folder)


def stage(config: Any, kind: type[Any], directory: Path, name: str, **own: Any) -> Any:
    """A stage's options: those of the whole run that it has too, without cadence and selection, and its `own`."""
    names = {field.name for field in dataclasses.fields(kind)}
    shared = {key: value for key, value in vars(config).items() if key in names}
    fixed: dict[str, Any] = {
        "output_dir": str(directory / name),
        "num_train_epochs": 1.0,
        "keep_best": "",
        "patience": 0,
        "stop_at_kl": 0.0,
        "eval_steps": 0,
        "overwrite": False,
        "dry_run": False,
    }
    fixed |= {"reward_model": ""} if "reward_model" in names else {}
    return kind(**{**shared, **fixed, **own})


def state(config: Any, made_of: str) -> Literal["absent", "begun", "done", "other"]:
    """What there is of a stage in its folder; "other" was made with other options than these.

    Raises InputError for one that is done and learned from other data than those of fingerprint `made_of`.
    """
    folder = Path(config.output_dir)
    if not (folder / CONFIG).is_file():
        return "absent"
    before, now = placeless(read_json(folder / CONFIG)["config"]), placeless(to_json(config))
    if differences(before, now) or before["max_steps"] != now["max_steps"]:
        return "other"
    if not all((folder / name).is_file() for name in (RESULT, LAST)):
        return "begun"
    steps = checkpoint.steps_in(folder)
    if steps and checkpoint.read_state(folder, steps[-1])["fingerprints"].get("basis") != made_of:
        raise InputError(
            "this stage learned from other data of that name",
            where=str(folder),
            mend="give the same, choose another --output_dir, or --overwrite to start anew",
        )
    return "done"


def placeless(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's options without the folder its run stands in: another spelling of that is no other model."""
    start = Path(values["output_dir"]).parent / SFT
    named = Path(values["model_name_or_path"] or ".")
    return {**values, "model_name_or_path": SFT if named == start else values["model_name_or_path"]}


def run_sft(config: Any, data: TextData[Any], run: Run, tools: Tools, model: Any) -> Any:
    """The options of what follows: its model is what SFT left. Without SFT they are `config`."""
    if not config.sft_steps:
        return config
    own = stage(
        config, SftStage, run.directory, SFT, max_steps=config.sft_steps, learning_rate=config.sft_learning_rate
    )
    found = run.world.on_main(lambda: state(own, data.fingerprint))
    if found != "done":
        own = dataclasses.replace(own, overwrite=found == "other")
        run.say(f"stage sft: {len(data.train)} answers")
        rows: Any = dataclasses.replace(
            data, config=own, train=answers(data.train), test=answers(data.test), selection=[]
        )

        def task(inner: Run) -> Any:
            policy = TextPolicy.create(own, inner.world, model=model, tokenizer=data.tokenizer, copy_reference=False)
            inner.fingerprint(model=policy.fingerprint, basis=data.fingerprint)
            inner.say(f"policy {policy.describe()}")
            return tools.supervised(
                policy=policy,
                sampler=sampler_for(policy, own),
                examples=rows.train,
                test=rows.test,
                selection=rows.selection,
                config=own,
                judges=tools.judges(own),
            )

        tools.run_task(own, SFT, rows, task)
    return continued(config, run.directory / SFT)


def run_reward(config: Any, data: TextData[Any], run: Run, tools: Tools, model: Any, train: Any) -> Path:
    """The folder of the reward model, trained where it is not there yet."""
    own = stage(
        config,
        RewardStage,
        run.directory,
        REWARD,
        max_steps=config.reward_steps,
        learning_rate=config.reward_learning_rate,
        **(OTHER_DATA | {"dataset_name": config.reward_dataset} if config.reward_dataset else {}),
    )
    found = run.world.on_main(lambda: state(own, data.fingerprint))
    if found != "done":
        own = dataclasses.replace(own, overwrite=found == "other")
        rows = None if config.reward_dataset else train
        pairs = prepare_pairs(own, model=model, tokenizer=data.tokenizer, train=rows, evaluation=None)
        run.say(f"stage reward: {len(pairs.train)} pairs")

        def task(inner: Run) -> Any:
            reward = RewardModel.create(own, inner.world, model=model, tokenizer=data.tokenizer)
            inner.fingerprint(model=reward.fingerprint, basis=data.fingerprint)
            inner.say(reward.module.how)
            return tools.reward(
                reward=reward, pairs=pairs.train, test=pairs.test, selection=pairs.selection, config=own
            )

        tools.run_task(own, REWARD, pairs, task)
    return run.directory / REWARD


def judged(
    config: Any, data: TextData[Any], run: Run, run_task: RunTask, reward: Callable[..., Any], *, model: Any, train: Any
) -> Any:
    """The options with a judge that is there: `--judge reward` alone has one fit to the pairs first."""
    if config.judge != REWARD:
        return config
    tools = Tools(run_task=run_task, reward=reward, supervised=_unused, judges=_unused, reward_of=_unused)
    folder = run_reward(config, data, run, tools, model, train)
    return dataclasses.replace(config, judge=f"{REWARD}:{folder}")


def _unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("a judge needs no other stage")


def continued(config: Any, folder: Path) -> Any:
    """Options for what starts from a stage's model. InputError where its base is quantised and took no merge."""
    if read_json(folder / RESULT)["model"] is None:
        raise InputError(
            "a quantised base cannot take up what SFT learned",
            where="--sft_steps",
            mend="run `prefkit sft` on the whole model first, and start from it",
        )
    return dataclasses.replace(config, model_name_or_path=str(folder), model_revision="main", adapter_name_or_path="")


def answers(rows: Sequence[Pair | Example]) -> list[Example]:
    """The chosen answers of pairs, or the answers there are, in token ids as they are."""
    return [row if isinstance(row, Example) else _chosen(row) for row in rows]


def _chosen(pair: Pair) -> Example:
    source = pair.source
    return Example(
        prompt=pair.prompt,
        completion=pair.chosen,
        truncated=pair.chosen_truncated,
        source=Completion(
            prompt=source.prompt, completion=last_content(source.chosen), row=source.row, extra=source.extra
        ),
    )
