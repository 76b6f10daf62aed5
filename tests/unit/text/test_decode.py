"""The decoding loop: it draws what `generate` draws under the same uniform numbers, and computes less to do so."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from prefkit.domains.text import decode, sampler
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.sampler import Decoding, TransformersSampler
from prefkit.engine.seeds import generator
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.methods import dpo
from prefkit.records import Group, Sample

FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "mistral", "cohere")
"""sliding windows of 8 tokens: gemma2 (every other layer, soft caps too) and mistral; absolute positions: gpt2"""
END = 2


def policy(family: str = "llama", *, end: float | None = 3.0, **options: Any) -> TextPolicy:
    """A tiny policy; with `end` its head is biased towards the end token, so that answers end here and there."""
    model = tiny.model(family)
    if end is not None:
        head = model.get_output_embeddings()
        head.bias = nn.Parameter(torch.zeros(head.weight.shape[0]))
        with torch.no_grad():
            head.bias[END] = 4 * end if family == "cohere" else end  # whose logits are scaled down
    config = dpo.Config(**{"dtype": "float32", **options})
    return TextPolicy.create(config, World.start(), model=model, tokenizer=tiny.tokenizer(), copy_reference=False)


def prompts(count: int = 4, longest: int = 20, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 300) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def sample(
    made: TextPolicy, texts: list[list[int]], num: int = 3, rows: Any = None, unfit: str = "", **how: Any
) -> list[list[Sample]]:
    """Samples through the loop; with a reason in `unfit` through the model's own generate."""
    given = {name: how.pop(name) for name in ("prefixes", "budgets") if name in how}
    draws = TransformersSampler(made)
    assert draws.unfit == ""
    draws.unfit = unfit
    decoding = Decoding(**{"max_new_tokens": 16, **how})
    where = range(len(texts)) if rows is None else rows
    return draws.sample(texts, num=num, decoding=decoding, seed=7, path=("test", 3), rows=where, **given)


def flat(drawn: list[list[Sample]]) -> list[Sample]:
    return [one for answers in drawn for one in answers]


def assert_same(found: list[list[Sample]], wanted: list[list[Sample]]) -> None:
    for one, other in zip(flat(found), flat(wanted), strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=2e-4)
        assert dataclasses.replace(one, log_probs=()) == dataclasses.replace(other, log_probs=())


class Counted:
    """Rows and tokens that went through a model."""

    def __init__(self, made: TextPolicy) -> None:
        self.shapes: list[tuple[int, int]] = []
        made.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _module: Any, _args: Any, kwargs: Any) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_draws_what_generate_draws(family: str, how: dict[str, Any]) -> None:
    made, texts = policy(family), prompts()
    drawn = sample(made, texts, **how)
    assert_same(drawn, sample(made, texts, unfit="to compare", **how))
    if not how:
        assert len({len(one.tokens) for one in flat(drawn)}) > 4, "answers end here and there"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_librarys_own(family: str) -> None:
    made, texts = policy(family, end=None), prompts()
    for text, answers in zip(texts, sample(made, texts, temperature=0.0), strict=True):
        ids = torch.tensor([text])
        mask = torch.ones_like(ids)
        greedy = made.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=END
        )
        assert all(list(one.tokens) == greedy[0, len(text) :].tolist() for one in answers)


@pytest.mark.parametrize("cut", [1, 5, None], ids=["1", "5", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_given_prefix_leaves_the_rest_of_an_answer_as_it_was(family: str, cut: int | None) -> None:
    """Tokens that were drawn, given instead: the same numbers meet the same distributions."""
    made, texts = policy(family), prompts(5)
    free = [answers[0] for answers in sample(made, texts, num=1)]
    cuts = [min(3 * i % 8 if cut is None else cut, len(one.tokens) - 1) for i, one in enumerate(free)]
    prefixes = [one.tokens[:k] for one, k in zip(free, cuts, strict=True)]
    drawn = [answers[0] for answers in sample(made, texts, num=1, prefixes=prefixes)]
    assert any(cuts)
    for one, whole, k in zip(drawn, free, cuts, strict=True):
        assert (one.tokens, one.text, one.finished, one.prefix) == (whole.tokens, whole.text, whole.finished, k)
        assert list(one.log_probs[:k]) == [0.0] * k
        assert one.log_probs[k:] == pytest.approx(whole.log_probs[k:], abs=2e-4)
    again = sample(made, texts, num=1, prefixes=prefixes, unfit="to compare")
    assert_same([[one] for one in drawn], again)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_rows_that_share_a_prompt_may_have_prefixes_of_their_own(family: str) -> None:
    """The prompt is read once where that leaves less to read, and the prefixes behind it."""
    made, text = policy(family), prompts(1, longest=60, seed=3)[0]
    texts = [text, prompts(1, seed=4)[0], text, text, text]
    prefixes = [[], [7, 8], [30, 31, 32], [40], []]
    seen = Counted(made)
    together = sample(made, texts, num=2, prefixes=prefixes, ignore_end=True)
    assert seen.shapes[:2] == ([(4, len(text) + 3), (10, 1)] if family == "gemma2" else [(2, len(text)), (4, 3)])
    for row, (one, prefix) in enumerate(zip(texts, prefixes, strict=True)):
        alone = sample(made, [one], num=2, rows=[row], prefixes=[prefix], ignore_end=True)
        assert_same([together[row]], alone)


def test_the_numbers_of_an_answer_begin_alike_whatever_its_budget() -> None:
    for length in (1, 15, 16, 17, 64):
        numbers = [torch.rand(n, generator=generator(3, "x")) for n in (length, 200)]
        assert torch.equal(numbers[0], numbers[1][:length])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_every_row_has_its_own_budget(family: str) -> None:
    made, texts = policy(family), prompts(5)
    budgets = [1, 16, 3, 9, 5]
    free, drawn = sample(made, texts), sample(made, texts, budgets=budgets)
    for whole, cut, budget in zip(free, drawn, budgets, strict=True):
        for one, other in zip(cut, whole, strict=True):
            assert one.tokens == other.tokens[:budget]
            assert one.finished == (other.finished and len(other.tokens) <= budget)
    assert_same(drawn, sample(made, texts, budgets=budgets, unfit="to compare"))
    longer = flat(sample(made, texts, budgets=[30] * 5, max_new_tokens=4))
    assert max(len(one.tokens) for one in longer) == 30
    within = sample(made, texts, budgets=[6] * 5, prefixes=[[9, 10]] * 5, ignore_end=True)
    assert {len(one.tokens) for one in flat(within)} == {6}, "a budget counts the prefix"


def test_a_row_that_is_done_does_not_run_past_the_models_positions() -> None:
    made = policy("gpt2", end=None)
    texts = [[5] * 250, *prompts(4)]
    drawn = sample(made, texts, num=1, budgets=[6, 60, 60, 60, 60], ignore_end=True)
    assert [len(one.tokens) for one in flat(drawn)] == [6, 60, 60, 60, 60]


def test_prefixes_and_budgets_that_cannot_work_are_refused() -> None:
    made, texts = policy(), prompts(2)
    with pytest.raises(ValueError, match="prompt 1: a prefix of 3 tokens leaves a budget of 3 nothing to draw"):
        sample(made, texts, prefixes=[[4], [4, 5, 6]], budgets=[3, 3])
    with pytest.raises(ValueError):
        sample(made, texts, prefixes=[[4]])
    with pytest.raises(InputError, match="2 tokens and a budget of 255 pass the model's context of 256"):
        sample(made, [[5, 6], [7]], budgets=[255, 255])


@pytest.mark.parametrize("unfit", ["", "to compare"])
def test_a_forced_length_goes_on_behind_the_end(unfit: str) -> None:
    made, texts = policy(), prompts()
    free, forced = flat(sample(made, texts)), flat(sample(made, texts, ignore_end=True, unfit=unfit))
    assert any(one.finished for one in free)
    for one, longer in zip(free, forced, strict=True):
        assert len(longer.tokens) == len(longer.log_probs) == 16 and not longer.finished
        assert longer.tokens[: len(one.tokens)] == one.tokens
        with torch.no_grad():
            scores = made.token_log_probs([Group(longer.prompt, [longer.tokens])])[0].tolist()
        assert longer.log_probs == pytest.approx(scores, abs=2e-4)
    with pytest.raises(InputError, match="exclude each other"):
        Decoding(ignore_end=True, stop_strings=("x",))


def test_rows_that_are_done_leave_the_batch_and_a_shared_prompt_is_read_once() -> None:
    made, texts = policy(end=5.0), prompts(6)
    seen = Counted(made)
    drawn = flat(sample(made, texts, num=8))
    read, *steps = seen.shapes
    assert read == (6, max(map(len, texts)))
    lengths = [len(one.tokens) for one in drawn]
    assert len(steps) == max(lengths) - 1 and {width for _, width in steps} == {1}
    rows = [count for count, _ in steps]
    assert rows == sorted(rows, reverse=True)
    for step, count in enumerate(rows):
        live = sum(length > step + 1 for length in lengths)
        assert live <= count < max(live / (1 - 1 / decode.PAYS), live + 1) + 1
    assert sum(rows) < 0.6 * len(drawn) * len(steps)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_seldom_looks_and_little_room_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, texts = policy(family), prompts(6)
    stop = sample(made, texts, num=1)[2][0].text[1:3]
    plain, stopped = sample(made, texts), sample(made, texts, stop_strings=(stop,))
    monkeypatch.setitem(decode.EVERY, "cpu", 5)
    monkeypatch.setattr(decode, "ROOM", 0)
    monkeypatch.setattr(decode, "PAYS", 1000)
    assert_same(sample(made, texts), plain)
    assert_same(sample(made, texts, stop_strings=(stop,)), stopped)
    assert any(one.finished and END not in one.tokens for one in flat(stopped))


@pytest.mark.parametrize("unfit", ["", "to compare"])
def test_a_stop_string_in_the_prefix_stops_nothing(unfit: str) -> None:
    made, text = policy(end=None), prompts(1)[0]
    words = made.tokenizer("red dog", add_special_tokens=False)["input_ids"]
    how: dict[str, Any] = {"num": 1, "prefixes": [words], "unfit": unfit}
    free = sample(made, [text], **how)[0][0]
    inside = sample(made, [text], **how, stop_strings=("dog",))[0][0]
    assert inside.tokens == free.tokens and not inside.finished
    across = free.text[free.text.index("dog") + 2 :][:2]
    over = sample(made, [text], **how, stop_strings=(across,))[0][0]
    assert over.finished and over.prefix == len(words) < len(over.tokens) < len(free.tokens)
    assert over.tokens == free.tokens[: len(over.tokens)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_in_any_dtype_is_drawn_from_as_by_generate(dtype: str) -> None:
    made, texts = policy("qwen2", end=None, use_peft=True, dtype=dtype), prompts()
    with torch.no_grad():
        for name, weight in made.module.named_parameters():
            if "lora_B.default" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    found, wanted = (sample(made, texts, num=1, max_new_tokens=1, unfit=how) for how in ("", "to compare"))
    for one, other in zip(flat(found), flat(wanted), strict=True):
        assert one.tokens == other.tokens
        assert one.log_probs == pytest.approx(other.log_probs, abs=2e-4 if dtype == "float32" else 0.05)
    if dtype == "float32":
        assert_same(sample(made, texts), sample(made, texts, unfit="to compare"))


def test_what_the_loop_cannot_run_is_named_and_goes_through_generate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, texts = policy(), prompts()
    plain = sample(made, texts)

    class Own(type(made.model)):
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs_for_generation(*args, **kwargs)

    monkeypatch.setattr(made.model, "__class__", Own)
    sampler._say.cache_clear()
    made_twice = [TransformersSampler(made) for _ in range(2)]
    line = "prefkit: answers are drawn by model.generate, which is slower: Own prepares the inputs of each step"
    assert capsys.readouterr().err.count(line) == 1
    how: dict[str, Any] = {"num": 3, "decoding": Decoding(max_new_tokens=16), "seed": 7, "path": ("test", 3)}
    assert_same(made_twice[0].sample(texts, rows=range(4), **how), plain)


def test_a_model_without_keys_and_values_does_not_fit() -> None:
    import transformers as t

    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32, "num_attention_heads": 2}
    mamba = t.MambaForCausalLM(t.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=32, state_size=4))
    assert decode.unfit(mamba) == "MambaForCausalLM takes no position_ids"
    bloom = t.BloomForCausalLM(t.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=32))
    assert decode.unfit(bloom) == "BloomForCausalLM takes no position_ids"
    mixed = t.Qwen3NextConfig(**size, num_key_value_heads=1, head_dim=8, layer_types=["linear_attention"] * 2)
    llama = tiny.model("llama")
    llama.config = mixed
    assert decode.unfit(llama) == "LlamaForCausalLM needs LinearAttentionLayer in its cache"
