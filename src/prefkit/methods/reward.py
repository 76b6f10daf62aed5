"""Reward model: a scalar head on any causal LM, fit to pairs by Bradley-Terry.

    min  -log σ(r(x, y⁺) - r(x, y⁻) - margin)

The reward is read at the last token of the answer; after training it is centred so that the chosen answers of the
training data have mean 0. The result is a stock sequence-classification folder (the mean stands in its config.json).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefkit.domains.text.config import Data, Lora, Model
from prefkit.domains.text.datasets import prepare_pairs
from prefkit.domains.text.reward import RewardModel
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.run import Run
from prefkit.errors import InputError
from prefkit.loops.reward_fit import RewardTask
from prefkit.loops.training import run_task
from prefkit.objectives.margin import bradley_terry as loss
from prefkit.records import Result

__all__ = ["PRESETS", "Config", "loss", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Optimisation, Selection, Output):
    learning_rate: float = 1e-5
    """peak learning rate"""


PRESETS = {
    "demo": Config(
        model_name_or_path="smollm2-135m-instruct",
        dataset_name="rotten-tomatoes",
        use_peft=True,
        lora_target_modules=("q_proj", "v_proj"),
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        max_steps=40,
        per_device_train_batch_size=16,
        max_length=128,
        num_eval_samples=240,
        save_steps=10,
    ),
    "tiny": Config(max_steps=4, per_device_train_batch_size=2),
}


def run(
    config: Config, *, model: Any = None, tokenizer: Any = None, train: Any = None, evaluation: Any = None
) -> Result:
    """Fit a reward model. `model` (a causal LM), `tokenizer`, `train`, `evaluation` take loaded objects.

    Returns the run directory, held-out accuracy and margin, and the model. Raises InputError for unusable input.
    """
    if config.adapter_name_or_path:
        raise InputError(
            "a reward model starts from a whole model",
            where="--adapter_name_or_path",
            mend="merge the adapter first with `prefkit export RUN --to FOLDER --merge`",
        )
    data = prepare_pairs(config, model=model, tokenizer=tokenizer, train=train, evaluation=evaluation)

    def task(run: Run) -> RewardTask:
        reward = RewardModel.create(config, run.world, model=model, tokenizer=data.tokenizer)
        run.fingerprint(model=reward.fingerprint)
        run.say(reward.module.how)
        return RewardTask(reward=reward, pairs=data.train, test=data.test, selection=data.selection, config=config)

    return run_task(config, "reward", data, task)
