from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tiny
from prefkit.domains.text.average import AverageWeights
from prefkit.domains.text.choice import LetterReader, letter_tokens, next_token_log_probs, prompt_ids, rendered
from prefkit.domains.text.config import Lora, Model
from prefkit.domains.text.policy import TextPolicy
from prefkit.engine.world import World
from prefkit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options(Model, Lora):
    seed: int = 0


def policy(*, lora: bool = False, model: Any = None) -> TextPolicy:
    return TextPolicy.create(
        Options(use_peft=lora, dtype="float32"), World.start(), model=model or tiny.model(), tokenizer=tiny.tokenizer()
    )


def conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "The better one is"}]


def own_log_probs(made: TextPolicy, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return made.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def test_a_begun_turn_is_continued_and_plain_text_stays_plain():
    tokenizer = tiny.tokenizer()
    assert rendered(tokenizer, conversation("red")).endswith("red<|im_end|>\n<|im_start|>assistant\nThe better one is")
    assert rendered(tokenizer, conversation("red")[:1]).endswith("<|im_start|>assistant\n")
    assert rendered(tokenizer, "red cat") == "red cat"
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        rendered(tokenizer, conversation("red"))


def test_letters_are_single_tokens_behind_the_prompt():
    tokenizer = tiny.tokenizer()
    one, other = letter_tokens(tokenizer, "The better one is")
    assert tokenizer.decode([one]).strip() == "A" and tokenizer.decode([other]).strip() == "B"
    for letters in (("AB", "Ac"), ("A", "A")):
        with pytest.raises(InputError, match="single tokens"):
            letter_tokens(tokenizer, "The better one is", letters)


def test_a_blank_before_the_letters_is_used_where_the_tokenizer_has_one():
    tokenizer = tiny.tokenizer()
    bare = letter_tokens(tokenizer, "The better one is")
    assert [tokenizer.decode([token]) for token in bare] == ["A", "B"]
    tokenizer.add_tokens([" A", " B"])
    tokens = letter_tokens(tokenizer, "The better one is")
    assert [tokenizer.decode([token]) for token in tokens] == [" A", " B"]
    assert letter_tokens(tokenizer, "The better one is (") == bare


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_log_probs_are_the_models_own_whatever_stands_beside(family: str):
    made = policy(model=tiny.model(family))
    texts = [conversation("red cat"), "a plain prompt that is longer than the other one", conversation("one " * 12)]
    reader = LetterReader(made, batch_size=2)
    found = reader(texts)
    for text, ids, reply in zip(texts, prompt_ids(made.tokenizer, texts), found, strict=True):
        log_probs = own_log_probs(made, ids)
        letters = letter_tokens(made.tokenizer, rendered(made.tokenizer, text))
        expected = [float(log_probs[token]) for token in letters]
        assert reply is not None
        assert reply[:2] == pytest.approx(expected, abs=1e-4)
        assert reply[2] == pytest.approx(sum(map(math.exp, expected)), rel=1e-4)
        assert LetterReader(made)([text])[0] == pytest.approx(reply, abs=1e-4)


def test_a_prompt_beyond_the_context_has_no_reply_and_nothing_asked_is_nothing():
    made = policy()
    found = LetterReader(made)(["red " * 300, "red"])
    assert found[0] is None and found[1] is not None
    assert LetterReader(made)([]) == []


def test_a_token_budget_changes_the_passes_alone():
    made = policy()
    prompts = [[5, 6, 7], [8] * 20, [9] * 7]
    plain = next_token_log_probs(made, prompts, [(65, 66)] * 3)
    packed = next_token_log_probs(made, prompts, [(65, 66)] * 3, tokens_per_batch=12)
    for one, other in zip(plain, packed, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_policy_reference_and_average_are_read_apart(lora: bool):
    made = policy(lora=lora)
    average = AverageWeights(made, decay=0.5)
    texts = ["red cat", conversation("dog")]
    start = LetterReader(made)(texts)
    before = {name: value.clone() for name, value in made.module.state_dict().items()}
    with torch.no_grad():
        for weight in made.module.parameters():
            if weight.requires_grad:
                weight.add_(0.05)
    moved = {name: value.clone() for name, value in made.module.state_dict().items()}
    average.update()
    frozen = LetterReader(made, active=made.reference.active)(texts)
    assert frozen == start
    own, mean = LetterReader(made)(texts), LetterReader(made, active=average.active)(texts)
    assert own != start and mean != start and mean != own
    after = made.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in moved.items()), "reading must not change the policy"
    assert any(not torch.equal(before[name], value) for name, value in moved.items())
    assert all(weight.grad is None for weight in made.module.parameters())


def test_the_average_follows_the_rule_and_survives_a_checkpoint(tmp_path):
    made = policy(lora=True)
    average = AverageWeights(made, decay=0.75)
    name, weight = next((n, w) for n, w in made.module.named_parameters() if w.requires_grad)
    start = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    average.update()
    with average.active():
        torch.testing.assert_close(weight.data, start + 0.25)
    torch.testing.assert_close(weight.data, start + 1.0)
    average.save(tmp_path)
    again = AverageWeights(made, decay=0.75)
    again.load(tmp_path)
    with again.active():
        torch.testing.assert_close(dict(made.module.named_parameters())[name].data, start + 0.25)
    for decay in (-0.1, 1.0):
        with pytest.raises(InputError, match="decay"):
            AverageWeights(made, decay=decay)
