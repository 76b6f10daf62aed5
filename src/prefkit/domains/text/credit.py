"""How a batch of episodes is given credit, and the loss of a pass: what tells `ppo`, `rloo` and `grpo` apart.

critic    token rewards -> generalised advantages and returns; clipped surrogate and clipped value loss
rloo      an answer is one action; its advantage is its reward less the mean of the others to the same prompt
grpo      every token has its answer's advantage: the score less its group's mean, over its standard deviation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefkit.domains.text.rollout_metrics import sequence_kl
from prefkit.domains.text.rollouts import Columns
from prefkit.objectives.kl_penalty import kl_loss, kl_reward, token_rewards
from prefkit.objectives.policy_gradient import (
    RatioSums,
    clipped_surrogate,
    group_normalised,
    leave_one_out,
    ratio_sums,
    sequence_surrogate,
)
from prefkit.objectives.value import clipped_value_loss, counted, gae, mean_and_variance, moments, whiten


@dataclass(frozen=True, kw_only=True)
class Credit:
    """What a batch of episodes is to be trained on, n rows of t counted positions."""

    advantages: Tensor
    """(n, t), or (n,) where an answer is one action"""
    returns: Tensor | None = None
    """(n, t) targets of the value function"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward pass of a minibatch: what a loss is taken of. n rows of t counted positions."""

    log_probs: Tensor
    """(n, t) with gradient"""
    values: Tensor | None
    """(n, t) with gradient"""
    columns: Columns
    credit: Credit
    kl_coef: float
    value_scale: Tensor | float
    """actions over counted positions: a loss's divisor counts actions, the value function's error every position"""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Of a pass's answers, (n,) each: sums over their tokens."""

    total: Tensor
    terms: Mapping[str, Tensor]
    """parts of it, for the log"""
    ratios: RatioSums


GiveCredit = Callable[[Columns, Tensor, float], Credit]
"""(columns, scores after penalties (n,), KL coefficient) -> credit; rows are in order of prompts"""
TakeLoss = Callable[[Step], Losses]


def critic_credit(config: Any, *, by_episode: bool = False) -> GiveCredit:
    """Token rewards -> generalised advantages and returns. `by_episode` whitens over forced positions too."""

    def give(columns: Columns, scores: Tensor, kl_coef: float) -> Credit:
        counted = columns.counted
        coefficient = kl_coef if config.kl_in == "reward" else 0.0
        kl = kl_reward(columns.log_probs, columns.ref_log_probs, counted, coefficient=coefficient)
        rewards = token_rewards(kl, scores, columns.ends, counted)
        if config.whiten_rewards:
            rewards = whiten(rewards, counted, keep_mean=True)
        advantages, returns = gae(rewards, columns.values, counted, gamma=config.gamma, lam=config.lam)
        mask = counted if by_episode else columns.actions
        return Credit(advantages=scaled(advantages, mask, config.scale_advantages), returns=returns)

    return give


def scaled(advantages: Tensor, mask: Tensor, how: str) -> Tensor:
    """Advantages as they are (none), over their standard deviation (scale), or less their mean too (whiten)."""
    if how == "none":
        return advantages
    white = whiten(advantages, mask)
    if how == "whiten":
        return white
    mean, var = mean_and_variance(moments(advantages, mask))
    return counted(white + mean * (var + 1e-8) ** -0.5, mask).to(advantages.dtype)


def critic_loss(config: Any) -> TakeLoss:
    """PPO's loss on tokens, and the KL as a loss where it is not a reward."""

    def take(step: Step) -> Losses:
        columns, advantages, returns = step.columns, step.credit.advantages, step.credit.returns
        assert step.values is not None and returns is not None
        four = step.log_probs, columns.log_probs, advantages, columns.actions
        policy = clipped_surrogate(*four, clip=config.cliprange, dual_clip=config.dual_clip or None)
        value = clipped_value_loss(
            step.values, columns.values, returns, columns.counted, clip=config.cliprange_value or None
        )
        value = value * step.value_scale
        found = with_kl(step, policy, ratio_sums(*four, clip=config.cliprange), config)
        total = found.total + config.vf_coef * value
        return Losses(total=total, terms={**found.terms, "loss/value": value}, ratios=found.ratios)

    return take


def kl_term(step: Step, config: Any) -> Tensor:
    """(n,) the KL to the reference as a loss, summed over actions."""
    columns = step.columns
    return kl_loss(step.log_probs, columns.ref_log_probs, columns.actions, kind=config.kl_estimator)


def rloo_credit(config: Any) -> GiveCredit:
    """(n,) score less c times the sequence's KL, less the mean of that over the other answers to the prompt."""

    def give(columns: Columns, scores: Tensor, kl_coef: float) -> Credit:
        coefficient = kl_coef if config.kl_in == "reward" else 0.0
        rewards = scores - coefficient * sequence_kl(columns) if coefficient else scores
        advantages = leave_one_out(rewards.view(-1, config.num_generations)).flatten()
        everyone = torch.ones_like(advantages, dtype=torch.bool)
        return Credit(advantages=scaled(advantages, everyone, config.scale_advantages))

    return give


def rloo_loss(config: Any) -> TakeLoss:
    """The clipped surrogate of whole answers."""

    def take(step: Step) -> Losses:
        columns, advantages = step.columns, step.credit.advantages
        four = step.log_probs, columns.log_probs, advantages, columns.actions
        policy = sequence_surrogate(*four, clip=config.cliprange, dual_clip=config.dual_clip or None)
        new, old = (counted(part, columns.actions).sum(-1, keepdim=True) for part in four[:2])
        some = columns.actions.any(-1, keepdim=True)
        ratios = ratio_sums(new, old, advantages[:, None], some, clip=config.cliprange)
        return with_kl(step, policy, ratios, config)

    return take


def grpo_credit(config: Any) -> GiveCredit:
    """(n, t) on every token the answer's score less its group's mean, over its deviation with --scale_rewards."""

    def give(columns: Columns, scores: Tensor, kl_coef: float) -> Credit:
        if config.kl_in == "reward" and kl_coef:
            scores = scores - kl_coef * sequence_kl(columns)
        advantages = group_normalised(scores.view(-1, config.num_generations), scale=config.scale_rewards).flatten()
        everyone = torch.ones_like(advantages, dtype=torch.bool)
        advantages = scaled(advantages, everyone, config.scale_advantages)
        return Credit(advantages=advantages[:, None].expand_as(columns.log_probs).contiguous())

    return give


def grpo_loss(config: Any) -> TakeLoss:
    """The clipped surrogate of tokens and the KL as a loss; over tokens, or a mean over each answer's first."""

    def take(step: Step) -> Losses:
        columns = step.columns
        four = step.log_probs, columns.log_probs, step.credit.advantages, columns.actions
        policy = clipped_surrogate(
            *four, clip=config.cliprange, clip_high=config.cliprange_high or None, dual_clip=config.dual_clip or None
        )
        ratios = ratio_sums(*four, clip=config.cliprange, clip_high=config.cliprange_high or None)
        found = with_kl(step, policy, ratios, config)
        if config.loss_mean == "tokens":
            return found
        lengths = columns.actions.sum(-1).clamp(min=1)
        terms = {name: term / lengths for name, term in found.terms.items()}
        each = RatioSums(
            tokens=ratios.tokens,
            ratio=ratios.ratio / lengths,
            approx_kl=ratios.approx_kl / lengths,
            clipped=ratios.clipped / lengths,
            largest=ratios.largest,
        )
        return Losses(total=found.total / lengths, terms=terms, ratios=each)

    return take


def with_kl(step: Step, policy: Tensor, ratios: RatioSums, config: Any) -> Losses:
    """A policy's loss, and the KL beside it where it is a loss."""
    terms, total = {"loss/policy": policy}, policy
    if config.kl_in == "loss" and step.kl_coef:
        terms["loss/kl"] = kl_term(step, config)
        total = total + step.kl_coef * terms["loss/kl"]
    return Losses(total=total, terms=terms, ratios=ratios)
