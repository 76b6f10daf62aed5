"""One optimizer step: normalisation, clipping, schedules, and the optimizers' states."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prefkit.engine import optimizers, seeds
from prefkit.engine.config import Optimisation
from prefkit.engine.learner import Learner
from prefkit.engine.precision import autocast, resolve_dtype
from prefkit.engine.world import World
from prefkit.errors import InputError

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
DATA = torch.randn(12, 4, generator=seeds.generator(0, "data"))


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def learner_of(network: nn.Module, **options: object) -> Learner:
    config = dataclasses.replace(Optimisation(learning_rate=0.05), **options)
    return Learner(network, config, total_steps=20, world=WORLD)


def compute(network: nn.Module):
    return lambda x: ((network(x).squeeze(-1) - x.sum(-1)).square(), {"size": x.abs().sum(-1)})


def trained(batches: Sequence[Tensor], steps: int = 4, **options: object) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    network = module()
    learner = learner_of(network, **options)
    return network, [learner.update(batches, compute(network)) for _ in range(steps)]


def test_micro_batches_of_any_size_equal_one_batch() -> None:
    whole, metrics = trained([DATA])
    parts, part_metrics = trained([DATA[:1], DATA[1:8], DATA[8:]])
    for name in ("loss", "grad_norm", "size", "learning_rate"):
        for a, b in zip(metrics, part_metrics, strict=True):
            assert a[name].ndim == 0
            torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=1e-7)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_the_sum_of_losses_over_the_sum_of_weights() -> None:
    network = module()
    expected = torch.autograd.grad(compute(network)(DATA)[0].sum() / 30, list(network.parameters()))
    norm = torch.stack([gradient.norm() for gradient in expected]).norm()
    metrics = learner_of(network).update([DATA[:5], DATA[5:]], compute(network), weight=lambda batch: 2.5 * len(batch))
    torch.testing.assert_close(metrics["grad_norm"], norm)
    torch.testing.assert_close(metrics["loss"], compute(module())(DATA)[0].sum().detach() / 30)


def test_clipping_bounds_the_step_and_zero_switches_it_off() -> None:
    def moved(**options: object) -> Tensor:
        network = module()
        learner = learner_of(network, adam_epsilon=1.0, **options)  # a large epsilon makes AdamW's step ~ gradient
        norm = learner.update([DATA * 30], compute(network))["grad_norm"]
        change = [a - b for a, b in zip(network.parameters(), module().parameters(), strict=True)]
        assert norm > 100
        return torch.cat([part.flatten() for part in change]).norm()

    assert moved(max_grad_norm=0.01) < 0.05 * 0.0101 < moved(max_grad_norm=0)


def test_a_weight_without_gradient_stays() -> None:
    network = module()
    network.register_parameter("idle", nn.Parameter(torch.ones(2, 2)))
    learner_of(network).update([DATA], compute(network))
    assert torch.equal(network.idle, torch.ones(2, 2))


@pytest.mark.parametrize("optim", ["adamw", "adafactor"])
def test_state_round_trips_bit_for_bit(tmp_path: Path, optim: str) -> None:
    straight = module()
    learner = learner_of(straight, optim=optim)
    for _ in range(3):
        learner.update([DATA], compute(straight))
    learner.save(tmp_path)
    resumed = module()
    resumed.load_state_dict(straight.state_dict())
    other = learner_of(resumed, optim=optim)
    other.load(tmp_path)
    for _ in range(3):
        learner.update([DATA], compute(straight))
        other.update([DATA], compute(resumed))
    assert other.step == 6
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_foreign_optimizer_states_are_refused(tmp_path: Path) -> None:
    network = module()
    learner = learner_of(network)
    learner.update([DATA], compute(network))
    learner.save(tmp_path)
    with pytest.raises(InputError, match="state of adamw, not of adafactor"):
        learner_of(module(), optim="adafactor").load(tmp_path)
    with pytest.raises(InputError, match="of other weights"):
        learner_of(nn.Linear(3, 3)).load(tmp_path)
    with pytest.raises(InputError, match="has shape"):
        learner_of(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))).load(tmp_path)
    assert json.loads((tmp_path / "optimizer.json").read_text())["step"] == 1


def test_adafactor_learns_and_keeps_little() -> None:
    network = module()
    learner = learner_of(network, optim="adafactor")
    losses = [float(learner.update([DATA], compute(network))["loss"]) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    state = optimizers.state_of(learner._optimizer, dict(network.named_parameters()))
    assert state["0.weight"]["row"].shape == (6,) and state["0.weight"]["column"].shape == (4,)


def test_adafactor_first_step_is_the_formula() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    optimizers.Adafactor([weight], lr=0.1).step()
    square = torch.tensor([[1.0, 4, 9], [16, 25, 36]])
    second = square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()
    update = torch.tensor([[1.0, 2, 3], [4, 5, 6]]) / second.sqrt()
    update = update / max(1.0, float(update.square().mean().sqrt()))
    torch.testing.assert_close(weight.detach(), -0.1 * update)


def test_optimizers_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown optimizer 'sgd'"):
        learner_of(module(), optim="sgd")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"pip install 'prefkit\[quant\]'"):
        learner_of(module(), optim="adamw_bnb_8bit")
    with pytest.raises(InputError, match="every weight is frozen"):
        learner_of(module().requires_grad_(False))
    assert optimizers.canonical("adamw_torch") == "adamw"


def test_weight_decay_spares_vectors() -> None:
    network = nn.LayerNorm(4)
    network.register_parameter("matrix", nn.Parameter(torch.ones(3, 4)))
    learner = learner_of(network, weight_decay=0.5)
    learner.update([DATA], lambda x: (network(x).sum(-1) * 0 + network.matrix.sum() * 0, {}))
    assert torch.equal(network.weight, torch.ones(4))
    assert torch.allclose(network.matrix, torch.full((3, 4), 1 - 0.05 * 0.5))


def test_schedules_are_functions_of_the_step() -> None:
    def rates(**options: object) -> list[float]:
        config = dataclasses.replace(Optimisation(learning_rate=1.0), **options)
        return [round(optimizers.learning_rate(config, step, 4), 6) for step in range(1, 5)]

    assert rates() == [1.0, 0.75, 0.5, 0.25]
    assert rates(warmup_ratio=0.5) == [0.5, 1.0, 1.0, 0.5]
    assert rates(lr_scheduler_type="constant") == [1.0] * 4
    assert rates(lr_scheduler_type="cosine") == [1.0, 0.853553, 0.5, 0.146447]


def test_random_streams_depend_on_their_path_alone() -> None:
    def draw(*path: int | str) -> Tensor:
        return torch.rand(3, generator=seeds.generator(5, *path))

    torch.rand(7)
    assert torch.equal(draw("sample", 3, 1), draw("sample", 3, 1))
    streams = {
        tuple(draw(*path).tolist()) for path in [("sample", 3, 1), ("sample", 31), ("sample", "3", 1), ("data", 3, 1)]
    }
    assert len(streams) == 4


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "prefkit.engine.precision._cpu_flags"
    monkeypatch.setattr(flags, lambda: frozenset({"avx2", "avx512_bf16"}))
    assert resolve_dtype("auto", "cpu") == torch.bfloat16
    monkeypatch.setattr(flags, lambda: frozenset({"avx2"}))
    assert resolve_dtype("auto", "cpu") == torch.float32
    with pytest.raises(InputError, match="float16 cannot train"):
        resolve_dtype("float16", "cpu")
    with pytest.raises(InputError, match="unknown dtype"):
        resolve_dtype("int8", "cpu")
    with autocast(torch.bfloat16, "cpu"):
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.bfloat16
    with autocast(torch.float32, "cpu"):
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32
