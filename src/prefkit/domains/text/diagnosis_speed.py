"""What each backend costs on a user's own model, rows and device, and which setting follows from it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefkit.domains.text.diagnosis import Finding, scored_in
from prefkit.domains.text.packing import num_tokens
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.scoring import Backend
from prefkit.engine.environment import memory_bytes
from prefkit.records import Group

REPETITIONS, MOST_REPETITIONS, SECONDS = 3, 20, 1.0
"""passes timed in each backend: so many at least, and more of them until they took a second together"""
NEAR = 0.95
"""a backend this near to the fastest one is as good as it: the one that needs less memory is then taken"""
MOMENTS = 8
"""bytes of AdamW's state for each trained weight"""
MOST_TOKENS = 2**14
"""largest pass suggested"""
MEMORY = {True: "peak above weights and gradients", False: "saved for backward"}
"""what is measured as memory, with CUDA and without"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a forward and backward pass over all rows takes in one backend; None throughout where it was not run."""

    backend: Backend
    pairs_per_second: float | None = None
    seconds: float | None = None
    """median of the repetitions"""
    tokens: int | None = None
    """places of the layout, padding included: what the linear layers multiply"""
    memory: int | None = None
    """bytes, see MEMORY"""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The setting to train with; `tokens_per_batch` 0 where none follows."""

    backend: Backend
    tokens_per_batch: int
    why: str

    @property
    def flags(self) -> str:
        tokens = f" --tokens_per_batch {self.tokens_per_batch}" if self.tokens_per_batch else ""
        return f"--scoring_backend {self.backend}{tokens}"


def measure(
    policy: TextPolicy, groups: Sequence[Group], refused: Mapping[Backend, str], findings: Sequence[Finding]
) -> list[Cost]:
    """Memory and median time of every backend that may train, the repetitions interleaved (A B A B)."""
    failed = {finding.backend for finding in findings if finding.state == "FAIL"}
    reasons: dict[Backend, str] = {"padded": ""}
    reasons.update(refused)
    for name in reasons:
        reasons[name] = reasons[name] or ("it fails its checks" if name in failed else "")
    usable: list[Backend] = [name for name, why in reasons.items() if not why]
    memory = {name: _memory(policy, groups, name) for name in usable}  # warms each of them up as well
    times: dict[Backend, list[float]] = {name: [] for name in usable}
    for repetition in range(MOST_REPETITIONS):
        if repetition >= REPETITIONS and sum(map(sum, times.values())) > SECONDS * len(usable):
            break
        for name in usable:
            times[name].append(_seconds(policy, groups, name))
    costs: list[Cost] = []
    for name, why in reasons.items():
        if why:
            costs.append(Cost(backend=name, note=why))
            continue
        seconds = statistics.median(times[name])
        with scored_in(policy, name):
            layout = policy.module.lay_out(groups, pad=policy.tokenizer.pad_token_id, device="cpu")
        costs.append(
            Cost(
                backend=name,
                pairs_per_second=len(groups) / seconds,
                seconds=seconds,
                tokens=layout.ids.numel(),
                memory=memory[name],
            )
        )
    return costs


def _pass(policy: TextPolicy, groups: Sequence[Group]) -> Tensor:
    return policy.token_log_probs(groups).sum() / len(groups)


def _seconds(policy: TextPolicy, groups: Sequence[Group], backend: Backend) -> float:
    with scored_in(policy, backend):
        _wait(policy)
        start = time.perf_counter()
        _pass(policy, groups).backward()
        _wait(policy)
        seconds = time.perf_counter() - start
    policy.module.zero_grad()
    return seconds


def _wait(policy: TextPolicy) -> None:
    """Until the device has done what it was given."""
    if policy.world.device.type == "cuda":
        torch.cuda.synchronize(policy.world.device)


def _memory(policy: TextPolicy, groups: Sequence[Group], backend: Backend) -> int:
    """Bytes of one pass, as MEMORY says: the allocator's peak, or what the forward pass keeps for the backward one."""
    device = policy.world.device
    with scored_in(policy, backend):
        if device.type != "cuda":
            return _saved(policy, groups)
        _pass(policy, groups).backward()  # compiles, and allocates the gradients
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _pass(policy, groups).backward()
        peak = torch.cuda.max_memory_allocated(device)
    policy.module.zero_grad()
    return peak - before


def _saved(policy: TextPolicy, groups: Sequence[Group]) -> int:
    """Bytes of the distinct storages saved for the backward pass, weights excepted; runs that pass too."""
    weights = {weight.untyped_storage().data_ptr() for weight in policy.module.parameters()}
    found: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return saved

    def back(saved: Any) -> Any:
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, back):
        total = _pass(policy, groups)
    total.backward()
    policy.module.zero_grad()
    return sum(found.values())


def advise(policy: TextPolicy, groups: Sequence[Group], costs: Sequence[Cost], *, max_length: int) -> Advice:
    """The fastest backend that passed its checks, and how many tokens of a pass the device has memory for.

    Half of the device's memory is counted on, less weights, reference, gradients and AdamW's state. No number of tokens
    is suggested where the longest possible pair (twice `max_length`) would not fit into it, nor for padded rows, whose
    memory depends on what is padded to what.
    """
    run = [(cost, cost.pairs_per_second, cost.memory) for cost in costs if cost.pairs_per_second]
    fastest = max(speed for _, speed, _ in run)
    best, speed, memory = min(
        ((cost, speed, memory or 0) for cost, speed, memory in run if speed >= NEAR * fastest), key=lambda one: one[2]
    )
    padded = next(cost.pairs_per_second for cost in costs if cost.backend == "padded") or speed
    why = "the fastest" if best.backend == "padded" else f"{speed / padded:.1f} times as fast as padded rows"
    each = memory / sum(map(num_tokens, groups))
    room = memory_bytes(policy.world.device) / 2 - _held(policy)
    fitting = room / each if each else 0.0
    if best.backend == "padded":
        return Advice(backend="padded", tokens_per_batch=0, why=why)
    if fitting < 2 * max_length:
        return Advice(backend=best.backend, tokens_per_batch=0, why=f"{why}; memory is short, see --use_peft")
    power = 2 ** (int(fitting).bit_length() - 1)
    tokens = max(min(MOST_TOKENS, power), 2 * max_length)
    what = MEMORY[policy.world.device.type == "cuda"]
    return Advice(
        backend=best.backend,
        tokens_per_batch=tokens,
        why=f"{why}; so many tokens take {tokens * each / 2**30:.1f} GiB {what}",
    )


def _held(policy: TextPolicy) -> int:
    """Bytes that training holds beside a pass: weights, reference, gradients, optimizer."""
    modules = [policy.module]
    with policy.reference.active() as reference:
        if reference is not policy.module:
            modules.append(reference)
    held = sum(weight.numel() * weight.element_size() for module in modules for weight in module.parameters())
    trained = [weight for weight in policy.module.parameters() if weight.requires_grad]
    return held + sum(weight.numel() * (weight.element_size() + MOMENTS) for weight in trained)
