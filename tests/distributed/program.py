"""Five steps of a tiny causal LM, launched as one or two processes; writes what the tests compare.

python program.py OUTPUT_DIR [--lora] [--stop-after STEP]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from prefkit.engine import sharding, world
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.learner import Learner
from prefkit.engine.run import Run
from prefkit.engine.world import World

STEPS, ROWS = 5, 8


@dataclass(frozen=True, kw_only=True)
class Config(Optimisation, Selection, Output):
    learning_rate: float = 1e-3
    max_grad_norm: float = 0.5
    save_steps: int = 3
    lora: bool = False


def model(lora: bool) -> nn.Module:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    whole = LlamaForCausalLM(shape)
    if not lora:
        return whole
    adapted = get_peft_model(whole, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return adapted


class Policy:
    """A Hugging Face folder per checkpoint."""

    def __init__(self, module: Any, world: World) -> None:
        self.module, self.world = module, world

    def save(self, folder: Path, /) -> None:
        state = sharding.full_state(self.module)
        if self.world.is_main:
            if isinstance(self.module, LlamaForCausalLM):
                self.module.save_pretrained(folder, state_dict=state)
            else:
                save_file(
                    {name: value for name, value in state.items() if "lora" in name},
                    folder / "lora.safetensors",
                )

    def load(self, folder: Path, /) -> None:
        path = folder / ("model.safetensors" if isinstance(self.module, LlamaForCausalLM) else "lora.safetensors")
        state = load_file(path) if self.world.is_main else {}
        if path.name == "lora.safetensors":
            state = {**sharding.full_state(self.module), **state}
        sharding.load_state(self.module, state)


def compute(module: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = module(input_ids=tokens).logits[:, :-1].float()
    log_probs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return -log_probs.sum(-1), {"likeliest": log_probs.max(-1).values}


def batches(step: int, world: World) -> list[Tensor]:
    """This process's share of the step's rows, in micro-batches of two."""
    rows = torch.randint(3, 61, (ROWS, 9), generator=torch.Generator().manual_seed(step))
    return list(rows.chunk(world.size)[world.rank].split(2))


@contextmanager
def counted_gathers() -> Iterator[list[int]]:
    """[all-gathers of any unit, those of the unit that holds the embedding and the head] inside the block."""
    count = [0, 0]
    original = _fsdp_param_group.foreach_all_gather

    def counted(params: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        count[1] += any(param._orig_size[0] == 61 for param in params)
        return original(params, *args, **kwargs)

    _fsdp_param_group.foreach_all_gather = counted
    yield count
    _fsdp_param_group.foreach_all_gather = original


def sample(module: Any, prompts: Tensor) -> tuple[list[list[int]], int]:
    """Greedy answers, and how many all-gathers the tokens cost after the weights were gathered."""
    with counted_gathers() as count, sharding.gathered(module), torch.no_grad():
        answers = module.generate(input_ids=prompts, max_new_tokens=6, do_sample=False)
    return answers.tolist(), count[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--stop-after", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = dataclasses.replace(Config(), output_dir=arguments.output_dir, lora=arguments.lora)
    with Run(config, method="toy") as run:
        module = sharding.shard(model(config.lora), run.world)
        learner = Learner(module, config, total_steps=STEPS, world=run.world)
        run.track(policy=Policy(module, run.world), learner=learner)
        gradients: dict[str, Tensor] = {}
        original = learner._optimizer.step

        def step_and_keep() -> None:
            if not gradients:
                for name, weight in module.named_parameters():
                    if weight.requires_grad and weight.grad is not None:
                        gradients[name] = sharding.whole(weight.grad).clone()
            original()

        learner._optimizer.step = step_and_keep  # type: ignore[method-assign]
        for step in run.steps(STEPS):
            with counted_gathers() as in_step:
                run.log(learner.update(batches(step, run.world), lambda tokens: compute(module, tokens)))
            if step == 3:
                sample(module, torch.tensor([[5, 6, 7]]))  # must leave no trace in the training
            if step == arguments.stop_after:
                raise SystemExit(3)
        answers, gathers = sample(module, torch.tensor([[5, 6, 7], [8, 9, 10]]))
        kinds = {isinstance(weight, DTensor) for weight in module.parameters()}
        again, _ = sample(module, torch.tensor([[5, 6, 7], [8, 9, 10]]))
        state = sharding.full_state(module)
        run.finish()
    if run.world.is_main:
        out = Path(arguments.output_dir)
        save_file({name: value.contiguous().clone() for name, value in state.items()}, out / "state.safetensors")
        save_file({name: value.contiguous() for name, value in gradients.items()}, out / "gradients.safetensors")
        facts = {
            "answers": answers,
            "again": again,
            "gathers": gathers,
            "head_gathers": in_step[1],
            "sharded": sorted(kinds),
        }
        facts["units"] = len(sharding.repeated_blocks(module)) + 1
        (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
    world.leave(0)
