"""The sampling engine that `--generator` names."""

from __future__ import annotations

from typing import Any

from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.sampler import Sampler, TransformersSampler


def sampler_for(policy: TextPolicy, config: Any) -> Sampler:
    """The engine of a Config; InputError where vLLM is asked for and not installed."""
    if config.generator == "vllm":
        from prefkit.domains.text.vllm import VllmSampler

        return VllmSampler(policy)
    return TransformersSampler(policy)
