"""Tiny models, tokenizers and data that tests build in milliseconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "red",
    "blue",
    "green",
    "one",
    "two",
    "three",
    "cat",
    "dog",
    "bird",
    "sun",
    "moon",
    "star",
    "yes",
    "no",
    "maybe",
]


def tokenizer() -> Any:
    """A byte-level BPE with ChatML's template, pad == eos, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = TEMPLATE
    return made


def config(family: str = "llama", vocabulary: int = 320, layers: int = 2) -> Any:
    """The configuration of a tiny model of one family."""
    import transformers as t

    size = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    wide = {**size, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256}
    ids = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    match family:
        case "llama":
            return t.LlamaConfig(**wide, **ids, tie_word_embeddings=True)
        case "mistral":
            return t.MistralConfig(**wide, **ids, sliding_window=8)
        case "qwen2":
            return t.Qwen2Config(**wide, **ids)
        case "gemma2":
            return t.Gemma2Config(**wide, **ids, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
        case "gpt2":
            return t.GPT2Config(n_embd=32, n_layer=layers, n_head=4, n_positions=256, **ids)
        case "gpt_neox":
            return t.GPTNeoXConfig(**size, intermediate_size=48, max_position_embeddings=256, **ids)
        case "granite":
            return t.GraniteConfig(**wide, **ids, logits_scaling=4.0)
        case "cohere":
            return t.CohereConfig(**wide, **ids, logit_scale=0.25)
    raise ValueError(family)


def model(family: str = "llama", *, seed: int = 0, vocabulary: int = 320, layers: int = 2) -> Any:
    """A tiny causal LM with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(family, vocabulary, layers), dtype=torch.float32)
    with torch.no_grad():  # random models are nearly uniform; sharper ones make differences visible
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
    return made.eval()


def folder(path: Path, family: str = "llama") -> Path:
    """A model folder with its tokenizer, as `save_pretrained` writes it."""
    model(family).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def pairs(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Conversational preference rows in groups of two."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    rows: list[dict[str, Any]] = []
    for i in range(count):
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{words(1, 5)} {i // 2}"}],
                "chosen": [{"role": "assistant", "content": words(1, 6) + " yes"}],
                "rejected": [{"role": "assistant", "content": words(1, 6) + " no"}],
                "group": f"g{i // 2}",
            }
        )
    return rows


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
