"""Tiny tokenizers trained in the test run: one of each family whose borders and special tokens differ.

(The module is not called `tokenizers`: with tests/ on the path that name would hide the library.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
CORPUS = [
    "The sky is blue and the sea is green.",
    "What is the capital of France? The capital of France is Paris.",
    "Question: how many? Answer: 14 or 15, perhaps 16.",
    "A good film about a town and its people, well acted and never dull.",
    "A bad film, slow and far too long; nobody laughed at all.",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.",
    "user assistant system\nHello! Tell me a story.\n\nOnce upon a time",
]


def _bytes(specials: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def byte_bpe(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE like GPT-2's: bos == eos == pad, nothing put in front, every text round-trips."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_bytes(["<|endoftext|>"], vocab_size),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def chatml(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template, eos == pad == <|im_end|>, a line break behind every turn."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bytes(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], vocab_size),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def sentencepiece(*, template: bool = False) -> PreTrainedTokenizerFast:
    """Unigram over ▁-joined words like Llama-2's: BOS put in front, a blank put before the text it encodes.

    With `template` conversations render as [INST] ... [/INST] and the template itself writes BOS.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    letters = sorted({char for text in CORPUS for char in text if char != " "} | set("▁0123456789:[]/\n"))
    letters += [char for char in map(chr, range(33, 127)) if char not in letters]
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    if template:
        made.chat_template = WITH_BOS
    return made


def whole_words(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word is one token and blanks are lost: a border inside a word cannot be kept."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["</s>", *words])}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


@lru_cache(maxsize=1)
def families() -> dict[str, PreTrainedTokenizerFast]:
    """One of each, shared by tests that do not change them."""
    return {"byte_bpe": byte_bpe(), "chatml": chatml(), "sentencepiece": sentencepiece()}
