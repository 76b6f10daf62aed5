"""Rounds of sampling, ranking and training: the task behind the online methods for text.

A round draws answers to its prompts, a judge ranks them (with the data set's own, where they take part), matches are
chosen, and a pair loss is taken on them for the round's steps. Every stage is on disk before the next one uses it, so
a run killed anywhere goes on with the loss of a piece. See docs/online.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.domains.text.contests import Contest, MatchScores, Origin, Plan
from prefkit.domains.text.generators import sampler_for
from prefkit.domains.text.influence import gradient_share, last_layer_weights
from prefkit.domains.text.metrics import (
    PairEvaluation,
    SampleEvaluation,
    pair_metrics,
    summarize_pairs,
    summarize_samples,
)
from prefkit.domains.text.packing import num_tokens, passes
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.round_maker import Draw, RoundMaker
from prefkit.domains.text.round_plan import Round, RoundData
from prefkit.domains.text.round_store import RoundStore, counted
from prefkit.domains.text.sampler import Decoding, Sampler, check_prompts
from prefkit.domains.text.scoring import causal_lm
from prefkit.engine import limits
from prefkit.engine.directory import METRICS
from prefkit.engine.learner import Learner
from prefkit.engine.parts import dealt
from prefkit.engine.run import Run
from prefkit.engine.seeds import number
from prefkit.errors import InputError
from prefkit.feedback.ranking import Pairing
from prefkit.protocols import Gold, Judge, Metrics, Trackable
from prefkit.records import HeldOut, Pair

Losses = tuple[Tensor, Mapping[str, Tensor]]
"""losses of the matches (p,), and further terms (p,) by name: their share in the gradient is logged"""
Objective = Callable[[MatchScores], Losses]

SHARE = "optimism/gradient_share"
LIMITS = {
    "beta": limits.ABOVE_0,
    "alpha": limits.NOT_BELOW_0,
    "num_rounds": limits.AT_LEAST_1,
    "prompts_per_round": limits.NOT_BELOW_0,
    "steps_per_round": limits.NOT_BELOW_0,
    "num_generations": limits.AT_LEAST_1,
    "offline_rounds": limits.NOT_BELOW_0,
    "replay_rounds": limits.NOT_BELOW_0,
    "max_log_ratio": limits.NOT_BELOW_0,
    "judge_batch_size": limits.AT_LEAST_1,
}


@dataclass(frozen=True)
class Item:
    """A contest of a batch, with the log-probs of its scored answers under the round's reference where kept."""

    contest: Contest
    prompt: Sequence[int]
    own: int | None
    reference: Sequence[float] | None = None


def check_options(config: Any) -> None:
    """InputError for options of the rounds that are out of range or do not go together."""
    limits.check(config, LIMITS)
    if config.learning_rates and not config.reset_optimizer:
        raise InputError(
            "learning rates of the rounds need a schedule that starts anew",
            where="--learning_rates",
            mend="drop it, or --no_reset_optimizer",
        )
    if config.learning_rates and (config.steps_per_round or len(config.learning_rates) != config.num_rounds):
        raise InputError(
            f"{len(config.learning_rates)} learning rates for "
            + (
                f"rounds of {config.steps_per_round} steps" if config.steps_per_round else f"{config.num_rounds} rounds"
            ),
            where="--learning_rates",
            mend="give one for each round, or none",
        )
    if any(rate < 0 for rate in config.learning_rates):
        raise InputError("a learning rate is below 0", where="--learning_rates")
    if config.steps_per_round and config.reset_optimizer:
        raise InputError(
            f"an optimizer that starts anew every {config.steps_per_round} steps learns no moments",
            where="--reset_optimizer",
            mend="--no_reset_optimizer, or rounds of one part of the data each (--steps_per_round 0)",
        )


def require_judge(config: Any) -> None:
    """InputError where no judge is named."""
    if not config.judge:
        raise InputError(
            "nobody ranks the answers",
            where="--judge",
            mend="for example --judge reward:runs/reward, --judge gold:my_rewards:politeness, --judge llm:MODEL; "
            "for stored pairs alone use `prefkit sdpo`",
        )


@dataclass(kw_only=True)
class RoundTask:
    """Rounds of ranked answers and a loss on their matches. See `protocols.Task` and `protocols.Staged`."""

    policy: TextPolicy
    sampler: Sampler
    data: RoundData
    run: Run
    objective: Objective
    judge: Judge | None
    pairing: Pairing
    config: Any
    """a Config with the groups of every online text method and `beta`"""
    draws: Sequence[Draw] = ()
    extra: Origin | None = None
    """whose first answer the loss needs beside the match: the policy's own, or the start model's"""
    judge_in_step: bool = False
    """whether the judge scores with the policy's own weights"""
    gold: Mapping[str, Gold] = field(default_factory=dict[str, Gold])
    """judges of own answers in evaluation"""

    def __post_init__(self) -> None:
        self.pairs: Sequence[Pair] = self.data.data.train
        self.num_rows = len(self.pairs)
        self.module: nn.Module = self.policy.module
        self.micro = self.config.per_device_train_batch_size
        self.world = self.policy.world
        self.store = RoundStore(self.run.directory, self.world)
        self.maker = RoundMaker(
            policy=self.policy,
            sampler=self.sampler,
            pairs=self.pairs,
            store=self.store,
            run=self.run,
            judge=self.judge,
            pairing=self.pairing,
            draws=self.draws,
            config=self.config,
            fingerprint=self.data.fingerprint,
            judge_in_step=self.judge_in_step,
        )
        self._round: Round | None = None
        self._items: list[Contest] = []
        self._reference: list[list[float]] | None = None
        self._counts: dict[str, float] = {}
        self._step = 0
        for draw in self.draws:  # at the start, not in the round that comes upon the prompt
            check_prompts(self.policy, [pair.prompt for pair in self.pairs], draw.decoding)
        parts = {False: (self.data.data.test, "test"), True: (self.data.data.selection, "selection")}
        self._evaluations = {key: self._evaluation(*part) for key, part in parts.items()}

    def _evaluation(self, pairs: Sequence[Pair], name: str) -> tuple[PairEvaluation, SampleEvaluation]:
        settings = {"batch_size": 2 * self.micro, "tokens_per_batch": self.config.tokens_per_batch}
        scored = PairEvaluation(self.policy, pairs, **settings, beta=self.config.beta)
        sampled = SampleEvaluation(
            self.policy,
            self.sampler,
            pairs,
            decoding=Decoding.of(self.config),
            seed=number(self.config.seed, name),
            judges=dict(self.gold),
            **settings,
            most=self.config.num_eval_prompts,
        )
        return scored, sampled

    def tracked(self) -> Mapping[str, Trackable]:
        return {"policy": self.policy}

    # Rounds

    def before(self, step: int, learner: Learner) -> None:
        """Begin the step's round where it is not the current one: draw, rank, and score the reference."""
        self._step = step
        one = self.data.round_of(step)
        if self._round is None or self._round.number != one.number:
            made = self._begin(one, step)
            learner.forget_metric_names()  # another round may measure other things
            if self.config.reset_optimizer:
                learner.schedule(first=one.first_step, total=one.num_steps, peak=self._peak(one))
            self._tell(one, aloud=made or step == one.first_step)
        # On every row, for a round may begin at a step that none is written of.
        self.run.log({"rounds/round": float(one.number), **self._counts})

    def after(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Stop a run whose policy has left its round's own answers far behind: the optimism term has no lower bound."""
        each = values.get("optimism/log_ratio_per_token")
        if each is None or not self._has_row(step):
            return
        floor = -math.log(causal_lm(self.policy.model).config.get_text_config().vocab_size)
        if (found := float(each)) < floor:
            raise InputError(
                f"at step {step} the answers that the optimism term pushes down have lost {-found:.1f} nats a token "
                f"against the reference, more than log(vocabulary) = {-floor:.1f}: training has diverged",
                where=str(self.run.directory),
                mend="in another --output_dir, lower --alpha or --learning_rate, or bound it with --max_log_ratio",
            )

    def ends_round(self, step: int) -> bool:
        return not self.config.steps_per_round and step == self.data.round_of(step).last_step

    def _peak(self, one: Round) -> float:
        rates = self.config.learning_rates
        return rates[min(one.number, len(rates)) - 1] if rates else self.config.learning_rate

    def _begin(self, one: Round, step: int) -> bool:
        """Load or make the items of a round and of those it replays; True where they had to be made."""
        earlier: list[Contest] = []
        for t in one.before:
            found = self.world.on_main(lambda t=t: self.store.items(t))
            earlier += self._required(found, t)
        items = self.world.on_main(lambda: self.store.items(one.number))
        made = items is None
        if items is None:
            if step != one.first_step:
                self._required(None, one.number)
            items = self.maker.make(one)
        self._round, self._items, self._reference = one, earlier + items, None
        if not self.config.steps_per_round and not any(item.matches for item in self._items):
            raise InputError(
                f"round {one.number}: the judge prefers none of the answers to any of {len(items)} prompts "
                f"({counted(items)['dropped']})",
                where=str(self.store.folder),
                mend="draw more answers (--num_generations), at a higher --temperature, or ask another judge",
            )
        if self.config.reset_reference:
            self._reference = self.world.on_main(lambda: self.store.reference(one.number))
            if self._reference is None:
                if step != one.first_step:
                    self._required(None, one.number)
                self._reference = self._score_reference()
                self.store.write_reference(one.number, self._reference)
        return made

    def _required(self, items: list[Contest] | None, t: int) -> list[Contest]:
        if items is None:
            raise InputError(
                f"round {t} had begun, and its file is gone",
                where=str(self.store.folder / f"{t:05d}.jsonl"),
                mend="put it back, or start anew with --overwrite",
            )
        return items

    @torch.no_grad()
    def _score_reference(self) -> list[list[float]]:
        """Log-probs of every item's scored answers under the policy, which is the round's reference when it begins."""
        plans = [self._plan([self._item(place)]) for place in range(len(self._items))]
        sizes = [num_tokens(plan.groups[0]) for plan in plans]
        # Cut before they are dealt, and of similar length, so that the numbers do not depend on the processes.
        order = sorted(range(len(plans)), key=lambda place: (sizes[place], place))
        cut = passes([sizes[place] for place in order], rows=4 * self.micro, budget=self.config.tokens_per_batch)
        pieces = [[order[i] for i in piece] for piece in cut]
        if self.world.in_step:  # sharded weights are gathered in every pass: all processes run as many
            pieces += [pieces[-1]] * (-len(pieces) % self.world.size)
        found: list[tuple[int, list[float]]] = []
        for piece in dealt(pieces, self.world):
            groups = [plans[place].groups[0] for place in piece]
            scores: Any = self.policy.token_log_probs(groups)
            values: list[float] = scores.sum(-1).tolist()
            for place, group in zip(piece, groups, strict=True):
                found.append((place, values[: len(group.answers)]))
                values = values[len(group.answers) :]
        by_place = dict(self.world.gather_objects(found))
        return [by_place[place] for place in range(len(plans))]

    def _tell(self, one: Round, *, aloud: bool) -> None:
        """Read the round's counts, and the label budget spent so far, for the rows of its steps; say what they are."""
        now = self.world.on_main(lambda: self.store.about(one.number))
        self._counts = round_metrics(now)
        if aloud and not self.config.steps_per_round:
            asked = f"{now['comparisons']} comparisons by {now['judge']}" if now["judge"] else "stored pairs"
            reasons = ", ".join(f"{count} {why}" for why, count in now["dropped"].items()) or "none"
            self.run.say(
                f"round {one.number}: {now['prompts']} prompts, {now['answers']} answers, {asked}, "
                f"{now['matches']} matches; dropped: {reasons}"
            )

    # Steps

    def _item(self, place: int) -> Item:
        contest = self._items[place]
        own = next((i for i, answer in enumerate(contest.answers) if answer.origin == self.extra), None)
        reference = None if self._reference is None else self._reference[place]
        return Item(contest, self.pairs[contest.row].prompt, own, reference)

    def _plan(self, items: Sequence[Item]) -> Plan:
        own = [item.own for item in items if item.own is not None]
        assert len(own) in (0, len(items)), "either all prompts of a round have an own answer, or none"
        return Plan([item.contest for item in items], [item.prompt for item in items], own=own)

    def batches(self, step: int, rows: Sequence[int], first: int) -> Sequence[Sequence[Item]]:
        items = [self._item(row) for row in rows]
        if not self.world.in_step:  # where weights are sharded, all processes run as many passes: nothing is left out
            items = [item for item in items if item.contest.matches] or items[:1]
        sizes = [num_tokens(self._plan([item]).groups[0]) for item in items]
        agree = self.world.most if self.world.in_step else None
        places = passes(sizes, rows=self.micro, budget=self.config.tokens_per_batch, agree=agree)
        return [[items[i] for i in piece] for piece in places]

    def compute(self, batch: Sequence[Item]) -> tuple[Tensor, Metrics]:
        plan = self._plan(batch)
        log_probs = self.policy.token_log_probs(plan.groups).sum(-1)
        if self._reference is None:
            reference = self.policy.reference_token_log_probs(plan.groups).sum(-1)
        else:
            values = [value for item in batch for value in item.reference or ()]
            reference = torch.tensor(values, dtype=log_probs.dtype, device=log_probs.device)
        scores = plan.scores(log_probs, reference)
        losses, terms = self.objective(scores)
        metrics = match_metrics(scores, self.config.beta)
        for name, term in terms.items():
            weighted = scores.weight * term
            metrics[f"{name}/loss"] = weighted.detach()
            if self.world.in_step:  # of sharded weights a process has a part
                continue
            share = losses.new_zeros(0)  # nothing measured, under a name that every step has
            if self._has_row(self._step):
                rest = (scores.weight * losses).sum() - weighted.sum()
                share = gradient_share(weighted.sum(), rest, last_layer_weights(self.module))[None]
            metrics[f"{name}/gradient_share"] = share
        return scores.weight * losses, metrics

    def _has_row(self, step: int) -> bool:
        """Whether the step's values are read: those of the cadence, and of evaluations."""
        evaluated = self.config.eval_steps > 0 and self.run.due(self.config.eval_steps)
        return self.run.due(self.config.logging_steps) or evaluated or self.ends_round(step)

    def weight(self, batch: Sequence[Item]) -> float:
        return float(sum(bool(item.contest.matches) for item in batch))

    def evaluate(self, *, selecting: bool = False) -> HeldOut:
        scored, sampled = self._evaluations[selecting and bool(self.data.data.selection)]
        pairs, samples = scored(), sampled()
        metrics = summarize_pairs(pairs) | summarize_samples(samples, tuple(self.gold))
        return HeldOut(metrics=metrics, pairs=pairs, samples=samples)

    def finish(self) -> None:
        """Say so where an optimism term never made a difference that could be told from none."""
        path = self.run.directory / METRICS
        rows = self.world.on_main(lambda: [json.loads(line) for line in path.read_text().split("\n")[:-1]])
        shares = [row[SHARE] for row in rows if row.get(SHARE) is not None]
        if shares and max(shares) < 0.01:
            self.run.say(
                f"the optimism term made at most {max(shares):.2%} of a step's gradient (last layer): this run is "
                f"indistinguishable from `{'iterative_dpo' if self.extra == 'own' else 'online_dpo'}`; "
                "a larger --alpha acts"
            )

    def save_final(self, directory: Path) -> Mapping[str, str | None]:
        return self.policy.save_final(directory)


def round_metrics(about: Mapping[str, Any]) -> dict[str, float]:
    """What is logged of a round, from its counts; the budget is that of all rounds so far."""
    names = ("mean_length", "answers_finished", "order_agreement", "tie_rate")
    values = {name: about[name] for name in names if about[name] is not None}
    values |= {"dropped": sum(about["dropped"].values()), "matches": about["matches"], **about["spent"]}
    return {f"rounds/{name}": float(value) for name, value in values.items()}


def match_metrics(scores: MatchScores, beta: float) -> Metrics:
    """What is logged of a batch's matches, (p,) each, without gradient."""
    log_probs = torch.stack([scores.chosen, scores.rejected], dim=1)
    reference = torch.stack([scores.ref_chosen, scores.ref_rejected], dim=1)
    metrics = pair_metrics(log_probs, reference, beta)
    metrics["strength"] = scores.strength
    if scores.own is not None and scores.ref_own is not None and scores.num_own_tokens is not None:
        ratio = scores.own.detach() - scores.ref_own
        metrics["optimism/log_ratio"] = ratio
        metrics["optimism/log_ratio_per_token"] = ratio / scores.num_own_tokens
    return metrics


def rounds_task(
    config: Any,
    data: RoundData,
    run: Run,
    objective: Objective,
    *,
    judge: Callable[[TextPolicy], Judge] | None,
    pairing: Pairing,
    draws: Sequence[Draw],
    gold: Mapping[str, Gold],
    extra: Origin | None = None,
    judge_in_step: bool = False,
    model: Any = None,
) -> RoundTask:
    """Load the policy and its reference, make the judge (which may need the policy), and join them with the data."""
    policy = TextPolicy.create(config, run.world, model=model, tokenizer=data.data.tokenizer)
    run.fingerprint(model=policy.fingerprint)
    run.say(f"policy {policy.describe()}; evaluations compare with {policy.reference.name}")
    found = None if judge is None else judge(policy)
    if found is not None:
        run.say(f"judge: {found.name}")
    return RoundTask(
        policy=policy,
        sampler=sampler_for(policy, config),
        data=data,
        run=run,
        objective=objective,
        judge=found,
        pairing=pairing,
        config=config,
        draws=draws,
        extra=extra,
        judge_in_step=judge_in_step,
        gold=gold,
    )
