"""From text to token ids, with the border between prompt and answer exact.

For every answer the full text (prompt + answer) and the prompt are encoded. Where ids(prompt) begins
ids(full), the answer is the rest. Where a token would straddle the border (a BPE merge, a SentencePiece
blank), the answer is encoded apart and taken if prompt ids + answer ids decode to the full text: this is what
the model sees when it continues that prompt. Otherwise the row is refused. So the prompt's ids never depend
on the answer, both answers share them, and `tokenize_prompt` gives the same ids for sampling.

Conversations are rendered by the chat template once; the template places BOS, so none is added. Strings get
the tokens the tokenizer puts in front (BOS) unless the text already has them. A whole answer ends in exactly
one end-of-sequence token; a cut answer has none and is marked. Padding plays no part: pad == eos is harmless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from prefkit.domains.text.encoder import Encoded, Encoder, Ids, LongPrompts, Settings, no_prompt
from prefkit.domains.text.problems import Problem, Where, raise_first, row_name
from prefkit.domains.text.render import (
    encode,
    front_tokens,
    render,
    require_template,
    stop_tokens,
    tokenizer_name,
    with_front,
)
from prefkit.errors import InputError
from prefkit.records import Completion, Example, Pair, Preference, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024
"""rows encoded in one call: long enough to be fast, short enough for memory"""
R = TypeVar("R", Preference, Completion)


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase,
    row: Preference,
    *,
    max_length: int,
    append_eos: bool = True,
    where: Where = row_name,
) -> Pair:
    """One preference in token ids. Raises InputError where the row must be refused."""
    return tokenize_pairs(tokenizer, [row], max_length=max_length, append_eos=append_eos, where=where)[0]


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Preference],
    *,
    max_length: int,
    append_eos: bool = True,
    long_prompts: LongPrompts = "refuse",
    where: Where = row_name,
) -> list[Pair]:
    """Preferences in token ids, in order. Raises InputError for the first refused row.

    With long_prompts "drop", rows whose prompt leaves no room for an answer are left out.
    """
    settings = Settings(max_length, append_eos, long_prompts)
    return [to_pair(row, kept) for row, kept in _kept(tokenizer, rows, settings, where)]


def tokenize_completion(
    tokenizer: PreTrainedTokenizerBase,
    row: Completion,
    *,
    max_length: int,
    append_eos: bool = True,
    where: Where = row_name,
) -> Example:
    """One prompt/completion row in token ids. Raises InputError where the row must be refused."""
    return tokenize_completions(tokenizer, [row], max_length=max_length, append_eos=append_eos, where=where)[0]


def tokenize_completions(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Completion],
    *,
    max_length: int,
    append_eos: bool = True,
    long_prompts: LongPrompts = "refuse",
    where: Where = row_name,
) -> list[Example]:
    """Prompt/completion rows in token ids; as `tokenize_pairs`."""
    settings = Settings(max_length, append_eos, long_prompts)
    return [to_example(row, kept) for row, kept in _kept(tokenizer, rows, settings, where)]


def to_pair(row: Preference, encoded: Encoded) -> Pair:
    return Pair(
        prompt=encoded.prompt,
        chosen=encoded.answers[0],
        rejected=encoded.answers[1],
        chosen_truncated=encoded.truncated[0],
        rejected_truncated=encoded.truncated[1],
        source=row,
    )


def to_example(row: Completion, encoded: Encoded) -> Example:
    return Example(prompt=encoded.prompt, completion=encoded.answers[0], truncated=encoded.truncated[0], source=row)


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, text: Text) -> Ids:
    """Ids a model continues: for the same prompt the very ids `tokenize_pair` gives. Raises InputError."""
    return tokenize_prompts(tokenizer, [text])[0]


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    extras: Sequence[Mapping[str, Any]] | None = None,
    where: Where = row_name,
) -> list[Ids]:
    """Prompts in token ids; `extras` may hold each row's `tools` and `chat_template_kwargs`."""
    require_template(tokenizer, texts)
    rendered: list[str] = []
    for place, text in enumerate(texts):
        row = render(tokenizer, text, (), extras[place] if extras else {})
        if isinstance(row, Problem):
            raise _placed(row, place, where).to_error()
        rendered.append(row[0])
    front = front_tokens(tokenizer)
    bare = encode(tokenizer, rendered)
    prompts = [with_front(ids, front if isinstance(text, str) else []) for text, ids in zip(texts, bare, strict=True)]
    for place, ids in enumerate(prompts):
        if not ids:
            raise _placed(no_prompt(), place, where).to_error()
    return prompts


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Preference | Completion],
    settings: Settings,
    *,
    where: Where = row_name,
) -> list[Encoded | Problem]:
    """Every row in token ids, or what is wrong with it; the form `check` uses.

    A prompt that leaves no room is a Problem of kind "long prompt": a warning where such rows are dropped.
    Raises InputError where no row can be encoded: no chat template for conversations, no EOS token.
    """
    require_template(tokenizer, [row.prompt for row in rows])
    if settings.append_eos and tokenizer.eos_token_id is None:
        where_from = tokenizer_name(tokenizer)
        mend = "set tokenizer.eos_token, or pass --append_eos False"
        raise InputError("has no end-of-sequence token", where=where_from, mend=mend)
    encoder = Encoder(tokenizer, settings)
    results: list[Encoded | Problem] = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        for row, result in zip(chunk, encoder.encode(chunk), strict=True):
            results.append(_placed(result, row.row, where) if isinstance(result, Problem) else result)
    return results


def _kept(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[R], settings: Settings, where: Where
) -> Iterable[tuple[R, Encoded]]:
    results = encode_rows(tokenizer, rows, settings, where=where)
    raise_first(result for result in results if isinstance(result, Problem))
    return [(row, result) for row, result in zip(rows, results, strict=True) if isinstance(result, Encoded)]


def _placed(problem: Problem, row: int, where: Where) -> Problem:
    return Problem(
        kind=problem.kind,
        what=problem.what,
        mend=problem.mend,
        level=problem.level,
        field=problem.field,
        where=where(row),
        row=row,
    )


__all__ = [
    "Encoded",
    "Settings",
    "encode_rows",
    "stop_tokens",
    "to_example",
    "to_pair",
    "tokenize_completion",
    "tokenize_completions",
    "tokenize_pair",
    "tokenize_pairs",
    "tokenize_prompt",
    "tokenize_prompts",
]
