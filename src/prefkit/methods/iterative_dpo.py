"""Iterative DPO: rounds of sampling, ranking and DPO, each round's reference the model it starts with.

paper: arXiv 2405.19332 (SELM's baseline), 2312.11456, 2404.19733

    min_π  -log σ(m)         m = β·[log-ratio of y⁺ - log-ratio of y⁻]

In each round the model answers once (ŷ), {ŷ, y⁺, y⁻} are ranked, and the best meets the worst. It is `selm` without
the optimism term, `online_dpo` with a round per part of the data, `sdpo` with answers of the model's own.
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
from prefkit.feedback.config import Judging
from prefkit.feedback.ranking import pairing_of
from prefkit.loops.judging import judge_of, judges
from prefkit.loops.reward_fit import RewardTask
from prefkit.loops.rounds import Losses, RoundTask, check_options, require_judge, rounds_task
from prefkit.loops.stages import judged
from prefkit.loops.training import run_task
from prefkit.objectives.preference import dpo_loss as loss
from prefkit.records import Result

__all__ = ["PRESETS", "Config", "loss", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Sampling, Parts, Rounds, Judging, RewardFirst, Optimisation, Selection, Output):
    beta: float = 0.1
    """temperature β of the implicit reward; larger keeps closer to the reference"""
    response: Literal["greedy", "sample"] = "greedy"
    """ŷ: the likeliest answer (the official code), or a sample (the paper)"""


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
"""what the paper's runs share, whose settings were tuned for this baseline; their batches are those of 8 processes"""

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
        max_new_tokens=40,
        max_length=128,
        num_eval_samples=240,
        save_steps=8,
    ),
    "zephyr": Config(
        **COMMON,
        model_name_or_path="HuggingFaceH4/mistral-7b-sft-beta",
        num_rounds=4,
        offline_rounds=1,
        learning_rates=(5e-7, 5e-7, 5e-7, 1e-7),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
    ),
    "llama3": Config(
        **COMMON,
        model_name_or_path="meta-llama/Meta-Llama-3-8B-Instruct",
        learning_rates=(5e-7, 3e-7, 1e-7),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    ),
    "phi3": Config(
        **COMMON,
        model_name_or_path="microsoft/Phi-3-mini-4k-instruct",
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
    """Train by iterative DPO. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

    Returns the run directory, the final held-out metrics and the model. Raises InputError for unusable input.
    """
    check_options(config)
    require_judge(config)
    rounds = RoundData.of(prepare_pairs(config, model=model, tokenizer=tokenizer, train=train, evaluation=evaluation))

    def objective(scores: MatchScores) -> Losses:
        return loss(scores.chosen, scores.rejected, scores.ref_chosen, scores.ref_rejected, beta=config.beta), {}

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
            model=model,
        )

    return run_task(config, "iterative_dpo", rounds, task)


def draws(config: Config) -> list[Draw]:
    """ŷ first, then what further answers `num_generations` asks for."""
    sampled = Decoding.of(config)
    if config.response == "sample":
        return [Draw(num=config.num_generations, decoding=sampled)]
    greedy = [Draw(num=1, decoding=replace(sampled, temperature=0.0, top_p=1.0), name="greedy")]
    more = [Draw(num=config.num_generations - 1, decoding=sampled)] if config.num_generations > 1 else []
    return greedy + more
