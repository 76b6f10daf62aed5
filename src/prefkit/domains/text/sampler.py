"""Answers drawn from a policy, with the log-probability of every token under the distribution it was drawn from.

Each row draws its own uniform numbers from a generator seeded by (seed, path, row, index) and inverts the cumulative
distribution: what a row samples does not depend on the rows beside it, on their order, or on the process it runs in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

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

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise InputError(
                f"cannot sample with temperature {self.temperature}, top_p {self.top_p}, "
                f"max_new_tokens {self.max_new_tokens}",
                mend="temperature >= 0, 0 < top_p <= 1, max_new_tokens >= 1",
            )

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
    log_probs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if top_p >= 1.0:
        return log_probs
    ordered, order = log_probs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return log_probs.masked_fill(outside, -torch.inf).log_softmax(-1)


def draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution: log-probs (n, v), uniforms in [0, 1) (n,) -> (n,)."""
    cumulative = log_probs.double().exp().cumsum(-1)
    # Scaled to the sum actually reached, so that rounding can never point past the last token with mass.
    point = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=log_probs.shape[-1] - 1)


class _Drawer:
    """A logits processor for `generate`: draws each row's token itself and leaves greedy search no other choice."""

    def __init__(self, uniforms: Tensor, decoding: Decoding) -> None:
        self.uniforms = uniforms
        self.decoding = decoding
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = sampling_log_probs(scores, self.decoding.temperature, self.decoding.top_p)
        if self.decoding.temperature == 0:
            tokens = log_probs.argmax(-1)
        else:
            tokens = draw(log_probs, self.uniforms[:, len(self.log_probs)])
        self.log_probs.append(log_probs.gather(-1, tokens[:, None])[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


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
    ) -> list[list[Sample]]:
        """See `TransformersSampler.sample`."""
        ...


class TransformersSampler:
    """Samples with the policy's own weights through `transformers`' generate."""

    name = "transformers"

    def __init__(self, policy: TextPolicy) -> None:
        self.policy = policy

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
    ) -> list[list[Sample]]:
        """`num` answers to each prompt.

        Args:
            prompts: token ids, each non-empty.
            seed, path, rows: sample j of prompt i depends on (seed, *path, rows[i], j) and on nothing else random.

        Returns one list of `num` samples for each prompt, in order.
        """
        check_prompts(self.policy, prompts, decoding)
        jobs = [(prompts[i], rows[i], j, i) for i in range(len(prompts)) for j in range(num)]
        jobs.sort(key=lambda job: len(job[0]))
        results: list[list[Sample | None]] = [[None] * num for _ in prompts]
        with gathered(self.policy.module):
            for start in range(0, len(jobs), MAX_ROWS):
                piece = jobs[start : start + MAX_ROWS]
                for job, sample in zip(piece, self._generate(piece, decoding, seed, path), strict=True):
                    results[job[3]][job[2]] = sample
        return [[sample for sample in answers if sample is not None] for answers in results]

    def _generate(self, jobs: Sequence[Any], decoding: Decoding, seed: int, path: Sequence[str | int]) -> list[Sample]:
        from transformers import GenerationConfig, LogitsProcessorList

        policy, tokenizer, device = self.policy, self.policy.tokenizer, self.policy.world.device
        width = max(len(job[0]) for job in jobs)
        ids = torch.full((len(jobs), width), tokenizer.pad_token_id)
        mask = torch.zeros((len(jobs), width), dtype=torch.long)
        for i, (prompt, *_) in enumerate(jobs):
            ids[i, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[i, width - len(prompt) :] = 1
        uniforms = torch.stack(
            [torch.rand(decoding.max_new_tokens, generator=generator(seed, *path, row, j)) for _, row, j, _ in jobs]
        ).to(device)
        drawer = _Drawer(uniforms, decoding)
        ends = end_tokens(policy)
        settings = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=tokenizer.pad_token_id,
            stop_strings=list(decoding.stop_strings) or None,
        )
        model = causal_lm(policy.model)
        with _plain_generation(model), autocast(policy.dtype, device):
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([drawer]),  # pyright: ignore[reportArgumentType]
                tokenizer=tokenizer if decoding.stop_strings else None,
            )
        log_probs = torch.stack(drawer.log_probs, dim=1).tolist()
        return [
            collect(tokenizer, job, tokens, logs, ends, decoding)
            for job, tokens, logs in zip(jobs, out[:, width:].tolist(), log_probs, strict=True)
        ]


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


def check_prompts(policy: TextPolicy, prompts: Sequence[Sequence[int]], decoding: Decoding) -> None:
    """Raises InputError for an empty prompt, or where a prompt and a longest answer do not fit the model's context."""
    if any(not prompt for prompt in prompts):
        raise InputError(f"prompt {[not p for p in prompts].index(True)} is empty", mend="give it some text")
    context = context_of(policy)
    longest = max(map(len, prompts), default=0)
    if not fits(longest, decoding, context):
        raise InputError(
            f"a prompt of {longest} tokens and max_new_tokens {decoding.max_new_tokens} pass the model's "
            f"context of {context} tokens",
            mend="shorten the prompt or lower --max_new_tokens",
        )


def end_tokens(policy: TextPolicy) -> list[int]:
    """Token ids that end an answer: EOS, what closes a turn in the chat template, and the generation config's."""
    configured = getattr(causal_lm(policy.model).generation_config, "eos_token_id", None)
    ids = {*stop_tokens(policy.tokenizer), *(configured if isinstance(configured, list) else [configured])}
    return sorted(i for i in ids if i is not None)


def collect(
    tokenizer: Any, job: Any, tokens: list[int], log_probs: list[float], ends: Sequence[int], decoding: Decoding
) -> Sample:
    """A Sample from one generated row: what follows the first end token or stop string is padding."""
    prompt, row, index, _ = job
    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    finished = length > 0 and tokens[length - 1] in ends
    if not finished and decoding.stop_strings:
        length, finished = _stopped(tokenizer, tokens[:length], decoding.stop_strings)
    tokens = tokens[:length]
    return Sample(
        prompt=tuple(prompt),
        tokens=tuple(tokens),
        log_probs=tuple(log_probs[:length]),
        finished=finished,
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        row=row,
        index=index,
    )


def _stopped(tokenizer: Any, tokens: list[int], stops: Sequence[str]) -> tuple[int, bool]:
    """Number of tokens up to the first that completes a stop string, and whether there is one."""
    text = tokenizer.decode(tokens)
    if not any(stop in text for stop in stops):
        return len(tokens), False
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        found = any(stop in tokenizer.decode(tokens[:middle]) for stop in stops)
        low, high = (low, middle) if found else (middle + 1, high)
    return low, True
