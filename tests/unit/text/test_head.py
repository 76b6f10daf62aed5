"""The output head: log-probs, entropy, hits and gradients of whole and chunked heads, and what they keep in memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefkit.domains.text.head import LogitTransform, TokenScores, chunk_tokens, token_scores

PLAIN = LogitTransform()
TRANSFORMS = [
    PLAIN,
    LogitTransform(scale=0.25),
    LogitTransform(soft_cap=3.0),
    LogitTransform(temperature=0.7),
    LogitTransform(scale=1.5, soft_cap=2.0, temperature=1.3),
]
M, D, V = 7, 5, 11
"""tokens, hidden size and vocabulary: no two, and no product of two, alike"""


def case(
    bias: bool = True, m: int = M, d: int = D, v: int = V, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Random hidden states, head weight, bias and targets; a target comes twice, so that its gradients add up."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(v, (m,), generator=generator)
    targets[-1] = targets[0]
    return leaf(m, d), leaf(v, d), leaf(v) if bias else None, targets


def direct(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """(m, v) log-softmax by the definition."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * transform.scale
    if transform.soft_cap:
        logits = transform.soft_cap * torch.tanh(logits / transform.soft_cap)
    return torch.log_softmax(logits / transform.temperature, -1)


def scores(inputs: Any, transform: LogitTransform = PLAIN, **options: Any) -> TokenScores:
    hidden, weight, bias, targets = inputs
    return token_scores(hidden, weight, bias, targets, transform=transform, **options)


def kept(compute: Any) -> list[Tensor]:
    """What `compute` saves for its backward pass."""
    found: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        found.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        compute()
    return found


class Largest(TorchDispatchMode):
    """Most numbers in a result that has one place for each entry of the vocabulary, and is not of the head's size."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.vocabulary, self.hidden = vocabulary, hidden
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, Tensor) and self.vocabulary in value.shape and self.hidden not in value.shape:
                self.numel = max(self.numel, value.numel())
        return found


@pytest.mark.parametrize("chunk", [1, 3, M, 0])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_scores_are_those_of_a_whole_log_softmax(bias: bool, transform: LogitTransform, chunk: int) -> None:
    inputs = case(bias)
    hidden, weight, shift, targets = inputs
    expected = direct(hidden, weight, shift, transform)
    ours = scores(inputs, transform, chunk=chunk, details=True)
    assert ours.entropy is not None and ours.top1 is not None
    torch.testing.assert_close(ours.log_probs, expected.gather(-1, targets[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.entropy, -(expected.exp() * expected).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.top1.double(), (expected.argmax(-1) == targets).double())
    assert ours.log_probs.requires_grad and not ours.entropy.requires_grad and not ours.top1.requires_grad
    plain = scores(inputs, transform, chunk=chunk)
    assert plain.entropy is None and plain.top1 is None
    assert torch.equal(plain.log_probs, ours.log_probs)


def test_hits_are_counted_on_both_sides() -> None:
    hidden, weight, bias, _ = case()
    best = direct(hidden, weight, bias, PLAIN).argmax(-1)
    targets = torch.where(torch.arange(M) % 2 == 0, best, (best + 1) % V)
    found = scores((hidden, weight, bias, targets), chunk=3, details=True).top1
    assert found is not None
    assert found.tolist() == [1, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("chunk", [1, 3, 0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_finite_differences(
    bias: bool, scale: float, soft_cap: float, temperature: float, chunk: int
) -> None:
    transform = LogitTransform(scale, soft_cap, temperature)
    hidden, weight, shift, targets = case(bias)
    inputs = (hidden, weight) if shift is None else (hidden, weight, shift)

    def compute(*values: Tensor) -> Tensor:
        shift = values[2] if bias else None
        return token_scores(*values[:2], shift, targets, transform=transform, chunk=chunk).log_probs

    assert torch.autograd.gradcheck(compute, inputs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk", [2, 0])
@pytest.mark.parametrize("trained", [t for t in itertools.product([False, True], repeat=3) if any(t)])
def test_each_input_gets_its_gradient_whatever_else_is_frozen(trained: tuple[bool, ...], chunk: int) -> None:
    transform = TRANSFORMS[-1]
    hidden, weight, bias, targets = case()
    assert bias is not None
    leaves = (hidden, weight, bias)
    share = torch.linspace(-1, 2, M, dtype=torch.float64)
    expected = torch.autograd.grad(
        (direct(hidden, weight, bias, transform).gather(-1, targets[:, None])[:, 0] * share).sum(), leaves
    )
    for leaf, wanted in zip(leaves, trained, strict=True):
        leaf.requires_grad_(wanted)
    (scores((hidden, weight, bias, targets), transform, chunk=chunk).log_probs * share).sum().backward()
    for leaf, wanted, gradient in zip(leaves, trained, expected, strict=True):
        assert (leaf.grad is not None) == wanted
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [3, M])
def test_gradients_add_up_over_two_passes_before_one_backward(chunk: int) -> None:
    inputs = case()
    hidden, weight, bias, targets = inputs
    assert bias is not None
    other = hidden.detach().flip(0).requires_grad_()
    (
        scores(inputs, chunk=chunk).log_probs.sum() - scores((other, weight, bias, targets), chunk=chunk)[0].sum()
    ).backward()
    ours = [leaf.grad for leaf in (hidden, other, weight, bias)]

    def chosen(values: Tensor) -> Tensor:
        return direct(values, weight, bias, PLAIN).gather(-1, targets[:, None]).sum()

    expected = torch.autograd.grad(chosen(hidden) - chosen(other), (hidden, other, weight, bias))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("details", [False, True])
def test_a_frozen_head_keeps_no_logits_and_gets_no_gradient(details: bool) -> None:
    inputs = case()
    hidden, weight, bias, _ = inputs
    assert bias is not None
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    saved = kept(lambda: scores(inputs, details=details))
    assert M * D in [value.numel() for value in saved], "the hidden states' gradient is kept"
    assert M * V not in [value.numel() for value in saved]
    scores(inputs, details=details).log_probs.sum().backward()
    assert weight.grad is None and bias.grad is None and hidden.grad is not None


def test_a_trained_head_keeps_probabilities_of_one_chunk_only() -> None:
    inputs = case()
    assert M * V in [value.numel() for value in kept(lambda: scores(inputs))], "one chunk: kept, not computed again"
    for chunk in (1, 3, M - 1):
        held = kept(lambda chunk=chunk: scores(inputs, chunk=chunk))
        assert not [value.shape for value in held if V in value.shape and D not in value.shape and value.dim() > 1]


def test_nothing_is_kept_without_gradient() -> None:
    inputs = case()
    with torch.no_grad():
        assert kept(lambda: scores(inputs)) == []
        assert not scores(inputs).log_probs.requires_grad


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_no_more_than_a_chunk_of_logits_exists_at_a_time(chunk: int, frozen: bool) -> None:
    m, d, v = 16, 6, 50
    inputs = case(m=m, d=d, v=v, dtype=torch.float32)
    hidden, weight, bias, targets = inputs
    assert bias is not None
    if frozen:
        weight.requires_grad_(False)
        bias.requires_grad_(False)
    with Largest(v, d) as largest:
        scores(inputs, TRANSFORMS[-1], chunk=chunk, details=True).log_probs.sum().backward()
    assert largest.numel == chunk * v
    with Largest(v, d) as whole:
        direct(hidden, weight, bias, PLAIN).gather(-1, targets[:, None]).sum().backward()
    assert whole.numel == m * v


def test_the_default_chunk_is_a_share_of_memory() -> None:
    here = torch.device("cpu")
    assert chunk_tokens(1, here) > 1_000_000
    assert chunk_tokens(1000, here) == pytest.approx(chunk_tokens(1, here) / 1000, rel=1e-3)
    assert chunk_tokens(1 << 62, here) == 1


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk", [5, 0])
def test_bfloat16_autocast_stays_near_and_sums_in_float32(transform: LogitTransform, chunk: int) -> None:
    inputs = case(m=40, d=16, v=64, dtype=torch.float32)
    hidden, weight, bias, targets = inputs
    assert bias is not None
    leaves = (hidden, weight, bias)
    expected = direct(*leaves, transform).gather(-1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad(expected.sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = scores(inputs, transform, chunk=chunk).log_probs
    assert ours.dtype == torch.float32
    ours.sum().backward()
    gap = (ours - expected).abs().max()
    assert 0 < gap < 0.1
    for leaf, gradient in zip(leaves, wanted, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, gradient, rtol=0.05, atol=0.03 * float(gradient.abs().max()))


def test_a_bfloat16_head_under_float32_hidden_states_trains_in_its_own_dtype() -> None:
    hidden, weight, bias, targets = case(dtype=torch.float32)
    assert bias is not None
    narrow = weight.detach().bfloat16().requires_grad_()
    token_scores(hidden, narrow, bias, targets, transform=PLAIN, chunk=3).log_probs.sum().backward()
    assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16
    wide = narrow.detach().float().requires_grad_()
    direct(hidden, wide, bias, PLAIN).gather(-1, targets[:, None]).sum().backward()
    torch.testing.assert_close(narrow.grad.float(), wide.grad, rtol=0.02, atol=0.02)
