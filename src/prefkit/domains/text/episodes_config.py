"""Options of reinforcement learning on text; each class is a group in `--help` (see engine/config.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Reward:
    """reward"""

    reward: str = ""
    """who scores: reward:MODEL (a run of `prefkit reward`, any sequence classifier) or gold:NAME; empty trains one"""
    missing_eos: Literal["keep", "replace", "subtract"] = "replace"
    """an answer without its end token: scored as it is, given -missing_eos_penalty, or lowered by it"""
    missing_eos_penalty: float = 1.0
    """see missing_eos"""
    reward_clip: float = 0.0
    """scores are clipped to ± this; 0 never clips"""
    kl_coef: float = 0.05
    """weight of the KL to the reference, per nat of an answer"""
    kl_in: Literal["reward", "loss"] = "reward"
    """where the KL counts: token by token in the reward, or as a term of the loss"""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """of kl_in loss: k3 (GRPO's) or k2, whose gradient is that of the KL for fresh samples"""
    kl_target: float = 0.0
    """nats of an answer that an adaptive kl_coef aims at; 0 keeps kl_coef fixed"""
    kl_horizon: int = 10_000
    """episodes over which the adaptive kl_coef moves"""
    whiten_rewards: bool = False
    """scale token rewards to variance 1 over a batch of episodes, keeping their mean"""


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """episodes"""

    num_generations: int = 1
    """answers drawn to each prompt of a batch of episodes"""
    num_ppo_epochs: int = 4
    """passes over a batch of episodes"""
    num_mini_batches: int = 1
    """optimizer steps in a pass; a batch of episodes has this many times the prompts of a step"""
    total_episodes: int = 0
    """answers to train on; 0 follows max_steps, or num_train_epochs over the prompts"""
    cliprange: float = 0.2
    """how far the probability ratio may move before its gradient stops"""
    dual_clip: float = 0.0
    """bound on the loss where the advantage is negative (above 1); 0, as in PPO: none"""
    scale_advantages: Literal["none", "scale", "whiten"] = "whiten"
    """over a batch of episodes: as they are, variance 1, or mean 0 too (which can hurt with resets, see drpo's page)"""


@dataclass(frozen=True, kw_only=True)
class Critic:
    """value function"""

    gamma: float = 1.0
    """discount of later rewards"""
    lam: float = 0.95
    """λ of generalised advantage estimation"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    cliprange_value: float = 0.2
    """how far values may move from those of the rollout before their gradient stops"""
    value_model: Literal["auto", "separate", "shared"] = "auto"
    """a model of its own, or an adapter on the policy's base; auto shares with LoRA where the reward model allows it"""
    value_init: Literal["reward", "policy"] = "reward"
    """what it begins as: the reward model, or the policy's backbone with a head of zeros (also where gold scores)"""


@dataclass(frozen=True, kw_only=True)
class Resets:
    """resets"""

    reset_prob: float = 0.0
    """share of rollouts that start after a prefix of an offline answer to their prompt"""
    reset_source: Literal["reference", "chosen", "rejected", "both", "policy"] = "chosen"
    """whose answers: demonstrations (`completion`), a side of the pairs, both, or the start model's own samples"""
    k_min: int = 0
    """fewest forced tokens; 0 lets a reset be the empty prefix"""
    reset_law: Literal["uniform", "fixed", "curriculum"] = "uniform"
    """how many tokens are forced: uniform; fixed at reset_cut; or late cuts first and all of them in the end"""
    reset_cut: float = 0.5
    """of reset_law fixed: a share of the answer below 1, else a number of tokens"""
    reset_filter: Literal["all", "finished"] = "all"
    """which offline answers count: all, or those that were not cut off"""


@dataclass(frozen=True, kw_only=True)
class RewardFirst:
    """reward model first"""

    reward_steps: int = -1
    """optimizer steps of the reward model that is fit to pairs first where none is named; -1 is one pass"""
    reward_learning_rate: float = 1e-5
    """its peak learning rate"""
    reward_dataset: str = ""
    """pairs it is fit to; empty takes dataset_name"""


@dataclass(frozen=True, kw_only=True)
class Stages(RewardFirst):
    """stages before"""

    sft_steps: int = 0
    """optimizer steps of supervised fine-tuning first, on the offline answers; -1 is one pass, 0 leaves it out"""
    sft_learning_rate: float = 1e-5
    """its peak learning rate"""
