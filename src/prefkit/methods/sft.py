"""SFT: maximum likelihood of stored answers given their prompts.

    min_π  -Σ log π(answer token | prompt, earlier tokens) / number of answer tokens in the batch

Prompt tokens carry no loss. Preference data may be given: then the chosen answers are learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefkit.domains.text.config import Data, Lora, Model, Sampling
from prefkit.domains.text.datasets import prepare_completions
from prefkit.domains.text.generators import sampler_for
from prefkit.domains.text.policy import TextPolicy
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.run import Run
from prefkit.loops.judging import judges
from prefkit.loops.supervised import SupervisedTask
from prefkit.loops.training import run_task
from prefkit.objectives.preference import nll as loss
from prefkit.records import Result

__all__ = ["PRESETS", "Config", "loss", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Sampling, Optimisation, Selection, Output):
    learning_rate: float = 2e-5
    """peak learning rate"""


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
        per_device_train_batch_size=16,
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
    """Train by SFT. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

    Returns the run directory, the final held-out metrics and the model. Raises InputError for unusable input.
    """
    data = prepare_completions(config, model=model, tokenizer=tokenizer, train=train, evaluation=evaluation)

    def task(run: Run) -> SupervisedTask:
        policy = TextPolicy.create(config, run.world, model=model, tokenizer=data.tokenizer, copy_reference=False)
        run.fingerprint(model=policy.fingerprint)
        run.say(f"policy {policy.describe()}")
        return SupervisedTask(
            policy=policy,
            sampler=sampler_for(policy, config),
            examples=data.train,
            test=data.test,
            selection=data.selection,
            config=config,
            judges=judges(config),
        )

    return run_task(config, "sft", data, task)
