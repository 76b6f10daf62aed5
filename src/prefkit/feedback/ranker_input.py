"""What a pairwise ranker reads: a source and two candidates as one row of tokens, and where its features stand.

The form is PairRM's (LLM-Blender, arXiv 2306.02561, and its published code):

    [CLS] <|source|> x [SEP] [CLS] <|candidate1|> y1 [SEP] [CLS] <|candidate2|> y2 [SEP]

Each of the three parts is encoded by itself with the tokens its tokenizer puts around a text. A source is cut to
`source_maxlength` tokens, [CLS], marker and [SEP] included; the candidates share what it leaves of
source_maxlength + 2 candidate_maxlength. Texts cannot forge a marker: special tokens spelled out in them become blanks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prefkit.errors import InputError
from prefkit.records import Text

SOURCE, FIRST, SECOND, EITHER = "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"
MARKERS = (SOURCE, FIRST, SECOND, EITHER)
"""in the order in which the published tokenizer numbers them; the last stands for either candidate"""
FILL_IN = (
    "Finish the following coversation in each i-th turn by filling in <Response i> with your response."  # as published
)

Side = Literal["left", "right"]
ReadOut = Literal["markers", "ends"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a ranker's rows are built and read."""

    source_maxlength: int = 1224
    """most tokens of a source"""
    candidate_maxlength: int = 412
    """most tokens of a candidate beside a source of full length"""
    read_out: ReadOut = "markers"
    """features stand at the three markers (PairRM), or at the ends of the three parts (causal models)"""
    cut_source: Side = "right"
    """side on which a long source loses tokens; the published weights saw it cut on the right"""

    @property
    def longest(self) -> int:
        """Most tokens of a row."""
        return self.source_maxlength + 2 * self.candidate_maxlength


@dataclass(frozen=True)
class Part:
    """A source or a candidate in token ids: `front` ends with its marker, `body` may be cut, `tail` closes it."""

    front: tuple[int, ...]
    body: tuple[int, ...]
    tail: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.front) + len(self.body) + len(self.tail)

    def cut(self, most: int, side: Side) -> Part:
        """At most `most` tokens; the body alone gives way."""
        over = len(self) - most
        if over <= 0:
            return self
        keep = max(0, len(self.body) - over)
        body = self.body[len(self.body) - keep :] if side == "left" else self.body[:keep]
        return Part(self.front, body, self.tail)


@dataclass(frozen=True)
class Row:
    """One row of tokens, and the three places its features are read at: source, first and second candidate."""

    ids: tuple[int, ...]
    places: tuple[int, int, int]
    cut_source: bool = False
    cut_first: bool = False
    cut_second: bool = False


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: ids and mask (b, length), places (b, 3)."""

    ids: Tensor
    mask: Tensor
    places: Tensor


class Reader:
    """Turns texts into rows with a tokenizer that knows the markers. Raises InputError for one that cannot."""

    def __init__(self, tokenizer: Any, form: Form) -> None:
        self.tokenizer, self.form = tokenizer, form
        known = tokenizer.get_added_vocab()
        self.markers = {marker: int(known[marker]) for marker in MARKERS if marker in known}
        end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        if end is None or len(self.markers) < len(MARKERS):
            raise InputError(
                "the tokenizer has no separator or end token"
                if end is None
                else "the tokenizer does not know the ranker's markers " + " ".join(MARKERS),
                where=str(tokenizer.name_or_path or "tokenizer"),
                mend="keep the tokenizer that was saved with the ranker in its folder",
            )
        self.end = int(end)
        pad = tokenizer.pad_token_id
        self.pad = self.end if pad is None else int(pad)
        special = {*tokenizer.all_special_tokens, *MARKERS}
        special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile("|".join(re.escape(word) for word in sorted(special, key=lambda w: (-len(w), w))))
        room = min(len(self.parts([""], marker)[0]) for marker in (SOURCE, EITHER))
        if form.source_maxlength <= room or form.candidate_maxlength <= room:
            raise InputError(
                f"{form.source_maxlength} source and {form.candidate_maxlength} candidate tokens leave no text: each "
                f"part has {room} tokens of its own",
                where="--source_maxlength / --candidate_maxlength",
                mend="raise them",
            )

    def sources(self, texts: Sequence[str]) -> list[Part]:
        return self.parts(texts, SOURCE)

    def candidates(self, texts: Sequence[str]) -> list[Part]:
        return self.parts(texts, EITHER)

    def parts(self, texts: Sequence[str], marker: str) -> list[Part]:
        """Each text behind `marker`, uncut."""
        if not texts:
            return []
        spelled = [marker + self._special.sub(" ", text) for text in texts]
        encoded = self.tokenizer(spelled, padding=False, truncation=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return [self._part(tuple(ids), self.markers[marker]) for ids in encoded]

    def _part(self, ids: tuple[int, ...], marker: int) -> Part:
        place = ids.index(marker)
        rest = ids[place + 1 :]
        # A tokenizer that closes no text (most causal models') gets its end token here, as in the published code.
        body = rest[:-1] if rest and rest[-1] == self.end else rest
        return Part(ids[: place + 1], body, (self.end,))

    def row(self, source: Part, first: Part, second: Part) -> Row:
        """One row; `first` and `second` are candidates, which get their own markers here."""
        kept = source.cut(self.form.source_maxlength, self.form.cut_source)
        room = (self.form.longest - len(kept)) // 2
        one, two = first.cut(room, "right"), second.cut(room, "right")
        swapped = (self._marked(one, FIRST), self._marked(two, SECOND))
        parts = (kept, *swapped)
        starts = (0, len(kept), len(kept) + len(one))
        if self.form.read_out == "markers":
            found = [start + len(part.front) - 1 for start, part in zip(starts, parts, strict=True)]
        else:
            found = [start + len(part) - 1 for start, part in zip(starts, parts, strict=True)]
        return Row(
            tuple(token for part in parts for token in (*part.front, *part.body, *part.tail)),
            (found[0], found[1], found[2]),
            cut_source=len(kept) < len(source),
            cut_first=len(one) < len(first),
            cut_second=len(two) < len(second),
        )

    def _marked(self, part: Part, marker: str) -> Part:
        return Part((*part.front[:-1], self.markers[marker]), part.body, part.tail)

    def batch(self, rows: Sequence[Row], device: torch.device | str) -> Batch:
        length = max(len(row.ids) for row in rows)
        ids = [[*row.ids, *[self.pad] * (length - len(row.ids))] for row in rows]
        mask = [[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in rows]
        return Batch(
            torch.tensor(ids, device=device),
            torch.tensor(mask, device=device),
            torch.tensor([row.places for row in rows], device=device),
        )


def texts_of(prompt: Text, answers: Sequence[Text]) -> tuple[str, list[str]]:
    """The source and the candidates as text, in the published form.

    A string stays as it is. Of a conversation with one user turn, the source is what the user says; a system turn goes
    before it on a line of its own (ours). Longer conversations take the form of LLM-Blender's `compare_conversations`:
    the source has a numbered blank in place of every reply, a candidate is all replies in order, its own the last.
    """
    words = [answer if isinstance(answer, str) else _said(answer) for answer in answers]
    if isinstance(prompt, str):
        return prompt, words
    system = [_content(turn) for turn in prompt if turn["role"] in ("system", "developer")]
    turns = [turn for turn in prompt if turn["role"] not in ("system", "developer")]
    if all(turn["role"] == "user" for turn in turns):
        return "\n".join([*system, *map(_content, turns)]), words
    lines, replies = [*system], list[str]()
    for turn in turns:
        if turn["role"] == "assistant":
            replies.append(f"<Response {len(replies) + 1}>: {_content(turn)}")
            lines.append(f"Assistant: <Response {len(replies)}>")
        else:
            lines.append(f"{turn['role'].upper()}: {_content(turn)}")
    last = len(replies) + 1
    lines.append(f"Assistant: <Response {last}>")
    return FILL_IN + "\n".join(lines), ["\n".join([*replies, f"<Response {last}>: {word}"]) for word in words]


def _content(turn: Any) -> str:
    return turn.get("content") or ""


def _said(answer: Any) -> str:
    return "\n".join(_content(turn) for turn in answer)
