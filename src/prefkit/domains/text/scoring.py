"""From token ids to answer log-probabilities: the only place where text is scored.

A batch is a list of groups (a prompt and its answers). Each answer becomes one right-padded row `prompt + answer`;
under causal attention a token never sees what stands to its right, so padding needs no mask and changes nothing.
Only the hidden states that predict answer tokens reach the output head, as one flat matrix: prompt positions and
padding are never multiplied by the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefkit.engine.precision import autocast
from prefkit.records import Group

CHUNK_ELEMENTS = 2**27
"""largest tokens x vocabulary matrix held at once; beyond it the head runs in recomputed chunks"""


@dataclass(frozen=True)
class Layout:
    """Where each answer token of a batch stands. n answers, s tokens a row, m answer tokens in all."""

    ids: Tensor
    """(n, s) token ids, right-padded"""
    before: Tensor
    """(m,) flat position, in (n * s), of the token that predicts each answer token"""
    targets: Tensor
    """(m,) the answer tokens"""
    slots: Tensor
    """(m,) flat position of each answer token in the padded (n, t) result"""
    num_answers: int
    longest_answer: int


def lay_out(groups: Sequence[Group], pad: int, device: torch.device | str = "cpu") -> Layout:
    """Arrange every answer of every group as one right-padded row.

    Raises ValueError for an empty prompt (nothing predicts the first answer token) or an empty answer.
    """
    rows = [(list(g.prompt), list(a)) for g in groups for a in g.answers]
    for index, (prompt, answer) in enumerate(rows):
        if not prompt or not answer:
            raise ValueError(f"answer {index} of the batch has an empty {'answer' if prompt else 'prompt'}")
    length = max(len(p) + len(a) for p, a in rows)
    longest = max(len(a) for _, a in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    before, slots, targets = [], [], []
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        start = i * length + len(prompt) - 1
        before.append(torch.arange(start, start + len(answer)))
        slots.append(torch.arange(i * longest, i * longest + len(answer)))
        targets.extend(answer)
    return Layout(
        ids.to(device),
        torch.cat(before).to(device),
        torch.tensor(targets, device=device),
        torch.cat(slots).to(device),
        len(rows),
        longest,
    )


class LanguageModel(nn.Module):
    """A causal LM that returns log-probabilities instead of logits.

    It is the module the learner trains and the engine shards: everything goes through `forward`, so that sharded
    weights are gathered by the module's own hooks.
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, logit_scale: float, soft_cap: float) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.logit_scale = logit_scale
        self.soft_cap = soft_cap

    def forward(self, layout: Layout, *, temperature: float = 1.0, distributions: bool = False) -> Tensor:
        """Log-probabilities of a batch's answer tokens, in float32.

        Returns (n, t), zero where an answer has ended; with `distributions`, (m, v): the whole next-token
        distribution before each answer token.
        """
        base = causal_lm(self.model)
        with autocast(self.dtype, layout.ids.device):
            hidden = base.get_decoder()(input_ids=layout.ids, use_cache=False).last_hidden_state
            hidden = hidden.flatten(0, 1).index_select(0, layout.before)
            if distributions:
                return self._log_softmax(hidden, temperature)
            token_log_probs = self._token_log_probs(hidden, layout.targets, temperature)
        padded = token_log_probs.new_zeros(layout.num_answers * layout.longest_answer)
        padded = padded.scatter(0, layout.slots, token_log_probs)
        return padded.view(layout.num_answers, layout.longest_answer)

    def _log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        logits = causal_lm(self.model).get_output_embeddings()(hidden).float() * self.logit_scale
        if self.soft_cap:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        if temperature != 1.0:
            logits = logits / temperature
        return logits.log_softmax(-1)

    def _chunk(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return self._log_softmax(hidden, temperature).gather(-1, targets[:, None])[:, 0]

    def _token_log_probs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        vocabulary = causal_lm(self.model).config.get_text_config().vocab_size
        chunk = max(1, CHUNK_ELEMENTS // vocabulary)
        if len(targets) <= chunk:
            return self._chunk(hidden, targets, temperature)
        pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._chunk(h, t, temperature) for h, t in pieces])
        # Recomputed in the backward pass, so that the memory peak is one chunk of the vocabulary matrix.
        return torch.cat([checkpoint(self._chunk, h, t, temperature, use_reentrant=False) for h, t in pieces])


def causal_lm(model: nn.Module) -> Any:
    """The transformers model itself, with any LoRA layers inside it but without peft's wrapper."""
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model


def logit_transform(config: object) -> tuple[float, float]:
    """(factor, soft cap) that a model applies to its logits after the head; (1, 0) for most models."""
    scale = 1.0
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale /= float(divisor)
    if (factor := getattr(config, "logit_scale", None)) is not None:
        scale *= float(factor)
    return scale, float(getattr(config, "final_logit_softcapping", None) or 0.0)


@torch.no_grad()
def check_scoring(module: LanguageModel, *, pad: int, vocabulary: int) -> float:
    """Largest difference between our log-probs and a plain forward pass of the model, on one fixed sequence.

    A model that transforms its logits in a way we do not know would train on a wrong objective.
    """
    device = next(module.parameters()).device
    ids = [(7 * i + 3) % vocabulary for i in range(8)]
    layout = lay_out([Group(ids[:4], [ids[4:]])], pad, device)
    with autocast(module.dtype, device):
        logits = causal_lm(module.model)(input_ids=layout.ids, use_cache=False).logits[0, 3:7]
    plain = logits.float().log_softmax(-1).gather(-1, layout.targets[:, None])[:, 0]
    return float((module(layout)[0] - plain).abs().max())
