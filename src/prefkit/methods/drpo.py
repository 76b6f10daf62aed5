"""DR-PO: PPO whose rollouts start after a random beginning of an answer the data set has to the same prompt.

paper: arXiv 2404.08495 (v3)

    k ~ Uniform{k_min, ..., L - 1} with probability reset_prob, else 0        y_1..y_k from the data, the rest from π

Everything else is `ppo`: forced tokens get neither reward nor gradient, and the answer is scored as a whole. With
reset_prob 0 the run is PPO's, bit for bit. SFT, a reward model and DR-PO run from this one command. `--profile paper`
does what the released code does, where that differs: docs/methods/drpo.md lists it.

Preset hh: not one of its values is from the DR-PO paper, which prints none for HH. They are trlx's HH defaults, and
reset_prob, k_min, reset_source, lr_scheduler_type and long_prompts are ours. Presets tldr (released code) and
tldr-paper (printed temperature) were not run by us.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from prefkit.domains.text.config import Data, Lora, Model, Sampling
from prefkit.domains.text.credit import critic_credit, critic_loss
from prefkit.domains.text.episodes import EpisodeData
from prefkit.domains.text.episodes_config import Critic, Episodes, Resets, Reward, Stages
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.run import Run
from prefkit.loops import stages
from prefkit.loops.judging import judges, reward_of
from prefkit.loops.policy_optimization import PolicyOptimization, check_options, optimization
from prefkit.loops.reward_fit import RewardTask
from prefkit.loops.supervised import SupervisedTask
from prefkit.loops.training import run_task
from prefkit.objectives.policy_gradient import clipped_surrogate as loss
from prefkit.records import Result

__all__ = ["PRESETS", "Config", "loss", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Sampling, Reward, Episodes, Critic, Resets, Stages, Optimisation, Selection, Output):
    adam_epsilon: float = 1e-5
    """AdamW's epsilon"""
    learning_rate: float = 3e-6
    """peak learning rate"""
    reset_prob: float = 1.0
    """share of rollouts that start after a prefix of an offline answer to their prompt; 0 is ppo"""
    profile: Literal["default", "paper"] = "default"
    """default counts what the policy chose; paper does what the released code does (see the method's page)"""
    compare_with_ppo: bool = False
    """also train without resets, from the same stages at the same budget, in DIRECTORY/ppo; the report shows both"""


RELEASED: dict[str, Any] = {
    "profile": "paper",
    "use_peft": True,
    "lora_r": 1024,
    "lora_alpha": 2048.0,
    "lora_target_modules": ("query_key_value",),
    "reset_prob": 1.0,
    "reset_source": "reference",
    "k_min": 1,
    "total_episodes": 1_000_000,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 32,
    "num_ppo_epochs": 4,
    "num_mini_batches": 1,
    "learning_rate": 3e-6,
    "lr_scheduler_type": "linear",
    "adam_epsilon": 1e-5,
    "weight_decay": 0.01,
    "kl_coef": 0.05,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "whiten_rewards": True,
    "scale_advantages": "whiten",
    "missing_eos": "replace",
    "missing_eos_penalty": 1.0,
    "max_length": 565,
    "max_new_tokens": 53,
    "temperature": 0.7,
    "sft_learning_rate": 3e-6,
    "reward_learning_rate": 3e-6,
    "sft_steps": -1,
}
"""of the released TL;DR code: 4 processes make a batch of 512; --weight_decay is AdamW's default there"""

PRINTED: dict[str, Any] = {**RELEASED, "temperature": 0.1}
"""with the temperature of the paper's table; its SFT and reward model have batch 64 and a linear schedule, too"""

HH: dict[str, Any] = {
    "reset_source": "chosen",
    "max_length": 1024,
    "max_new_tokens": 128,
    "num_ppo_epochs": 4,
    "kl_coef": 0.05,
    "kl_target": 6.0,
    "kl_horizon": 10_000,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 1.0,
    "reward_clip": 10.0,
    "learning_rate": 8e-6,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 1e-6,
    "per_device_train_batch_size": 32,
    "num_mini_batches": 4,
    "long_prompts": "drop",
}
"""not from the DR-PO paper, which prints none for HH: trlx's HH defaults for a model of 125 M"""


PRESETS = {
    "demo": Config(
        model_name_or_path="smollm2-135m-instruct",
        dataset_name="rotten-tomatoes",
        gold_reward="rotten-tomatoes",
        use_peft=True,
        lora_target_modules=("q_proj", "v_proj"),
        reward_steps=30,
        reward_learning_rate=5e-4,
        compare_with_ppo=True,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        max_steps=16,
        num_ppo_epochs=2,
        num_mini_batches=2,
        per_device_train_batch_size=8,
        max_new_tokens=24,
        max_length=128,
        kl_coef=0.05,
        num_eval_samples=120,
        eval_steps=4,
        save_steps=8,
    ),
    "tldr": Config(**RELEASED),
    "tldr-paper": Config(**PRINTED),
    "hh": Config(**HH),
    "tiny": Config(
        max_steps=4,
        num_ppo_epochs=2,
        per_device_train_batch_size=2,
        num_eval_prompts=2,
        max_new_tokens=8,
        reward="gold:prefkit.feedback.gold:brevity",
        missing_eos="keep",
    ),
}


def run(
    config: Config, *, model: Any = None, tokenizer: Any = None, train: Any = None, evaluation: Any = None
) -> Result:
    """Train by DR-PO. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

    Returns the run directory, the final held-out metrics and the model. Raises InputError for unusable input.
    """
    check_options(config)
    tools = stages.Tools(
        run_task=run_task, supervised=SupervisedTask, reward=RewardTask, judges=judges, reward_of=reward_of
    )
    data = stages.prepare(config, model=model, tokenizer=tokenizer, train=train, evaluation=evaluation)

    def task(run: Run) -> PolicyOptimization:
        ready = stages.before(config, data, run, tools, model=model, train=train)
        if config.compare_with_ppo:
            own = without_resets(ready, run)
            if run.world.on_main(lambda: stages.state(own, data.fingerprint)) != "done":
                run.say("the same without resets, for comparison")
                rows, start = dataclasses.replace(data, config=own), copy.deepcopy(ready)

                def beside(inner: Run) -> PolicyOptimization:
                    inner.fingerprint(basis=data.fingerprint)
                    return made(own, rows, start, inner)

                run_task(own, "drpo", EpisodeData.of(rows), beside)
        return made(ready.config, data, ready, run)

    return run_task(config, "drpo", EpisodeData.of(data), task)


def made(config: Config, data: Any, ready: stages.Ready, run: Run) -> PolicyOptimization:
    """The task of a run, with resets or without."""
    paper = config.profile == "paper"
    return optimization(
        config,
        EpisodeData.of(data),
        run,
        reward=ready.reward,
        reward_name=ready.reward_model,
        give_credit=critic_credit(config, by_episode=paper),
        take_loss=critic_loss(config),
        judges=judges(config),
        critic=config.value_init if ready.reward_model else "policy",
        accounting="episode" if paper else "continuation",
        mean_per_pass=paper,
        model=ready.model,
    )


def without_resets(ready: stages.Ready, run: Run) -> Config:
    """PPO's options: the same run in DIRECTORY/ppo, on the stages that are there already."""
    return dataclasses.replace(
        ready.config,
        output_dir=str(run.directory / "ppo"),
        reset_prob=0.0,
        compare_with_ppo=False,
        reward=ready.config.reward or f"reward:{ready.reward_model}",
        sft_steps=0,
        overwrite=False,
    )
