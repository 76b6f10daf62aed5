"""The value function: it begins as the reward model, its head learns, and policy, reference and value stay apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from prefkit.domains.text.policy import TextPolicy, reference_policy
from prefkit.domains.text.reward import RewardModel
from prefkit.domains.text.value import ADAPTER, SeparateValue, SharedValue, Value, value_of, why_not_shared
from prefkit.engine.learner import Learner
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.methods import ppo
from prefkit.records import Group

GROUPS = [Group([5, 6, 7], [[8, 2], [9, 10, 11, 2]]), Group([12], [[13], [14, 2, 15, 2]])]
KINDS = ("separate", "lora", "shared")


def config(**options: Any) -> ppo.Config:
    shared: dict[str, Any] = {"dtype": "float32", "lora_r": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    return ppo.Config(**{**shared, **options})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("base") / "model")


def trained_reward(folder: Path, base: Path, *, lora: bool, mean: float = 0.25) -> RewardModel:
    """A reward model that says something, as a run of `prefkit reward` leaves it."""
    how = config(model_name_or_path=str(base), use_peft=lora, seed=3)
    found = RewardModel.create(how, World.start())
    draws = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in found.module.named_parameters():
            if weight.requires_grad and (not lora or "lora_B" in name or "score" in name):
                weight.add_(torch.randn(weight.shape, generator=draws) * 0.1)
    found.centre(mean)
    result = found.save_final(folder)
    (folder / "metrics.jsonl").write_text("")
    (folder / "config.json").write_text(json.dumps({"config": {"model_name_or_path": str(base)}}))
    (folder / "result.json").write_text(json.dumps(result))
    return found


@pytest.fixture(scope="module")
def rewards(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, RewardModel]]:
    """By whether it is an adapter: its run folder, and itself."""
    found: dict[bool, tuple[Path, RewardModel]] = {}
    for lora in (False, True):
        folder = tmp_path_factory.mktemp("reward")
        found[lora] = folder, trained_reward(folder, base, lora=lora)
    return found


def both(kind: str, base: Path, reward: str, **options: Any) -> tuple[TextPolicy, Value]:
    """Policy and value function of a run: all weights, two adapters on two models, or two on one."""
    how = config(model_name_or_path=str(base), use_peft=kind != "separate", **options)
    policy = TextPolicy.create(how, World.start())
    return policy, value_of(how, policy, reward=reward, keeping="shared" if kind == "shared" else "separate")


@pytest.fixture(params=KINDS)
def pair(request: Any, base: Path, rewards: Any) -> tuple[TextPolicy, Value]:
    return both(request.param, base, str(rewards[True][0]))


def digests(weights: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(value.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in weights.items()
    }


def whole(policy: TextPolicy, value: Value) -> nn.Module:
    return nn.ModuleDict({"policy": policy.module, "value": value.module})


def train(policy: TextPolicy, value: Value, *, of_policy: float = 1.0, of_value: float = 1.0, steps: int = 2) -> None:
    """Steps as reinforcement learning makes them: policy, reference and value in one loss."""
    learner = Learner(whole(policy, value), config(), total_steps=steps, world=policy.world)

    def compute(groups: list[Group]) -> Any:
        log_probs, values = policy.token_log_probs(groups), value.values(groups)
        policy.reference_token_log_probs(groups)
        return of_policy * log_probs.sum(-1) + of_value * (values - 3.0).square().sum(-1), {}

    for _ in range(steps):
        learner.update([GROUPS], compute)


def parts(policy: TextPolicy, value: Value) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What trains for the policy, what trains for the value function, what is frozen."""
    own, other, frozen = {}, {}, {}
    for name, weight in whole(policy, value).named_parameters():
        mine = name.startswith("value.") or f".{ADAPTER}." in name
        (other if mine else own if weight.requires_grad else frozen)[name] = weight
    return own, {n: w for n, w in other.items() if w.requires_grad}, frozen


@pytest.mark.parametrize(
    ("kind", "lora", "adapter"),
    [
        ("separate", False, False),
        ("separate", True, False),
        ("separate", True, True),
        ("lora", False, False),
        ("lora", True, True),
        ("shared", True, False),
        ("shared", True, True),
    ],
)
def test_it_begins_as_the_reward_model(kind: str, lora: bool, adapter: bool, base: Path, rewards: Any) -> None:
    """The value before a token is the reward of what stands before it, centred: one read-out for both."""
    folder, reward = rewards[lora]
    _, value = both(kind, base, str(folder / "adapter" if adapter else folder))
    found = value.values(GROUPS)
    assert found.shape == (4, 4) and found.dtype == torch.float32
    answers = [(group.prompt, answer) for group in GROUPS for answer in group.answers]
    for row, (prompt, answer) in enumerate(answers):
        assert bool((found[row, len(answer) :] == 0).all())
        for t in range(1, len(answer)):
            expected = reward.rewards([Group(prompt, [answer[:t]])])[0, 0]
            torch.testing.assert_close(found[row, t], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mistral"])
def test_neighbours_padding_and_packing_change_nothing(family: str) -> None:
    tokenizer = tiny.tokenizer()
    found: list[Tensor] = []
    for backend in ("sdpa", "padded"):
        how = config(scoring_backend=backend)
        policy = TextPolicy.create(how, World.start(), model=tiny.model(family), tokenizer=tokenizer)
        value = SeparateValue.create(how, policy)
        nn.init.normal_(dict(value.module.named_parameters())["model.score.weight"], generator=torch.Generator())
        together = value.values(GROUPS)
        alone = torch.cat(
            [nn.functional.pad(one, (0, 4 - one.shape[1])) for one in map(value.values, [[g] for g in GROUPS])]
        )
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
        found.append(together)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_without_a_reward_model_it_is_the_policys_backbone_and_says_0(base: Path, lora: bool, memory: bool) -> None:
    how = config(use_peft=lora, **({} if memory else {"model_name_or_path": str(base)}))
    given: Any = {"model": tiny.model(), "tokenizer": tiny.tokenizer()} if memory else {}
    policy = TextPolicy.create(how, World.start(), **given)
    value = value_of(how, policy, reward="", keeping="auto")
    assert bool((value.values(GROUPS) == 0).all())
    before = policy.log_probs(GROUPS).detach()
    train(policy, value, of_policy=0.0)
    assert bool((value.values(GROUPS).abs().sum(-1) > 0).all())
    assert torch.equal(policy.log_probs(GROUPS), before)


def test_its_head_is_trained(pair: tuple[TextPolicy, Value]) -> None:
    policy, value = pair
    _, own, _ = parts(policy, value)
    heads = [name for name in own if "score" in name]
    assert len(heads) == 1
    before = digests(own)
    train(policy, value, of_policy=0.0)
    after = digests(own)
    assert before[heads[0]] != after[heads[0]]
    changed = [name for name in own if before[name] != after[name]]
    assert len(changed) > len(own) // 2


def test_a_value_loss_moves_no_policy_and_a_policy_loss_no_value(pair: tuple[TextPolicy, Value]) -> None:
    policy, value = pair
    own, other, frozen = parts(policy, value)
    assert own and other
    with torch.no_grad():
        log_probs, values, reference = (
            policy.log_probs(GROUPS),
            value.values(GROUPS),
            policy.reference_log_probs(GROUPS),
        )
    before = [digests(part) for part in (own, other, frozen)]
    train(policy, value, of_policy=0.0)
    after = [digests(part) for part in (own, other, frozen)]
    assert [one == two for one, two in zip(before, after, strict=True)] == [True, False, True]
    assert torch.equal(policy.log_probs(GROUPS), log_probs)
    assert torch.equal(policy.reference_log_probs(GROUPS), reference)
    values = value.values(GROUPS).detach()
    train(policy, value, of_value=0.0)
    last = [digests(part) for part in (own, other, frozen)]
    assert [one == two for one, two in zip(after, last, strict=True)] == [False, True, True]
    assert torch.equal(value.values(GROUPS), values)
    assert torch.equal(policy.reference_log_probs(GROUPS), reference)
    assert not torch.equal(policy.log_probs(GROUPS), log_probs)


def test_gradients_are_those_of_policy_and_value_alone(pair: tuple[TextPolicy, Value]) -> None:
    """One backward pass over both equals two over one each."""
    policy, value = pair
    own, other, _ = parts(policy, value)

    def gradients(loss: Tensor) -> list[Tensor | None]:
        for weight in (*own.values(), *other.values()):
            weight.grad = None
        loss.backward()
        return [None if w.grad is None else w.grad.clone() for w in (*own.values(), *other.values())]

    alone = gradients(policy.token_log_probs(GROUPS).sum())[: len(own)]
    alone += gradients(value.values(GROUPS).square().sum())[len(own) :]
    together = policy.token_log_probs(GROUPS).sum()
    with torch.no_grad():
        policy.reference_token_log_probs(GROUPS)
    together = gradients(together + value.values(GROUPS).square().sum())
    assert all(gradient is not None for gradient in together)
    for one, other_one in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other_one)


@pytest.mark.parametrize("kind", ["lora", "shared"])
def test_the_reference_is_the_start_model_bit_for_bit(kind: str, base: Path, rewards: Any) -> None:
    start = TextPolicy.create(config(model_name_or_path=str(base)), World.start())
    with torch.no_grad():
        expected = start.token_log_probs(GROUPS, temperature=0.7)
    policy, value = both(kind, base, str(rewards[True][0]))
    for _ in range(2):
        assert torch.equal(policy.reference_token_log_probs(GROUPS, temperature=0.7), expected)
        train(policy, value)
    with torch.no_grad(), reference_policy(policy) as reference:
        assert torch.equal(reference.token_log_probs(GROUPS, temperature=0.7), expected)
        assert not torch.equal(expected, torch.zeros_like(expected))
    assert not torch.equal(policy.token_log_probs(GROUPS, temperature=0.7), expected)


def test_both_learn_after_a_reference_pass_though_peft_freezes_adapters_there(base: Path, rewards: Any) -> None:
    policy, value = both("shared", base, str(rewards[True][0]))
    names = {name for name, w in whole(policy, value).named_parameters() if w.requires_grad}
    with reference_policy(policy) as start, torch.no_grad():
        start.token_log_probs(GROUPS)
    policy.reference_log_probs(GROUPS)
    assert {name for name, w in whole(policy, value).named_parameters() if w.requires_grad} == names


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_is_float32_though_the_rest_computes_in_bfloat16(kind: str, base: Path, rewards: Any) -> None:
    policy, value = both(kind, base, str(rewards[True][0]), dtype="bfloat16")
    own, other, _ = parts(policy, value)
    assert own and other
    assert {weight.dtype for weight in (*own.values(), *other.values())} == {torch.float32}
    assert value.values(GROUPS).dtype == torch.float32
    train(policy, value)


def test_a_shared_base_is_there_once(base: Path, rewards: Any) -> None:
    policy, value = both("shared", base, str(rewards[True][0]))
    assert isinstance(value, SharedValue)
    frozen = parts(policy, value)[2]
    start = tiny.model()
    assert sum(w.numel() for w in frozen.values()) == sum(w.numel() for w in start.parameters())
    assert {name.partition(".")[0] for name in frozen} == {"policy"}
    separate = both("lora", base, str(rewards[True][0]))
    counts = [sum(w.numel() for w in whole(*one).parameters()) for one in ((policy, value), separate)]
    backbone = sum(w.numel() for w in start.base_model.parameters())
    assert counts[1] - counts[0] >= backbone - 1
    own = [w.data_ptr() for w in frozen.values()]
    assert len(set(own)) == len(own)


def test_it_is_saved_and_put_back_bit_for_bit(pair: tuple[TextPolicy, Value], tmp_path: Path) -> None:
    policy, value = pair
    train(policy, value)
    with torch.no_grad():
        values, log_probs = value.values(GROUPS), policy.token_log_probs(GROUPS)
    saved = digests(parts(policy, value)[1])
    (tmp_path / "policy").mkdir()
    value.save(tmp_path)
    policy.save(tmp_path / "policy")
    train(policy, value)
    assert not torch.equal(value.values(GROUPS), values)
    value.load(tmp_path)
    assert digests(parts(policy, value)[1]) == saved
    assert torch.equal(value.values(GROUPS), values)
    assert not torch.equal(policy.token_log_probs(GROUPS), log_probs)
    policy.load(tmp_path / "policy")
    assert torch.equal(policy.token_log_probs(GROUPS), log_probs)
    assert torch.equal(value.values(GROUPS), values)
    assert not [path for path in (tmp_path / "policy").rglob("*") if path.name == ADAPTER]


def test_a_policy_with_a_value_adapter_is_saved_without_it(base: Path, rewards: Any, tmp_path: Path) -> None:
    policy, value = both("shared", base, str(rewards[True][0]))
    train(policy, value)
    policy.save_final(tmp_path)
    again = TextPolicy.pretrained(str(tmp_path / "model"), dtype="float32")
    torch.testing.assert_close(again.token_log_probs(GROUPS), policy.token_log_probs(GROUPS), rtol=1e-4, atol=1e-4)
    assert not [path for path in tmp_path.rglob("*") if path.name == ADAPTER]


def test_it_is_shared_where_it_can_be(base: Path, rewards: Any) -> None:
    how = config(model_name_or_path=str(base), use_peft=True)
    policy = TextPolicy.create(how, World.start())
    for name in (rewards[True][0], rewards[True][0] / "adapter"):
        assert why_not_shared(how, policy, str(name)) == ""
    assert isinstance(value_of(how, policy, reward=str(rewards[True][0]), keeping="auto"), SharedValue)


def test_why_it_is_not_shared(base: Path, rewards: Any, tmp_path: Path) -> None:
    adapter, full = str(rewards[True][0]), str(rewards[False][0])
    how = config(model_name_or_path=str(base), use_peft=True)
    policy = TextPolicy.create(how, World.start())
    assert why_not_shared(how, policy, full) == "the reward model is no adapter"
    assert why_not_shared(how, policy, "") == "it begins as no reward model"
    made = value_of(how, policy, reward=full, keeping="auto")
    assert isinstance(made, SeparateValue)
    assert "the reward model is no adapter, so the base is not shared" in made.how
    with pytest.raises(InputError, match="cannot share the policy's base: the reward model is no adapter"):
        value_of(how, policy, reward=full, keeping="shared")
    checkpointing = config(model_name_or_path=str(base), use_peft=True, gradient_checkpointing=True)
    assert "recomputed activations" in why_not_shared(checkpointing, policy, adapter)
    elsewhere = config(model_name_or_path=str(tiny.folder(tmp_path / "other")), use_peft=True)
    assert "another base" in why_not_shared(elsewhere, TextPolicy.create(elsewhere, World.start()), adapter)
    plain = config(model_name_or_path=str(base))
    assert "not a fresh LoRA adapter" in why_not_shared(plain, TextPolicy.create(plain, World.start()), adapter)


@pytest.mark.parametrize("lora", [False, True])
def test_a_reward_model_that_reads_other_tokens_is_refused(lora: bool, base: Path, rewards: Any) -> None:
    how = config(model_name_or_path=str(base), use_peft=lora)
    policy = TextPolicy.create(how, World.start())
    policy.tokenizer.add_tokens(["<another>"])
    with pytest.raises(InputError, match="another tokenizer than the policy") as found:
        value_of(how, policy, reward=str(rewards[lora][0]), keeping="auto")
    assert "--value_init policy" in found.value.mend


def test_the_global_generator_is_left_alone(base: Path, rewards: Any) -> None:
    for kind in KINDS:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        both(kind, base, str(rewards[True][0]))
        assert torch.equal(torch.get_rng_state(), before), kind
