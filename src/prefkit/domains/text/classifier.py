"""Any sequence-classification model with one output as a scorer of answers: read where its own forward pass reads.

A decoder with a linear head is a `RewardModel`: it reads the last token, and many answers share a packed row. Every
other model (an encoder with a pooler, a head of several layers) runs its own forward pass on right-padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from prefkit.domains.text.prompts import plain
from prefkit.domains.text.render import finished
from prefkit.domains.text.reward import RewardModel, require_room
from prefkit.domains.text.scoring import causal_lm
from prefkit.engine.precision import autocast
from prefkit.records import Message, Text


class Scorer(Protocol):
    """A model that gives answers one number each, higher is better."""

    fingerprint: str
    """sha256 of the weights"""

    def judge(self, prompts: Sequence[Text], completions: Sequence[str], *, batch_size: int = 16) -> list[float]: ...


def load_scorer(name: str, *, dtype: str = "auto") -> Scorer:
    """A reward model by folder, run directory or Hub id, ready to score. Raises InputError for what is none."""
    made = RewardModel.load(name, dtype=dtype)
    return made if made.reads_last_token else OwnForward(made)


class OwnForward:
    """Scores by the model's own forward pass, logits[:, 0], with its own tokenizer and template.

    A conversation goes through the chat template where the tokenizer has one. Without one, prompt and answer are the
    two segments of the tokenizer's pair form, `[CLS] prompt [SEP] answer [SEP]` for BERT and its kin, as reward models
    on encoders are trained; a tokenizer that knows no pairs gets prompt and answer in one text.
    """

    def __init__(self, reward: RewardModel) -> None:
        self.model, self.dtype = reward.model, reward.module.dtype
        self.tokenizer, self.device = reward.tokenizer, reward.world.device
        self.fingerprint, self.mean = reward.fingerprint, reward.mean

    @torch.no_grad()
    def judge(self, prompts: Sequence[Text], completions: Sequence[str], *, batch_size: int = 16) -> list[float]:
        """One score per answer, in order. Raises InputError for a prompt that leaves no room for an answer."""
        rows = [self._encode(p, c, row) for row, (p, c) in enumerate(zip(prompts, completions, strict=True))]
        if causal_lm(self.model).config.get_text_config().pad_token_id is None:
            batch_size = 1  # such a model takes one sequence at a time
        scores: list[float] = []
        for start in range(0, len(rows), batch_size):
            batch = self.tokenizer.pad(rows[start : start + batch_size], padding_side="right", return_tensors="pt")
            with autocast(self.dtype, self.device):
                logits = self.model(**batch.to(self.device)).logits
            scores += (logits[:, 0].float() - self.mean).tolist()
        return scores

    def _encode(self, prompt: Text, answer: str, row: int) -> dict[str, list[int]]:
        """The tokenizer's fields of one row, the answer cut at the model's context."""
        tokenizer, longest = self.tokenizer, self._context()
        templated = False
        first, text = _alone(prompt), _alone(prompt) + answer
        if not isinstance(prompt, str) and tokenizer.chat_template:
            templated = True
            first, text = finished(tokenizer, prompt, answer)
        bare, paired = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
        added = 0 if templated else max(bare, paired)
        used = len(tokenizer(first, add_special_tokens=False)["input_ids"])
        require_room(used, longest, row, added=added)
        if paired <= bare or templated:
            cut: dict[str, Any] = {"truncation": True, "max_length": longest}
            return dict(tokenizer(text, add_special_tokens=not templated, **cut))
        return dict(tokenizer(first, answer, truncation="only_second", max_length=longest))

    def _context(self) -> int:
        """Most tokens of a row: the tokenizer's limit where it names one, for some models count places from 2."""
        config = causal_lm(self.model).config.get_text_config()
        positions = int(getattr(config, "max_position_embeddings", 0) or 0) or 1 << 20
        return min(int(self.tokenizer.model_max_length), positions)


def _alone(prompt: Text) -> str:
    """A prompt as one text: what a lone user turn says, or the turns with their roles."""
    turns: Sequence[Message] = [] if isinstance(prompt, str) else prompt
    if len(turns) == 1:
        return str(turns[0]["content"])
    return plain(prompt)


def label(name: str) -> str:
    """A short name for a model given as path or Hub id, for records that must not hold anybody's folders."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name
