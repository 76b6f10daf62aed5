"""Log-probs of answers equal those of a plain, unpadded forward pass, whatever the model, batch or head."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from prefkit.domains.text import scoring
from prefkit.domains.text.policy import TextPolicy
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.methods import dpo
from prefkit.records import Group

FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_neox", "granite", "cohere")


def policy(family: str = "llama", **options: Any) -> TextPolicy:
    config = dpo.Config(**{"dtype": "float32", **options})
    made = TextPolicy.create(config, World.start(), model=tiny.model(family), tokenizer=tiny.tokenizer())
    if config.use_peft:
        wake(made)
    return made


def wake(made: TextPolicy, seed: int = 1) -> None:
    """Give every LoRA B random values: with B = 0 an adapter that is never applied would go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.module.named_parameters():
            if "lora_B.default" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def groups(count: int = 3, answers: int = 2, seed: int = 0, longest: int = 14) -> list[Group]:
    """Ragged random groups: prompts of 1 to 20 tokens, answers of 1 to `longest`."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 300) for _ in range(rng.randint(low, high))]

    return [Group(ids(1, 20), [ids(1, longest) for _ in range(answers)]) for _ in range(count)]


def plain(model: Any, group: Group, answer: int, temperature: float = 1.0) -> Tensor:
    """(t,) token log-probs of one answer by the model's own forward pass on this one sequence."""
    target = torch.tensor(group.answers[answer])
    ids = torch.tensor([[*group.prompt, *group.answers[answer]]])
    logits = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def gradients(made: TextPolicy) -> dict[str, Tensor]:
    found = {}
    for name, weight in made.module.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
            found[name] = weight.grad.clone()
            weight.grad = None
    return found


def assert_same_gradients(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert first.keys() == second.keys()
    largest = max(float(value.abs().max()) for value in first.values())
    assert largest > 1e-3
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=tolerance, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_equal_a_plain_forward_pass(family: str, use_peft: bool) -> None:
    made, batch = policy(family, use_peft=use_peft), groups()
    assert max(len(g.prompt) + len(g.answers[0]) for g in batch) > 2 * 8, "longer than the sliding windows"
    ours = made.token_log_probs(batch)
    row = 0
    for group in batch:
        for answer in range(2):
            expected = plain(made.model, group, answer)
            torch.testing.assert_close(ours[row, : len(expected)], expected, rtol=1e-5, atol=2e-5)
            assert not ours[row, len(expected) :].any()
            row += 1


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_plain_forward_passes(family: str) -> None:
    made, batch = policy(family), groups()
    weights = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.7]])
    (made.log_probs(batch) * weights).sum().backward()
    ours = gradients(made)
    for i, group in enumerate(batch):
        for answer in range(2):
            (plain(made.model, group, answer).sum() * weights[i, answer]).backward()
    assert_same_gradients(gradients(made), ours)


def test_neither_order_nor_neighbours_nor_padding_change_a_score() -> None:
    made, batch = policy(), groups(count=6)
    together = made.log_probs(batch)
    order = [4, 0, 5, 2, 1, 3]
    torch.testing.assert_close(made.log_probs([batch[i] for i in order]), together[order], rtol=1e-5, atol=2e-5)
    alone = torch.cat([made.log_probs([group]) for group in batch])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=2e-5)
    beside_a_long_one = [*batch, Group(list(range(3, 63)), [list(range(3, 90)), [5]])]
    torch.testing.assert_close(made.log_probs(beside_a_long_one)[:6], together, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("pad", [0, 2, 7, 299])
def test_the_pad_token_does_not_matter(pad: int) -> None:
    made, batch = policy(), groups()
    layouts = [scoring.lay_out(batch, pad=p) for p in (2, pad)]
    assert pad == 2 or not torch.equal(layouts[0].ids, layouts[1].ids)
    assert torch.equal(made.module(layouts[0]), made.module(layouts[1]))


def test_answers_that_contain_the_pad_token_are_scored_whole() -> None:
    made = policy()
    pad = made.tokenizer.pad_token_id
    group = Group([5, pad, 6], [[7, pad, 8, pad], [pad]])
    ours = made.token_log_probs([group])
    torch.testing.assert_close(ours[0], plain(made.model, group, 0), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours[1, :1], plain(made.model, group, 1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("answers", [1, 2, 5])
def test_shapes(answers: int) -> None:
    made, batch = policy(), groups(count=3, answers=answers)
    scores = made.log_probs(batch)
    assert scores.shape == (3, answers)
    assert scores.dtype == torch.float32
    for i, group in enumerate(batch):
        for j in range(answers):
            torch.testing.assert_close(scores[i, j], plain(made.model, group, j).sum(), rtol=1e-5, atol=5e-5)


def test_one_token_prompts_and_answers() -> None:
    made, group = policy(), Group([4], [[9]])
    assert made.log_probs([group]).shape == (1, 1)
    torch.testing.assert_close(made.log_probs([group])[0, 0], plain(made.model, group, 0).sum())


def test_what_cannot_be_scored_is_refused() -> None:
    made = policy()
    with pytest.raises(ValueError, match="group 1 of the batch has an empty prompt"):
        made.log_probs([Group([4], [[9]]), Group([], [[9]])])
    with pytest.raises(ValueError, match="group 0 of the batch has an empty answer"):
        made.log_probs([Group([4], [[9], []])])
    with pytest.raises(ValueError, match=r"same number of answers, not \[1, 2\]"):
        made.log_probs([Group([4], [[9]]), Group([4], [[9], [8]])])


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_a_temperature_divides_the_final_logits(family: str) -> None:
    made, batch = policy(family), groups()
    ours = made.log_probs(batch, temperature=0.7)
    torch.testing.assert_close(ours[1, 0], plain(made.model, batch[1], 0, 0.7).sum(), rtol=1e-5, atol=5e-5)
    assert (ours - made.log_probs(batch)).abs().max() > 0.1


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_a_chunked_head_gives_the_same_values_and_gradients(rows: int, adapted: bool) -> None:
    """`adapted`: a head with an adapter on it, which takes the general path."""
    options = {"use_peft": True, "lora_target_modules": ("q_proj", "lm_head")} if adapted else {}
    made, batch = policy("llama" if adapted else "gemma2", **options), groups()
    whole = made.log_probs(batch)
    whole[:, 0].sub(whole[:, 1]).sum().backward()
    expected = gradients(made)
    made.module.chunk = rows
    with torch.no_grad():
        torch.testing.assert_close(made.log_probs(batch), whole, rtol=1e-6, atol=1e-5)
    chunked = made.log_probs(batch)
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-5)
    chunked[:, 0].sub(chunked[:, 1]).sum().backward()
    assert_same_gradients(expected, gradients(made), 1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_entropy_and_hits_come_from_the_same_pass(adapted: bool) -> None:
    options = {"use_peft": True, "lora_target_modules": ("q_proj", "lm_head")} if adapted else {}
    made, batch = policy(**options), groups()
    first = made.module(scoring.lay_out(batch, 0), distributions=True)[0].argmax()
    batch[0] = Group(batch[0].prompt, [[int(first), 9], *batch[0].answers[1:]])  # one hit at least
    tokens, entropy, top1 = made.token_details(batch)
    torch.testing.assert_close(tokens, made.token_log_probs(batch))
    layout = made.module.lay_out(batch, pad=0, device="cpu")
    rows = made.module(layout, distributions=True)
    torch.testing.assert_close(entropy.flatten()[layout.slots], -(rows.exp() * rows).sum(-1))
    assert torch.equal(top1.flatten()[layout.slots], (rows.argmax(-1) == layout.targets).float())
    assert not entropy.requires_grad and 0 < top1.sum() < len(layout.targets)


@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing_but_memory(family: str, use_peft: bool) -> None:
    batch, found = groups(), []
    for checkpointing in (False, True):
        made = policy(family, use_peft=use_peft, gradient_checkpointing=checkpointing)
        assert scoring.causal_lm(made.model).is_gradient_checkpointing == checkpointing
        scores = made.log_probs(batch)
        scores.square().mean().backward()
        found.append((scores.detach(), gradients(made)))
    assert torch.equal(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1], 1e-6)


def test_distributions_are_normalised_and_hold_the_token_log_probs() -> None:
    made, batch = policy("gemma2"), groups()
    layout = scoring.lay_out(batch, 0)
    rows = made.module(layout, distributions=True)
    assert rows.shape == (len(layout.targets), 320)
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(len(rows)), rtol=0, atol=1e-5)
    tokens = made.token_log_probs(batch).flatten()[layout.slots]
    torch.testing.assert_close(rows.gather(-1, layout.targets[:, None])[:, 0], tokens)


def test_the_state_kl_is_the_kl_of_whole_distributions() -> None:
    made, batch = policy(use_peft=True), groups()
    tokens, reference_tokens, kl = made.state_kl(batch)
    torch.testing.assert_close(tokens, made.token_log_probs(batch))
    torch.testing.assert_close(reference_tokens, made.reference_token_log_probs(batch))
    assert kl.requires_grad and not reference_tokens.requires_grad
    group = batch[0]
    ids = torch.tensor([[*group.prompt, *group.answers[0]]])
    here = made.model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].double().log_softmax(-1)
    with made.model.disable_adapter():
        there = made.model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].double().log_softmax(-1)
    expected = (here.exp() * (here - there)).sum(-1).float()
    assert expected.min() > 1e-4
    torch.testing.assert_close(kl[0, : len(expected)], expected, rtol=1e-3, atol=1e-5)
    assert not kl[0, len(expected) :].any()


def test_a_model_with_an_unknown_logit_transform_is_refused() -> None:
    model = tiny.model()
    original = type(model).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = scaled.__get__(model)
    with pytest.raises(InputError, match="transforms its logits"):
        TextPolicy.create(dpo.Config(dtype="float32"), World.start(), model=model, tokenizer=tiny.tokenizer())


def test_a_model_that_gives_nan_is_refused() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.get_input_embeddings().weight[10] = float("nan")
    with pytest.raises(InputError, match="nan nats"):
        TextPolicy.create(dpo.Config(dtype="float32"), World.start(), model=model, tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_bfloat16_autocast_stays_near_and_sums_in_float32(family: str) -> None:
    exact, rounded = policy(family), policy(family, dtype="bfloat16")
    batch = groups()
    scores = rounded.log_probs(batch)
    assert scores.dtype == torch.float32
    assert {p.dtype for p in rounded.module.parameters()} == {torch.float32}
    gap = (rounded.token_log_probs(batch) - exact.token_log_probs(batch)).abs()
    assert 0 < gap.mean() < 0.05
