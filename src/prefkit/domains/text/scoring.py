"""From token ids to answer log-probabilities: the only place where text is scored.

A batch is a list of groups (a prompt and its answers). `layout` arranges it as one packed row that holds each prompt
once, or as padded rows; `attention` keeps the answers of a packed row apart; `head` turns the hidden states before the
answer tokens into log-probs. Prompt positions and padding are never multiplied by the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefkit.domains.text import attention
from prefkit.domains.text.head import LogitTransform, TokenScores, chunk_tokens, token_scores
from prefkit.domains.text.layout import Backend, Layout, lay_out
from prefkit.engine.precision import autocast
from prefkit.records import Group

__all__ = [
    "Backend",
    "LanguageModel",
    "Layout",
    "causal_lm",
    "check_scoring",
    "hidden_states",
    "lay_out",
    "logit_transform",
    "spread_tokens",
]


class LanguageModel(nn.Module):
    """A causal LM that returns log-probabilities instead of logits.

    It is the module the learner trains and the engine shards: everything goes through `forward`, so that sharded
    weights are gathered by the module's own hooks.
    """

    def __init__(
        self, model: nn.Module, *, dtype: torch.dtype, logit_scale: float, soft_cap: float, backend: Backend = "padded"
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.logit_scale = logit_scale
        self.soft_cap = soft_cap
        self.backend: Backend = backend
        """how batches are laid out; `backends.choose` sets it"""
        self.chunk = 0
        """most answer tokens whose logits are held at once; 0 takes a share of the device's memory"""
        self.how = ""
        """how batches are laid out and why, for the log"""

    def lay_out(self, groups: Sequence[Group], *, pad: int, device: torch.device | str) -> Layout:
        """The layout this model is scored in."""
        return lay_out(groups, pad, device, backend=self.backend)

    def forward(
        self, layout: Layout, *, temperature: float = 1.0, distributions: bool = False, details: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of a batch's answer tokens, in float32 (float64 for a float64 model).

        Returns (n, t), zero where an answer has ended. With `details` also the entropy of each next-token distribution
        and whether the token was the likeliest one, (n, t) each, without gradient. With `distributions`, (m, v): the
        whole next-token distribution before each answer token.
        """
        transform = LogitTransform(self.logit_scale, self.soft_cap, temperature)
        with autocast(self.dtype, layout.ids.device):
            hidden = hidden_states(causal_lm(self.model).get_decoder(), layout)
            hidden = hidden.flatten(0, 1).index_select(0, layout.before)
            if distributions:
                return self._log_softmax(hidden, transform)
            scores = self._scores(hidden, layout.targets, transform, details)
        if scores.entropy is None or scores.top1 is None:
            return spread_tokens(scores.log_probs, layout)
        return (
            spread_tokens(scores.log_probs, layout),
            spread_tokens(scores.entropy, layout),
            spread_tokens(scores.top1, layout),
        )

    def _scores(self, hidden: Tensor, targets: Tensor, transform: LogitTransform, details: bool) -> TokenScores:
        head = causal_lm(self.model).get_output_embeddings()
        if type(head) is nn.Linear or type(head).__name__ == f"FSDP{nn.Linear.__name__}":
            return token_scores(
                hidden, head.weight, head.bias, targets, transform=transform, chunk=self.chunk, details=details
            )
        return self._scores_of_any_head(hidden, targets, transform, details)

    def _scores_of_any_head(
        self, hidden: Tensor, targets: Tensor, transform: LogitTransform, details: bool
    ) -> TokenScores:
        """For a head that is no plain matrix (an adapter on it, quantised): chunks recomputed in the backward pass."""
        vocabulary = causal_lm(self.model).config.get_text_config().vocab_size
        chunk = self.chunk or chunk_tokens(vocabulary, hidden.device)

        def one(hidden: Tensor, targets: Tensor) -> TokenScores:
            log_softmax = self._log_softmax(hidden, transform)
            found = log_softmax.gather(-1, targets[:, None])[:, 0]
            if not details:
                return TokenScores(found)
            plain = log_softmax.detach()
            entropy = -torch.einsum("mv,mv->m", plain.exp(), plain)
            return TokenScores(found, entropy, (plain.argmax(-1) == targets).float())

        pieces: list[TokenScores] = []
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            again = torch.is_grad_enabled() and len(targets) > chunk
            pieces.append(checkpoint(one, h, t, use_reentrant=False) if again else one(h, t))
        log_probs, *rest = ([value for value in column if value is not None] for column in zip(*pieces, strict=True))
        return TokenScores(torch.cat(log_probs), *(torch.cat(column) if column else None for column in rest))

    def _log_softmax(self, hidden: Tensor, transform: LogitTransform) -> Tensor:
        logits = causal_lm(self.model).get_output_embeddings()(hidden)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) * transform.scale
        if transform.soft_cap:
            logits = torch.tanh(logits / transform.soft_cap) * transform.soft_cap
        if transform.temperature != 1.0:
            logits = logits / transform.temperature
        return logits.log_softmax(-1)


def hidden_states(decoder: Any, layout: Layout) -> Tensor:
    """Last hidden states (r, s, d) of a batch in its layout; final at `layout.rows` only, where it has some."""
    # Our attention is the one that takes the keyword off: without it the rows stay here.
    rows = {} if layout.rows is None or not attention.installed(decoder) else {attention.ROWS: layout.rows}
    if layout.plan is None:
        return decoder(input_ids=layout.ids, use_cache=False, **rows).last_hidden_state
    # A mask of four dimensions is taken as prepared: no mask is built, and the plan decides.
    prepared = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.ids.device)
    found = decoder(
        input_ids=layout.ids,
        position_ids=layout.positions,
        attention_mask=prepared,
        use_cache=False,
        **{attention.PLAN: layout.plan, **rows},
    )
    return found.last_hidden_state


def spread_tokens(values: Tensor, layout: Layout) -> Tensor:
    """(m,) values of answer tokens -> (n, t), zero where an answer has ended."""
    padded = values.new_zeros(layout.num_answers * layout.longest_answer)
    return padded.scatter(0, layout.slots, values).view(layout.num_answers, layout.longest_answer)


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
        whole = torch.tensor([ids], device=device)
        logits = causal_lm(module.model)(input_ids=whole, use_cache=False).logits[0, 3:7]
    plain = logits.float().log_softmax(-1).gather(-1, layout.targets[:, None])[:, 0]
    return float((module(layout)[0] - plain).abs().max())
