"""A last layer that computes only what is read: the same results and gradients, and less work."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from prefkit.domains.text import last_layer
from prefkit.domains.text.layout import Backend, lay_out
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.reward import RewardModel
from prefkit.domains.text.scoring import causal_lm
from prefkit.engine.world import World
from prefkit.methods import dpo, reward
from prefkit.records import Group

FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_neox", "granite", "cohere")
BACKENDS: tuple[Backend, ...] = ("padded", "sdpa", "flex")
BATCH = [Group(range(5, 17), [range(20, 24), range(30, 37)]), Group(range(40, 49), [[50, 51], [60, 61, 62]])]
OTHER = [Group(range(7, 26), [range(70, 73), [80], range(90, 95)])]


def policy(family: str = "llama", **options: Any) -> TextPolicy:
    config = dpo.Config(**{"dtype": "float32", **options})
    made = TextPolicy.create(config, World.start(), model=tiny.model(family), tokenizer=tiny.tokenizer())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in made.module.named_parameters():
            if "lora_B" in name:  # zero at the start: an adapter that is left out would go unnoticed
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return made


def last(made: Any) -> Any:
    """The last decoder layer of a policy or reward model."""
    decoder: Any = causal_lm(made.model).base_model
    stack = next(child for child in decoder.children() if isinstance(child, nn.ModuleList))
    return stack[-1]


def first_linear(made: Any) -> nn.Module:
    """The part of the last MLP that sees its input."""
    return next(last(made).mlp.children())


def state(made: Any) -> last_layer.LastLayer:
    """What the hooks of the last layer share: there must be just one set of them."""
    found = [
        h.layer for m in last(made).modules() for h in m._forward_pre_hooks.values() if type(h) is last_layer.Enter
    ]
    assert len(found) == 1
    return found[0]


@contextmanager
def rows_of(module: nn.Module) -> Iterator[list[int]]:
    """The number of rows of each call of a module."""
    seen: list[int] = []
    handle = module.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[:-1].numel()))
    yield seen
    handle.remove()


def scored(made: TextPolicy, *batches: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of batches that are run forward one after the other, then backward together, and the gradients."""
    made.module.zero_grad(set_to_none=True)
    found = torch.cat([made.token_log_probs(batch).flatten() for batch in batches])
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return found.detach(), {n: w.grad.clone() for n, w in made.module.named_parameters() if w.grad is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=2e-5)
    assert ours[1].keys() == expected[1].keys() and expected[1]
    largest = max(float(value.abs().max()) for value in expected[1].values())
    for name, value in expected[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=1e-4, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients_are_those_of_a_whole_layer(family: str, use_peft: bool, checkpointing: bool) -> None:
    made = policy(family, use_peft=use_peft, gradient_checkpointing=checkpointing)
    layer = state(made)
    assert layer.on
    for backend in BACKENDS:
        made.module.backend = backend
        with rows_of(first_linear(made)) as rows:
            ours = scored(made, BATCH, OTHER)
        layouts = [lay_out(batch, 0, backend=backend) for batch in (BATCH, OTHER)]
        assert rows[:2] == [len(set(layout.before.tolist())) for layout in layouts]
        assert all(read < layout.ids.numel() for read, layout in zip(rows, layouts, strict=False))
        assert set(rows) == set(rows[:2]) and len(rows) == (4 if checkpointing else 2)
        layer.on = False
        expected = scored(made, BATCH, OTHER)
        layer.on = True
        assert_same(ours, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_projections_around_attention_work_on_read_rows_only(family: str) -> None:
    made = policy(family)
    into = dict(last(made).named_children())
    children = dict(next(into[name] for name in last_layer.ATTENTION if name in into).named_children())
    layout = lay_out(BATCH, 0, backend="sdpa")
    read, whole = len(set(layout.before.tolist())), layout.ids.numel()
    for name, module in children.items():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            with rows_of(module) as rows:
                made.token_log_probs(BATCH)
            assert rows == [read if name in last_layer.BY_ROW else whole], name
    assert any(name in last_layer.BY_ROW for name in children)


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_a_reward_model_computes_only_the_ends(family: str, use_peft: bool) -> None:
    config = reward.Config(dtype="float32", use_peft=use_peft)
    made = RewardModel.create(config, World.start(), model=tiny.model(family), tokenizer=tiny.tokenizer())
    for backend in BACKENDS:
        made.module.backend = backend
        found = []
        for on in (True, False):
            state(made).on = on
            made.module.zero_grad(set_to_none=True)
            with rows_of(first_linear(made)) as rows:
                rewards = made.rewards(BATCH).flatten()
            whole = lay_out(BATCH, 0, backend=backend, last=True).ids.numel()
            assert rows == [4 if on else whole]
            (rewards * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
            slopes = {n: w.grad for n, w in made.module.named_parameters() if w.grad is not None}
            found.append((rewards.detach(), slopes))
        assert_same(*found)


def test_copies_have_hooks_of_their_own_and_only_once() -> None:
    made = policy()
    before = state(made)
    again = TextPolicy.create(
        dpo.Config(dtype="float32"), World.start(), model=copy.deepcopy(made.model), tokenizer=tiny.tokenizer()
    )
    assert state(again) is not before
    state(again).on = False
    with rows_of(first_linear(made)) as ours, rows_of(first_linear(again)) as others:
        assert torch.allclose(made.token_log_probs(BATCH), again.token_log_probs(BATCH), atol=1e-5)
    assert ours[0] < others[0]


def test_calls_without_rows_are_whole() -> None:
    made, fresh = policy(), tiny.model()
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    made.token_log_probs(BATCH)
    with rows_of(first_linear(made)) as rows:
        assert torch.equal(made.model(input_ids=ids).logits, fresh(input_ids=ids).logits)
    assert rows == [24]


def test_a_forward_pass_that_broke_off_leaves_nothing_behind() -> None:
    made = policy()
    expected = made.token_log_probs(BATCH)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = last(made).mlp.gate_proj.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        made.token_log_probs(OTHER)
    handle.remove()
    ids = torch.randint(3, 300, (1, 30))
    assert made.model(input_ids=ids).logits.shape[1] == 30
    assert torch.equal(made.token_log_probs(BATCH), expected)


def mlp_first(layer: Any) -> Any:
    """A parallel layer's forward in which the MLP runs before attention has said which rows are read."""

    def forward(hidden_states: Tensor, **settings: Any) -> Tensor:
        normed = layer.input_layernorm(hidden_states)
        moved = layer.mlp(normed)
        return hidden_states + moved + layer.self_attn(hidden_states=normed, **settings)[0]

    return forward


def refusing(mlp: nn.Module) -> Any:
    """An MLP's forward that gives a tuple, as routers do."""
    own = mlp.forward

    class Both(tuple[Any, ...]):
        def __radd__(self, other: Tensor) -> Tensor:
            return other + self[0]

    return lambda hidden: Both((own(hidden), None))


def test_a_layer_that_gives_no_plain_tensor_stays_whole() -> None:
    model = tiny.model()
    model.model.layers[-1].mlp.forward = refusing(model.model.layers[-1].mlp)
    made = TextPolicy.create(dpo.Config(dtype="float32"), World.start(), model=model, tokenizer=tiny.tokenizer())
    assert made.module.backend == "sdpa" and not state(made).on
    torch.testing.assert_close(made.token_log_probs(BATCH), policy().token_log_probs(BATCH), rtol=1e-5, atol=2e-5)


def test_an_mlp_that_runs_before_attention_stays_whole() -> None:
    def model() -> Any:
        made = tiny.model()
        made.model.layers[-1].forward = mlp_first(made.model.layers[-1])
        return made

    made = TextPolicy.create(dpo.Config(dtype="float32"), World.start(), model=model(), tokenizer=tiny.tokenizer())
    assert made.module.backend == "sdpa" and not state(made).on
    ours = made.token_log_probs([Group(BATCH[0].prompt, [BATCH[0].answers[1]])])[0]
    ids = torch.tensor([[*BATCH[0].prompt, *BATCH[0].answers[1]]])
    plain = model()(input_ids=ids).logits[0, 11:-1].log_softmax(-1).gather(-1, ids[0, 12:, None])[:, 0]
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)


def test_experts_and_strange_layers_are_left_alone() -> None:
    model = tiny.model()
    model.model.layers[-1].mlp.experts = nn.Linear(2, 2)
    assert last_layer.install(model.model) is None
    model = tiny.model()
    del model.model.layers[-1].mlp
    assert last_layer.install(model.model) is None
    model = tiny.model()
    model.model.config.num_hidden_layers = 1
    assert last_layer.install(model.model) is None


def test_where_nearly_all_rows_are_read_none_are_sorted_out() -> None:
    assert lay_out([Group([5], [range(20, 60)])], 0).rows is None
    rows = lay_out(BATCH, 0).rows
    assert rows is not None and rows.tolist() == sorted(set(lay_out(BATCH, 0).before.tolist()))
