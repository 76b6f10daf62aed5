"""Answers drawn by vLLM (extra `vllm`) from a policy's current weights, which are pushed before each sampling phase.

With LoRA the adapter is written to a folder and sent under a new number, since vLLM keeps an adapter it has seen; with
full fine-tuning the model is written and vLLM reads its weights anew. Log-probs are those of the distribution each
token was drawn from (`processed_logprobs`), as the other engine's are. Each answer has its own seed.

Only vLLM's public interface is used: LLM, SamplingParams, LoRARequest, TokensPrompt.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.quantised import is_quantised
from prefkit.domains.text.sampler import Decoding, answer_ends, collect, jobs_for
from prefkit.domains.text.scoring import causal_lm
from prefkit.engine.seeds import number
from prefkit.errors import InputError
from prefkit.records import Sample

MEMORY_SHARE = 0.35
"""share of the GPU's memory given to vLLM, which stays resident beside the trained model"""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""adapter ranks vLLM has room for; a rank between them takes the next"""
WHERE = "--generator vllm"


class VllmSampler:
    """Samples through a vLLM engine of its own, on the policy's device. See `sampler.Sampler`."""

    name = "vllm"

    def __init__(self, policy: TextPolicy) -> None:
        """Raises InputError where vLLM is missing, or cannot sample exactly what the policy scores."""
        _check(policy)
        self.policy = policy
        self._folder = Path(tempfile.mkdtemp(prefix="prefkit-vllm-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._pushes = itertools.count(1)
        self._adapter: Any = None
        self._engine: Any = None

    def refresh(self) -> None:
        """Send the policy's current weights to the engine; starts it the first time."""
        if self._engine is None:
            self._engine = self._start()
        push = next(self._pushes)
        folder = self._folder / f"weights-{push}"
        self.policy.save(folder)
        if self.policy.uses_adapter:
            from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

            self._adapter = LoRARequest(lora_name=f"policy-{push}", lora_int_id=push, lora_path=str(folder))
            # The engine reads the folder when the next answers are drawn, so only the one before it may go.
            shutil.rmtree(self._folder / f"weights-{push - 1}", ignore_errors=True)
            return
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._engine.reset_prefix_cache()
        shutil.rmtree(folder)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num: int,
        decoding: Decoding,
        seed: int,
        path: Sequence[str | int],
        rows: Sequence[int],
        prefixes: Sequence[Sequence[int]] | None = None,
        budgets: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        """As `TransformersSampler.sample`; the two engines draw other answers from the same seed.

        A prefix is part of what vLLM is sent as a prompt, whose cache it shares between requests.
        """
        from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

        jobs = jobs_for(self.policy, prompts, num, decoding, rows, prefixes, budgets)
        if self._engine is None:
            self.refresh()
        engine: Any = self._engine
        ends = answer_ends(self.policy, decoding)
        settings = [
            SamplingParams(
                max_tokens=job.start.budget,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                seed=number(seed, *path, job.row, job.index),
                stop=list(decoding.stop_strings) or None,
                stop_token_ids=ends,
                ignore_eos=decoding.ignore_end,
                include_stop_str_in_output=True,
                skip_special_tokens=False,
                logprobs=0,
            )
            for job in jobs
        ]
        outputs = engine.generate(
            [TokensPrompt(prompt_token_ids=list(job.start.context)) for job in jobs],
            settings,
            use_tqdm=False,
            lora_request=self._adapter,
        )
        results: list[list[Sample]] = [[] for _ in prompts]
        for job, output in zip(jobs, outputs, strict=True):
            drawn = output.outputs[0]
            tokens = list(drawn.token_ids)
            logs = [step[token].logprob for step, token in zip(drawn.logprobs, tokens, strict=True)]
            results[job.place].append(collect(self.policy.tokenizer, job, tokens, logs, ends, decoding))
        return results

    def _start(self) -> Any:
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        policy = self.policy
        model: Any = causal_lm(policy.model)
        source = policy.source
        if not source:
            source = str(self._folder / "base")
            self._write_base(source)
        adapter: dict[str, Any] = {}
        if policy.uses_adapter:
            rank = policy.model.peft_config["default"].r
            adapter = {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(r for r in RANKS if r >= rank)}
        return LLM(
            model=source,
            tokenizer=source,
            dtype=str(policy.dtype).removeprefix("torch."),
            max_model_len=getattr(model.config.get_text_config(), "max_position_embeddings", None),
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # none of the model's own sampling settings
            gpu_memory_utilization=MEMORY_SHARE,
            seed=0,
            **adapter,
        )

    def _write_base(self, folder: str) -> None:
        """A model given in memory, without its adapter, where vLLM can read it."""
        model: Any = causal_lm(self.policy.model)
        state = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in model.state_dict().items()
            if ".lora_" not in name
        }
        model.save_pretrained(folder, state_dict=state)
        self.policy.tokenizer.save_pretrained(folder)


def _check(policy: TextPolicy) -> None:
    """Refuse what vLLM cannot do as this project needs it done."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "vLLM is not installed", where=WHERE, mend="pip install 'prefkit[vllm]', or --generator transformers"
        )
    if policy.world.size > 1:
        raise InputError(
            "the vLLM engine serves a run of one process",
            where=WHERE,
            mend="launch one process, or use --generator transformers",
        )
    if is_quantised(policy.model):
        raise InputError(
            "vLLM would sample from the unrounded base, which is another policy than the quantised one that is scored",
            where=WHERE,
            mend="leave --load_in_4bit and --load_in_8bit off, or use --generator transformers",
        )
    if policy.uses_adapter and policy.model.peft_config["default"].r > max(RANKS):
        raise InputError(
            f"vLLM takes adapters up to rank {max(RANKS)}, not {policy.model.peft_config['default'].r}",
            where=WHERE,
            mend="a smaller --lora_r, or --generator transformers",
        )
