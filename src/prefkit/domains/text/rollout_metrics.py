"""What a batch of episodes was like: all of it, rollouts that were reset and not, and by where they were cut.

Rewards of reset rollouts are those of answers that somebody else began: they are not comparable over reset shares, and
say nothing on the policy's own answers. Evaluation, from empty prefixes, does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefkit.domains.text.rollouts import Columns
from prefkit.objectives.kl_penalty import log_ratio

PARTS = 4
"""of an answer, by which cuts are told apart"""


def sequence_kl(columns: Columns) -> Tensor:
    """(n,) log π - log π_ref of what is counted, summed, in nats."""
    return log_ratio(columns.log_probs, columns.ref_log_probs, columns.counted).sum(-1)


def penalised(columns: Columns, config: Any) -> Tensor:
    """(n,) scores after clipping and the rule for answers without an end."""
    scores = columns.scores
    if config.reward_clip:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    if config.missing_eos == "replace":
        return torch.where(columns.finished, scores, -config.missing_eos_penalty)
    if config.missing_eos == "subtract":
        return torch.where(columns.finished, scores, scores - config.missing_eos_penalty)
    return scores


def summary(columns: Columns, scores: Tensor, *, kl_coef: float, resets: bool) -> dict[str, float]:
    """Means over a batch's rollouts; `scores` are those after penalties. A kind without a rollout has no value."""
    found = _means("", columns, torch.ones_like(columns.finished), kl_coef)
    kl = sequence_kl(columns) if kl_coef else torch.zeros_like(scores)
    found["objective/rlhf_reward"] = float((scores - kl_coef * kl).mean())
    if not resets:
        return found
    reset = columns.resets > 0
    found["rollout/reset_share"] = float(reset.float().mean())
    share = columns.resets / columns.lengths
    kinds = {"plain": ~reset, "reset": reset}
    for part in range(PARTS):
        low, high = part / PARTS, (part + 1) / PARTS
        kinds[f"cut_{low:.0%}_{high:.0%}".replace("%", "")] = reset & (share >= low) & (share < high)
    for kind, places in kinds.items():
        if bool(places.any()):
            found |= _means(f"rollout/{kind}/", columns, places, kl_coef)
    return found


def _means(prefix: str, columns: Columns, places: Tensor, kl_coef: float) -> dict[str, float]:
    """Of some rollouts: under TRL's names for all of them, under `prefix` for a kind."""
    names = {
        "scores": "objective/scores",
        "length": "completions/mean_length",
        "contain_eos_token": "val/contain_eos_token",
    }
    found = {
        "scores": columns.scores[places].mean(),
        "length": columns.lengths[places].mean(),
        "contain_eos_token": columns.finished[places].float().mean(),
    }
    values = {(f"{prefix}{name}" if prefix else names[name]): float(value) for name, value in found.items()}
    if kl_coef:
        values[f"{prefix}kl" if prefix else "objective/kl"] = float(sequence_kl(columns)[places].mean())
    return values
