"""OSP's stage 1: supervised fine-tuning on chosen answers and, in the same mixture, on A/B judgments of stored pairs.

Each pair gives its chosen answer as an example and two judgments: chosen shown as A (reply A) and shown as B (reply B).
A judgment is a single token, so in a plain token mean it would drown among the answers' tokens; judgments are weighed
up to a given share of the loss. The model this leaves is the start, the reference and the frozen judge of stage 2.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from prefkit.domains.text.batches import hold_out
from prefkit.domains.text.choice import LETTERS, letter_tokens, prompt_ids, rendered
from prefkit.domains.text.config import Data, Lora, Model, Sampling
from prefkit.domains.text.datasets import TextData
from prefkit.domains.text.prompts import group_of, last_content
from prefkit.engine import checkpoint, limits
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.directory import CONFIG, RESULT, differences
from prefkit.engine.files import read_json
from prefkit.errors import InputError
from prefkit.options import to_json
from prefkit.protocols import Metrics, Task, Trackable
from prefkit.records import Completion, Example, HeldOut, Pair, Text

FOLDER = "stage1"
"""stage 1's own run directory, inside that of the whole run"""
METHOD = "osp_stage1"
LAST = "report.html"
"""what a run writes last"""

Ask = Callable[[Text, str, str], Text]
"""(prompt, answer shown as A, answer shown as B) -> the judge's prompt, whose next token is the letter"""


LIMITS = {
    "judge_pairs": limits.AT_LEAST_1,
    "judgment_share": limits.Limit(0, 1, above=True, below=True),
    "judge_temperature": limits.NOT_BELOW_0,
    "ema_decay": limits.Limit(0, 1, below=True),
    "stage1_steps": limits.Limit(-1),
    "stage1_batch_size": limits.AT_LEAST_1,
    "stage1_learning_rate": limits.NOT_BELOW_0,
}
"""of the options that say how a model learns to judge itself"""


@dataclass(frozen=True, kw_only=True)
class JudgeFit(Model, Lora, Data, Sampling, Optimisation, Selection, Output):
    """The options that stage 1 depends on; it goes on after a kill as long as these are the same."""

    judge_template: str = "chat"
    judge_pairs: int = 256
    judgment_share: float = 0.5


def check(config: Any) -> None:
    """InputError for options that are out of range or contradict each other."""
    limits.check(config, LIMITS)
    if config.stage1_steps and not config.judge_labels:
        raise InputError(
            "stage 1 learns from the labels that are not to be used",
            where="--no_judge_labels",
            mend="add --stage1_steps 0, or let the labels be used",
        )
    if config.candidates == "own" and config.pairing != "vs_baseline" and config.num_generations < 2:
        raise InputError(
            "one candidate beside the baseline makes no pair",
            where="--num_generations 1",
            mend="give 2 or more, or --pairing vs_baseline",
        )
    if config.self_judge != "frozen" and config.steps_per_round == 0 and config.num_rounds == 1:
        raise InputError(
            "in a single round every answer is judged by the weights it starts with",
            where=f"--self_judge {config.self_judge}",
            mend="more --num_rounds, or --steps_per_round 1",
        )


def stage1_config(config: Any, directory: Path) -> JudgeFit:
    """Stage 1's options from those of the whole run."""
    names = {field.name for field in dataclasses.fields(JudgeFit)}
    shared = {name: value for name, value in vars(config).items() if name in names}
    return JudgeFit(
        **{
            **shared,
            "output_dir": str(directory / FOLDER),
            "max_steps": config.stage1_steps,
            "num_train_epochs": 1.0,
            "learning_rate": config.stage1_learning_rate,
            "lr_scheduler_type": "cosine",  # as SELF-JUDGE has it, and the warm-up
            "warmup_ratio": 0.03,
            "per_device_train_batch_size": config.stage1_batch_size,
            "keep_best": "",
            "patience": 0,
            "stop_at_kl": 0.0,
            "eval_steps": 0,
            "overwrite": False,
            "dry_run": False,
        }
    )


def set_aside(pairs: Sequence[Pair], config: Any) -> tuple[list[Pair], list[Pair]]:
    """(pairs of stage 1, pairs that measure and calibrate the judge): no prompt or group stands on both sides.

    About `judge_pairs` pairs, and about a fifth of all at most, are set aside. Raises InputError where all share one
    prompt.
    """
    share = min(0.2, config.judge_pairs / len(pairs))
    try:
        rest, aside = hold_out(pairs, lambda pair: group_of(pair.source), share=share, seed=config.seed)
    except ValueError as error:
        raise InputError(
            f"no pairs can be set aside to measure the judge: {error}",
            where="--dataset_name",
            mend="give pairs of more prompts",
        ) from error
    return rest, aside[: config.judge_pairs]


def judgments(tokenizer: Any, pairs: Sequence[Pair], ask: Ask, *, room: int) -> tuple[list[Example], int]:
    """Two examples a pair, and how many were left out because they pass `room` tokens."""
    texts: list[tuple[Pair, str, Text]] = []
    for pair in pairs:
        chosen, rejected = last_content(pair.source.chosen), last_content(pair.source.rejected)
        texts.append((pair, LETTERS[0], ask(pair.source.prompt, chosen, rejected)))
        texts.append((pair, LETTERS[1], ask(pair.source.prompt, rejected, chosen)))
    if not texts:
        return [], 0
    tokens: dict[str, int] = dict(zip(LETTERS, letter_tokens(tokenizer, rendered(tokenizer, texts[0][2])), strict=True))
    ids = prompt_ids(tokenizer, [text for _, _, text in texts])
    made = [
        Example(
            prompt=prompt,
            completion=(tokens[letter],),
            source=Completion(prompt=text, completion=letter, row=pair.source.row, extra=pair.source.extra),
        )
        for (pair, letter, text), prompt in zip(texts, ids, strict=True)
        if len(prompt) < room
    ]
    return made, len(texts) - len(made)


def answers(pairs: Sequence[Pair]) -> list[Example]:
    """The chosen answers as examples, in token ids as they are in the pairs."""
    return [
        Example(
            prompt=pair.prompt,
            completion=pair.chosen,
            truncated=pair.chosen_truncated,
            source=Completion(
                prompt=pair.source.prompt,
                completion=last_content(pair.source.chosen),
                row=pair.source.row,
                extra=pair.source.extra,
            ),
        )
        for pair in pairs
    ]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Stage 1's data: the chosen answers, then the judgments."""

    data: TextData[Example]
    num_judgments: int
    left_out: int
    """judgments that are too long"""
    judgment_weight: float
    """what a judgment's token counts for, an answer's token counting for 1"""

    def describe(self) -> str:
        out = f" ({self.left_out} more are too long)" if self.left_out else ""
        num = len(self.data.train) - self.num_judgments
        return f"{num} answers and {self.num_judgments} judgments{out}, each weighing {self.judgment_weight:.3g} tokens"


def mixture(data: TextData[Pair], pairs: Sequence[Pair], ask: Ask, config: JudgeFit) -> Mixture:
    """Answers and judgments of `pairs`; of the held-out pairs, the answers. InputError where no judgment fits."""
    room = min(room for room in (config.max_length, data.context, config.tokens_per_batch) if room)
    found, left_out = judgments(data.tokenizer, pairs, ask, room=room)
    if not found:
        raise InputError(
            f"none of {left_out} judgments fits {room} tokens",
            where="--max_length",
            mend="raise it: a judgment holds the prompt, both answers and the question",
        )
    learned = answers(pairs)
    tokens = sum(len(example.completion) for example in learned)
    digest = hashlib.sha256(f"{data.fingerprint} {len(pairs)}".encode())
    for example in found:
        digest.update(repr((example.prompt, example.completion)).encode())
    num = len(learned) + len(found)
    rows = dataclasses.replace(data.checks["train"], name="answers and judgments", rows=num, kept=num, dropped={})
    mixed: Any = dataclasses.replace(
        data,
        config=config,
        checks={**data.checks, "train": rows},
        train=[*learned, *found],
        test=answers(data.test),
        selection=[],
        fingerprint=digest.hexdigest(),
    )
    share = config.judgment_share
    return Mixture(
        data=mixed,
        num_judgments=len(found),
        left_out=left_out,
        judgment_weight=share / (1 - share) * tokens / len(found),
    )


@dataclass(kw_only=True)
class Weighed:
    """A supervised task on a mixture whose judgments count for more. See `protocols.Task`."""

    task: Task
    mixture: Mixture

    def __post_init__(self) -> None:
        self.num_rows = self.task.num_rows
        self.module: nn.Module = self.task.module
        rows = self.mixture.data.train
        self._judgments = {id(example) for example in rows[len(rows) - self.mixture.num_judgments :]}

    def _weights(self, batch: Sequence[Example]) -> list[float]:
        heavy = self.mixture.judgment_weight
        return [heavy if id(example) in self._judgments else 1.0 for example in batch]

    def tracked(self) -> Mapping[str, Trackable]:
        return self.task.tracked()

    def batches(self, step: int, rows: Sequence[int], first: int) -> Sequence[Sequence[Any]]:
        return self.task.batches(step, rows, first)

    def compute(self, batch: Sequence[Example]) -> tuple[Tensor, Metrics]:
        losses, metrics = self.task.compute(batch)
        return losses * losses.new_tensor(self._weights(batch)), metrics

    def weight(self, batch: Sequence[Example]) -> float:
        return sum(w * len(example.completion) for w, example in zip(self._weights(batch), batch, strict=True))

    def evaluate(self, *, selecting: bool = False) -> HeldOut:
        return self.task.evaluate(selecting=selecting)

    def finish(self) -> None:
        self.task.finish()

    def save_final(self, directory: Path) -> Mapping[str, str | None]:
        return self.task.save_final(directory)


def basis(data: TextData[Pair], version: str) -> str:
    """sha256 of what stage 1 learns from: the pairs, and the version of the template."""
    return hashlib.sha256(f"{data.fingerprint} {version}".encode()).hexdigest()


def state(directory: Path, config: JudgeFit, made_of: str) -> Literal["absent", "begun", "done", "other"]:
    """What there is of stage 1 in a run directory; "other" is one with other options than these.

    Raises InputError for one that is done and learned from something else than `made_of`, its `basis`.
    """
    folder = directory / FOLDER
    if not (folder / CONFIG).is_file():
        return "absent"
    before, now = read_json(folder / CONFIG)["config"], to_json(config)
    if differences(before, now) or before["max_steps"] != now["max_steps"]:
        return "other"
    if not all((folder / name).is_file() for name in (RESULT, LAST)):
        return "begun"
    steps = checkpoint.steps_in(folder)
    if steps and checkpoint.read_state(folder, steps[-1])["fingerprints"].get("basis") != made_of:
        raise InputError(
            "stage 1 learned from other pairs, or by another judge template of that name",
            where=str(folder),
            mend="give the same, choose another --output_dir, or --overwrite to start anew",
        )
    return "done"


def fitted(config: Any, directory: Path) -> Any:
    """The options of stage 2: the model is what stage 1 left, its base and adapter where they could not be merged."""
    folder = directory / FOLDER
    if read_json(folder / RESULT)["model"] is None:
        return dataclasses.replace(config, adapter_name_or_path=str(folder))
    return dataclasses.replace(config, model_name_or_path=str(folder), model_revision="main", adapter_name_or_path="")
