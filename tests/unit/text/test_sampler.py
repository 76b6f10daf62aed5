"""Samples: their distribution, their seeds, their ends, and log-probs that equal those the scorer gives."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from prefkit.domains.text import sampler as sampler_module
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.sampler import Decoding, TransformersSampler, draw, end_tokens, sampling_log_probs
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.methods import dpo
from prefkit.records import Group, Sample

FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2", "mistral", "qwen2", "granite", "cohere")
END = 2
"""end-of-sequence token of the tiny models and tokenizers, which is the pad token too"""


def policy(family: str = "llama", model: Any = None, **options: Any) -> TextPolicy:
    config = dpo.Config(**{"dtype": "float32", **options})
    model = tiny.model(family) if model is None else model
    return TextPolicy.create(config, World.start(), model=model, tokenizer=tiny.tokenizer(), copy_reference=False)


def prompts(count: int = 4, longest: int = 20, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 300) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def sample(made: TextPolicy, texts: list[list[int]], num: int = 1, rows: Any = None, **how: Any) -> list[list[Sample]]:
    decoding = Decoding(**{"max_new_tokens": 12, **how})
    where = range(len(texts)) if rows is None else rows
    return TransformersSampler(made).sample(texts, num=num, decoding=decoding, seed=7, path=("test", 3), rows=where)


def with_likely_end(family: str, bias: float) -> Any:
    """A model that ends often: its head gets a bias towards the end token."""
    model = tiny.model(family)
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(head.weight.shape[0]))
    with torch.no_grad():
        head.bias[END] = bias
    return model


def scored(made: TextPolicy, drawn: Sample, temperature: float = 1.0) -> list[float]:
    group = Group(drawn.prompt, [drawn.tokens])
    with torch.no_grad():
        return made.token_log_probs([group], temperature=temperature)[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_ragged_prompts_equals_one_prompt_at_a_time(family: str) -> None:
    made, texts = policy(family), prompts()
    together = sample(made, texts, num=2)
    for row, text in enumerate(texts):
        alone = sample(made, [text], num=2, rows=[row])[0]
        for one, other in zip(together[row], alone, strict=True):
            assert one.tokens == other.tokens
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
            assert (one.row, one.index, list(one.prompt)) == (other.row, other.index, text)


def test_a_row_draws_the_same_in_any_order_and_any_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    made, texts = policy(), prompts(6)
    drawn = sample(made, texts, num=2)
    order = [4, 1, 5, 0]
    again = sample(made, [texts[i] for i in order], num=2, rows=order)
    monkeypatch.setattr(sampler_module, "MAX_ROWS", 3)
    pieces = sample(made, texts, num=2)
    for place, row in enumerate(order):
        assert [s.tokens for s in again[place]] == [s.tokens for s in drawn[row]] == [s.tokens for s in pieces[row]]


def test_samples_differ_by_row_index_seed_and_path() -> None:
    made, text = policy(), prompts(1)[0]
    found = [s.tokens for answers in sample(made, [text] * 3, num=3) for s in answers]
    draws = TransformersSampler(made)
    how: dict[str, Any] = {"num": 1, "decoding": Decoding(max_new_tokens=12), "rows": [0]}
    found.append(draws.sample([text], seed=8, path=("test", 3), **how)[0][0].tokens)
    found.append(draws.sample([text], seed=7, path=("test", 4), **how)[0][0].tokens)
    assert len(set(found)) == len(found)
    assert draws.sample([text], seed=7, path=("test", 3), **how)[0][0].tokens == found[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sampled_log_prob_equals_the_scored_one(family: str, temperature: float) -> None:
    made = policy(family)
    for answers in sample(made, prompts(), num=2, temperature=temperature):
        for drawn in answers:
            assert drawn.log_probs == pytest.approx(scored(made, drawn, temperature), abs=2e-4)


def test_an_adapter_is_sampled_from(monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy(use_peft=True)
    plain = sample(made, prompts())[0][0].tokens
    with torch.no_grad():
        for name, weight in made.module.named_parameters():
            if "lora_B.default" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    drawn = sample(made, prompts())[0][0]
    assert drawn.tokens != plain
    assert drawn.log_probs == pytest.approx(scored(made, drawn), abs=2e-4)


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_nucleus_log_probs_follow_the_definition(top_p: float) -> None:
    made = policy()
    for answers in sample(made, prompts(3), num=2, top_p=top_p, temperature=0.5, max_new_tokens=6):
        for drawn in answers:
            ids = torch.tensor([[*drawn.prompt, *drawn.tokens]])
            with torch.no_grad():
                logits = made.model(input_ids=ids).logits[0, len(drawn.prompt) - 1 : -1]
            for step, (token, got) in enumerate(zip(drawn.tokens, drawn.log_probs, strict=True)):
                kept = nucleus(logits[step].tolist(), 0.5, top_p)
                assert token in kept
                assert got == pytest.approx(math.log(kept[token] / sum(kept.values())), abs=1e-3)


def nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """Likeliest tokens until their probabilities reach top_p, by plain Python."""
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    kept: dict[int, float] = {}
    for token in sorted(range(len(logits)), key=lambda i: -weights[i]):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = weights[token] / sum(weights)
    return kept


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_an_answer_ends_at_its_end_token_though_padding_is_the_same_token(family: str) -> None:
    made = policy(model=with_likely_end(family, 4.0))
    assert made.tokenizer.pad_token_id == made.tokenizer.eos_token_id == END
    drawn = [s for answers in sample(made, prompts(6), num=6, max_new_tokens=8) for s in answers]
    ended, cut = [s for s in drawn if s.finished], [s for s in drawn if not s.finished]
    assert ended and cut and len({len(s.tokens) for s in ended}) > 2
    for one in ended:
        assert one.tokens[-1] == END and END not in one.tokens[:-1]
        assert len(one.log_probs) == len(one.tokens)
        assert one.log_probs == pytest.approx(scored(made, one), abs=2e-4)
        assert "<|im_end|>" not in one.text
    for one in cut:
        assert len(one.tokens) == 8 and END not in one.tokens


def test_an_end_token_named_by_the_model_alone_ends_too() -> None:
    model = with_likely_end("qwen2", -20.0)
    model.generation_config.eos_token_id = [END, 40]
    with torch.no_grad():
        model.get_output_embeddings().bias[40] = 4.0
    made = policy(model=model)
    assert end_tokens(made) == [END, 40]
    drawn = [s for answers in sample(made, prompts(), num=6) for s in answers]
    assert any(s.finished for s in drawn)
    assert all((s.tokens[-1] == 40) == s.finished and 40 not in s.tokens[:-1] for s in drawn)


def test_a_stop_string_ends_an_answer_with_the_token_that_completes_it() -> None:
    made, texts = policy(), prompts(1)
    free = sample(made, texts)[0][0]
    middle = free.text[len(free.text) // 2 :][:2]
    first = free.text.index(middle)
    stopped = sample(made, texts, stop_strings=(middle, "never said"))[0][0]
    assert stopped.finished and middle in stopped.text
    assert stopped.tokens == free.tokens[: len(stopped.tokens)] and len(stopped.tokens) < len(free.tokens)
    assert middle not in made.tokenizer.decode(stopped.tokens[:-1])
    assert first < len(stopped.text)
    assert stopped.log_probs == pytest.approx(free.log_probs[: len(stopped.tokens)], abs=1e-5)


def test_rows_of_one_batch_stop_apart() -> None:
    """A row that stopped goes on being padded while others are drawn; it keeps its own length."""
    made, texts = policy(), prompts(5)
    stop = sample(made, texts)[2][0].text[1:3]
    together = sample(made, texts, stop_strings=(stop,))
    for row, text in enumerate(texts):
        alone = sample(made, [text], rows=[row], stop_strings=(stop,))[0][0]
        assert (together[row][0].tokens, together[row][0].finished) == (alone.tokens, alone.finished)


def test_the_models_own_generation_settings_do_not_bend_the_distribution() -> None:
    plain = sample(policy(), prompts())
    model = tiny.model()
    settings = model.generation_config
    settings.update(repetition_penalty=5.0, temperature=0.1, top_k=1, do_sample=True, max_length=2, num_beams=3)
    bent = policy(model=model)
    assert [a[0].tokens for a in sample(bent, prompts())] == [a[0].tokens for a in plain]
    assert model.generation_config is settings


def test_temperature_zero_is_the_librarys_greedy_search() -> None:
    made = policy()
    for text, answers in zip(prompts(), sample(made, prompts(), temperature=0.0), strict=True):
        greedy = made.model.generate(
            input_ids=torch.tensor([text]), max_new_tokens=12, do_sample=False, pad_token_id=END
        )
        assert list(answers[0].tokens) == greedy[0, len(text) :].tolist()
        assert answers[0].log_probs == pytest.approx(scored(made, answers[0]), abs=2e-4)


def test_frequencies_match_probabilities() -> None:
    """Chi-square over the first token of 1,500 samples at temperature 0.25; refused by chance once in 10,000."""
    from scipy.stats import chisquare

    made, text, count = policy(), prompts(1)[0], 1500
    drawn = sample(made, [text], num=count, temperature=0.25, max_new_tokens=1)[0]
    with torch.no_grad():
        logits = made.model(input_ids=torch.tensor([text])).logits[0, -1]
    expected = (logits / 0.25).softmax(-1) * count
    seen = Counter(s.tokens[0] for s in drawn)
    common = [token for token in range(len(expected)) if expected[token] >= 5]
    assert len(common) >= 5
    observed = [seen[token] for token in common]
    wanted = [float(expected[token]) for token in common]
    observed, wanted = [*observed, count - sum(observed)], [*wanted, count - sum(wanted)]
    assert chisquare(observed, wanted).pvalue > 1e-4


def test_drawing_inverts_the_cumulative_distribution() -> None:
    log_probs = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(6, -1)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-24])
    assert draw(log_probs, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


def test_the_nucleus_keeps_the_token_that_reaches_its_mass() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kept = sampling_log_probs(logits, 1.0, 0.6).exp()[0].tolist()
    assert kept == pytest.approx([0.625, 0.375, 0.0])
    assert sampling_log_probs(logits, 1.0, 0.01).exp()[0].tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_sampling_uses_the_cache_under_gradient_checkpointing_and_leaves_the_modes_as_they_were() -> None:
    made, plain = policy(gradient_checkpointing=True), policy()
    before = [part.training for part in made.module.modules()]
    assert any(before)
    assert [a[0].tokens for a in sample(made, prompts())] == [a[0].tokens for a in sample(plain, prompts())]
    assert [part.training for part in made.module.modules()] == before


def test_sampling_leaves_no_gradient_and_no_trace_in_the_global_generators() -> None:
    made = policy()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample(made, prompts())
    assert torch.equal(torch.rand(3), expected)
    assert all(weight.grad is None for weight in made.module.parameters())


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(InputError, match=r"250 tokens and max_new_tokens 12 pass the model's context of 256"):
        sample(policy(), [[5] * 3, [5] * 250])
    with pytest.raises(InputError, match="prompt 1 is empty"):
        sample(policy(), [[5], []])


@pytest.mark.parametrize("how", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}])
def test_settings_that_cannot_work_are_refused(how: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cannot sample with"):
        Decoding(**how)
