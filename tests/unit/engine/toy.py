"""A regression small enough to train in a second, run as a program so that tests can kill it.

python toy.py OUTPUT_DIR '{"max_steps": 40}' [--slow-step SECONDS] [--slow-checkpoint SECONDS]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefkit.engine import files, seeds
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.learner import Learner
from prefkit.engine.run import Run


@dataclass(frozen=True, kw_only=True)
class Config(Optimisation, Selection, Output):
    learning_rate: float = 0.01
    max_steps: int = 40
    save_steps: int = 5
    eval_steps: int = 4
    num_rows: int = 64


class Weights:
    """Keeps a module's weights in a checkpoint."""

    def __init__(self, module: nn.Module, *, is_main: bool = True) -> None:
        self.module, self.is_main = module, is_main

    def save(self, folder: Path, /) -> None:
        if self.is_main:
            save_file(dict(self.module.state_dict()), folder / "model.safetensors")

    def load(self, folder: Path, /) -> None:
        self.module.load_state_dict(load_file(folder / "model.safetensors"))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


def train(config: Config, *, slow_step: float = 0.0) -> dict[str, object]:
    torch.set_num_threads(1)
    with Run(config, method="toy") as run:
        module = network(config.seed)
        learner = Learner(module, config, total_steps=config.max_steps, world=run.world)
        run.fingerprint(data="fixed")
        run.track(policy=Weights(module, is_main=run.world.is_main), learner=learner)
        if run.resumed_step == 0:
            run.evaluated({"eval_error": _error(module)})
        for step in run.steps(config.max_steps, per_epoch=8):
            batch = torch.randn(config.num_rows, 4, generator=seeds.generator(config.seed, "batch", step))
            run.log(learner.update(batch.chunk(config.gradient_accumulation_steps), lambda x: _loss(module, x)))
            run.log({"dice": float(torch.rand(()))})
            if run.due(config.eval_steps):
                run.evaluated({"eval_error": _error(module)})
            time.sleep(slow_step)
        run.log({"test_error": _error(module)})
        return run.finish()


def _target(x: Tensor) -> Tensor:
    return torch.sin(x.sum(-1))


def _loss(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    losses = (module(x).squeeze(-1) - _target(x)).square()
    return losses, {"magnitude": x.norm(dim=-1)}


def _error(module: nn.Module) -> float:
    x = torch.randn(64, 4, generator=seeds.generator(0, "evaluation"))
    with torch.no_grad():
        return float(_loss(module, x)[0].mean())


def _slow_down_checkpoints(seconds: float) -> None:
    """Make every file of a checkpoint take a while to reach the disk: kills then fall inside the writing."""
    force = files.force

    def slow(path: Path) -> None:
        time.sleep(seconds)
        force(path)

    files.force = slow


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("options", type=json.loads)
    parser.add_argument("--slow-step", type=float, default=0.0)
    parser.add_argument("--slow-checkpoint", type=float, default=0.0)
    arguments = parser.parse_args()
    if arguments.slow_checkpoint:
        _slow_down_checkpoints(arguments.slow_checkpoint)
    config = dataclasses.replace(Config(), output_dir=arguments.output_dir, **arguments.options)
    train(config, slow_step=arguments.slow_step)


if __name__ == "__main__":
    main()
