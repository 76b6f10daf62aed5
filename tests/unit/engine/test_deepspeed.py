"""The engine's side of DeepSpeed, against a small stand-in; tests/distributed/test_deepspeed.py runs the real one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import yaml
from torch import Tensor, nn

import prefkit
from prefkit.engine import deepspeed, seeds
from prefkit.engine.config import Optimisation
from prefkit.engine.learner import Learner
from prefkit.engine.world import World
from prefkit.errors import InputError

LAUNCHES = Path(prefkit.__file__).parent / "commands" / "accelerate"
DATA = torch.randn(12, 4, generator=seeds.generator(0, "data"))
CONFIG = Optimisation(learning_rate=0.05, max_grad_norm=0.5)


class StandIn:
    """What accelerate and DeepSpeed do for process 0 of `train_batch_size`, whose others bring zero gradients.

    As DeepSpeed does, it keeps a copy of the weights, steps that, and writes the result into the weights.
    """

    last: StandIn

    def __init__(self, mixed_precision: str) -> None:
        assert mixed_precision == "no"
        self.deepspeed_plugin = SimpleNamespace(deepspeed_config={"train_batch_size": "auto", "gradient_clipping": 9.0})
        self.sync_gradients = True
        self.steps = 0
        StandIn.last = self

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        self.module, self.adam, self.engine = module, optimizer, self
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [nn.Parameter(weight.detach().clone()) for weight in group["params"]]
        self.optimizer = self
        return self, optimizer

    def pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for weights, group in zip(self.groups, self.adam.param_groups, strict=True):
            yield from zip(weights, group["params"], strict=True)

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    @torch.no_grad()
    def refresh_fp32_params(self) -> None:
        for weight, copy in self.pairs():
            copy.copy_(weight)

    def backward(self, loss: Tensor) -> None:
        config = self.deepspeed_plugin.deepspeed_config
        (loss / config["gradient_accumulation_steps"]).backward()
        if not self.sync_gradients:
            return
        for weight, copy in self.pairs():
            copy.grad, weight.grad = weight.grad / config["train_batch_size"], None
        copies = [copy for _, copy in self.pairs()]
        self.norm = nn.utils.get_total_norm([copy.grad for copy in copies])
        if config["gradient_clipping"]:
            nn.utils.clip_grads_with_norm_(copies, config["gradient_clipping"], self.norm)
        self.adam.step()
        self.steps += 1
        with torch.no_grad():
            for weight, copy in self.pairs():
                weight.copy_(copy)

    def get_global_grad_norm(self) -> Tensor:
        return self.norm

    def state_of(self, weight: nn.Parameter, key: str) -> Tensor:
        assert self.steps, "the real one knows no state before the first step"
        return next(self.adam.state[copy][key] for own, copy in self.pairs() if own is weight)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    utilities = SimpleNamespace(
        safe_get_full_optimizer_state=lambda weight, key: StandIn.last.state_of(weight, key).clone(),
        safe_set_full_optimizer_state=lambda weight, value, key: StandIn.last.state_of(weight, key).copy_(value),
    )
    monkeypatch.setattr(accelerate, "Accelerator", StandIn)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(utils=utilities))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utilities)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 1))


def learner_of(module: nn.Module, zero: int) -> Learner:
    world = World(rank=0, size=1, device=torch.device("cpu"), zero=zero)
    return Learner(module, CONFIG, total_steps=8, world=world)


def train(learner: Learner, module: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    def compute(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (module(x).squeeze(-1) - x.sum(-1)).square(), {"size": x.abs().sum(-1)}

    return [learner.update([DATA[:5], DATA[5:]], compute, weight=lambda b: 2.0 * len(b)) for _ in range(steps)]


def test_a_learner_under_deepspeed_does_the_same(stand_in: None, tmp_path: Path) -> None:
    plain, sharded, folders = network(), network(), (tmp_path / "plain", tmp_path / "zero")
    learners = learner_of(plain, 0), learner_of(sharded, 2)
    for a, b in zip(train(learners[0], plain, 4), train(learners[1], sharded, 4), strict=True):
        assert a["grad_norm"] > CONFIG.max_grad_norm, "clipping takes part"
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=1e-7)
    for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    for learner, folder in zip(learners, folders, strict=True):
        folder.mkdir()
        learner.save(folder)
    assert {path.name for path in folders[1].iterdir()} == {"optimizer.json", "optimizer.safetensors"}
    straight = train(learners[1], sharded, 2)
    for folder in folders:  # each is in the same form, and the second load is into a used optimizer
        resumed = network()
        resumed.load_state_dict(plain.state_dict())
        learner = learner_of(resumed, 1)
        for _ in range(2):
            resumed.load_state_dict(plain.state_dict())
            learner.load(folder)
            for a, b in zip(straight, train(learner, resumed, 2), strict=True):
                torch.testing.assert_close(b["loss"], a["loss"], rtol=1e-5, atol=1e-7)
            assert learner.step == 6
    with pytest.raises(InputError, match="of other weights"):
        learner_of(nn.Linear(3, 3), 2).load(folders[1])


def test_gradients_are_summed_over_processes(stand_in: None) -> None:
    module = nn.Linear(3, 1, bias=False)
    weights = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(weights.values())
    zero = deepspeed.Zero(module, weights, optimizer, stage=1, size=4, max_grad_norm=0.0)
    x = torch.tensor([3.0, 0.0, 4.0])
    zero.backward(zero.losses(lambda x: (module(x), {}), x)[0].sum(), step=True)
    assert float(zero.norm()) == 5.0
    assert StandIn.last.deepspeed_plugin.deepspeed_config == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1 << 25, "allgather_bucket_size": 1 << 25},
    }


def test_quantised_weights_and_other_optimizers_are_refused(stand_in: None) -> None:
    module = nn.Linear(2, 2)
    module.register_parameter("codes", nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    with pytest.raises(InputError, match="quantised"):
        learner_of(module, 2)
    world = World(rank=0, size=1, device=torch.device("cpu"), zero=2)
    with pytest.raises(InputError, match="--optim adamw"):
        Learner(network(), Optimisation(optim="adafactor"), total_steps=1, world=world)


def launch(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ZERO_STAGE", "3", "(?s)stage 3.*FSDP2"),
        ("ZERO_STAGE", "0", "stage 0"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "(?s)offload.*FSDP2"),
        ("CONFIG_FILE", "ds.json", "config file"),
    ],
)
def test_launches_that_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    launch(monkeypatch, **{f"ACCELERATE_DEEPSPEED_{name}": value})
    with pytest.raises(InputError, match=message):
        World.start()


def test_the_stage_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deepspeed.stage() == 0
    launch(monkeypatch, ACCELERATE_DEEPSPEED_ZERO_STAGE="1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'prefkit\[deepspeed\]'"):
        deepspeed.stage()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert deepspeed.stage() == 1
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(InputError, match="outside of a launch"):
        deepspeed.stage()


@pytest.mark.parametrize("stage", [1, 2])
def test_the_shipped_files_say_what_they_are(stage: int) -> None:
    text = (LAUNCHES / f"deepspeed_zero{stage}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# Not run here: no GPU. Not run by the project's tests")
    values = yaml.safe_load(text)
    assert values["distributed_type"] == "DEEPSPEED" and values["deepspeed_config"]["zero_stage"] == stage
