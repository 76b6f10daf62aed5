"""What a tokenizer puts around text: the chat template, tokens in front, the token that closes a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefkit.domains.text.problems import Problem
from prefkit.errors import InputError
from prefkit.records import Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "qzxprobe"


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text alone: nothing added in front or behind, nothing padded or cut."""
    if not texts:
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,  # a text longer than the model's context is our caller's to judge
    )["input_ids"]


def front_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens the tokenizer puts before a plain text: [BOS], or nothing."""
    bare = encode(tokenizer, ["a"])[0]
    full: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    raise InputError(
        "encodes the letter a differently with and without special tokens",
        where=tokenizer_name(tokenizer),
        mend="use the tokenizer that belongs to the model",
    )


def with_front(ids: list[int], front: Sequence[int]) -> list[int]:
    """`ids` with `front` before it, unless the text already spelled it out."""
    return ids if ids[: len(front)] == list(front) else [*front, *ids]


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: EOS, and the special token with which the chat template closes a turn.

    Most templates close with EOS itself; where EOS stands behind the turn's own token, only EOS counts.
    """
    eos: int | None = tokenizer.eos_token_id  # pyright: ignore[reportAssignmentType]
    turn = _turn_end(tokenizer, eos)
    return tuple(token for token in (eos, turn) if token is not None)


def _turn_end(tokenizer: PreTrainedTokenizerBase, eos: int | None) -> int | None:
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    text = _template(tokenizer, turns, {}, generation=False)
    if isinstance(text, Problem):
        return None
    tail = encode(tokenizer, [text[text.rfind(_PROBE) + len(_PROBE) :]])[0]
    if eos in tail:
        return None
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in tail if token in special), None)


def require_template(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> None:
    """Raise InputError if a conversation is to be rendered and the tokenizer has no chat template."""
    if not tokenizer.chat_template and any(not isinstance(text, str) for text in texts):
        raise InputError(
            "the data holds conversations, but this tokenizer has no chat template",
            where=tokenizer_name(tokenizer),
            mend="take the instruct variant of the model, put a chat_template.jinja file into its folder, "
            "or write prompt and answers as plain strings",
        )


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path or "tokenizer")


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, answers: Sequence[Text], extra: Mapping[str, Any]
) -> list[str] | Problem:
    """[text of the prompt, prompt + answer for every answer], the chat template applied once to each.

    The row's `tools` and `chat_template_kwargs` reach the template. A Problem says that the template refuses
    the conversation, or renders the prompt differently once an answer follows, so that no border exists.
    """
    if isinstance(prompt, str):
        assert all(isinstance(answer, str) for answer in answers)
        return [prompt, *(prompt + answer for answer in answers if isinstance(answer, str))]
    start = _template(tokenizer, prompt, extra, generation=True)
    if isinstance(start, Problem):
        return start
    texts = [start]
    for answer in answers:
        assert not isinstance(answer, str)
        text = _template(tokenizer, [*prompt, *answer], extra, generation=False)
        if isinstance(text, Problem):
            return text
        if not text.startswith(start):
            return Problem(
                kind="border",
                what="the chat template renders the prompt differently once an answer follows "
                f"({_difference(start, text)})",
                mend="use a template whose generation prompt begins every answer, "
                "or pass its options in a chat_template_kwargs column",
                field="prompt",
            )
        texts.append(text)
    return texts


def finished(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answer: str) -> tuple[str, str]:
    """(text that a model would continue, the finished conversation to its very end), as the chat template writes them.

    Raises InputError where there is no chat template or it refuses the conversation.
    """
    require_template(tokenizer, [prompt])
    turns = [*prompt, {"role": "assistant", "content": answer}]
    texts: list[str] = []
    for messages, generation in ((prompt, True), (turns, False)):
        text = _template(tokenizer, messages, {}, generation=generation)
        if isinstance(text, Problem):
            raise text.to_error()
        texts.append(text)
    return texts[0], texts[1]


def _template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    extra: Mapping[str, Any],
    *,
    generation: bool,
) -> str | Problem:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=extra.get("tools") or None,
            add_generation_prompt=generation,
            tokenize=False,
            **(extra.get("chat_template_kwargs") or {}),
        )
    except (TemplateError, ValueError, TypeError) as error:
        what = f"the chat template refuses this conversation: {error}"
        return Problem(kind="template", what=what, mend="write the turns the template expects", field="prompt")
    assert isinstance(text, str)
    return text


def _difference(start: str, text: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(start, text, strict=False)) if a != b), len(text))
    return f"{start[place : place + 24]!r} becomes {text[place : place + 24]!r}"
