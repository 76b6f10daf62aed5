"""Answers drawn from a policy, with the log-probability of every token under the distribution it was drawn from.

Each row draws its own uniform numbers from a generator seeded by (seed, path, row, index) and inverts the cumulative
distribution: what a row samples does not depend on the rows beside it, on their order, or on the process it runs in.
The t-th token of an answer takes the t-th number, also where the answer's first tokens are given and not drawn.

The loop that runs the model is `decode`; a model that it cannot run goes through `transformers`' generate.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from prefkit.domains.text.decode import EVERY, Start, decode, unfit
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.quantised import evaluating
from prefkit.domains.text.render import stop_tokens
from prefkit.domains.text.scoring import causal_lm
from prefkit.engine.precision import autocast
from prefkit.engine.seeds import generator
from prefkit.engine.sharding import gathered
from prefkit.errors import InputError
from prefkit.records import Sample

MAX_ROWS = 64
"""answers generated at once; more are cut into pieces of similar prompt length"""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are drawn. temperature 0 takes the likeliest token (its log-probability is then the model's own)."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    ignore_end: bool = False
    """go on behind end tokens until the budget is spent: every answer has a fixed length, and none is `finished`"""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise InputError(
                f"cannot sample with temperature {self.temperature}, top_p {self.top_p}, "
                f"max_new_tokens {self.max_new_tokens}",
                mend="temperature >= 0, 0 < top_p <= 1, max_new_tokens >= 1",
            )
        if self.ignore_end and self.stop_strings:
            raise InputError("ignore_end and stop strings exclude each other", mend="leave one of them out")

    @classmethod
    def of(cls, config: Any) -> Self:
        """As the Sampling group of a Config says."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop_strings=tuple(config.stop_strings),
        )


def sampling_log_probs(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Log-probabilities of the sampling distribution, float32: logits (n, v) tempered, then cut to the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probabilities reach top_p; it is renormalised.
    """
    scaled = logits.float() if temperature in (0.0, 1.0) else logits.float() / temperature
    log_probs = scaled.log_softmax(-1)
    if top_p >= 1.0:
        return log_probs
    ordered, order = log_probs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return log_probs.masked_fill(outside, -torch.inf).log_softmax(-1)


def draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution: log-probs (n, v), uniforms in [0, 1) (n,) -> (n,)."""
    cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
    # Scaled to the sum actually reached, so that rounding can never point past the last token with mass.
    point = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=log_probs.shape[-1] - 1)


def pick(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """One token per row, as `decoding` says, and its log-probability: logits (n, v), uniforms (n,) -> (n,), (n,)."""
    log_probs = sampling_log_probs(logits, decoding.temperature, decoding.top_p)
    tokens = log_probs.argmax(-1) if decoding.temperature == 0 else draw(log_probs, uniforms)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


class _Drawer:
    """A logits processor for `generate`: draws each row's token itself and leaves greedy search no other choice."""

    def __init__(self, uniforms: Tensor, decoding: Decoding) -> None:
        self.uniforms = uniforms
        self.decoding = decoding
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, log_probs = pick(scores, self.uniforms[:, len(self.log_probs)], self.decoding)
        self.log_probs.append(log_probs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


@dataclass(frozen=True)
class Job:
    """One answer to draw."""

    start: Start
    place: int
    """of its prompt among those asked for"""
    row: int
    index: int


class Sampler(Protocol):
    """An engine that draws answers from a policy's current weights."""

    def refresh(self) -> None:
        """Take up the policy's current weights; called before each sampling phase."""
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num: int,
        decoding: Decoding,
        seed: int,
        path: Sequence[str | int],
        rows: Sequence[int],
        prefixes: Sequence[Sequence[int]] | None = None,
        budgets: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        """See `TransformersSampler.sample`."""
        ...


class TransformersSampler:
    """Samples with the policy's own weights through its transformers model."""

    name = "transformers"

    def __init__(self, policy: TextPolicy) -> None:
        self.policy = policy
        self.unfit = unfit(causal_lm(policy.model))
        """why answers are drawn by `model.generate`, which is slower; empty where our own loop draws them"""
        if self.unfit and policy.world.is_main:
            _say(f"prefkit: answers are drawn by model.generate, which is slower: {self.unfit}")

    def refresh(self) -> None:
        """Nothing to push: the sampler reads the policy's own weights."""

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num: int,
        decoding: Decoding,
        seed: int,
        path: Sequence[str | int],
        rows: Sequence[int],
        prefixes: Sequence[Sequence[int]] | None = None,
        budgets: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        """`num` answers to each prompt.

        Args:
            prompts: token ids, each non-empty.
            seed, path, rows: sample j of prompt i depends on (seed, *path, rows[i], j) and on nothing else random.
            prefixes: for each prompt the tokens that its answers begin with; they are read, not drawn.
            budgets: for each prompt the most tokens of an answer, its prefix included; else decoding.max_new_tokens.

        Returns one list of `num` samples for each prompt, in order. A sample holds the whole answer: prefix and what
        was drawn. Raises ValueError for a prefix that leaves its budget no token to draw.
        """
        jobs = jobs_for(self.policy, prompts, num, decoding, rows, prefixes, budgets)
        # Like lengths side by side, and all that share a prompt.
        first: dict[tuple[int, ...], int] = {}
        for job in jobs:
            first.setdefault(job.start.prompt, len(first))
        jobs.sort(key=lambda job: (len(job.start.prompt), first[job.start.prompt]))
        results: list[list[Sample | None]] = [[None] * num for _ in prompts]
        with gathered(self.policy.module):
            for start in range(0, len(jobs), MAX_ROWS):
                piece = jobs[start : start + MAX_ROWS]
                for job, sample in zip(piece, self._draw(piece, decoding, seed, path), strict=True):
                    results[job.place][job.index] = sample
        return [[sample for sample in answers if sample is not None] for answers in results]

    def _draw(self, jobs: Sequence[Job], decoding: Decoding, seed: int, path: Sequence[str | int]) -> list[Sample]:
        policy, tokenizer, device = self.policy, self.policy.tokenizer, self.policy.world.device
        uniforms = torch.zeros(len(jobs), max(job.start.budget for job in jobs))
        for i, job in enumerate(jobs):
            given, count = len(job.start.prefix), job.start.budget
            numbers = torch.rand(given + count, generator=generator(seed, *path, job.row, job.index))
            uniforms[i, :count] = numbers[given:]
        uniforms = uniforms.to(device)
        model = causal_lm(policy.model)
        ends = answer_ends(policy, decoding)
        with _plain_generation(model), autocast(policy.dtype, device):
            if self.unfit:
                drawn = self._generated(model, jobs, uniforms, decoding, ends)
            else:
                drawn = decode(
                    model,
                    [job.start for job in jobs],
                    uniforms,
                    lambda logits, numbers: pick(logits, numbers, decoding),
                    pad=tokenizer.pad_token_id,
                    ends=ends,
                    stopped=_stop_test(tokenizer, jobs, decoding.stop_strings),
                )
        return [
            collect(tokenizer, job, tokens, log_probs, ends, decoding)
            for job, (tokens, log_probs) in zip(jobs, drawn, strict=True)
        ]

    def _generated(
        self, model: Any, jobs: Sequence[Job], uniforms: Tensor, decoding: Decoding, ends: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]:
        """As `decode.decode`, through the model's own generate: rows that are done stay in the batch."""
        from transformers import GenerationConfig, LogitsProcessorList

        tokenizer, device = self.policy.tokenizer, uniforms.device
        width = max(len(job.start.context) for job in jobs)
        ids = torch.full((len(jobs), width), tokenizer.pad_token_id)
        mask = torch.zeros((len(jobs), width), dtype=torch.long)
        for i, context in enumerate(job.start.context for job in jobs):
            ids[i, width - len(context) :] = torch.tensor(context)
            mask[i, width - len(context) :] = 1
        drawer = _Drawer(uniforms, decoding)
        settings = GenerationConfig(
            max_new_tokens=uniforms.shape[1],
            do_sample=False,
            eos_token_id=list(ends) or None,
            pad_token_id=tokenizer.pad_token_id,
            stop_strings=list(decoding.stop_strings) or None,
        )
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([drawer]),  # pyright: ignore[reportArgumentType]
            tokenizer=tokenizer if decoding.stop_strings else None,
        )
        rows = zip(jobs, out[:, width:].tolist(), torch.stack(drawer.log_probs, dim=1).tolist(), strict=True)
        return [(tokens[: job.start.budget], logs[: job.start.budget]) for job, tokens, logs in rows]


@functools.cache
def _say(line: str) -> None:
    """To stderr, once."""
    print(line, file=sys.stderr)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """The model without its own generation settings, and in eval mode.

    `generate` fills what we leave unset from them: a repetition penalty would make samples come from another
    distribution than the one that is scored. Gradient checkpointing, which acts in training mode, would switch the
    key-value cache off.
    """
    from transformers import GenerationConfig

    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = settings


def context_of(policy: TextPolicy) -> int:
    """Most tokens the model takes, prompt and answer together; 0 where its config names no limit."""
    return int(getattr(causal_lm(policy.model).config.get_text_config(), "max_position_embeddings", None) or 0)


def fits(prompt: int, decoding: Decoding, context: int) -> bool:
    """Whether a longest answer fits behind a prompt of so many tokens; `context` 0 holds any number."""
    return not context or prompt + decoding.max_new_tokens <= context


def check_prompts(
    policy: TextPolicy, prompts: Sequence[Sequence[int]], decoding: Decoding, budgets: Sequence[int] | None = None
) -> None:
    """Raises InputError for an empty prompt, or where a prompt and a longest answer do not fit the model's context."""
    if any(not prompt for prompt in prompts):
        raise InputError(f"prompt {[not p for p in prompts].index(True)} is empty", mend="give it some text")
    context = context_of(policy)
    lengths = [len(prompt) for prompt in prompts]
    most = [decoding.max_new_tokens] * len(lengths) if budgets is None else budgets
    longest, budget = max(zip(lengths, most, strict=True), key=sum, default=(0, 0))
    if context and longest + budget > context:
        what = "max_new_tokens" if budgets is None else "a budget of"
        raise InputError(
            f"a prompt of {longest} tokens and {what} {budget} pass the model's context of {context} tokens",
            mend="shorten the prompt or lower --max_new_tokens",
        )


def jobs_for(
    policy: TextPolicy,
    prompts: Sequence[Sequence[int]],
    num: int,
    decoding: Decoding,
    rows: Sequence[int],
    prefixes: Sequence[Sequence[int]] | None,
    budgets: Sequence[int] | None,
) -> list[Job]:
    """What `Sampler.sample` is asked for, `num` answers to the first prompt first. Raises as it says."""
    check_prompts(policy, prompts, decoding, budgets)
    given = [()] * len(prompts) if prefixes is None else prefixes
    most = [decoding.max_new_tokens] * len(prompts) if budgets is None else budgets
    jobs: list[Job] = []
    for i, (prompt, prefix, budget, row) in enumerate(zip(prompts, given, most, rows, strict=True)):
        if len(prefix) >= budget:
            raise ValueError(
                f"prompt {i}: a prefix of {len(prefix)} tokens leaves a budget of {budget} nothing to draw"
            )
        start = Start(tuple(prompt), tuple(prefix), budget - len(prefix))
        jobs += [Job(start, i, row, j) for j in range(num)]
    return jobs


def answer_ends(policy: TextPolicy, decoding: Decoding) -> list[int]:
    """Token ids that end an answer drawn so: none with `ignore_end`."""
    return [] if decoding.ignore_end else end_tokens(policy)


def end_tokens(policy: TextPolicy) -> list[int]:
    """Token ids that end an answer: EOS, what closes a turn in the chat template, and the generation config's."""
    configured = getattr(causal_lm(policy.model).generation_config, "eos_token_id", None)
    ids = {*stop_tokens(policy.tokenizer), *(configured if isinstance(configured, list) else [configured])}
    return sorted(i for i in ids if i is not None)


def collect(
    tokenizer: Any, job: Job, tokens: list[int], log_probs: list[float], ends: Sequence[int], decoding: Decoding
) -> Sample:
    """A Sample from the tokens drawn for one row: what follows the first end token or stop string is dropped."""
    prefix = job.start.prefix
    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    finished = length > 0 and tokens[length - 1] in ends
    if not finished and decoding.stop_strings:
        length, finished = _stopped(tokenizer, prefix, tokens[:length], decoding.stop_strings)
    answer = [*prefix, *tokens[:length]]
    return Sample(
        prompt=job.start.prompt,
        tokens=tuple(answer),
        log_probs=(0.0,) * len(prefix) + tuple(log_probs[:length]),
        finished=finished,
        text=tokenizer.decode(answer, skip_special_tokens=True),
        row=job.row,
        index=job.index,
        prefix=len(prefix),
    )


def _stopped(tokenizer: Any, prefix: Sequence[int], tokens: list[int], stops: Sequence[str]) -> tuple[int, bool]:
    """Number of drawn tokens up to the first that completes a stop string, and whether there is one.

    A stop string may begin in the prefix; one that ends there stops nothing.
    """
    given = len(tokenizer.decode(list(prefix))) if prefix else 0

    def complete(count: int) -> bool:
        text = tokenizer.decode([*prefix, *tokens[:count]])
        return any(text.find(stop, max(0, given - len(stop) + 1)) >= 0 for stop in stops)

    if not complete(len(tokens)):
        return len(tokens), False
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if complete(middle) else (middle + 1, high)
    return low, True


def _stop_test(tokenizer: Any, jobs: Sequence[Job], stops: Sequence[str]) -> Callable[[int, list[int]], bool] | None:
    """Whether a row's drawn tokens hold a stop string; None where there is none to look for."""
    if not stops:
        return None
    # A token is at least a byte: no stop string that new tokens complete begins before these. A few more, since
    # a character cut in two reads as another one.
    reach = max(len(stop.encode()) for stop in stops) + max(EVERY.values()) + 8

    def stopped(row: int, drawn: list[int]) -> bool:
        prefix = jobs[row].start.prefix
        text = tokenizer.decode([*prefix, *drawn][-reach:])
        return any(stop in text for stop in stops) and _stopped(tokenizer, prefix, drawn, stops)[1]

    return stopped
