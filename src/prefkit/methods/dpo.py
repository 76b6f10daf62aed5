"""DPO on stored pairs: logistic, IPO or hinge loss, label smoothing, optional SFT or offline-KL term.

paper: arXiv 2305.18290 (DPO), 2310.12036 (IPO), 2305.10425 (hinge)

With h = β[(log π(y⁺) - log π_ref(y⁺)) - (log π(y⁻) - log π_ref(y⁻))], log-probs summed over the answer:

    sigmoid   (1 - ε)·(-log σ(h)) + ε·(-log σ(-h))
    ipo       (h/β - 1/(2β))²
    hinge     max(0, 1 - h)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from prefkit.domains.text.config import Data, Lora, Model, Sampling
from prefkit.domains.text.datasets import prepare_pairs
from prefkit.domains.text.policy import TextPolicy
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.run import Run
from prefkit.loops.judging import judges
from prefkit.loops.pairs import KINDS, Item, PairScores, PairTask, check_options, extra_terms, pair_task
from prefkit.loops.training import run_task
from prefkit.objectives.margin import Hinge, Ipo, Logistic
from prefkit.objectives.preference import dpo_loss as loss
from prefkit.protocols import Metrics
from prefkit.records import Result

__all__ = ["PRESETS", "Config", "Hinge", "Ipo", "Logistic", "loss", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Sampling, Optimisation, Selection, Output):
    beta: float = 0.1
    """temperature β of the implicit reward; larger keeps closer to the reference"""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """loss on the margin"""
    label_smoothing: float = 0.0
    """ε: share of labels taken as flipped (sigmoid only)"""
    sft_weight: float = 0.0
    """weight of the per-token negative log-likelihood of the chosen answer"""
    offline_kl_weight: float = 0.0
    """weight of the next-token KL to the reference along the stored answers"""
    precompute_ref_log_probs: bool = False
    """score the reference once before training and keep the result on disk"""


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
        max_steps=24,
        per_device_train_batch_size=8,
        max_new_tokens=32,
        max_length=128,
        num_eval_samples=240,
        save_steps=8,
    ),
    "tiny": Config(max_steps=4, per_device_train_batch_size=2, num_eval_prompts=2, max_new_tokens=8),
}


def run(
    config: Config, *, model: Any = None, tokenizer: Any = None, train: Any = None, evaluation: Any = None
) -> Result:
    """Train by DPO. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

    Returns the run directory, the final held-out metrics and the model. Raises InputError for unusable input.
    """
    check_options(config)
    data = prepare_pairs(config, model=model, tokenizer=tokenizer, train=train, evaluation=evaluation)

    def objective(scores: PairScores, items: Sequence[Item], policy: TextPolicy) -> tuple[Tensor, Metrics]:
        losses = loss(
            scores.chosen,
            scores.rejected,
            scores.ref_chosen,
            scores.ref_rejected,
            beta=config.beta,
            kind=KINDS[config.loss_type],
            label_smoothing=config.label_smoothing,
        )
        return losses + extra_terms(config, scores), {}

    def task(run: Run) -> PairTask:
        return pair_task(config, data, run, objective, judges=judges(config), model=model)

    return run_task(config, "dpo", data, task)
