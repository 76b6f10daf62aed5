"""RLOO: an answer is one action, its baseline the mean reward of the others to the prompt. No value function.

paper: arXiv 2402.14740

    min_π  max(-ρ A, -clip(ρ, 1 ± ε) A)        ρ = π(y|x)/π_old(y|x),   A_j = R_j - mean of R_i over the others,
                                               R = r(x, y) - c (log π_old(y|x) - log π_ref(y|x))

With one pass over fresh answers ρ is 1, and this is REINFORCE with a leave-one-out baseline. Rollouts may be reset as
in `drpo`; the answers to a prompt then begin with the same tokens, so that they are compared from one state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prefkit.domains.text.config import Data, Lora, Model, Sampling
from prefkit.domains.text.credit import rloo_credit, rloo_loss
from prefkit.domains.text.episodes import EpisodeData
from prefkit.domains.text.episodes_config import Episodes, Resets, Reward, Stages
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.run import Run
from prefkit.loops import stages
from prefkit.loops.judging import judges, reward_of
from prefkit.loops.policy_optimization import PolicyOptimization, check_groups, check_options, optimization
from prefkit.loops.reward_fit import RewardTask
from prefkit.loops.supervised import SupervisedTask
from prefkit.loops.training import run_task
from prefkit.objectives.policy_gradient import leave_one_out as advantages
from prefkit.objectives.policy_gradient import sequence_surrogate as loss
from prefkit.records import Result

__all__ = ["PRESETS", "Config", "advantages", "loss", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Sampling, Reward, Episodes, Resets, Stages, Optimisation, Selection, Output):
    num_generations: int = 4
    """K: answers drawn to each prompt"""
    num_ppo_epochs: int = 1
    """passes over a batch of episodes"""
    scale_advantages: Literal["none", "scale", "whiten"] = "none"
    """over a batch of episodes: as they are, variance 1, or mean 0 too"""


PRESETS = {
    "demo": Config(
        model_name_or_path="smollm2-135m-instruct",
        dataset_name="rotten-tomatoes",
        gold_reward="rotten-tomatoes",
        use_peft=True,
        lora_target_modules=("q_proj", "v_proj"),
        reward_steps=40,
        reward_learning_rate=5e-4,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_steps=12,
        per_device_train_batch_size=8,
        max_new_tokens=32,
        max_length=128,
        kl_coef=0.05,
        num_eval_samples=240,
        save_steps=6,
    ),
    "tiny": Config(
        max_steps=4,
        num_ppo_epochs=2,
        num_generations=2,
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
    """Train by RLOO. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

    Returns the run directory, the final held-out metrics and the model. Raises InputError for unusable input.
    """
    check_options(config)
    check_groups(config)
    tools = stages.Tools(
        run_task=run_task, supervised=SupervisedTask, reward=RewardTask, judges=judges, reward_of=reward_of
    )
    data = EpisodeData.of(stages.prepare(config, model=model, tokenizer=tokenizer, train=train, evaluation=evaluation))

    def task(run: Run) -> PolicyOptimization:
        ready = stages.before(config, data.data, run, tools, model=model, train=train)
        return optimization(
            ready.config,
            data,
            run,
            reward=ready.reward,
            reward_name=ready.reward_model,
            give_credit=rloo_credit(config),
            take_loss=rloo_loss(config),
            judges=judges(config),
            critic="none",
            by_answer=True,
            model=ready.model,
        )

    return run_task(config, "rloo", data, task)
