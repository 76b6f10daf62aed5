"""Checks of the engine on a user's own model, rows and device: ways to compute the same number must agree.

Padded rows, one for each answer and scored by the model's own attention, are what everything else is compared with.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prefkit import assets
from prefkit.domains.text import attention, backends
from prefkit.domains.text.cache import reference_table, tokens_fingerprint
from prefkit.domains.text.check import check
from prefkit.domains.text.columns import parse_preferences
from prefkit.domains.text.config import Lora, Model
from prefkit.domains.text.load import load
from prefkit.domains.text.packaged import dataset as packaged_dataset
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.problems import Problem
from prefkit.domains.text.render import encode, front_tokens, render, stop_tokens, with_front
from prefkit.domains.text.sampler import Decoding, TransformersSampler, context_of, fits
from prefkit.domains.text.scoring import Backend, causal_lm, lay_out
from prefkit.domains.text.tokenize import tokenize_prompts
from prefkit.engine.seeds import generator, number
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.objectives.preference import dpo_loss
from prefkit.records import Group, Pair, Preference

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2.0}
"""how far the log-probs of a token may be apart in two layouts, in nats, by the dtype computed in

In bfloat16 a logit of 20 is rounded to an eighth: among a thousand tokens of a chat model the worst moved by 0.44 when
the same padded rows were scored one at a time, by 0.61 in packed rows, and by 6 when answers saw one another."""
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""the same for gradients, as a share of the largest one; 0.06 and 0.85 were seen"""
LOSS_TOLERANCE = 1e-6
CHUNK = 7
"""answer tokens of a chunk in the check of chunks: odd and small, so that answers are cut"""
BETA = 0.1
NEW_TOKENS = 16
"""tokens of the answers that are sampled"""
BUILT_IN = (
    ("Name a colour.", "Red", "Blue, or perhaps green: it depends on the light."),
    ("What is the capital of France?", "The capital of France is Paris.", "Lyon."),
    ("Write one line about the sea.", "The sea breathes in, and the shore breathes out.", "It is wet and big."),
    ("Is 7 a prime number? Answer yes or no.", "Yes", "No"),
    ("Translate to German: good morning", "Guten Morgen", "Schönen Tag noch, und bis später!"),
    ("Name three fruits, separated by commas, and nothing else.", "apple, pear, plum", "I like all kinds of fruit."),
    ("Why is the sky blue?", "Air scatters short waves of light more than long ones.", "Because of the sea."),
    ("Continue: 1, 2, 4, 8,", "16, 32, 64", "9, 10, 11, 12, 13, 14, 15, 16, 17"),
)
"""(prompt, chosen, rejected) for a diagnosis without data"""
State = Literal["pass", "FAIL", "skipped"]
UNUSABLE = (TypeError, ValueError, KeyError, AttributeError, RuntimeError, NotImplementedError)
"""what a model raises whose attention takes no plan"""


@dataclass(frozen=True, kw_only=True)
class Start(Model, Lora):
    """What a diagnosis loads: as a training run would."""

    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    check: str
    state: State
    deviation: float | None = None
    """largest one found; None where nothing was compared"""
    tolerance: float | None = None
    unit: str = ""
    note: str = ""
    backend: str = ""
    """of a check that says something about one backend"""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokenized preference rows to check with."""

    pairs: Sequence[Pair]
    source: str
    """what they are and how many, in words"""
    places: Sequence[str]
    """where each of them stands"""

    @property
    def groups(self) -> list[Group]:
        return [pair.group for pair in self.pairs]


def compared(name: str, deviation: float, tolerance: float, *, unit: str, note: str = "", backend: str = "") -> Finding:
    """A finding that passes where `deviation` is at most `tolerance`; nan fails."""
    state: State = "pass" if deviation <= tolerance else "FAIL"
    values = {"deviation": deviation, "tolerance": tolerance, "unit": unit, "note": note, "backend": backend}
    return Finding(check=name, state=state, **values)


def skipped(name: str, why: str, *, backend: str = "") -> Finding:
    return Finding(check=name, state="skipped", note=why, backend=backend)


def load_policy(options: Start) -> TextPolicy:
    """The model as training starts from it, with its reference. Raises InputError where it cannot be loaded."""
    return TextPolicy.create(options, World.start())


def read_rows(name: str, policy: TextPolicy, *, count: int, max_length: int, seed: int) -> Rows:
    """`count` rows of the preference data `name`, drawn by `seed`; built-in ones for no name.

    Raises InputError for data that training would refuse: anything in the file that is no preference row, and among
    the drawn rows whatever `prefkit data check` calls an error.
    """
    if name:
        packaged = name in assets.ASSETS and not Path(name).exists()
        source = load(packaged_dataset(name, seed)["train"] if packaged else name)
        rows, problems = parse_preferences(source)
        where, label = source.path_of_row, name
    else:
        rows, problems = _built_in(chat=bool(policy.tokenizer.chat_template)), []
        where, label = (lambda row: f"built-in row {row + 1}"), "built-in rows"
    draw = random.Random(number(seed, "doctor"))
    chosen = sorted(draw.sample(range(len(rows)), min(count, len(rows))))
    report = check(
        [rows[place] for place in chosen],
        tokenizer=policy.tokenizer,
        max_length=max_length,
        context=context_of(policy),
        where=where,
        problems=problems,
        name=label,
    )
    report.raise_errors()
    pairs: list[Any] = list(report.examples)
    if not pairs:
        raise InputError("no drawn row can be trained on", where=label, mend="see `prefkit data check`")
    places = [where(pair.source.row) for pair in pairs]
    return Rows(pairs=pairs, source=f"{len(pairs)} of {len(rows)} rows of {label}" if name else label, places=places)


def _built_in(*, chat: bool) -> list[Preference]:
    def turn(role: str, text: str) -> Any:
        if chat:
            return [{"role": role, "content": text}]
        return text if role == "user" else f" {text}"

    return [
        Preference(prompt=turn("user", p), chosen=turn("assistant", c), rejected=turn("assistant", r), row=row)
        for row, (p, c, r) in enumerate(BUILT_IN)
    ]


def diagnose(policy: TextPolicy, rows: Rows, refused: Mapping[Backend, str], *, seed: int = 0) -> list[Finding]:
    """Every check, in the order of the command's table; `refused` as `refusals` gives it."""
    return [
        *check_layouts(policy, rows.groups, refused, seed=seed),
        check_cache(policy, rows.groups),
        *check_first_step(policy, rows.groups),
        check_tokens(policy, rows),
        check_sampler(policy, rows, seed=seed),
    ]


def refusals(policy: TextPolicy) -> dict[Backend, str]:
    """For each packed backend why it cannot train this model on this device; empty text where it can."""
    return {backend: _refusal(policy, backend) for backend in ("sdpa", "flex")}


def _refusal(policy: TextPolicy, backend: Backend) -> str:
    if backend == "flex" and policy.world.device.type != "cuda":
        return "needs CUDA: torch has no backward pass for it on this device"
    module = policy.module
    before = module.backend, module.how
    vocabulary = causal_lm(module.model).config.get_text_config().vocab_size
    try:
        backends.choose(module, backend, pad=policy.tokenizer.pad_token_id, vocabulary=vocabulary)
    except InputError as error:
        return error.what
    finally:
        module.backend, module.how = before
    return ""


@contextmanager
def scored_in(policy: TextPolicy, backend: Backend, *, chunk: int = 0) -> Iterator[None]:
    """The policy scored in this backend's layout inside the block; `chunk` as `LanguageModel.chunk`."""
    module = policy.module
    before = module.backend, module.chunk
    module.backend, module.chunk = backend, chunk
    try:
        yield
    finally:
        module.backend, module.chunk = before


def check_layouts(
    policy: TextPolicy, groups: Sequence[Group], refused: Mapping[Backend, str], *, seed: int
) -> list[Finding]:
    """Log-probs and gradients: padded = packed = shared prefix = chunked, for every backend."""
    with scored_in(policy, "padded"):
        base = _scores(policy, groups, seed)
    alone = [Group(group.prompt, [answer]) for group in groups for answer in group.answers]
    findings: list[Finding] = []
    for backend, why in refused.items():
        if why:
            findings.append(_refused(policy, groups, backend, why, base[0]))
            continue
        for name, these in (("packed", alone), ("shared prefix", groups)):
            with scored_in(policy, backend):
                found = _scores(policy, these, seed)
            findings += _equal(policy, f"{name} ({backend})", backend, base, found)
            del found  # its gradients are as large as the trained weights
    chunked: Backend = policy.module.backend
    with scored_in(policy, chunked, chunk=CHUNK):
        found = _scores(policy, groups, seed)
    # Said of no backend: chunks belong to the head, which all of them share.
    return [*findings, *_equal(policy, f"chunks of {CHUNK} ({chunked})", "", base, found)]


def _scores(policy: TextPolicy, groups: Sequence[Group], seed: int) -> tuple[Tensor, list[Tensor]]:
    """Token log-probs (n, t), and what a DPO-like weighted sum of the answers' log-probs sends to each trained weight.

    Answers pull in turns up and down, each by a weight of its own, so that no two of them cancel.
    """
    log_probs = policy.token_log_probs(groups)
    draw = torch.rand(len(log_probs), generator=generator(seed, "doctor weights"))
    signs = torch.tensor([1.0, -1.0]).repeat(len(draw))[: len(draw)]
    weights = ((0.5 + draw) * signs / len(draw)).to(log_probs.device)
    trained = [weight for weight in policy.module.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad((log_probs.sum(-1) * weights).sum(), trained, materialize_grads=True)
    return log_probs.detach(), list(gradients)


def _equal(
    policy: TextPolicy,
    name: str,
    backend: Backend | Literal[""],
    base: tuple[Tensor, list[Tensor]],
    found: tuple[Tensor, list[Tensor]],
) -> list[Finding]:
    largest = float(torch.stack([gradient.abs().max() for gradient in base[1]]).max())
    # Stacked, for Python's own max would lose a nan.
    apart = float(torch.stack([(a - b).abs().max() for a, b in zip(base[1], found[1], strict=True)]).max())
    gap = float((base[0] - found[0]).abs().max())
    dtype = policy.dtype
    return [
        compared(f"{name}: log-probs", gap, TOLERANCE[dtype], unit="nats", backend=backend),
        compared(
            f"{name}: gradients",
            apart / largest if largest else math.nan,
            GRADIENT_TOLERANCE[dtype],
            unit="of largest",
            backend=backend,
        ),
    ]


def _refused(policy: TextPolicy, groups: Sequence[Group], backend: Backend, why: str, base: Tensor) -> Finding:
    """A backend that the engine refuses: skipped where the model cannot use it, failed where it gives other numbers."""
    name = f"packed ({backend})"
    gap = None
    if backend != "flex" or policy.world.device.type == "cuda":
        gap = _gap_all_the_same(policy, groups, backend, base)
    if gap is None or gap <= TOLERANCE[policy.dtype]:
        return skipped(name, why, backend=backend)
    note = f"{why}; training with auto does not use it"
    return compared(name, gap, TOLERANCE[policy.dtype], unit="nats", note=note, backend=backend)


@torch.no_grad()
def _gap_all_the_same(policy: TextPolicy, groups: Sequence[Group], backend: Backend, base: Tensor) -> float | None:
    """Largest deviation in a backend the engine refuses; None where no layer of the model takes the plan."""
    config: Any = causal_lm(policy.model).config
    parts = (config, config.get_text_config())
    before = [part._attn_implementation for part in parts]
    layout = lay_out(groups, policy.tokenizer.pad_token_id, policy.world.device, backend=backend)
    assert layout.plan is not None
    layout.plan.seen = []
    try:
        attention.install(causal_lm(policy.model))
        found = policy.module(layout)
    except UNUSABLE:
        return None
    finally:
        for part, own in zip(parts, before, strict=True):
            part._attn_implementation = own
    return float((found - base).abs().max()) if layout.plan.seen else None


def check_cache(policy: TextPolicy, groups: Sequence[Group]) -> Finding:
    """The reference table written to disk and read back is, bit for bit, what the live reference gives."""
    size = max(1, len(groups) // 2)
    settings: dict[str, Any] = {
        "key": {"model": policy.fingerprint, "data": tokens_fingerprint(groups)},
        "batch_size": size,
        "say": lambda line: None,
        "world": policy.world,
    }

    def unread(missing: Sequence[Group]) -> Tensor:
        """In place of scores: the file just written was not taken."""
        return torch.full((len(missing), 2), math.nan)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.safetensors"
        reference_table(path, groups, score=policy.reference_log_probs, **settings)
        cached = reference_table(path, groups, score=unread, **settings)
    starts = range(0, len(groups), size)
    live = torch.cat([policy.reference_log_probs(groups[start : start + size]).cpu() for start in starts])
    gap = float((cached - live).abs().max())
    return compared("cached = live reference", gap, 0.0, unit="nats", note=policy.reference.name)


def check_first_step(policy: TextPolicy, groups: Sequence[Group]) -> list[Finding]:
    """Before the first step the policy is its reference: every reward is 0, every DPO loss log 2."""
    log_probs = policy.log_probs(groups)  # with gradient, as a training step computes them
    reference = policy.reference_log_probs(groups)
    losses = dpo_loss(*log_probs.detach().unbind(1), *reference.unbind(1), beta=BETA)
    rewards = BETA * (log_probs.detach() - reference)
    return [
        compared("first DPO loss = log 2", float((losses - math.log(2)).abs().max()), LOSS_TOLERANCE, unit="nats"),
        compared("first rewards = 0", float(rewards.abs().max()), 0.0, unit=f"at beta {BETA}"),
    ]


def check_tokens(policy: TextPolicy, rows: Rows) -> Finding:
    """Prompt and answer ids read as the row's text does, and sampling takes the very same prompt ids."""
    read = [(place, _misread(policy, pair)) for place, pair in zip(rows.places, rows.pairs, strict=True)]
    wrong = [(place, why) for place, why in read if why]
    note = f"{wrong[0][0]}: {wrong[0][1]}" if wrong else ""
    return compared("tokens read as the text", len(wrong), 0, unit=f"of {len(rows.pairs)} rows", note=note)


def _misread(policy: TextPolicy, pair: Pair) -> str:
    """What is wrong with the tokens of a row; empty if nothing is."""
    tokenizer, row = policy.tokenizer, pair.source
    texts = render(tokenizer, row.prompt, (row.chosen, row.rejected), row.extra)
    if isinstance(texts, Problem):
        return texts.what
    if tokenize_prompts(tokenizer, [row.prompt], extras=[row.extra])[0] != list(pair.prompt):
        return "the prompt alone has other tokens"
    front = front_tokens(tokenizer) if isinstance(row.prompt, str) else []
    stops = stop_tokens(tokenizer)

    def read(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    parts = (pair.chosen, pair.chosen_truncated), (pair.rejected, pair.rejected_truncated)
    for name, text, (answer, cut) in zip(("chosen", "rejected"), texts[1:], parts, strict=True):
        ended = answer[-1] in stops
        if not cut and not ended:
            return f"the {name} answer is whole and has no end-of-sequence token"
        wanted = read(with_front(encode(tokenizer, [text])[0], front))
        found = read([*pair.prompt, *(answer[:-1] if ended else answer)])
        if cut:  # the cut may stand inside a character, which then reads as a replacement mark
            found = found.rstrip("\N{REPLACEMENT CHARACTER}")
        if not wanted.startswith(found):
            return f"prompt and {name} answer read otherwise than the text"
        rest = wanted[len(found) :]
        for stop in stops:
            rest = rest.replace(read([stop]), "")
        if rest.strip() and not cut:
            return f"of the {name} answer {len(rest)} characters are missing"
    return ""


def check_sampler(policy: TextPolicy, rows: Rows, *, seed: int) -> Finding:
    """The log-probs that sampling recorded are those that scoring gives the same tokens."""
    name = "sampler = engine log-probs"
    context = context_of(policy)
    decoding = Decoding(max_new_tokens=NEW_TOKENS)
    prompts = [list(pair.prompt) for pair in rows.pairs if fits(len(pair.prompt), decoding, context)]
    if not prompts:
        return skipped(
            name, f"no prompt leaves room for {NEW_TOKENS} tokens in the model's context of {context} tokens"
        )
    sampler = TransformersSampler(policy)
    drawn = sampler.sample(prompts, num=1, decoding=decoding, seed=seed, path=("doctor",), rows=range(len(prompts)))
    samples = [answers[0] for answers in drawn]
    with torch.no_grad():
        scored = policy.token_log_probs([Group(sample.prompt, [sample.tokens]) for sample in samples]).cpu()
    gaps = [
        (scored[i, : len(sample.log_probs)] - torch.tensor(sample.log_probs)).abs().max()
        for i, sample in enumerate(samples)
    ]
    note = f"{sum(len(sample.tokens) for sample in samples)} tokens drawn at temperature 1"
    gap = float(torch.stack(gaps).max())
    return compared(name, gap, TOLERANCE[policy.dtype], unit="nats", note=note)
