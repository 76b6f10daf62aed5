"""Whether a model that judges itself can judge: measured before stage 2, which a judge at chance is refused.

With labels, accuracy on pairs it was not trained on, and the temperature its probabilities need. Without, the agreement
of the two orders (a judge that goes by the place alone agrees never, one that guesses half the time) and the mass on A
and B (a model that would say something else than a letter was not understood).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefkit.domains.text.average import AverageWeights
from prefkit.domains.text.choice import Active, LetterReader
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.prompts import group_of, last_content
from prefkit.engine.files import read_json, write_json
from prefkit.engine.run import Run
from prefkit.errors import InputError
from prefkit.evaluation.stats import Interval, bootstrap, sign_flip_p
from prefkit.feedback.calibration import Calibration, calibrate
from prefkit.feedback.self_judge import Reading, SelfJudge, choice_template
from prefkit.records import Pair, Preference, Question

LEAST_MASS = 0.1
"""of A and B together, below which a judge without labels is refused"""
LARGEST_P = 0.05
"""of a judge that is held for better than chance"""


@dataclass(frozen=True, kw_only=True)
class JudgeQuality:
    """What was measured on stored pairs."""

    judge: str
    num: int
    """pairs with different answers that the model had room for"""
    too_long: int
    agreement: Interval
    """share of pairs for which both orders name the same answer"""
    mass: float
    """mean probability of A or B as next token"""
    accuracy: Interval | None
    """share of pairs whose better answer, by the label, is the judge's; None where labels were not used"""
    calibration: Calibration | None
    chance_p: float
    """p of a sign-flip test over groups of "accuracy (where labels were not used, agreement) is 1/2": the interval of
    a few pairs that are all right has no width, and says nothing of chance"""

    @property
    def temperature(self) -> float:
        return 1.0 if self.calibration is None else self.calibration.temperature

    def describe(self) -> str:
        parts = [
            f"orders agree on {_spread(self.agreement)} of {self.num} pairs",
            f"mass on A and B {self.mass:.3f}",
        ]
        if self.accuracy is not None:
            parts.append(f"accuracy {_spread(self.accuracy)}")
        if self.calibration is not None:
            found = self.calibration
            errors = f"calibration error {found.ece_before:.3f} -> {found.ece_after:.3f}"
            parts.append(f"temperature {found.temperature:.3g} ({errors})")
        if self.too_long:
            parts.append(f"{self.too_long} pairs were too long")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "judge": self.judge,
            "num": self.num,
            "too_long": self.too_long,
            "order_agreement": self.agreement.to_json(),
            "mass": self.mass,
            "accuracy": None if self.accuracy is None else self.accuracy.to_json(),
            "chance_p": self.chance_p,
            "temperature": self.temperature,
            "calibration": None if self.calibration is None else self.calibration.to_json(),
        }


def measured(judge: SelfJudge, pairs: Sequence[Preference], *, labelled: bool, seed: int) -> JudgeQuality:
    """Ask about stored pairs, chosen and rejected in both orders. Intervals resample groups of rows.

    Raises InputError where no pair can be asked about.
    """
    questions = [
        Question(prompt=row.prompt, answers=(last_content(row.chosen), last_content(row.rejected)), row=row.row)
        for row in pairs
    ]
    asked = [
        (row, readings[0])
        for row, (readings, _) in zip(pairs, judge.read(questions), strict=True)
        if readings[0].mass is not None or readings[0].orders is None
    ]
    known = [(row, reading) for row, reading in asked if reading.orders is not None]
    if not known:
        raise InputError(
            f"none of {len(pairs)} pairs can be put to the judge: "
            + ("both answers of all are equal" if not asked else "all are longer than the model's context"),
            where="--judge_pairs",
            mend="give shorter or other pairs",
        )
    groups = [group_of(row) for row, _ in known]
    probs = [_prob(reading) for _, reading in known]
    masses = [value for _, reading in known for value in reading.mass or ()]
    agree = [float(reading.agrees) for _, reading in known]
    right = [1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0 for p in probs]
    told = right if labelled else agree
    return JudgeQuality(
        judge=judge.name,
        num=len(known),
        too_long=len(asked) - len(known),
        agreement=bootstrap(agree, groups, seed=seed),
        mass=sum(masses) / len(masses),
        accuracy=bootstrap(right, groups, seed=seed) if labelled else None,
        calibration=calibrate(probs, [1.0] * len(probs)) if labelled else None,
        chance_p=sign_flip_p(told, [0.5] * len(told), groups, seed=seed),
    )


def fault(quality: JudgeQuality) -> str:
    """Why a judge cannot be used; empty where it can."""
    chance = f"(p = {quality.chance_p:.2g} of a sign test)"
    if quality.accuracy is not None:
        if quality.accuracy.low > 0.5 and quality.chance_p <= LARGEST_P:
            return ""
        return (
            f"the judge is right on {_spread(quality.accuracy)} of {quality.num} held-out pairs, "
            f"which is not better than chance {chance}"
        )
    if quality.mass < LEAST_MASS:
        return (
            f"A and B together have {quality.mass:.3f} of the next token's probability: the question is not understood"
        )
    if not (quality.agreement.low > 0.5 and quality.chance_p <= LARGEST_P):
        return (
            f"both orders name the same answer for {_spread(quality.agreement)} of {quality.num} pairs, "
            f"which is not more often than by chance {chance}"
        )
    return ""


def refuse(quality: JudgeQuality, *, stage1: bool) -> None:
    """InputError for a judge at chance."""
    if found := fault(quality):
        first = "more of it (--stage1_steps, --judgment_share)" if stage1 else "train a judge first (--stage1_steps -1)"
        raise InputError(
            found,
            where="--judge self",
            mend=f"{first}, more pairs to measure it on (--judge_pairs), another --judge_template, a larger model, "
            "another --judge, or --force_judge",
        )


def own_judge(
    config: Any, policy: TextPolicy, pairs: Sequence[Pair], run: Run
) -> tuple[SelfJudge, AverageWeights | None]:
    """The policy as its own judge, measured and calibrated on `pairs`, and the average of its weights if that judges.

    Raises InputError for a judge at chance unless it is forced.
    """
    average = AverageWeights(policy, decay=config.ema_decay) if config.self_judge == "ema" else None
    active: Active | None = average.active if average is not None else None
    if config.self_judge == "frozen":
        active = policy.reference.active
    judge = SelfJudge(
        LetterReader(policy, active=active, batch_size=config.judge_batch_size),
        choice_template(config.judge_template),
        f"self:{config.self_judge}:{policy.fingerprint[:12]}",
        disagreement=config.disagreement,
    )
    return settled(judge, [pair.source for pair in pairs], run), average


def settled(judge: SelfJudge, pairs: Sequence[Preference], run: Run) -> SelfJudge:
    """The judge with its temperature, after it was measured; once in a run, and remembered in evaluation/judge.json.

    Raises InputError for a judge at chance unless it is forced.
    """
    config, labelled = run.config, run.config.judge_labels
    path = run.directory / "evaluation" / "judge.json"
    asked = {"judge": judge.name, "labelled": labelled}
    stored = run.world.on_main(lambda: read_json(path) if path.is_file() else None)
    if stored is None or any(stored[name] != value for name, value in asked.items()):
        run.say(f"measuring the judge on {len(pairs)} pairs")
        quality = run.world.broadcast(measured(judge, pairs, labelled=labelled, seed=config.seed))
        run.say(f"judge {quality.judge}: {quality.describe()}")
        if not config.force_judge:
            refuse(quality, stage1=config.stage1_steps != 0)
        elif found := fault(quality):
            run.say(f"the judge is used all the same: {found}")
        stored = quality.to_json() | asked

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            write_json(path, stored)

        run.world.on_main(write)
    return judge.at(config.judge_temperature or float(stored["temperature"]))


def _prob(reading: Reading) -> float:
    assert reading.orders is not None
    return sum(reading.orders) / 2


def _spread(found: Interval) -> str:
    ends = found.to_json()
    low, high = ends["low"], ends["high"]
    return f"{found.mean:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")
