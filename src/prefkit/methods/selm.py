"""SELM: rounds of sampling, ranking and DPO, with an optimism term on the model's own answer.

paper: arXiv 2405.19332 (v3)

    min_π  -log σ(m) + α·β·(log π(ŷ|x) - log π_ref(ŷ|x))         m = β·[log-ratio of y⁺ - log-ratio of y⁻]

In each round the model answers once (ŷ), {ŷ, y⁺, y⁻} are ranked, best meets worst, and ŷ is pushed *down* whatever its
rank: in expectation over ŷ ~ π_ref the term is -α·β·KL(π_ref ‖ π), a payment for moving on. The model that ends a round
begins the next one and is its reference. With α = 0 nothing of ŷ is scored, and the run is that of `iterative_dpo`, bit
for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from prefkit.objectives.optimism import selm_loss as loss
from prefkit.records import Result

__all__ = ["PRESETS", "Config", "loss", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Sampling, Parts, Rounds, Judging, RewardFirst, Optimisation, Selection, Output):
    beta: float = 0.1
    """temperature β of the implicit reward; larger keeps closer to the reference"""
    alpha: float = 0.1
    """α: weight of the optimism term relative to β; 0 is iterative_dpo"""
    response: Literal["greedy", "sample"] = "greedy"
    """ŷ: the likeliest answer (the official code), or a sample (the paper)"""
    max_log_ratio: float = 0.0
    """ŷ is pushed no further once it is so many nats less likely than under the reference; 0, as published: no bound"""


COMMON: dict[str, Any] = {
    "dataset_name": "HuggingFaceH4/ultrafeedback_binarized",
    "dataset_train_split": "train_prefs",
    "dataset_eval_split": "test_prefs",
    "judge": "ranker:llm-blender/PairRM",
    "beta": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "gradient_checkpointing": True,
    "max_length": 1024,
    "max_new_tokens": 1024,
    "long_prompts": "drop",
    "seed": 42,
}
"""what the published runs share; their batches are those of 8 processes"""

PRESETS = {
    "demo": Config(
        model_name_or_path="smollm2-135m-instruct",
        dataset_name="rotten-tomatoes",
        judge="reward",
        reward_steps=40,
        reward_learning_rate=5e-4,
        gold_reward="rotten-tomatoes",
        use_peft=True,
        lora_target_modules=("q_proj", "v_proj"),
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        unfinished="drop",
        prompts_per_round=64,
        per_device_train_batch_size=8,
        beta=0.1,
        alpha=0.1,
        max_new_tokens=40,
        max_length=128,
        num_eval_samples=240,
        save_steps=8,
    ),
    "zephyr": Config(
        **COMMON,
        model_name_or_path="HuggingFaceH4/mistral-7b-sft-beta",
        alpha=0.001,
        num_rounds=4,
        offline_rounds=1,
        learning_rates=(5e-7, 5e-7, 5e-7, 1e-7),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
    ),
    "llama3": Config(
        **COMMON,
        model_name_or_path="meta-llama/Meta-Llama-3-8B-Instruct",
        alpha=0.0001,
        learning_rates=(5e-7, 3e-7, 1e-7),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    ),
    "phi3": Config(
        **COMMON,
        model_name_or_path="microsoft/Phi-3-mini-4k-instruct",
        alpha=0.001,
        learning_rates=(5e-7, 3e-7, 1e-7),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    ),
    "tiny": Config(
        max_steps=4,
        num_rounds=2,
        prompts_per_round=4,
        per_device_train_batch_size=2,
        num_eval_prompts=2,
        max_new_tokens=8,
        judge="gold:prefkit.feedback.gold:brevity",
    ),
}


def run(
    config: Config, *, model: Any = None, tokenizer: Any = None, train: Any = None, evaluation: Any = None
) -> Result:
    """Train by SELM. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

    Returns the run directory, the final held-out metrics and the model. Raises InputError for unusable input.
    """
    check(config)
    rounds = RoundData.of(prepare_pairs(config, model=model, tokenizer=tokenizer, train=train, evaluation=evaluation))

    def objective(scores: MatchScores) -> Losses:
        acts = config.alpha > 0 and scores.own is not None and scores.ref_own is not None
        bound = config.max_log_ratio or None
        losses = loss(
            scores.chosen,
            scores.rejected,
            scores.own,
            scores.ref_chosen,
            scores.ref_rejected,
            scores.ref_own,
            beta=config.beta,
            alpha=config.alpha if acts else 0.0,
            max_log_ratio=bound,
        )
        if scores.own is None or scores.ref_own is None or not acts:
            return losses, {}
        ratio = bounded_log_ratio(scores.own, scores.ref_own, max_log_ratio=bound)
        return losses, {"optimism": config.alpha * config.beta * ratio}

    def task(run: Run) -> RoundTask:
        ready = judged(config, rounds.data, run, run_task, RewardTask, model=model, train=train)
        return rounds_task(
            config,
            rounds,
            run,
            objective,
            judge=lambda policy: judge_of(ready, directory=run.directory, policy=policy, say=run.say),
            pairing=pairing_of(config.pairing, seed=config.seed),
            draws=draws(config),
            gold=judges(config),
            extra="own" if config.alpha else None,
            model=model,
        )

    return run_task(config, "selm", rounds, task)


def draws(config: Config) -> list[Draw]:
    """ŷ first, then what further answers `num_generations` asks for."""
    sampled = Decoding.of(config)
    if config.response == "sample":
        return [Draw(num=config.num_generations, decoding=sampled)]
    greedy = [Draw(num=1, decoding=replace(sampled, temperature=0.0, top_p=1.0), name="greedy")]
    more = [Draw(num=config.num_generations - 1, decoding=sampled)] if config.num_generations > 1 else []
    return greedy + more


def check(config: Config) -> None:
    """Refuse options that are out of range or cannot go together."""
    check_options(config)
    require_judge(config)
    if config.alpha and config.offline_rounds and config.replay_rounds:
        raise InputError(
            "replayed offline rounds have no answer of the model's own to be optimistic about",
            where="--replay_rounds",
            mend="--replay_rounds 0, --offline_rounds 0 or --alpha 0",
        )
