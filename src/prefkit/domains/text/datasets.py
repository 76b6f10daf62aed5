"""From what the user named to checked, tokenized rows and their order: the data a text run trains and reports on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from prefkit import assets
from prefkit.domains.text import loading, quantised
from prefkit.domains.text.batches import hold_out, num_steps, process_slice, step_batches
from prefkit.domains.text.check import Report, check
from prefkit.domains.text.columns import parse_completions, parse_preferences, read_prompts
from prefkit.domains.text.config import Sampling
from prefkit.domains.text.files import Source
from prefkit.domains.text.load import evaluation_split, load, splits
from prefkit.domains.text.packaged import dataset as packaged_dataset
from prefkit.domains.text.packing import check_budget
from prefkit.domains.text.problems import Where
from prefkit.domains.text.prompts import group_of
from prefkit.domains.text.sampler import Decoding, fits
from prefkit.domains.text.tokenize import tokenize_prompts
from prefkit.engine import limits
from prefkit.errors import InputError
from prefkit.records import Example, Pair

R = TypeVar("R", Pair, Example)
LIMITS = {
    "lora_r": limits.AT_LEAST_1,
    "lora_alpha": limits.ABOVE_0,
    "num_train_samples": limits.NOT_BELOW_0,
    "tokens_per_batch": limits.NOT_BELOW_0,
    "max_length": limits.AT_LEAST_1,
    "max_new_tokens": limits.AT_LEAST_1,
    "temperature": limits.NOT_BELOW_0,
    "top_p": limits.Limit(0, 1, above=True),
}
"""ranges of the numbers in domains/text/config.py"""
Kind = Literal["pairs", "completions"]
SHOWN = 5
"""problems printed for each part of the data"""


@dataclass(frozen=True, kw_only=True)
class TextData(Generic[R]):
    """Tokenized rows in three parts. `selection` may choose checkpoints; `test` is reported and never chooses."""

    config: Any
    tokenizer: Any
    train: Sequence[R]
    test: Sequence[R]
    selection: Sequence[R]
    checks: dict[str, Report]
    fingerprint: str
    context: int
    """most tokens the model takes, 0 for any number"""
    where: Where
    """the place of a training row in its file"""

    def report(self) -> dict[str, Any]:
        return {
            "train": self.checks["train"].to_json(),
            "evaluation": self.checks["evaluation"].to_json(),
            "parts": {"train": len(self.train), "test": len(self.test), "selection": len(self.selection)},
            "fingerprint": self.fingerprint,
        }

    def describe(self) -> Sequence[str]:
        parts = {"train": self.train, "held out": [*self.test, *self.selection]}
        lines = [
            _described(name, report, len(rows))
            for (name, rows), report in zip(parts.items(), self.checks.values(), strict=True)
        ]
        if self.selection:
            chooses, reported = len(self.selection), len(self.test)
            lines.append(f"held-out rows that choose checkpoints: {chooses}; that are reported: {reported}")
        lines += self._unanswered()
        for report in self.checks.values():
            lines += [f"{p.level}: {p.where}: {p.what}" for p in report.problems[:SHOWN]]
            if len(report.problems) > SHOWN:
                lines.append(f"... {len(report.problems) - SHOWN} more in data.json, or by `prefkit data check`")
        return lines

    def _unanswered(self) -> list[str]:
        """A line on held-out prompts that evaluation draws no answer to, where there are any."""
        draws = isinstance(self.config, Sampling)
        if not draws or not self.config.num_eval_prompts:
            return []
        decoding = Decoding.of(self.config)
        prompts = {tuple(row.prompt) for row in [*self.test, *self.selection]}
        out = sum(not fits(len(prompt), decoding, self.context) for prompt in prompts)
        if not out:
            return []
        return [
            f"{out} of {len(prompts)} held-out prompts leave no room for {decoding.max_new_tokens} new tokens in the "
            f"model's context of {self.context}: evaluation draws no answers to them"
        ]

    def online_prompts(self, name: str) -> list[list[int]]:
        """The prompts of the file or data set `name` in token ids; empty for no name: the training rows' own are used.

        Raises InputError, naming file and row, where a prompt leaves no room for an answer of max_new_tokens.
        """
        decoding = Decoding.of(self.config)
        if not name:
            for row in self.train:
                _check_room(len(row.prompt), decoding, self.context, where=self.where(row.source.row))
            return []
        prompts = read_prompts(_packaged(name, self.config.seed))
        tokens = tokenize_prompts(
            self.tokenizer,
            [prompt.prompt for prompt in prompts],
            extras=[prompt.extra for prompt in prompts],
            where=lambda place: prompts[place].where,
        )
        for prompt, ids in zip(prompts, tokens, strict=True):
            if len(ids) >= self.config.max_length:
                raise InputError(
                    f"the prompt has {len(ids)} tokens, max_length is {self.config.max_length}",
                    where=prompt.where,
                    mend="shorten it or raise --max_length",
                )
            _check_room(len(ids), decoding, self.context, where=prompt.where)
        return tokens

    def forecast(self) -> Sequence[str]:
        from prefkit.domains.text.forecast import forecast

        return forecast(self.config, [*self.train], held_out=[*self.test])

    def global_batch(self, size: int) -> int:
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps * size

    def step_rows(self, step: int, size: int) -> list[int]:
        batch = self.global_batch(size)
        return step_batches(len(self.train), step=step, global_batch=batch, seed=self.config.seed)

    def num_tokens(self, step: int, size: int) -> int:
        groups = (self.train[row].group for row in self.step_rows(step, size))
        return sum(len(group.prompt) + sum(map(len, group.answers)) for group in groups)

    def rows(self, step: int, rank: int, size: int) -> tuple[list[int], int]:
        everyone = self.step_rows(step, size)
        mine = process_slice(everyone, rank=rank, size=size)
        return mine, rank * len(mine)

    def total_steps(self, size: int) -> int:
        if self.config.max_steps > 0:
            return self.config.max_steps
        return num_steps(len(self.train), epochs=self.config.num_train_epochs, global_batch=self.global_batch(size))

    def steps_per_epoch(self, size: int) -> float:
        return len(self.train) / self.global_batch(size)


def _described(name: str, report: Report, used: int) -> str:
    """One line on a part of the data: rows used, what was left out or odd, median lengths."""
    odd = [f"{count} {what}" for what, count in {**report.dropped, **report.counts, **report.overlap}.items() if count]
    extra = f" ({'; '.join(odd)})" if odd else ""
    lengths = ", ".join(f"{part} {found.quantiles['0.5']:.0f}" for part, found in report.lengths.items())
    return f"{name}: {used} of {report.rows} rows used{extra}; median tokens: {lengths}"


def prepare_pairs(config: Any, *, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> TextData[Pair]:
    """Preference data named by `config` or given in memory, checked and tokenized.

    Raises InputError for data or a tokenizer that cannot be used, naming file, row and field.
    """
    return _prepare(config, "pairs", model=model, tokenizer=tokenizer, train=train, evaluation=evaluation)


def prepare_completions(config: Any, *, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> TextData[Example]:
    """Prompt/completion data (or the chosen answers of preference data), as `prepare_pairs`."""
    return _prepare(config, "completions", model=model, tokenizer=tokenizer, train=train, evaluation=evaluation)


def _packaged(name: str, seed: int) -> Any:
    """The training rows of a packaged data set; any other name as it is."""
    return packaged_dataset(name, seed)["train"] if name in assets.ASSETS and not Path(name).exists() else name


def _check_room(tokens: int, decoding: Decoding, context: int, *, where: str) -> None:
    if not fits(tokens, decoding, context):
        raise InputError(
            f"the prompt has {tokens} tokens, which leaves no room for {decoding.max_new_tokens} new ones in the "
            f"model's context of {context}",
            where=where,
            mend="shorten or drop it, or lower --max_new_tokens",
        )


def _prepare(config: Any, kind: Kind, *, model: Any, tokenizer: Any, train: Any, evaluation: Any) -> TextData[Any]:
    _check_options(config)
    if tokenizer is None:
        if model is not None:
            raise InputError("a model given in memory needs its tokenizer", mend="pass tokenizer=...")
        tokenizer = loading.load_tokenizer(config, loading.resolve(config.model_name_or_path))
    tokenizer = loading.prepare_tokenizer(tokenizer)
    source, held = _sources(config, train, evaluation)
    parse = parse_preferences if kind == "pairs" else parse_completions
    rows, problems = parse(source)
    if held is None:
        rows, held_rows = _hold_out(rows, config.seed)
        held_problems, held_name, held_where = [], f"{source.name} (held out)", source.path_of_row
    else:
        held_rows, held_problems = parse(held)
        held_name, held_where = held.name, held.path_of_row
    context = loading.context(config, model)
    settings = {
        "tokenizer": tokenizer,
        "max_length": config.max_length,
        "context": context,
        "append_eos": config.append_eos,
        "long_prompts": config.long_prompts,
    }
    checks = {
        "train": check(
            rows, evaluation=held_rows, where=source.path_of_row, problems=problems, name=source.name, **settings
        ),
        "evaluation": check(held_rows, where=held_where, problems=held_problems, name=held_name, **settings),
    }
    for report in checks.values():
        report.raise_errors()
    examples: list[Any] = list(checks["train"].examples)
    if config.num_train_samples:
        examples = examples[: config.num_train_samples]
    if not examples:
        raise InputError("no row is left to train on", where=source.name, mend="see `prefkit data check`")
    places = [source.path_of_row(row.source.row) for row in examples] if config.tokens_per_batch else []
    check_budget([row.group for row in examples], config.tokens_per_batch, where=places.__getitem__)
    test, selection = _select(config, list(checks["evaluation"].examples))
    prints = "".join(report.fingerprint for report in checks.values())
    digest = hashlib.sha256(f"{prints} {len(examples)} {len(test)} {len(selection)}".encode()).hexdigest()
    return TextData(
        config=config,
        tokenizer=tokenizer,
        train=examples,
        test=test,
        selection=selection,
        checks=checks,
        fingerprint=digest,
        context=context,
        where=source.path_of_row,
    )


def _check_options(config: Any) -> None:
    quantised.check(config)
    limits.check(config, limits.SHARED | LIMITS)
    if (config.keep_best or config.stop_at_kl) and not config.eval_steps:
        raise InputError(
            "a checkpoint is chosen, or the run stopped, by evaluations, and none is made during training",
            where="--eval_steps",
            mend="evaluate every so many steps: --eval_steps 10",
        )
    if config.max_steps < 1 and config.num_train_epochs <= 0:
        raise InputError("neither max_steps nor num_train_epochs is above 0", mend="give one of them")


def _sources(config: Any, train: Any, evaluation: Any) -> tuple[Source, Source | None]:
    """Training rows, and held-out rows where there are any apart from them."""
    name = train if train is not None else config.dataset_name
    if isinstance(name, str) and not name:
        raise InputError("no training data given", where="--dataset_name", mend="name a file, folder or Hub id")
    held = evaluation if evaluation is not None else config.eval_dataset
    if isinstance(name, str) and name in assets.ASSETS:
        parts = packaged_dataset(name, config.seed)
        source, rest = load(parts["train"]), load(parts["test"], what="evaluation")
        return source, rest if isinstance(held, str) and not held else load(held, what="evaluation")
    source = load(name, split=_train_split(config, name), config=config.dataset_config)
    if not isinstance(held, str) or held:
        return source, load(held, config=config.dataset_config, what="evaluation")
    split = config.dataset_eval_split or evaluation_split(splits(name, config=config.dataset_config))
    if split:
        return source, load(name, split=split, config=config.dataset_config, what="evaluation")
    return source, None


def _train_split(config: Any, name: Any) -> str:
    """The split asked for; the default falls to whatever `load` finds where there is no `train`."""
    asked = config.dataset_train_split
    return asked if asked != "train" or "train" in splits(name, config=config.dataset_config) else ""


def _hold_out(rows: Sequence[Any], seed: int) -> tuple[list[Any], list[Any]]:
    try:
        return hold_out(rows, group_of, seed=seed)
    except ValueError as error:
        raise InputError(
            f"no held-out rows can be made: {error}", where="--eval_dataset", mend="give held-out data of your own"
        ) from error


def _select(config: Any, examples: list[Any]) -> tuple[list[Any], list[Any]]:
    """(test, selection): half of the held-out clusters choose where something is chosen, else all are test."""
    if not (config.keep_best or config.patience or config.stop_at_kl):
        test, selection = examples, []
    else:
        try:
            test, selection = hold_out(examples, lambda row: group_of(row.source), share=0.5, seed=config.seed)
        except ValueError as error:
            raise InputError(
                "held-out data with a single prompt cannot both choose a checkpoint and test it",
                where="--eval_dataset",
                mend="give more held-out prompts, or drop --keep_best, --patience and --stop_at_kl",
            ) from error
    limit = config.num_eval_samples
    return (test[:limit], selection[:limit]) if limit else (test, selection)
