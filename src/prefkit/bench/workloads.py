"""What a bench trains and on what: models, answer lengths and token ids, the same for every side and every machine."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from prefkit.domains.text import loading
from prefkit.engine.precision import resolve_dtype
from prefkit.errors import InputError
from prefkit.records import Pair, Preference

Lengths = tuple[int, int, int]
"""tokens of prompt, chosen and rejected answer, the end-of-sequence token of the answers included"""

PAD, UNKNOWN, EOS, FIRST = 0, 1, 2, 3
"""token ids with a meaning, and the first without one"""
ROWS = 64
FILE = "lengths.json"

MODELS: dict[str, dict[str, Any]] = {
    "llama-micro": {
        "vocab_size": 320,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    },
    "llama-16k": {
        "vocab_size": 16384,
        "num_hidden_layers": 6,
        "hidden_size": 384,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "intermediate_size": 1024,
    },
    "llama-135m": {
        "vocab_size": 49152,
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
}
"""Llamas with random weights; embeddings are tied, as in released models of these sizes"""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One task that every side of a bench trains on."""

    model: str = "llama-16k"
    """a name of MODELS, or whatever --model_name_or_path takes"""
    vocabulary: int = 0
    """another vocabulary size for a model of MODELS; 0 keeps its own"""
    shape: str = "256/64"
    """prompt/answer tokens, or the name of a distribution in lengths.json"""
    batch: int = 8
    """pairs in a step"""
    steps: int = 4
    """optimizer steps in a block"""
    sort: bool = False
    """batches of similar length, in a shuffled order"""
    dtype: str = "float32"
    use_peft: bool = False
    seed: int = 0

    def lengths(self) -> list[Lengths]:
        """A block's rows in the order they are trained on."""
        found = shape_lengths(self.shape)
        rows = [found[i % len(found)] for i in range(self.steps * self.batch)]
        if not self.sort:
            return rows
        rows.sort(key=lambda row: (row[0] + max(row[1:]), row))
        batches = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        random.Random(self.seed).shuffle(batches)
        return [row for batch in batches for row in batch]


def shape_lengths(shape: str) -> list[Lengths]:
    """The rows of a shape: P/A repeated, or a stored distribution. Raises InputError."""
    found = re.fullmatch(r"(\d+)/(\d+)", shape)
    if found:
        prompt, answer = int(found[1]), int(found[2])
        if prompt < 1 or answer < 1:
            raise InputError(f"{shape} leaves a side without a token", where="--shape", mend="for instance 256/64")
        return [(prompt, answer, answer)] * ROWS
    stored = distributions()
    if shape not in stored:
        names = ", ".join(stored)
        raise InputError(f"unknown shape {shape!r}", where="--shape", mend=f"prompt/answer tokens (96/192), or {names}")
    return [(row[0], row[1], row[2]) for row in stored[shape]["rows"]]


def distributions() -> dict[str, Any]:
    """The stored distributions by name: `about`, how they were drawn, and `rows`."""
    return json.loads(resources.files("prefkit.bench").joinpath(FILE).read_text(encoding="utf-8"))


def drawn(
    *,
    prompt: tuple[float, float, int, int],
    answer: tuple[float, float, int, int],
    shared: float,
    seed: int,
    num: int = ROWS,
) -> list[list[int]]:
    """Log-normal lengths (median, sigma, least, most), rounded and clipped; what lengths.json was made with.

    `shared` is the sigma of a factor that both answers of a row have in common.
    """
    draw = random.Random(seed)

    def length(median: float, sigma: float, least: int, most: int, factor: float = 0.0) -> int:
        value = median * math.exp(sigma * draw.gauss() + factor)
        return min(most, max(least, round(value)))

    rows: list[list[int]] = []
    for _ in range(num):
        factor = shared * draw.gauss()
        rows.append([length(*prompt), length(*answer, factor), length(*answer, factor)])
    return rows


def token_pairs(lengths: list[Lengths], vocabulary: int, seed: int) -> list[Pair]:
    """Pairs of random tokens of the given lengths; every answer ends with EOS."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(FIRST, vocabulary) for _ in range(count)]

    return [
        Pair(
            prompt=ids(prompt),
            chosen=[*ids(chosen - 1), EOS],
            rejected=[*ids(rejected - 1), EOS],
            source=Preference(prompt="", chosen="", rejected="", row=row),
        )
        for row, (prompt, chosen, rejected) in enumerate(lengths)
    ]


def word(token: int) -> str:
    """The word of `word_tokenizer` that stands for a token id."""
    return {PAD: "<pad>", UNKNOWN: "<unk>", EOS: "<eos>"}.get(token, str(token))


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of one word for each token id: text goes to exactly the ids a bench wants, by the usual way in."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word(i): i for i in range(vocabulary)}, unk_token=word(UNKNOWN)))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=word(EOS), pad_token=word(PAD), unk_token=word(UNKNOWN)
    )


def build_model(workload: Workload, config: Any, device: torch.device) -> Any:
    """The model of a workload; random weights depend on its seed alone. Raises InputError."""
    dtype = resolve_dtype(workload.dtype, device)
    if workload.model not in MODELS:
        if workload.vocabulary:
            raise InputError("only a random model can have another vocabulary", where="--vocabulary")
        return loading.load_model(config, config, loading.resolve(workload.model), dtype)
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {**MODELS[workload.model], "max_position_embeddings": 4096, "tie_word_embeddings": True}
    if workload.vocabulary:
        sizes["vocab_size"] = workload.vocabulary
    settings = LlamaConfig(**sizes, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(workload.seed)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    return model.to(dtype) if workload.use_peft else model  # as a run loads frozen weights
