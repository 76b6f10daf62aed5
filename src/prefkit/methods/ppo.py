"""PPO: policy optimization from a reward, with a value function and a KL to the reference.

paper: arXiv 1707.06347; for language models 1909.08593, 2009.01325

    max_π  E_{y~π}[r(x, y)] - c KL(π ‖ π_ref)        by steps on  min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t),  ρ_t = π/π_old

Answers are drawn to a batch of prompts and scored at their end; the KL is a reward at every token; advantages are
generalised ones of a value function that begins as the reward model. Each batch is passed over several times. It is
`drpo` without resets, bit for bit. SFT and a reward model can be trained before, in the same command.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


PRESETS = {
    "demo": Config(
        model_name_or_path="smollm2-135m-instruct",
        dataset_name="rotten-tomatoes",
        gold_reward="rotten-tomatoes",
        use_peft=True,
        lora_target_modules=("q_proj", "v_proj"),
        reward_steps=30,
        reward_learning_rate=5e-4,
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
        save_steps=8,
    ),
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
    """Train by PPO. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

    Returns the run directory, the final held-out metrics and the model. Raises InputError for unusable input.
    """
    check_options(config)
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
            give_credit=critic_credit(config),
            take_loss=critic_loss(config),
            judges=judges(config),
            critic=config.value_init if ready.reward_model else "policy",
            model=ready.model,
        )

    return run_task(config, "ppo", data, task)
