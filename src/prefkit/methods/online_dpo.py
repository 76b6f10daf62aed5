"""Online DPO: at every step two fresh answers to each prompt, ranked by a judge, and DPO on the pair.

paper: arXiv 2402.04792 (OAIF)

    min_π  E_{y₁,y₂ ~ π}[-log σ(m)]         the judge says which of y₁, y₂ is y⁺

The reference is the start model throughout. `iterative_dpo` draws a whole round ahead and moves the reference; `xpo`
draws the second answer from the reference and adds an optimism term.
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
    steps_per_round: int = 1
    """optimizer steps from one sampling to the next; 0: num_train_epochs over a round's part"""
    num_generations: int = 2
    """answers drawn to each prompt"""
    candidates: Literal["own", "data", "both"] = "own"
    """answers that are ranked: the model's own, or also the data set's chosen and rejected"""
    reset_reference: bool = False
    """make the model at each sampling the reference; off: the start model throughout"""
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
        beta=0.1,
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
    """Train by online DPO. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

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
            draws=[Draw(num=config.num_generations, decoding=Decoding.of(config))],
            gold=judges(config),
            model=model,
        )

    return run_task(config, "online_dpo", rounds, task)
