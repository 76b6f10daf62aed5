"""XPO: online DPO on an answer of the policy and one of the start model, with an optimism term on the latter.

paper: arXiv 2405.21046

    min_π  E_{y ~ π, ỹ ~ π_ref}[-log σ(m) + α·log π(ỹ|x)]         the judge says which of y, ỹ is y⁺

α stands alone, it is not multiplied by β: SELM with a sampled ŷ has the gradient of XPO with α_XPO = α_SELM·β. The
paper names no value; the default is that of TRL. The reference, which also answers, is the start model throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prefkit.domains.text.config import Data, Lora, Model, Parts, Rounds, Sampling
from prefkit.domains.text.contests import MatchScores
from prefkit.domains.text.datasets import prepare_pairs
from prefkit.domains.text.episodes_config import RewardFirst
from prefkit.domains.text.round_maker import Draw
from prefkit.domains.text.round_plan import RoundData
from prefkit.domains.text.sampler import Decoding
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.run import Run
from prefkit.errors import InputError
from prefkit.feedback.config import Judging
from prefkit.feedback.ranking import pairing_of
from prefkit.loops.judging import judge_of, judges
from prefkit.loops.reward_fit import RewardTask
from prefkit.loops.rounds import Losses, RoundTask, check_options, require_judge, rounds_task
from prefkit.loops.stages import judged
from prefkit.loops.training import run_task
from prefkit.objectives.optimism import bounded_log_ratio
from prefkit.objectives.optimism import xpo_loss as loss
from prefkit.records import Result

__all__ = ["PRESETS", "Config", "loss", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Sampling, Parts, Rounds, Judging, RewardFirst, Optimisation, Selection, Output):
    beta: float = 0.1
    """temperature β of the implicit reward; larger keeps closer to the reference"""
    alpha: float = 1e-5
    """α: weight of the optimism term, per nat of the start model's answer"""
    max_log_ratio: float = 0.0
    """ỹ is pushed no further once it is so many nats less likely than under the reference; 0, as published: no bound"""
    steps_per_round: int = 1
    """optimizer steps from one sampling to the next; 0: num_train_epochs over a round's part"""
    num_generations: int = 1
    """answers drawn to each prompt by the policy, and as many by the start model"""
    candidates: Literal["own", "both"] = "own"
    """answers that are ranked: the drawn ones, or also the data set's chosen and rejected"""
    reset_reference: bool = False
    """must stay off: the reference is the start model, which answers"""
    reset_optimizer: bool = False
    """optimizer state and schedule start anew in each round"""


PRESETS = {
    "demo": Config(
        model_name_or_path="smollm2-135m-instruct",
        dataset_name="rotten-tomatoes",
        judge="gold:rotten-tomatoes",
        gold_reward="rotten-tomatoes",
        use_peft=True,
        lora_target_modules=("q_proj", "v_proj"),
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        max_steps=24,
        per_device_train_batch_size=8,
        alpha=0.01,
        max_new_tokens=32,
        max_length=128,
        num_eval_samples=240,
        save_steps=8,
    ),
    "tiny": Config(
        max_steps=4,
        per_device_train_batch_size=2,
        num_eval_prompts=2,
        max_new_tokens=8,
        judge="gold:prefkit.feedback.gold:brevity",
    ),
}


def run(
    config: Config, *, model: Any = None, tokenizer: Any = None, train: Any = None, evaluation: Any = None
) -> Result:
    """Train by XPO. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

    Returns the run directory, the final held-out metrics and the model. Raises InputError for unusable input.
    """
    check(config)
    rounds = RoundData.of(prepare_pairs(config, model=model, tokenizer=tokenizer, train=train, evaluation=evaluation))

    def objective(scores: MatchScores) -> Losses:
        bound = config.max_log_ratio or None
        losses = loss(
            scores.chosen,
            scores.rejected,
            scores.own,
            scores.ref_chosen,
            scores.ref_rejected,
            beta=config.beta,
            alpha=config.alpha,
            reference_of_sample=scores.ref_own,
            max_log_ratio=bound,
        )
        if not config.alpha or scores.own is None or scores.ref_own is None:
            return losses, {}
        # The share in the gradient is that of log π(ỹ), whose log-ratio differs by a constant.
        ratio = bounded_log_ratio(scores.own, scores.ref_own, max_log_ratio=bound)
        return losses, {"optimism": config.alpha * ratio}

    def task(run: Run) -> RoundTask:
        ready = judged(config, rounds.data, run, run_task, RewardTask, model=model, train=train)
        return rounds_task(
            config,
            rounds,
            run,
            objective,
            judge=lambda policy: judge_of(ready, directory=run.directory, policy=policy, say=run.say),
            pairing=pairing_of(config.pairing, seed=config.seed),
            draws=[
                Draw(num=config.num_generations, decoding=Decoding.of(config)),
                Draw(num=config.num_generations, decoding=Decoding.of(config), origin="reference", name="reference"),
            ],
            extra="reference" if config.alpha else None,
            gold=judges(config),
            model=model,
        )

    return run_task(config, "xpo", rounds, task)


def check(config: Config) -> None:
    """Refuse options that are out of range or cannot go together."""
    check_options(config)
    require_judge(config)
    if config.reset_reference:
        raise InputError(
            "the reference is the start model, which answers beside the policy",
            where="--reset_reference",
            mend="leave it off, or use `prefkit selm`",
        )
    if config.generator != "transformers":
        raise InputError(
            f"{config.generator} holds the policy's weights only, and the start model answers too",
            where="--generator",
            mend="--generator transformers",
        )
    if config.offline_rounds:
        raise InputError(
            "stored pairs have no answer of the start model", where="--offline_rounds", mend="leave it at 0"
        )
