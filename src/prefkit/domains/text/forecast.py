"""What a run will need, before it: steps, memory, disk and time. Printed by `--dry_run`; nothing is written.

Steps follow from the data, memory and disk from arithmetic on the model's config.json (see `memory`). Time is rough:
the products a step multiplies, over the speed of one matrix product measured now on this device, at the share of that
speed that whole models reach; drawing a token takes at least the time to read all weights from memory once. The shares
were measured on a small model on a CPU.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from prefkit.domains.text import loading
from prefkit.domains.text.batches import num_steps
from prefkit.domains.text.memory import GIB, Shape, shape_of
from prefkit.domains.text.memory import forecast as memory_forecast
from prefkit.domains.text.sampler import MAX_ROWS
from prefkit.engine.environment import memory_gib
from prefkit.engine.optimizers import STATE_BYTES, canonical
from prefkit.engine.precision import resolve_dtype
from prefkit.engine.progress import duration
from prefkit.engine.world import World
from prefkit.records import Example, Pair

MEASURE_SECONDS = 0.2
MATRIX = 1024
REACHED = 0.4
"""share of one large matrix product's speed that a model's passes reach"""
REACHED_BFLOAT16_CPU = 0.15
"""the same where a processor's matrix units are so fast that everything else takes most of the time"""
DRAWING = 0.2
"""share of the memory's speed at which weights are read for one token"""
DTYPE_NAMES: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What the device does in a second."""

    products: float
    """multiply-adds of a large matrix product"""
    bytes: float
    """read from memory"""
    reached: float = REACHED

    def pass_seconds(self, products: float) -> float:
        """Seconds of passes through a model that multiply so often."""
        return products / (self.products * self.reached)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What one optimizer step of one process works on."""

    rows: int
    """stored answers scored"""
    length: float
    """their mean tokens, prompt included"""
    answer: float
    """their mean answer tokens"""
    longest: int
    longest_answer: int
    drawn: int
    """fresh answers"""
    drawn_length: int
    """their longest possible tokens, prompt included"""
    reference: bool


def forecast(config: Any, rows: Sequence[Pair | Example], *, held_out: Sequence[Pair | Example] = ()) -> list[str]:
    """Lines to print: data, steps, model, memory, disk, time. `rows` are trained on, `held_out` evaluated on.

    Raises InputError for a model that cannot be found or is no causal LM.
    """
    options: dict[str, Any] = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    world = World.start()
    steps = total_steps(options, len(rows), world.size)
    lines = [*_data(rows, held_out), _steps(options, len(rows), steps, world.size)]
    if not options["model_name_or_path"]:
        lines.append("model     given in memory: no forecast of memory, disk and time")
    else:
        name = loading.resolve(options["model_name_or_path"])
        plan = _Plan(
            options=options,
            shape=shape_of(name, revision=options["model_revision"]),
            load=load_of(options, rows),
            held_out=load_of(options, held_out, everything=True) if held_out else None,
            dtype=resolve_dtype(options["dtype"], world.device),
            device=world.device,
            steps=steps,
        )
        lines += [plan.model(), *plan.memory(), *plan.disk(), *plan.time()]
    return [*lines, "Nothing was trained and nothing was written."]


def load_of(options: Mapping[str, Any], rows: Sequence[Pair | Example], *, everything: bool = False) -> Load:
    """The work of a step on rows like these, or of `everything` at once, by the options of a method's Config."""
    groups = [row.group for row in rows]
    answers = [(len(group.prompt), len(answer)) for group in groups for answer in group.answers]
    examples = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    if everything:
        examples = min(len(rows), options["num_eval_samples"] or len(rows))
    draws = options.get("num_generations", 0) if options.get("kl_weight", 1.0) else 0
    longest_prompt = max(prompt for prompt, _ in answers)
    return Load(
        rows=examples * len(groups[0].answers),
        length=statistics.fmean(prompt + answer for prompt, answer in answers),
        answer=statistics.fmean(answer for _, answer in answers),
        longest=max(prompt + answer for prompt, answer in answers),
        longest_answer=max(answer for _, answer in answers),
        drawn=examples * draws,
        drawn_length=longest_prompt + options.get("max_new_tokens", 0),
        reference="beta" in options,
    )


def total_steps(options: Mapping[str, Any], num_rows: int, processes: int) -> int:
    """Optimizer steps of the whole run."""
    if options["max_steps"] > 0:
        return int(options["max_steps"])
    batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] * processes
    return num_steps(num_rows, epochs=options["num_train_epochs"], global_batch=batch)


def training_products(shape: Shape, load: Load, *, lora: bool, cached: bool) -> float:
    """Multiply-adds of one optimizer step: forward and backward on stored and fresh answers, and the reference.

    The backward pass costs two forward passes where all weights train, and about one where only an adapter does.
    """
    stored = scoring_products(shape, load)
    fresh = load.drawn * load.drawn_length * (shape.body + shape.hidden * shape.vocabulary)
    passes = 2 if lora else 3
    reference = int(load.reference)
    return stored * (passes + (0 if cached else reference)) + fresh * (passes + reference)


def scoring_products(shape: Shape, load: Load) -> float:
    """Multiply-adds of one forward pass over the stored answers; the output head sees answer tokens only."""
    return load.rows * (load.length * shape.body + load.answer * shape.hidden * shape.vocabulary)


def drawing_seconds(shape: Shape, speed: Speed, *, answers: int, tokens: int, prompt: int) -> float:
    """Seconds to draw `answers` of `tokens` each to prompts of `prompt` tokens."""
    weights = shape.body + shape.hidden * shape.vocabulary
    total = 0.0
    for start in range(0, answers, MAX_ROWS):
        together = min(MAX_ROWS, answers - start)
        total += speed.pass_seconds(together * prompt * shape.body)
        # Four bytes whatever the dtype: with few rows at a time half-size weights are not read twice as fast.
        total += tokens * max(speed.pass_seconds(together * weights), 4 * weights / (speed.bytes * DRAWING))
    return total


def measure(device: torch.device, dtype: torch.dtype, *, seconds: float = MEASURE_SECONDS) -> Speed:
    """The device's speed in one matrix product and in reading memory."""
    left, right = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    block = torch.zeros(2**24, device=device)
    products = _per_second(lambda: left @ right, device, seconds) * MATRIX**3
    read = _per_second(block.sum, device, seconds / 2) * block.numel() * block.element_size()
    slow_rest = device.type == "cpu" and dtype == torch.bfloat16
    return Speed(products=products, bytes=read, reached=REACHED_BFLOAT16_CPU if slow_rest else REACHED)


def _per_second(work: Any, device: torch.device, seconds: float) -> float:
    """How often `work` is done in a second; once unmeasured, for what is set up on first use."""
    work()
    done, started = 0, _now(device)
    while (passed := _now(device) - started) < seconds:
        work()
        done += 1
    return done / passed


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _data(rows: Sequence[Pair | Example], held_out: Sequence[Pair | Example]) -> list[str]:
    lengths = sorted(len(group.prompt) + max(map(len, group.answers)) for group in (row.group for row in rows))
    tokens = sum(len(group.prompt) + len(answer) for group in (row.group for row in rows) for answer in group.answers)
    kind = "pairs" if isinstance(rows[0], Pair) else "answers"
    return [
        f"data      {len(rows):,} {kind} to train on, {len(held_out):,} held out; {_count(tokens)} tokens a pass",
        f"          prompt + answer: {statistics.median(lengths):.0f} tokens at the median, {lengths[-1]} the longest",
    ]


def _steps(options: Mapping[str, Any], num_rows: int, steps: int, processes: int) -> str:
    micro, pieces = options["per_device_train_batch_size"], options["gradient_accumulation_steps"]
    batch = micro * pieces * processes
    parts = [f"{micro} a forward pass"] if pieces * processes > 1 else []
    parts += [f"{pieces} accumulated"] if pieces > 1 else []
    parts += [f"{processes} processes"] if processes > 1 else []
    detail = f" ({', '.join(parts)})" if parts else ""
    return f"steps     {steps:,} of {batch} rows{detail}: {steps * batch / num_rows:.3g} passes over the data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """A run on a known model."""

    options: Mapping[str, Any]
    shape: Shape
    load: Load
    held_out: Load | None
    """all that one evaluation scores"""
    dtype: torch.dtype
    device: torch.device
    steps: int

    @property
    def lora(self) -> bool:
        return bool(self.options["use_peft"])

    @property
    def trained(self) -> int:
        """Number of weights that train."""
        if not self.lora:
            return self.shape.parameters
        return self.shape.rank(self.options["lora_target_modules"]) * self.options["lora_r"]

    @property
    def bits(self) -> Literal[0, 4, 8]:
        return 4 if self.options["load_in_4bit"] else 8 if self.options["load_in_8bit"] else 0

    @property
    def moments(self) -> int:
        return STATE_BYTES[canonical(self.options["optim"])]

    def model(self) -> str:
        how = f"LoRA of rank {self.options['lora_r']}" if self.lora else "all weights"
        return (
            f"model     {self.options['model_name_or_path']}: {_count(self.shape.parameters)} parameters, "
            f"{_count(self.trained)} trained ({how}), {DTYPE_NAMES[self.dtype]}"
            f"{f', base in {self.bits} bit' if self.bits else ''}"
        )

    def memory(self) -> Iterator[str]:
        options, load = self.options, self.load
        tokens = options.get("max_new_tokens", 0)
        needed = memory_forecast(
            self.shape,
            rows=(load.rows + load.drawn) // options["gradient_accumulation_steps"],
            length=max(load.longest, load.drawn_length if load.drawn else 0),
            answer=max(load.longest_answer, tokens if load.drawn else 0),
            trained="lora" if self.lora else "all",
            lora_r=options["lora_r"],
            targets=options["lora_target_modules"],
            dtype=DTYPE_NAMES[self.dtype],
            checkpointing=options["gradient_checkpointing"],
            reference=load.reference,
            bits=self.bits,
            moments=self.moments,
            sampled=min(MAX_ROWS, max(load.drawn, options["num_eval_prompts"])) * load.drawn_length if tokens else 0,
        )
        uses = ("weights", "reference", "gradients", "optimizer", "activations", "logits", "cache")
        parts = ", ".join(f"{use} {_size(value)}" for use in uses if (value := getattr(needed, use)))
        there = _available(self.device)
        yield f"memory    {_size(needed.total)}{f' of {_size(there)}' if there else ''} with the longest rows: {parts}"
        if there and needed.total > there:
            yield "          more than there is: try --use_peft, a smaller --per_device_train_batch_size with more"
            yield "          --gradient_accumulation_steps, a smaller --max_length, or --gradient_checkpointing"

    def disk(self) -> Iterator[str]:
        options = self.options
        checkpoint = self.trained * (4 + self.moments)
        made = max(1, -(-self.steps // options["save_steps"]) if options["save_steps"] else 1)
        kept = min(made, options["save_total_limit"] or made)
        # One more than is kept: the oldest goes once the newest is whole; the best is kept besides.
        peak = (kept + (made > kept) + bool(options["keep_best"])) * checkpoint
        final = (0 if self.bits else self.shape.parameters * 4) + (self.trained * 4 if self.lora else 0)
        folder = Path(options["output_dir"] or ".").absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        plural = "s" if kept > 1 else ""
        yield (
            f"disk      up to {_size(peak + final)} of {_size(free)} free: {kept} checkpoint{plural} of "
            f"{_size(checkpoint)} kept, final model {_size(final)}"
        )
        if peak + final > free:
            yield "          more than is free: try --save_total_limit 1, or another --output_dir"

    def time(self) -> Iterator[str]:
        options, speed = self.options, measure(self.device, self.dtype)
        cached = bool(options.get("precompute_ref_log_probs", False))
        step = speed.pass_seconds(training_products(self.shape, self.load, lora=self.lora, cached=cached))
        step *= 4 / 3 if options["gradient_checkpointing"] else 1
        step += self._drawing(speed, self.load.drawn)
        evaluation = self._drawing(speed, options["num_eval_prompts"])
        if self.held_out is not None:
            scored = speed.pass_seconds(scoring_products(self.shape, self.held_out))
            evaluation += (2 if self.load.reference else 1) * scored
        evaluations = 2 + (self.steps // options["eval_steps"] if options["eval_steps"] else 0)
        total = self.steps * step + evaluations * evaluation
        yield (
            f"time      roughly {duration(total)}, give or take a factor of two: {self.steps:,} steps of "
            f"{_seconds(step)}, {evaluations} evaluations of {_seconds(evaluation)}"
        )
        yield (
            f"          (from {2 * speed.products / 1e9:.0f} GFLOP/s and {speed.bytes / 1e9:.0f} GB/s, measured now "
            f"on {self.device.type} in {DTYPE_NAMES[self.dtype]})"
        )

    def _drawing(self, speed: Speed, answers: int) -> float:
        return drawing_seconds(
            self.shape,
            speed,
            answers=answers,
            tokens=self.options.get("max_new_tokens", 0),
            prompt=round(self.load.length - self.load.answer),
        )


def _available(device: torch.device) -> int | None:
    """Bytes of memory of the device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    gib = memory_gib()
    return None if gib is None else round(gib * GIB)


def _seconds(number: float) -> str:
    return f"{number:.2g} s" if number < 10 else duration(number)


def _size(count: float) -> str:
    """`2.9 GiB`, `180 MiB`."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.3g} MiB"


def _count(number: float) -> str:
    """`134 M`, `5.2 k`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"
