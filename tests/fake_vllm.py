"""vLLM's public interface, as far as prefkit uses it, over plain transformers: what it holds is what was pushed to it.

It reads weights from the folders it is given and from nowhere else, keeps an adapter by its number as vLLM does, and
draws by its own generator.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(kw_only=True)
class SamplingParams:
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None


@dataclass(kw_only=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Logprob:
    logprob: float


@dataclass
class Completion:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class RequestOutput:
    outputs: list[Completion]


class LLM:
    """One engine; `made` lists all of them."""

    made: ClassVar[list[LLM]] = []

    def __init__(self, model: str, **options: Any) -> None:
        self.options = options
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
        self.adapters: dict[int, Any] = {}
        self.calls: list[tuple[list[Any], list[SamplingParams], Any]] = []
        self.reloads: list[str] = []
        self.caches_reset = 0
        LLM.made.append(self)

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> list[None]:
        assert method == "reload_weights" and set(kwargs) == {"weights_path"}
        assert Path(kwargs["weights_path"], "config.json").is_file()
        self.reloads.append(kwargs["weights_path"])
        self.model = AutoModelForCausalLM.from_pretrained(kwargs["weights_path"], dtype=torch.float32).eval()
        return [None]

    def reset_prefix_cache(self) -> bool:
        self.caches_reset += 1
        return True

    def generate(
        self, prompts: list[Any], sampling_params: list[SamplingParams], *, use_tqdm: bool, lora_request: Any
    ) -> list[RequestOutput]:
        self.calls.append((prompts, sampling_params, lora_request))
        model = self.model if lora_request is None else self._with(lora_request)
        return [
            RequestOutput([self._draw(model, prompt["prompt_token_ids"], how)])
            for prompt, how in zip(prompts, sampling_params, strict=True)
        ]

    def _with(self, request: LoRARequest) -> Any:
        from peft import PeftModel

        assert self.options["enable_lora"]
        if request.lora_int_id not in self.adapters:
            base = AutoModelForCausalLM.from_pretrained(self.options["tokenizer"], dtype=torch.float32)
            self.adapters = {request.lora_int_id: PeftModel.from_pretrained(base, request.lora_path).eval()}
        return self.adapters[request.lora_int_id]

    @torch.no_grad()
    def _draw(self, model: Any, prompt: list[int], how: SamplingParams) -> Completion:
        generator, done, ids = torch.Generator().manual_seed(how.seed or 0), Completion(), list(prompt)
        while len(done.token_ids) < how.max_tokens and done.finish_reason == "length":
            log_probs = (model(input_ids=torch.tensor([ids])).logits[0, -1] / (how.temperature or 1.0)).log_softmax(-1)
            token = (
                int(torch.multinomial(log_probs.exp(), 1, generator=generator))
                if how.temperature
                else int(log_probs.argmax())
            )
            assert self.options["logprobs_mode"] == "processed_logprobs"
            ids.append(token)
            done.token_ids.append(token)
            done.logprobs.append({token: Logprob(float(log_probs[token]))})
            text = self.tokenizer.decode(done.token_ids, skip_special_tokens=how.skip_special_tokens)
            ended = token == self.tokenizer.eos_token_id and not how.ignore_eos
            if ended or token in (how.stop_token_ids or []) or any(stop in text for stop in how.stop or []):
                done.finish_reason = "stop"
        return done


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import vllm` give this."""
    vllm, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams, vllm.TokensPrompt = LLM, SamplingParams, dict  # type: ignore[attr-defined]
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    for module in (vllm, lora, request):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(LLM, "made", [])
