"""OSP: own answers, ranked and compared by the model itself, trained on with the strength of each preference.

paper: arXiv 2405.14103

    min_π  -p log σ(h) - (1-p) log σ(-h)        h = β·[log-ratio of y₁ - log-ratio of y₂],  p = the model's own
                                                judgment that y₁ is the better one

Stage 1 teaches the model to answer and to judge (A or B?) from stored pairs; `--stage1_steps 0` leaves it out for a
model that can judge already. Stage 2 needs no labels: own answers are ranked against a baseline answer, paired, and
judged in both orders; p is calibrated. Judge and reference are the model stage 2 starts with. Strength 1 is DPO.

Presets `hh` and `tldr`: learning rates, schedules, batch, epochs, LoRA, top-p and the longest answer of `hh` are
SELF-JUDGE's, published for the same data, not OSP's, which could not be found; lengths, K and pairing are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefkit.domains.text.average import AverageWeights
from prefkit.domains.text.config import Data, Lora, Model, Parts, Rounds, Sampling
from prefkit.domains.text.contests import MatchScores
from prefkit.domains.text.datasets import TextData, prepare_pairs
from prefkit.domains.text.generators import sampler_for
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.round_maker import Draw
from prefkit.domains.text.round_plan import RoundData
from prefkit.domains.text.sampler import Decoding
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.run import Run
from prefkit.feedback.config import Judging
from prefkit.feedback.self_judge import choice_template
from prefkit.feedback.strength import RankedPairing, stored_pairs
from prefkit.loops import judge_fit
from prefkit.loops.judge_quality import own_judge
from prefkit.loops.judge_watch import Watched
from prefkit.loops.judging import judge_of, judges
from prefkit.loops.rounds import Losses, check_options, require_judge, rounds_task
from prefkit.loops.supervised import SupervisedTask
from prefkit.loops.training import run_task
from prefkit.objectives.preference import osp_loss as loss
from prefkit.protocols import Judge
from prefkit.records import Pair, Result

__all__ = ["PRESETS", "Config", "loss", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Sampling, Parts, Rounds, Judging, Optimisation, Selection, Output):
    beta: float = 0.1
    """temperature β of the implicit reward; a pair of strength p is drawn to the margin logit(p)/β"""
    judge: str = "self"
    """self: the model judges its own answers; or any other judge, as the online methods take it"""
    self_judge: Literal["frozen", "policy", "ema"] = "frozen"
    """weights that judge: those stage 2 starts with, the policy's own of the moment, or their moving average"""
    ema_decay: float = 0.99
    """share that the moving average keeps at every step"""
    disagreement: Literal["keep", "flatten", "drop"] = "keep"
    """a pair whose two orders name different answers gets their mean, 1/2, or is left out"""
    judge_temperature: float = 0.0
    """temperature of the judge's log-odds; 0 fits it on labelled pairs (1 where labels are not used)"""
    judge_pairs: int = 256
    """training pairs kept out of stage 1, on which the judge is measured and calibrated"""
    judge_labels: bool = True
    """the labels of these pairs may be used; off: only order agreement and the mass on A and B are checked"""
    force_judge: bool = False
    """go on with a judge that is no better than chance"""
    stage1_steps: int = -1
    """optimizer steps of stage 1 (answers and judgments of stored pairs); -1 is one pass, 0 leaves it out"""
    stage1_learning_rate: float = 2e-5
    """peak learning rate of stage 1"""
    stage1_batch_size: int = 16
    """examples per process and forward pass of stage 1; each pair gives three"""
    judgment_share: float = 0.5
    """share of the judgments in the loss of stage 1"""
    num_generations: int = 4
    """K: candidates drawn to each prompt, besides the baseline answer"""
    baseline: Literal["policy", "reference"] = "policy"
    """who writes the answer that candidates are compared with: the policy, or the model stage 2 starts with"""
    candidates: Literal["own", "data", "both"] = "own"
    """own: online; data: offline, the stored pairs with strengths by the judge; both: stored answers are ranked too"""
    pairing: Literal["adjacent", "all", "best_worst", "vs_baseline"] = "all"  # pyright: ignore[reportIncompatibleVariableOverride]
    """which ranked candidates meet: neighbours, all, best and worst, or each and the baseline"""
    composition: Literal["direct", "logit", "linear"] = "direct"
    """strength of a pair: asked of the judge again, or from both strengths over the baseline"""
    reset_reference: bool = False
    """make the model at each sampling the reference; off: the model stage 2 starts with throughout"""
    reset_optimizer: bool = False
    """optimizer state and schedule start anew in each round"""


SELF_JUDGE: dict[str, Any] = {
    "use_peft": True,
    "lora_r": 8,
    "lora_alpha": 16.0,
    "stage1_learning_rate": 2e-5,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_ratio": 0.1,
    "num_train_epochs": 3,
    "steps_per_round": 1,
    "per_device_train_batch_size": 16,
    "top_p": 0.9,
}
"""published for SELF-JUDGE (arXiv 2402.11253), which has the same data and problem, not for OSP; β and the temperature
are the defaults"""

PRESETS = {
    "demo": Config(
        model_name_or_path="smollm2-135m-instruct",
        dataset_name="rotten-tomatoes",
        gold_reward="rotten-tomatoes",
        use_peft=True,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        max_steps=8,
        prompts_per_round=32,
        per_device_train_batch_size=8,
        num_generations=3,
        composition="logit",
        judge_template="reviews",
        judge_pairs=120,
        stage1_steps=48,
        stage1_learning_rate=1e-3,
        judgment_share=0.8,
        max_new_tokens=32,
        max_length=256,
        num_eval_samples=120,
        save_steps=4,
    ),
    "hh": Config(**SELF_JUDGE, judge_template="hh", max_length=2048, max_new_tokens=768, long_prompts="drop"),
    "tldr": Config(**SELF_JUDGE, judge_template="tldr", max_length=1024, max_new_tokens=53),
    "tiny": Config(
        max_steps=4,
        prompts_per_round=4,
        per_device_train_batch_size=2,
        num_generations=2,
        num_eval_prompts=2,
        max_new_tokens=8,
        stage1_steps=0,
        force_judge=True,
    ),
}


def run(
    config: Config, *, model: Any = None, tokenizer: Any = None, train: Any = None, evaluation: Any = None
) -> Result:
    """Train by OSP, both stages. `model`, `tokenizer`, `train`, `evaluation` take loaded objects in place of names.

    Stage 1 is a run of its own in DIRECTORY/stage1; with it, a model given in memory is trained, too. Returns the run
    directory, the final held-out metrics and the model. Raises InputError for unusable input and a judge at chance.
    """
    check(config)
    data = prepare_pairs(config, model=model, tokenizer=tokenizer, train=train, evaluation=evaluation)
    rounds = RoundData.of(data)
    asks = not all(one.offline for one in rounds.rounds)
    learned, aside = judge_fit.set_aside(data.train, config)
    ranked = RankedPairing(pairs=config.pairing, composition=config.composition)

    def objective(scores: MatchScores) -> Losses:
        four = scores.chosen, scores.rejected, scores.ref_chosen, scores.ref_rejected
        return loss(*four, beta=config.beta, strength=scores.strength), {}

    def task(run: Run) -> Watched:
        second, start = config, model
        if config.stage1_steps:
            stage1(config, data, learned, run, model)
            second, start = judge_fit.fitted(config, run.directory), None
        average: AverageWeights | None = None

        def judge(policy: TextPolicy) -> Judge:
            nonlocal average
            if config.judge != "self":
                return judge_of(config, directory=run.directory, policy=policy, say=run.say)
            found, average = own_judge(config, policy, aside, run)
            return found

        gold = judges(config)
        found = rounds_task(
            second,
            rounds,
            run,
            objective,
            judge=judge if asks else None,  # stored strengths alone need nobody, and nobody is measured
            pairing=stored_pairs if config.candidates == "data" else ranked,
            draws=draws(config),
            gold=gold,
            judge_in_step=config.judge == "self" and asks,
            model=start,
        )
        return Watched(task=found, run=run, rounds=rounds, store=found.store, gold=gold.get("gold"), average=average)

    return run_task(config, "osp", rounds, task)


def stage1(config: Config, data: TextData[Pair], pairs: Sequence[Pair], run: Run, model: Any) -> None:
    """Stage 1 in a run directory of its own, unless it is there; made anew where its options were others."""
    own, template = judge_fit.stage1_config(config, run.directory), choice_template(config.judge_template)
    basis = judge_fit.basis(data, template.version)
    state = run.world.on_main(lambda: judge_fit.state(run.directory, own, basis))
    if state == "done":
        return
    if state == "other":
        run.say("stage 1 is made anew: its options were others")
        own = dataclasses.replace(own, overwrite=True)
    mixed = judge_fit.mixture(data, pairs, template.render, own)
    run.say(f"stage 1: {mixed.describe()}")

    def task(inner: Run) -> judge_fit.Weighed:
        policy = TextPolicy.create(own, inner.world, model=model, tokenizer=data.tokenizer, copy_reference=False)
        inner.fingerprint(model=policy.fingerprint, basis=basis)
        inner.say(f"policy {policy.describe()}")
        supervised = SupervisedTask(
            policy=policy,
            sampler=sampler_for(policy, own),
            examples=mixed.data.train,
            test=mixed.data.test,
            selection=mixed.data.selection,
            config=own,
            judges=judges(own),
        )
        return judge_fit.Weighed(task=supervised, mixture=mixed)

    run_task(own, judge_fit.METHOD, mixed.data, task)


def draws(config: Config) -> list[Draw]:
    """The baseline answer, and the candidates; nothing in the offline variant."""
    if config.candidates == "data":
        return []
    decoding = Decoding.of(config)
    origin = "own" if config.baseline == "policy" else "reference"
    return [
        Draw(num=1, decoding=decoding, origin=origin, name="baseline"),
        Draw(num=config.num_generations, decoding=decoding),
    ]


def check(config: Config) -> None:
    """Refuse options that are out of range or do not go together."""
    check_options(config)
    require_judge(config)
    judge_fit.check(config)
    if config.judge == "self":
        choice_template(config.judge_template)
