"""The rules of tokenization for one row: where the answer's ids begin and how they end (see `tokenize`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prefkit.domains.text.problems import Problem
from prefkit.domains.text.render import encode, front_tokens, render, stop_tokens, with_front
from prefkit.records import Completion, Preference, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LongPrompts = Literal["refuse", "drop"]
Ids = list[int]


@dataclass(frozen=True)
class Settings:
    """How rows become ids. `max_length` counts prompt + answer tokens, the end-of-sequence token included."""

    max_length: int = 1024
    append_eos: bool = True
    long_prompts: LongPrompts = "refuse"
    context: int = 0
    """most tokens the model takes, 0 for any number"""

    @property
    def limit(self) -> int:
        """Most tokens of a row."""
        return min(self.max_length, self.context) if self.context else self.max_length

    def named(self) -> str:
        """The limit with what sets it."""
        if self.limit < self.max_length:
            return f"the model's context of {self.limit} tokens"
        return f"max_length {self.limit}"


@dataclass(frozen=True)
class Encoded:
    """One row in token ids; `apart` says that an answer was encoded apart from its prompt."""

    prompt: Ids
    answers: tuple[Ids, ...]
    truncated: tuple[bool, ...]
    apart: bool = False


class Encoder:
    """The tokenizer with what is asked of it for every row, found out once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.front = front_tokens(tokenizer)
        self.eos: int = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self.stops = frozenset(stop_tokens(tokenizer))

    def decode(self, ids: Ids) -> str:
        """The text of `ids`, special tokens and blanks as they are."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def encode(self, rows: Sequence[Preference | Completion]) -> list[Encoded | Problem]:
        rendered = [render(self.tokenizer, row.prompt, _answers(row), row.extra) for row in rows]
        texts = list(dict.fromkeys(text for row in rendered if not isinstance(row, Problem) for text in row))
        ids = dict(zip(texts, encode(self.tokenizer, texts), strict=True))
        self._encode_answers(rendered, ids)
        return [
            one if isinstance(one, Problem) else self._row(row, one, ids)
            for row, one in zip(rows, rendered, strict=True)
        ]

    def _row(self, row: Preference | Completion, texts: Sequence[str], ids: Mapping[str, Ids]) -> Encoded | Problem:
        chat = not isinstance(row.prompt, str)
        bare = ids[texts[0]]
        prompt = with_front(bare, [] if chat else self.front)
        whole = [ids[text] for text in texts[1:]]
        if not prompt and isinstance(row, Completion) and whole[0]:
            # nothing precedes the first token, so it cannot be predicted: it becomes the prompt
            prompt, bare = whole[0][:1], whole[0][:1]
        if not prompt:
            return no_prompt()
        room = self.settings.limit - len(prompt)
        if room < 1:
            return self._long(len(prompt))
        answers: list[Ids] = []
        truncated: list[bool] = []
        apart = False
        for field, full, text in zip(_fields(row), whole, texts[1:], strict=True):
            beside = not _begins(full, bare)
            answer = self._apart(bare, texts[0], text, ids) if beside else full[self._border(bare, full, chat) :]
            if answer is None:
                return _straddles(field)
            apart |= beside
            ended = self._ended(answer, turns=_turns(row, field))
            if ended is None:
                return _stop_inside(field)
            answers.append(ended[:room])
            truncated.append(len(ended) > room)
        return Encoded(prompt, tuple(answers), tuple(truncated), apart)

    def _border(self, bare: Ids, full: Ids, chat: bool) -> int:
        """Where the answer begins in the full ids: behind the prompt, which may be no more than the front tokens."""
        spelled_out = not bare and not chat and _begins(full, self.front)
        return len(self.front) if spelled_out else len(bare)

    def _encode_answers(self, rendered: Iterable[list[str] | Problem], ids: dict[str, Ids]) -> None:
        """Add ids of the answers to be encoded apart from their prompts: alone and behind a line break."""
        apart: dict[str, None] = {"\n": None}
        for texts in rendered:
            if isinstance(texts, Problem):
                continue
            for full in texts[1:]:
                if not _begins(ids[full], ids[texts[0]]):
                    answer = full[len(texts[0]) :]
                    apart |= {answer: None, "\n" + answer: None}
        missing = [text for text in apart if text not in ids]
        ids.update(zip(missing, encode(self.tokenizer, missing), strict=True))

    def _apart(self, prompt: Ids, prompt_text: str, full_text: str, ids: Mapping[str, Ids]) -> Ids | None:
        """The answer's own ids where prompt + answer reads exactly as the full text does, else None.

        A tokenizer that puts a blank before every text it encodes gets the answer behind a line break, which
        is then cut off again.
        """
        answer = full_text[len(prompt_text) :]
        line, behind = ids["\n"], ids["\n" + answer]
        wanted = self.decode(ids[full_text])
        for candidate in (ids[answer], behind[len(line) :] if _begins(behind, line) else None):
            if candidate and self.decode(prompt + candidate) == wanted:
                return candidate
        return None

    def _ended(self, answer: Ids, *, turns: int | None) -> Ids | None:
        """The answer closed by one stop token; None if a stop token stands inside it, or twice at its end.

        `turns`: how many stop tokens it may have; None for any number, as in text that holds a whole conversation.
        """
        stops = [place for place, token in enumerate(answer) if token in self.stops]
        behind = answer[stops[-1] + 1 :] if stops else answer
        closed = bool(stops) and (not behind or not self.decode(behind).strip())
        if turns is None:
            twice = len(stops) > 1 and answer[stops[-1]] == answer[stops[-1] - 1]
            if closed and twice:
                return None
        elif len(stops) > turns or (len(stops) == turns and not closed):
            return None
        if closed:
            return answer[: stops[-1] + 1] if self.settings.append_eos else answer[: stops[-1]]
        return [*answer, self.eos] if self.settings.append_eos else answer

    def _long(self, tokens: int) -> Problem:
        raised = "" if self.settings.limit < self.settings.max_length else f"raise --max_length above {tokens}, "
        return Problem(
            kind="long prompt",
            level="warning" if self.settings.long_prompts == "drop" else "error",
            what=f"the prompt has {tokens} tokens, which leaves no room for an answer in {self.settings.named()}",
            mend=f"{raised}shorten it, or pass --long_prompts drop",
            field="prompt",
        )


def _answers(row: Preference | Completion) -> tuple[Text, ...]:
    return (row.chosen, row.rejected) if isinstance(row, Preference) else (row.completion,)


def _fields(row: Preference | Completion) -> tuple[str, ...]:
    return ("chosen", "rejected") if isinstance(row, Preference) else ("completion",)


def _turns(row: Preference | Completion, field: str) -> int | None:
    """Stop tokens an answer may have: one a message; any number in a `text` row, which may hold many turns."""
    answer: Text = getattr(row, field)
    if not isinstance(answer, str):
        return len(answer)
    return None if isinstance(row, Completion) and not row.prompt else 1


def _begins(full: Ids, prompt: Ids) -> bool:
    return full[: len(prompt)] == prompt


def no_prompt() -> Problem:
    return Problem(
        kind="empty",
        what="the prompt is empty and this tokenizer puts no token in front: nothing to continue",
        mend="give the row a prompt",
        field="prompt",
    )


def _straddles(field: str) -> Problem:
    return Problem(
        kind="border",
        what="a token straddles the border between prompt and answer, and apart they read otherwise",
        mend="move the blank at the border from the prompt's end to the answer's start, or the other way",
        field=field,
    )


def _stop_inside(field: str) -> Problem:
    return Problem(
        kind="stop token",
        what="the end-of-sequence token stands inside the answer, or twice at its end",
        mend="remove it from the text; it is added once, where the answer ends",
        field=field,
    )
