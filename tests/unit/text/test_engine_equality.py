"""Packed rows (sdpa, flex), padded rows and plain forward passes give the same log-probs, losses and gradients.

In float32 the ways to score differ by the order of sums: log-probs are held to 2e-5 nats beside 1e-5 of their size,
gradients to 1e-4 of the largest one. In float64 everything is held to 1e-10.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from prefkit.domains.text import scoring
from prefkit.domains.text.layout import Backend
from prefkit.domains.text.packing import num_tokens, pack
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.reference import FrozenCopy
from prefkit.domains.text.reward import RewardModel
from prefkit.engine.config import Optimisation
from prefkit.engine.learner import Learner
from prefkit.engine.world import World
from prefkit.loops.pairs import Item
from prefkit.methods import dpo, hypo, reward
from prefkit.objectives.margin import Hinge, Ipo, Logistic, bradley_terry
from prefkit.objectives.preference import dpo_loss, hypo_loss, nll
from prefkit.records import Group, Pair, Preference, Sample

FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_neox", "granite", "cohere")
BACKENDS: tuple[Backend, ...] = ("padded", "sdpa", "flex")
LOG_PROBS: Any = {"rtol": 1e-5, "atol": 2e-5}


def model(family: str) -> Any:
    """A tiny model; Gemma-2's attention scores capped so low that leaving the cap out is seen."""
    made = tiny.model(family)
    if family == "gemma2":
        for layer in made.model.layers:
            layer.self_attn.attn_logit_softcapping = 2.0
    return made


def policy(family: str = "llama", **options: Any) -> TextPolicy:
    config = dpo.Config(**{"dtype": "float32", **options})
    made = TextPolicy.create(config, World.start(), model=model(family), tokenizer=tiny.tokenizer())
    if config.use_peft:
        wake(made.module)
    return made


def wake(module: torch.nn.Module) -> None:
    """Random values for every LoRA B: with B = 0 an adapter that is never applied would go unnoticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "lora_B.default" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def moved(made: TextPolicy) -> TextPolicy:
    """The policy after it has left its reference, so that no log-ratio is zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in made.module.parameters():
            if weight.requires_grad and weight.dim() > 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    return made


def use(made: TextPolicy, backend: Backend) -> None:
    """Score in `backend` from now on, the reference too."""
    made.module.backend = backend
    if made.has_reference and isinstance(made.reference, FrozenCopy):
        made.reference.module.backend = backend


def groups(count: int = 3, answers: int = 2, seed: int = 0, longest: int = 14) -> list[Group]:
    """Ragged random groups: prompts of 1 to 20 tokens, answers of 1 to `longest`."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 300) for _ in range(rng.randint(low, high))]

    return [Group(ids(1, 20), [ids(1, longest) for _ in range(answers)]) for _ in range(count)]


def plain(model: Any, group: Group, answer: int) -> Tensor:
    """(t,) token log-probs of one answer by the model's own forward pass on this one sequence."""
    target = torch.tensor(group.answers[answer])
    ids = torch.tensor([[*group.prompt, *group.answers[answer]]])
    logits = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def plain_scores(model: Any, batch: Sequence[Group]) -> Tensor:
    """(n, t) as `token_log_probs`, one forward pass per answer."""
    rows = [plain(model, group, answer) for group in batch for answer in range(len(group.answers))]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def weights_like(values: Tensor) -> Tensor:
    """A fixed random weight for each entry, so that no two errors cancel."""
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(3), dtype=values.dtype)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of a module's trained weights, which are taken away."""
    found = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
            found[name] = weight.grad
            weight.grad = None
    return found


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert ours.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance * largest, msg=name)


def scored(made: TextPolicy, batch: Sequence[Group], backend: Backend) -> tuple[Tensor, dict[str, Tensor]]:
    """Token log-probs in a backend, and the gradients of a weighted sum of them."""
    use(made, backend)
    found = made.token_log_probs(batch)
    (found * weights_like(found)).sum().backward()
    return found.detach(), gradients(made.module)


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_backend_equals_plain_forward_passes(family: str, use_peft: bool) -> None:
    made = policy(family, use_peft=use_peft)
    assert made.module.backend == "sdpa", made.module.how
    batch = [*groups(), Group([7], [[9], [11, 12]])]
    assert max(len(g.prompt) + len(g.answers[0]) for g in batch) > 2 * 8, "longer than the sliding windows"
    expected = plain_scores(made.model, batch)
    (expected * weights_like(expected)).sum().backward()
    wanted = gradients(made.module)
    for backend in BACKENDS:
        found, slopes = scored(made, batch, backend)
        torch.testing.assert_close(found, expected.detach(), msg=backend, **LOG_PROBS)
        assert_same_gradients(slopes, wanted)
        with torch.no_grad():  # flex attention itself; with gradient a CPU takes its mask
            torch.testing.assert_close(made.token_log_probs(batch), expected.detach(), msg=backend, **LOG_PROBS)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])  # the others' norms compute in float32 by themselves
def test_in_float64_backends_agree_to_the_last_digits(family: str) -> None:
    made, batch = policy(family), groups(answers=3)
    made.module.double()
    expected = plain_scores(made.model, batch)
    assert expected.dtype == torch.float64
    (expected * weights_like(expected)).sum().backward()
    wanted = gradients(made.module)
    for backend in BACKENDS:
        found, slopes = scored(made, batch, backend)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10, msg=backend)
        assert_same_gradients(slopes, wanted, 1e-10)
        with torch.no_grad():
            torch.testing.assert_close(made.token_log_probs(batch), expected, rtol=1e-10, atol=1e-10, msg=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("answers", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_any_number_of_ragged_answers(family: str, answers: int, backend: Backend) -> None:
    made, batch = policy(family), groups(count=3, answers=answers, seed=answers)
    assert len({len(answer) for group in batch for answer in group.answers}) > 1
    use(made, backend)
    expected = plain_scores(made.model, batch)
    torch.testing.assert_close(made.token_log_probs(batch), expected, **LOG_PROBS)
    scores = made.log_probs(batch)
    assert scores.shape == (3, answers)
    torch.testing.assert_close(scores, expected.sum(-1).view(3, answers), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_unlike_numbers_of_answers_share_a_row(backend: Backend) -> None:
    made = policy()
    use(made, backend)
    batch = [groups(1, answers, seed=answers)[0] for answers in (5, 1, 3)]
    torch.testing.assert_close(made.token_log_probs(batch), plain_scores(made.model, batch), **LOG_PROBS)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_answers_of_a_group_that_begin_alike_are_kept_apart(backend: Backend) -> None:
    made = policy("mistral")
    use(made, backend)
    start = list(range(20, 32))
    batch = [Group(start[:5], [[*start[5:], 40], [*start[5:], 41], start[5:], [*start[5:], 40]])]
    found = made.token_log_probs(batch)
    torch.testing.assert_close(found, plain_scores(made.model, batch), **LOG_PROBS)
    torch.testing.assert_close(found[3], found[0])


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_recomputed_layers_see_their_own_batch(family: str, use_peft: bool, backend: Backend) -> None:
    """Two forward passes, then one backward pass: a recomputed layer must not find the other batch's plan."""
    first, second = groups(seed=1), groups(count=2, answers=3, seed=2)
    found = []
    for checkpointing in (False, True):
        made = policy(family, use_peft=use_peft, gradient_checkpointing=checkpointing)
        assert scoring.causal_lm(made.model).is_gradient_checkpointing == checkpointing
        use(made, backend)
        scores = [made.token_log_probs(batch) for batch in (first, second)]
        torch.stack([(part * weights_like(part)).sum() for part in scores]).sum().backward()
        found.append((torch.cat([part.detach().flatten() for part in scores]), gradients(made.module)))
    assert torch.equal(found[0][0], found[1][0])
    assert_same_gradients(found[1][1], found[0][1], 1e-6)


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_a_chunked_head_changes_nothing_in_any_backend(family: str, use_peft: bool) -> None:
    made, batch = policy(family, use_peft=use_peft), groups()
    for backend in BACKENDS:
        expected, wanted = scored(made, batch, backend)
        for chunk in (1, 5):
            made.module.chunk = chunk
            found, slopes = scored(made, batch, backend)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
            assert_same_gradients(slopes, wanted, 2e-5)
        made.module.chunk = 0


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_details_come_from_the_same_pass(backend: Backend, chunk: int) -> None:
    made, batch = policy("gemma2"), groups()
    use(made, backend)
    made.module.chunk = chunk
    log_probs, entropy, top1 = made.token_details(batch)
    assert torch.equal(log_probs, made.token_log_probs(batch))
    assert log_probs.requires_grad and not entropy.requires_grad and not top1.requires_grad
    row = 0
    for group in batch:
        for answer in group.answers:
            ids = torch.tensor([[*group.prompt, *answer]])
            rows = made.model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].detach().log_softmax(-1)
            expected = -(rows.exp() * rows).sum(-1)
            torch.testing.assert_close(entropy[row, : len(answer)], expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(top1[row, : len(answer)].bool(), rows.argmax(-1) == torch.tensor(answer))
            assert not entropy[row, len(answer) :].any() and not top1[row, len(answer) :].any()
            row += 1


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_autocast_stays_near_float32(family: str, backend: Backend) -> None:
    exact, rounded, batch = policy(family), policy(family, dtype="bfloat16"), groups()
    use(rounded, backend)
    scores = rounded.token_log_probs(batch)
    assert scores.dtype == torch.float32
    gap = (scores - exact.token_log_probs(batch)).abs()
    assert 0 < gap.mean() < 0.05
    scores.sum().backward()
    assert all(value.dtype == torch.float32 for value in gradients(rounded.module).values())


def items(count: int = 3) -> list[Item]:
    """Stored pairs, each with three fixed answers that stand for the policy's own."""
    stored, own = groups(count, 2, seed=4), groups(count, 3, seed=5)
    return [
        Item(
            i,
            Pair(
                prompt=pair.prompt,
                chosen=pair.answers[0],
                rejected=pair.answers[1],
                source=Preference(prompt="", chosen="", rejected=""),
            ),
            [
                Sample(prompt=pair.prompt, tokens=a, log_probs=[], finished=True, text="", row=i, index=k)
                for k, a in enumerate(online.answers)
            ],
        )
        for i, (pair, online) in enumerate(zip(stored, own, strict=True))
    ]


def of_pairs(made: TextPolicy, batch: Sequence[Item]) -> tuple[Tensor, ...]:
    stored = [item.pair.group for item in batch]
    return (*made.log_probs(stored).unbind(-1), *made.reference_log_probs(stored).unbind(-1))


def dpo_of(kind: Any, label_smoothing: float = 0.0) -> Callable[[TextPolicy, Sequence[Item]], Tensor]:
    return lambda made, batch: dpo_loss(*of_pairs(made, batch), beta=0.3, kind=kind, label_smoothing=label_smoothing)


def hypo_of(estimator: str) -> Callable[[TextPolicy, Sequence[Item]], Tensor]:
    def loss(made: TextPolicy, batch: Sequence[Item]) -> Tensor:
        own, reference, state_kl = hypo.own_scores(made, batch, estimator)
        return hypo_loss(
            *of_pairs(made, batch), own, reference, beta=0.3, kl_weight=0.05, estimator=estimator, state_kl=state_kl
        )

    return loss


def sft(made: TextPolicy, batch: Sequence[Item]) -> Tensor:
    chosen = [Group(item.pair.prompt, [item.pair.chosen]) for item in batch]
    lengths = torch.tensor([len(item.pair.chosen) for item in batch])
    return nll(made.log_probs(chosen)[:, 0], lengths)


LOSSES: dict[str, Callable[[TextPolicy, Sequence[Item]], Tensor]] = {
    "sigmoid": dpo_of(Logistic()),
    "smoothed": dpo_of(Logistic(), 0.2),
    "ipo": dpo_of(Ipo()),
    "hinge": dpo_of(Hinge()),
    "hypo rloo": hypo_of("rloo"),
    "hypo reinforce": hypo_of("reinforce"),
    "hypo rtg": hypo_of("rtg"),
    "hypo rb": hypo_of("rb"),
    "sft": sft,
}


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_the_same_in_every_backend(name: str, use_peft: bool) -> None:
    made, batch = moved(policy("gemma2", use_peft=use_peft)), items()  # windows, soft caps and grouped heads
    found = {}
    for backend in BACKENDS:
        use(made, backend)
        losses = LOSSES[name](made, batch)
        assert losses.shape == (len(batch),) and losses.requires_grad
        losses.mean().backward()
        found[backend] = (losses.detach(), gradients(made.module))
    expected, wanted = found["padded"]
    for backend in ("sdpa", "flex"):
        losses, slopes = found[backend]
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4, msg=backend)
        assert_same_gradients(slopes, wanted, 2e-4)


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_neox", "qwen2"])
def test_rewards_and_their_loss_are_the_same_in_every_backend(family: str, use_peft: bool) -> None:
    config = reward.Config(dtype="float32", use_peft=use_peft)
    made = RewardModel.create(config, World.start(), model=model(family), tokenizer=tiny.tokenizer())
    if use_peft:
        wake(made.module)
    assert made.module.backend == "sdpa", made.module.how
    batch = [*groups(seed=6), Group([7], [[9], [11, 12]])]
    inner: Any = scoring.causal_lm(made.model)
    head = inner.score.modules_to_save["default"] if use_peft else inner.score
    ends = [
        inner.base_model(input_ids=torch.tensor([[*group.prompt, *answer]])).last_hidden_state[0, -1]
        for group in batch
        for answer in group.answers
    ]
    plainly = head(torch.stack(ends).detach())[:, 0].detach().view(-1, 2)
    found = {}
    for backend in BACKENDS:
        made.module.backend = backend
        rewards = made.rewards(batch)
        bradley_terry(rewards[:, 0], rewards[:, 1]).mean().backward()
        found[backend] = (rewards.detach(), gradients(made.module))
    expected, wanted = found["padded"]
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 1e-3
    torch.testing.assert_close(expected, plainly, rtol=1e-5, atol=2e-5)
    for backend in ("sdpa", "flex"):
        rewards, slopes = found[backend]
        torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=2e-5, msg=backend)
        assert_same_gradients(slopes, wanted)


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["sigmoid", "hypo rloo", "sft"])
def test_micro_batches_of_packed_rows_equal_one_batch(name: str, use_peft: bool) -> None:
    """One optimizer step over N packed rows is that over one, and over padded rows."""
    batch, start = items(6), moved(policy(use_peft=use_peft))
    sizes = [num_tokens(item.pair.group) for item in batch]
    packed = pack(sizes, 2 * max(sizes))
    assert 1 < len(packed) < 6, "several rows, some with several groups"
    ways: dict[str, tuple[Backend, list[list[int]]]] = {
        "padded": ("padded", [[0, 1, 2, 3, 4, 5]]),
        "one row": ("sdpa", [[0, 1, 2, 3, 4, 5]]),
        "packed rows": ("sdpa", packed),
        "a row each": ("sdpa", [[i] for i in range(6)]),
        "flex": ("flex", packed),
    }
    found = {}
    for way, (backend, rows) in ways.items():
        made = copy.deepcopy(start)
        use(made, backend)
        # A large epsilon: with a small one the first step of Adam is the gradient's sign, and ulps decide it.
        options = Optimisation(learning_rate=0.1, adam_epsilon=0.1, max_grad_norm=0.5, lr_scheduler_type="constant")
        learner = Learner(made.module, options, total_steps=4, world=made.world)

        def compute(part: Sequence[Item], made: TextPolicy = made) -> tuple[Tensor, dict[str, Tensor]]:
            losses = LOSSES[name](made, part)
            return losses, {"twice": 2 * losses}

        metrics = [learner.update([[batch[i] for i in row] for row in rows], compute) for _ in range(2)]
        trained = {key: weight.detach() for key, weight in made.module.named_parameters() if weight.requires_grad}
        found[way] = (metrics, trained)
    expected, wanted = found.pop("padded")
    before = {key: weight.detach() for key, weight in start.module.named_parameters()}
    assert max(float((wanted[key] - before[key]).abs().max()) for key in wanted) > 1e-2, "the step is no small one"
    for way, (metrics, trained) in found.items():
        for ours, theirs in zip(metrics, expected, strict=True):
            for key in ("loss", "grad_norm", "twice"):
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=f"{way}: {key}")
        for key, value in wanted.items():
            torch.testing.assert_close(trained[key], value, rtol=1e-4, atol=2e-5, msg=f"{way}: {key}")
