"""Reinforcement learning from a reward on text: batches of episodes, and steps on them. The task behind `ppo`, `drpo`,
`rloo` and `grpo`, which differ in how they give credit and in their loss.

    before the first step of a batch    cut, sample, score: `domains.text.rollout_maker`
    once per batch                      credit: token rewards -> advantages (and returns)
    every step                          the loss on a minibatch, in packed passes, normalised over the whole minibatch

Everything that is counted is masked: prompts, forced prefixes and what stands behind the end of an answer get neither
reward nor gradient (in `episode` accounting they do, which is the quirk of DR-PO's code: docs/methods/drpo.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefkit.domains.text.credit import Credit, GiveCredit, Step, TakeLoss
from prefkit.domains.text.episodes import EpisodeData
from prefkit.domains.text.generators import sampler_for
from prefkit.domains.text.metrics import SampleEvaluation, summarize_samples
from prefkit.domains.text.packing import num_tokens, passes
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.resets import ResetSampler, finished_only
from prefkit.domains.text.reward import RewardModel
from prefkit.domains.text.rollout_maker import RolloutMaker, Unit, scoring, units_of
from prefkit.domains.text.rollout_metrics import penalised, sequence_kl, summary
from prefkit.domains.text.rollouts import Accounting, Columns, Rollout, RolloutStore, group_of
from prefkit.domains.text.sampler import Decoding, Sampler
from prefkit.domains.text.value import Value, value_of
from prefkit.engine import limits
from prefkit.engine.learner import Learner
from prefkit.engine.run import Run
from prefkit.engine.seeds import number
from prefkit.errors import InputError
from prefkit.objectives.kl_penalty import adaptive_coefficient
from prefkit.objectives.value import explained_variance
from prefkit.protocols import Gold, Metrics, Trackable
from prefkit.records import HeldOut

LIMITS = {
    "num_generations": limits.AT_LEAST_1,
    "num_ppo_epochs": limits.AT_LEAST_1,
    "num_mini_batches": limits.AT_LEAST_1,
    "total_episodes": limits.NOT_BELOW_0,
    "cliprange": limits.Limit(0, 1, above=True, below=True),
    "kl_coef": limits.NOT_BELOW_0,
    "kl_target": limits.NOT_BELOW_0,
    "kl_horizon": limits.AT_LEAST_1,
    "reward_clip": limits.NOT_BELOW_0,
    "gamma": limits.Limit(0, 1),
    "lam": limits.Limit(0, 1),
    "vf_coef": limits.NOT_BELOW_0,
    "cliprange_value": limits.NOT_BELOW_0,
    "reset_prob": limits.Limit(0, 1),
    "k_min": limits.NOT_BELOW_0,
    "reset_cut": limits.ABOVE_0,
}
MOST_RATIO = 10.0
"""mean probability ratio of a step beyond which the policy has left the one that drew its answers"""
MOST_KL = 10.0
"""the same for policy/approx_kl: answers that have become all but impossible have ratios near 0"""
SAME_BATCHES, SAME_ANSWERS = 5, 100
"""batches of episodes in a row and answers in them with one and the same score, after which a run ends: there is
nothing to learn from
"""


@dataclass(kw_only=True)
class PolicyOptimization:
    """See `protocols.Task` and `protocols.Staged`."""

    policy: TextPolicy
    sampler: Sampler
    value: Value | None
    data: EpisodeData
    run: Run
    maker: RolloutMaker
    give_credit: GiveCredit
    take_loss: TakeLoss
    config: Any
    accounting: Accounting = "continuation"
    by_answer: bool = False
    """whether the loss is a mean over answers, not over tokens"""
    mean_per_pass: bool = False
    """whether every forward pass is a mean of its own, as in the released code of DR-PO"""
    judges: Mapping[str, Gold] = field(default_factory=dict[str, Gold])

    def __post_init__(self) -> None:
        self.num_rows = len(self.data.data.train)
        self.module: nn.Module = self.policy.module
        if self.value is not None:
            self.module = nn.ModuleDict({"policy": self.policy.module, "value": self.value.module})
        self.world = self.policy.world
        self.store = RolloutStore(is_main=lambda: self.world.is_main)
        self._batch = 0
        self._units: list[Unit] = []
        self._credits: list[Credit] = []
        self._share = self._value_scale = 1.0
        self._measured = False
        parts = {False: (self.data.data.test, "test"), True: (self.data.data.selection, "selection")}
        self._evaluations = {key: self._evaluation(*part) for key, part in parts.items()}

    def _evaluation(self, rows: Any, name: str) -> SampleEvaluation:
        """From empty prefixes, always: it hands the sampler prompts, and refuses samples that were begun for it."""
        return SampleEvaluation(
            self.policy,
            self.sampler,
            rows,
            decoding=Decoding.of(self.config),
            seed=number(self.config.seed, name),
            judges=self.judges,
            batch_size=2 * self.config.per_device_train_batch_size,
            most=self.config.num_eval_prompts,
        )

    def tracked(self) -> Mapping[str, Trackable]:
        found: dict[str, Trackable] = {"policy": self.policy, "rollouts": self.store}
        if self.value is not None:
            found["value"] = self.value
        if self.maker.resets is not None:
            found["resets"] = self.maker.resets
        return found

    # Batches of episodes

    def before(self, step: int, learner: Learner) -> None:
        """Make the batch of episodes that begins with this step, or take up the one a checkpoint holds."""
        batch, epoch, part = self.data.batch_of(step)
        if batch != self._batch:
            if not (epoch or part):
                self._make(batch)
            elif self.store.about.get("batch") != batch:
                raise InputError(f"the checkpoint lacks batch {batch} of episodes", where=str(self.run.directory))
            self._take_up(batch)
        # In the first row of the batch that is written, which need not be that of its first step.
        if self._written(step) and not any(map(self._written, range(self.data.first_step(batch), step))):
            self._log_batch()

    def _written(self, step: int) -> bool:
        """Whether this step gets a row in the log."""
        config = self.config
        evaluated = bool(config.eval_steps) and step % config.eval_steps == 0
        return evaluated or step % config.logging_steps == 0 or step == self.data.total_steps(self.world.size)

    def _make(self, batch: int) -> None:
        before = self.store.about
        coefficient = self._next_coefficient() if before else self.config.kl_coef
        total = self.data.total_steps(self.world.size)
        rollouts = self.maker.make(batch, progress=min(1.0, (self.data.first_step(batch) - 1) / total))
        sampled = sum(len(rollout.tokens) - rollout.prefix for rollout in rollouts)
        self.store.about = {
            "batch": batch,
            "kl_coef": coefficient,
            "sampled_tokens": before.get("sampled_tokens", 0) + sampled,
            "alike": self._count_alike(rollouts, before.get("alike", {})),
        }
        self.store.rollouts = rollouts

    def _count_alike(self, rollouts: Sequence[Rollout], before: Mapping[str, Any]) -> dict[str, Any]:
        """How many batches and answers in a row had one and the same score, and which. InputError for very many."""
        scores = set(penalised(Columns.of(rollouts, self.accounting), self.config).tolist())
        if len(scores) > 1:
            return {}
        score = scores.pop()
        same = before if before.get("score") == score else {"batches": 0, "answers": 0}
        found = {"score": score, "batches": same["batches"] + 1, "answers": same["answers"] + len(rollouts)}
        if found["batches"] >= SAME_BATCHES and found["answers"] >= SAME_ANSWERS:
            ended = any(rollout.finished for rollout in rollouts)
            advice = "look at the reward with `prefkit judge run`"
            raise InputError(
                f"for {found['batches']} batches of episodes all {found['answers']} answers scored {score:g}",
                where="--reward",
                mend=f"{advice if ended else 'no answer ended: raise --max_new_tokens, or see --missing_eos'}; "
                "the last checkpoint is whole",
            )
        if len(rollouts) > 1 and found["batches"] == 1:
            self.run.say(f"all {len(rollouts)} answers of this batch score {score:g}: the reward says nothing")
        return found

    def _next_coefficient(self) -> float:
        """The KL coefficient after the batch that was trained on."""
        config, now = self.config, self.store.about["kl_coef"]
        if not config.kl_target:
            return now
        kl = float(sequence_kl(Columns.of(self.store.rollouts, self.accounting)).mean())
        return adaptive_coefficient(
            now, kl, target=config.kl_target, horizon=config.kl_horizon, episodes=len(self.store.rollouts)
        )

    def _take_up(self, batch: int) -> None:
        """Give credit for the batch in the store."""
        self._batch, self._units = batch, units_of(self.store.rollouts)
        columns = Columns.of(self.store.rollouts, self.accounting)
        credit = self.give_credit(columns, penalised(columns, self.config), self.kl_coef)
        self._credits, line = [], 0
        for unit in self._units:
            rows = slice(line, line := line + len(unit))
            returns = None if credit.returns is None else credit.returns[rows]
            self._credits.append(Credit(advantages=credit.advantages[rows], returns=returns))

    @property
    def kl_coef(self) -> float:
        """Of the batch in training."""
        return self.store.about["kl_coef"]

    def _log_batch(self) -> None:
        """The batch's rollouts, in the row of its first step."""
        columns = Columns.of(self.store.rollouts, self.accounting)
        resets = self.maker.resets is not None and self.maker.resets.prob > 0
        found = summary(columns, penalised(columns, self.config), kl_coef=self.kl_coef, resets=resets)
        about = self.store.about
        found["rollout/episodes"] = float(about["batch"] * self.data.episodes_per_batch)
        found["rollout/sampled_tokens"] = float(about["sampled_tokens"])
        if self.config.kl_coef:
            found["objective/kl_coef"] = self.kl_coef
        returns = [credit.returns for credit in self._credits if credit.returns is not None]
        if returns:
            explained = explained_variance(columns.values, joined(returns), columns.counted)
            found["value/explained_variance"] = float(explained.nan_to_num())
        self.run.log(found)

    # Steps

    def batches(self, step: int, rows: Sequence[int], first: int) -> Sequence[Sequence[int]]:
        """Places of this process's prompts, a list for each pass."""
        self._measured = self._written(step)
        everyone = [rollout for place in self.data.places(step) for rollout in self._units[place]]
        counted = sum(len(rollout.counted(self.accounting)) for rollout in everyone)
        actions = sum(self._actions(rollout) for rollout in everyone)
        assert actions > 0, "every rollout leaves the policy a token"
        self._share, self._value_scale = len(everyone) / actions, actions / counted
        sizes = [num_tokens(group_of(self._units[place], self.accounting)) for place in rows]
        agree = self.world.most if self.world.in_step else None
        budget = max([self.config.tokens_per_batch, *sizes]) if self.config.tokens_per_batch else 0
        micro = self.config.per_device_train_batch_size
        return [[rows[i] for i in piece] for piece in passes(sizes, rows=micro, budget=budget, agree=agree)]

    def _actions(self, rollout: Rollout) -> int:
        return len(rollout.counted(self.accounting)) - (rollout.prefix - rollout.start(self.accounting))

    def compute(self, batch: Sequence[int]) -> tuple[Tensor, Metrics]:
        units, device = [self._units[place] for place in batch], self.world.device
        groups = [group_of(unit, self.accounting) for unit in units]
        columns = Columns.of([rollout for unit in units for rollout in unit], self.accounting, device)
        metrics: Metrics = {"objective/entropy": columns.scores.new_zeros(0)}  # a name that every step has
        if self._measured:
            log_probs, entropy, _ = self.policy.token_details(groups, temperature=self.config.temperature)
            metrics["objective/entropy"] = (entropy * columns.actions).sum(-1) * self._share
        else:
            log_probs = self.policy.token_log_probs(groups, temperature=self.config.temperature)
        credits = [self._credits[place] for place in batch]
        width = columns.counted.shape[1]
        returns = [credit.returns for credit in credits if credit.returns is not None]
        per_pass = columns.actions.sum() / columns.counted.sum()
        losses = self.take_loss(
            Step(
                log_probs=log_probs,
                values=None if self.value is None else self.value.values(groups),
                columns=columns,
                credit=Credit(
                    advantages=joined([credit.advantages for credit in credits], width).to(device),
                    returns=joined(returns, width).to(device) if returns else None,
                ),
                kl_coef=self.kl_coef,
                value_scale=per_pass if self.mean_per_pass else self._value_scale,
            )
        )
        scale = 1.0 if self.by_answer else self._share
        metrics |= {name: term.detach() * scale for name, term in losses.terms.items()}
        metrics |= {
            "policy/ratio": losses.ratios.ratio * scale,
            "policy/approx_kl": losses.ratios.approx_kl * scale,
            "policy/clip_fraction": losses.ratios.clipped.float() * scale,
        }
        return losses.total / columns.actions.sum() if self.mean_per_pass else losses.total, metrics

    def weight(self, batch: Sequence[int]) -> float:
        if self.mean_per_pass:
            return 1.0
        rollouts = [rollout for place in batch for rollout in self._units[place]]
        return float(len(rollouts) if self.by_answer else sum(map(self._actions, rollouts)))

    def after(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Stop where the policy has left the one that drew the answers it is trained on."""
        if not (self._measured or self.run.due(self.config.save_steps)):
            return
        ratio, kl = float(values["policy/ratio"]), float(values["policy/approx_kl"])
        if ratio > MOST_RATIO or kl > MOST_KL:  # one that is no number is found by the run itself
            raise InputError(
                f"at step {step} the probability ratio is {ratio:.3g} in the mean and the KL {kl:.3g}: the policy has "
                "left the one that drew its answers",
                where=str(self.run.directory),
                mend="in another --output_dir, lower --learning_rate or --num_ppo_epochs; the last checkpoint is whole",
            )

    def ends_round(self, step: int) -> bool:
        return False

    def evaluate(self, *, selecting: bool = False) -> HeldOut:
        samples = self._evaluations[selecting and bool(self.data.data.selection)]()
        return HeldOut(metrics=summarize_samples(samples, tuple(self.judges)), pairs=[], samples=samples)

    def finish(self) -> None:
        """Nothing: the last step's weights are final."""

    def save_final(self, directory: Path) -> Mapping[str, str | None]:
        return self.policy.save_final(directory)


def joined(rows: Sequence[Tensor], width: int | None = None) -> Tensor:
    """Rows of several prompts under one another, cut or filled with 0 to one width; (n,) stay as they are."""
    if rows[0].ndim == 1:
        return torch.cat(list(rows))
    width = width if width is not None else max(row.shape[1] for row in rows)
    return torch.cat([nn.functional.pad(row[:, :width], (0, max(0, width - row.shape[1]))) for row in rows])


def check_options(config: Any) -> None:
    """InputError for options that are out of range or do not go together."""
    limits.check(config, LIMITS)
    if config.top_p != 1.0 or config.temperature == 0:
        raise InputError(
            f"answers drawn at temperature {config.temperature} and top_p {config.top_p} are not the policy's own: "
            "their probability ratios would be those of another distribution",
            where="--temperature/--top_p",
            mend="leave top_p at 1 and temperature above 0",
        )
    if config.dual_clip and config.dual_clip <= 1:
        raise InputError(
            f"dual_clip is {config.dual_clip}", where="--dual_clip", mend="give more than 1, or 0 for none"
        )
    if config.kl_target and not config.kl_coef:
        raise InputError("an adaptive KL coefficient cannot grow from 0", where="--kl_coef", mend="give it a start")


def check_groups(config: Any) -> None:
    """InputError where answers have no others to be compared with."""
    if config.num_generations < 2:
        raise InputError(
            "an answer is compared with the others to its prompt, and there are none",
            where="--num_generations",
            mend="give 2 or more",
        )
    if config.whiten_rewards:
        raise InputError(
            "token rewards are whitened for a value function, and there is none",
            where="--whiten_rewards",
            mend="leave it out; --scale_advantages acts on what an answer is given",
        )


def resets_of(config: Any, *, writes: bool) -> ResetSampler:
    """The resets that a Config's `Resets` group names; `writes` on the process that writes checkpoints."""
    return ResetSampler(
        source=config.reset_source,
        prob=config.reset_prob,
        k_min=config.k_min,
        law=config.reset_law,
        cut=config.reset_cut,
        filter=finished_only if config.reset_filter == "finished" else None,
        seed=config.seed,
        writes=writes,
    )


def optimization(
    config: Any,
    data: EpisodeData,
    run: Run,
    *,
    reward: RewardModel | Gold,
    reward_name: str,
    give_credit: GiveCredit,
    take_loss: TakeLoss,
    judges: Mapping[str, Gold],
    critic: Literal["reward", "policy", "none"],
    accounting: Accounting = "continuation",
    by_answer: bool = False,
    mean_per_pass: bool = False,
    model: Any = None,
) -> PolicyOptimization:
    """Load policy, reference and value function, and join them with the data and the reward.

    `reward_name` is the folder or Hub id a value function may begin as; empty where a function scores.
    """
    policy = TextPolicy.create(config, run.world, model=model, tokenizer=data.data.tokenizer)
    run.fingerprint(model=policy.fingerprint)
    run.say(f"policy {policy.describe()}; the reference is {policy.reference.name}")
    value = None
    if critic != "none":
        start = reward_name if critic == "reward" else ""
        value = value_of(config, policy, reward=start, keeping=config.value_model)
        run.say(f"value function: {value.how}")
    resets = resets_of(config, writes=run.world.is_main)
    if resets.prob and (warning := resets.warning()):
        run.say(warning)
    sampler, rows = sampler_for(policy, config), data.data.train
    batch_size = 4 * config.per_device_train_batch_size
    maker = RolloutMaker(
        policy=policy,
        sampler=sampler,
        data=data,
        score=scoring(reward, policy, rows, batch_size=batch_size),
        resets=resets,
        value=value,
        accounting=accounting,
        config=config,
    )
    found = judges if not isinstance(reward, RewardModel) else {"reward_model": reward.judge, **judges}
    return PolicyOptimization(
        policy=policy,
        sampler=sampler,
        value=value,
        data=data,
        run=run,
        maker=maker,
        give_credit=give_credit,
        take_loss=take_loss,
        config=config,
        accounting=accounting,
        by_answer=by_answer,
        mean_per_pass=mean_per_pass,
        judges=found,
    )
