"""What a model takes the next token to be among a few letters: the model's side of a judge that answers A or B.

A prompt is plain text, or a conversation whose last turn, the assistant's, is begun and goes on with the letter. The
letter is " A" or "A": the form that is a single token behind the prompt's own tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from prefkit.domains.text.encoder import Ids
from prefkit.domains.text.packing import num_tokens, passes
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.problems import Problem
from prefkit.domains.text.render import encode, front_tokens, render, require_template, tokenizer_name, with_front
from prefkit.domains.text.sampler import context_of
from prefkit.domains.text.scoring import LanguageModel
from prefkit.engine.sharding import gathered
from prefkit.errors import InputError
from prefkit.records import Group, Text

__all__ = ["LETTERS", "Active", "LetterReader", "letter_tokens", "next_token_log_probs", "prompt_ids", "rendered"]

LETTERS = ("A", "B")
TAIL = 24
"""characters at a prompt's end that decide how a letter behind it is encoded"""

Active = Callable[[], AbstractContextManager[LanguageModel]]
"""puts the weights to be read in place for a block: `policy.reference.active`, an average's, or the policy's own"""


def rendered(tokenizer: Any, text: Text, extra: Mapping[str, Any] | None = None) -> str:
    """The text the model reads: a string as it is, a conversation by the chat template, a begun last turn appended.

    Raises InputError where there is no chat template or it refuses the conversation.
    """
    if isinstance(text, str):
        return text
    require_template(tokenizer, [text])
    begun = bool(text) and text[-1]["role"] == "assistant"
    found = render(tokenizer, text[:-1] if begun else text, (), extra or {})
    if isinstance(found, Problem):
        raise found.to_error()
    return found[0] + (str(text[-1].get("content") or "") if begun else "")


def prompt_ids(tokenizer: Any, texts: Sequence[Text]) -> list[Ids]:
    """Token ids of each prompt; plain text gets what the tokenizer puts in front."""
    front = front_tokens(tokenizer)
    bare = encode(tokenizer, [rendered(tokenizer, text) for text in texts])
    return [with_front(ids, front if isinstance(text, str) else []) for text, ids in zip(texts, bare, strict=True)]


def letter_tokens(tokenizer: Any, prompt: str, letters: Sequence[str] = LETTERS) -> tuple[int, ...]:
    """The token of each letter as it stands behind `prompt`, all with a blank before them or all without.

    Raises InputError where some letter is not one token there: its probability could not be read off.
    """
    open_end = not prompt or prompt[-1].isspace() or prompt[-1] in "([{\"'"
    for blank in ("", " ") if open_end else (" ", ""):
        bare, *full = encode(tokenizer, [prompt, *(prompt + blank + letter for letter in letters)])
        tokens = [ids[len(bare) :] for ids in full if ids[: len(bare)] == bare]
        if all(len(token) == 1 for token in tokens) and len({token[0] for token in tokens}) == len(letters):
            return tuple(token[0] for token in tokens)
    raise InputError(
        f"{' and '.join(letters)} are not single tokens behind {prompt[-TAIL:]!r}",
        where=tokenizer_name(tokenizer),
        mend="give a --judge_template whose reply begins otherwise, without a blank at its end",
    )


@torch.no_grad()
def next_token_log_probs(
    policy: TextPolicy,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    *,
    active: Active | None = None,
    batch_size: int = 16,
    tokens_per_batch: int = 0,
) -> list[list[float]]:
    """Log-probability of every choice as next token, in nats, over the whole vocabulary.

    Args:
        prompts: token ids, not empty, each at least one token shorter than the model's context.
        choices: token ids to ask about, for each prompt; equally many for all.
        active: whose weights; None takes the policy's current ones.
        batch_size, tokens_per_batch: prompts of a forward pass, as in training.

    With sharded weights a collective call: every process makes it, with prompts or without.
    """
    groups = [Group(prompt, [[token] for token in tokens]) for prompt, tokens in zip(prompts, choices, strict=True)]
    order = sorted(range(len(groups)), key=lambda i: (num_tokens(groups[i]), i))
    sizes = [num_tokens(groups[i]) for i in order]
    # A prompt longer than a whole pass has one of its own: nothing is trained on it.
    budget = max([tokens_per_batch, *sizes]) if tokens_per_batch else 0
    found: list[list[float]] = [[] for _ in groups]
    with (active or (lambda: nullcontext(policy.module)))() as module, gathered(module):
        for piece in passes(sizes, rows=batch_size, budget=budget):
            part = [order[place] for place in piece]
            layout = module.lay_out(
                [groups[i] for i in part], pad=policy.tokenizer.pad_token_id, device=policy.world.device
            )
            rows = module(layout)[:, 0].view(len(part), -1).tolist()
            for i, row in zip(part, rows, strict=True):
                found[i] = row
    return found


class LetterReader:
    """Prompts -> (log-prob of A, of B, mass of both) by a policy's weights; None for one that passes its context.

    The `Ask` of a self-judge. It draws nothing and keeps no gradient.
    """

    def __init__(
        self,
        policy: TextPolicy,
        *,
        active: Active | None = None,
        letters: tuple[str, str] = LETTERS,
        batch_size: int = 16,
        tokens_per_batch: int = 0,
    ) -> None:
        self.policy, self.active, self.letters = policy, active, letters
        self.batch_size, self.tokens_per_batch = batch_size, tokens_per_batch
        self._tokens: dict[tuple[str, bool], tuple[int, ...]] = {}

    def __call__(self, prompts: Sequence[Text]) -> list[tuple[float, float, float] | None]:
        """Raises InputError for a prompt the chat template refuses, and letters that are no single tokens."""
        ids = prompt_ids(self.policy.tokenizer, prompts)
        context = context_of(self.policy)
        fitting = [i for i, tokens in enumerate(ids) if not context or len(tokens) < context]
        found: list[tuple[float, float, float] | None] = [None] * len(ids)
        read = next_token_log_probs(
            self.policy,
            [ids[i] for i in fitting],
            [self._letters_behind(prompts[i]) for i in fitting],
            active=self.active,
            batch_size=self.batch_size,
            tokens_per_batch=self.tokens_per_batch,
        )
        for i, (one, other) in zip(fitting, read, strict=True):
            found[i] = (one, other, math.exp(one) + math.exp(other))
        return found

    def _letters_behind(self, prompt: Text) -> tuple[int, ...]:
        """Found out once for each ending: answers inside a prompt do not change how its last words are encoded."""
        text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")
        key = (text[-TAIL:], isinstance(prompt, str))
        if key not in self._tokens:
            tokenizer = self.policy.tokenizer
            self._tokens[key] = letter_tokens(tokenizer, rendered(tokenizer, prompt), self.letters)
        return self._tokens[key]
