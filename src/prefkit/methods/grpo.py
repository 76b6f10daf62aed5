"""GRPO: every token of an answer has its advantage, the score among the others to the prompt. No value function.

paper: arXiv 2402.03300; variants 2503.20783 (Dr. GRPO), 2503.14476 (DAPO)

    min_π  Σ_t max(-ρ_t A, -clip(ρ_t, 1 - ε, 1 + ε_high) A) + c KL

A_j = (r_j - mean) / (std + 10⁻⁴) over the group of answers to a prompt.

The mean is over answers of their tokens' mean (the paper), or over tokens (--loss_mean tokens, DAPO). The KL is a term
of the loss, by the estimator k3. Rollouts may be reset as in `drpo`, a group from one state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prefkit.domains.text.config import Data, Lora, Model, Sampling
from prefkit.domains.text.credit import grpo_credit, grpo_loss
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
from prefkit.objectives.policy_gradient import clipped_surrogate as loss
from prefkit.objectives.policy_gradient import group_normalised as advantages
from prefkit.records import Result

__all__ = ["PRESETS", "Config", "advantages", "loss", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Sampling, Reward, Episodes, Resets, Stages, Optimisation, Selection, Output):
    num_generations: int = 4
    """K: answers drawn to each prompt"""
    num_ppo_epochs: int = 1
    """passes over a batch of episodes"""
    cliprange_high: float = 0.0
    """how far the probability ratio may rise, where that differs from cliprange; 0 takes cliprange"""
    scale_advantages: Literal["none", "scale", "whiten"] = "none"
    """over a batch of episodes: as they are, variance 1, or mean 0 too"""
    scale_rewards: bool = True
    """divide a group's advantages by its standard deviation; off: Dr. GRPO"""
    loss_mean: Literal["answers", "tokens"] = "answers"
    """the mean over answers of each one's mean over tokens, or over all tokens alike"""
    kl_in: Literal["reward", "loss"] = "loss"
    """where the KL counts: token by token in the reward, or as a term of the loss"""
    kl_coef: float = 0.04
    """weight of the KL to the reference"""


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
    """Train by GRPO. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

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
            give_credit=grpo_credit(config),
            take_loss=grpo_loss(config),
            judges=judges(config),
            critic="none",
            by_answer=config.loss_mean == "answers",
            model=ready.model,
        )

    return run_task(config, "grpo", data, task)
