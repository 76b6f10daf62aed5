"""Stepwise DPO: DPO on the stored pairs part by part, each part's reference the model that the last one left.

paper: arXiv 2403.19270

    min_π  -log σ(m)         m = β·[log-ratio of y⁺ - log-ratio of y⁻]

The reference of part t is the model after part t - 1.

Nothing is sampled and nobody judges: `iterative_dpo` with offline rounds only. With one part it is `dpo`,
rows in another order.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from prefkit.domains.text.config import Data, Lora, Model, Parts, Sampling
from prefkit.domains.text.contests import MatchScores
from prefkit.domains.text.datasets import prepare_pairs
from prefkit.domains.text.round_plan import RoundData
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.run import Run
from prefkit.feedback.ranking import best_worst
from prefkit.loops.judging import judges
from prefkit.loops.rounds import Losses, RoundTask, check_options, rounds_task
from prefkit.loops.training import run_task
from prefkit.objectives.preference import dpo_loss as loss
from prefkit.records import Result

__all__ = ["PRESETS", "Config", "loss", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Sampling, Parts, Optimisation, Selection, Output):
    beta: float = 0.1
    """temperature β of the implicit reward; larger keeps closer to the reference"""

    steps_per_round: ClassVar[int] = 0
    candidates: ClassVar[str] = "data"
    unfinished: ClassVar[str] = "keep"
    share_samples: ClassVar[str] = ""
    offline_rounds: ClassVar[int] = sys.maxsize


PRESETS = {
    "demo": Config(
        model_name_or_path="smollm2-135m-instruct",
        dataset_name="rotten-tomatoes",
        gold_reward="rotten-tomatoes",
        use_peft=True,
        lora_target_modules=("q_proj", "v_proj"),
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        prompts_per_round=64,
        per_device_train_batch_size=8,
        max_new_tokens=32,
        max_length=128,
        num_eval_samples=240,
        save_steps=8,
    ),
    "tiny": Config(
        max_steps=4,
        num_rounds=2,
        prompts_per_round=4,
        per_device_train_batch_size=2,
        num_eval_prompts=2,
        max_new_tokens=8,
    ),
}


def run(
    config: Config, *, model: Any = None, tokenizer: Any = None, train: Any = None, evaluation: Any = None
) -> Result:
    """Train by stepwise DPO. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

    Returns the run directory, the final held-out metrics and the model. Raises InputError for unusable input.
    """
    check_options(config)
    rounds = RoundData.of(prepare_pairs(config, model=model, tokenizer=tokenizer, train=train, evaluation=evaluation))

    def objective(scores: MatchScores) -> Losses:
        return loss(scores.chosen, scores.rejected, scores.ref_chosen, scores.ref_rejected, beta=config.beta), {}

    def task(run: Run) -> RoundTask:
        return rounds_task(
            config,
            rounds,
            run,
            objective,
            judge=None,
            pairing=best_worst,
            draws=(),
            gold=judges(config),
            model=model,
        )

    return run_task(config, "sdpo", rounds, task)
