"""A value function over text: the expected return of the state before each answer token.

It starts as the reward model that is to be learned from (its backbone, its head and its centring), or, where there is
none, as the policy's backbone with a head of zeros. Three ways to keep it:

    separate   a model of its own, all weights or with LoRA
    shared     a second LoRA adapter on the policy's frozen base, begun as the reward model's own adapter
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefkit.domains.text import backends, loading, quantised, weights
from prefkit.domains.text.policy import TextPolicy
from prefkit.domains.text.reference import AdaptersOff, without_dropout
from prefkit.domains.text.reward import MEAN, float_weights, from_causal
from prefkit.domains.text.scoring import Backend, Layout, causal_lm, hidden_states, lay_out, spread_tokens
from prefkit.engine.precision import autocast
from prefkit.engine.sharding import shard
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.records import Group

Keeping = Literal["auto", "separate", "shared"]
ADAPTER = "value"
"""name of the value function's adapter on a shared base"""
FOLDER = "value"
"""of a checkpoint, that holds what the value function has learned"""
SHARED_FILE = "value.safetensors"


class ValueModule(nn.Module):
    """Values of states; part of the module the learner trains, and what the engine shards."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, mean: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.mean = mean
        """subtracted from what the head says, as the reward model it comes from does"""
        self.backend: Backend = "padded"
        self.how = ""

    def forward(self, layout: Layout) -> Tensor:
        """A batch laid out -> (n, t) value before each answer token, float32; zero where an answer has ended."""
        inner: Any = causal_lm(self.model)
        head = inner.score if "score" in dict(inner.named_children()) else inner.classifier
        return read_values(inner.base_model, head, layout, self.dtype, self.mean)


def read_values(decoder: Any, head: Any, layout: Layout, dtype: torch.dtype, mean: float) -> Tensor:
    """(n, t) values by a decoder and a linear head of one output."""
    with autocast(dtype, layout.ids.device):
        hidden = hidden_states(decoder, layout).flatten(0, 1).index_select(0, layout.before)
    # The head is tiny and its errors are the baseline of every advantage: float32.
    values = nn.functional.linear(hidden.float(), *float_weights(head))[:, 0] - mean
    return spread_tokens(values, layout)


class SeparateValue:
    """A value function with weights of its own."""

    def __init__(self, module: ValueModule, tokenizer: Any, *, world: World, adapter: bool, how: str) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.world = world
        self.uses_adapter = adapter
        self.how = how
        """for the log: what it started as, and how it is kept"""

    @classmethod
    def create(cls, options: Any, policy: TextPolicy, *, reward: str = "", how: str = "") -> Self:
        """From a reward model (folder, run or Hub id) that reads the policy's tokens, else from the policy's backbone.

        `options` is a Config with Model and Lora. Raises InputError for a reward model with another tokenizer.
        """
        world, dtype, tokenizer = policy.world, policy.dtype, policy.tokenizer
        if reward:
            found = loading.trained(reward)
            model = loading.load_model(found.options, options, found.model, dtype, kind="reward")
            mean = float(getattr(model.config, MEAN, 0.0) or 0.0)
            if found.adapter is not None:
                mean = float(weights.extra(found.adapter).get(MEAN, 0.0))
                model = loading.load_adapter(model, found.adapter).merge_and_unload(safe_merge=True)
            same_tokens(loading.load_tokenizer(found.options, str(found.adapter or found.model)), tokenizer, reward)
            start = f"the reward model {reward}"
        else:
            model, mean, start = _from_policy(options, policy), 0.0, "the policy's backbone with a head of zeros"
        if options.use_peft:
            unnamed = _without_start(options)
            model = loading.add_adapter(model, unnamed, unnamed, seed=options.seed, modules_to_save=["score"])
        loading.widen(model, dtype)
        without_dropout(model)
        quantised.evaluation_mode(model)
        if options.gradient_checkpointing:
            model.train()
            inner: Any = causal_lm(model)
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            inner.enable_input_require_grads()
        module = ValueModule(model, dtype, mean=mean).to(world.device)
        vocabulary = causal_lm(module.model).config.get_text_config().vocab_size
        backends.choose(module, options.scoring_backend, pad=tokenizer.pad_token_id or 0, vocabulary=vocabulary)
        shard(module, world)
        kept = how or "a separate value model" + (" with LoRA" if options.use_peft else "")
        return cls(module, tokenizer, world=world, adapter=options.use_peft, how=f"{kept}, begun as {start}")

    def values(self, groups: Sequence[Group]) -> Tensor:
        """(b * K, t) value before each answer token, with gradient."""
        pad, device = self.tokenizer.pad_token_id, self.world.device
        return self.module(lay_out(groups, pad, device, backend=self.module.backend))

    def save(self, folder: Path) -> None:
        """Write what trains into FOLDER/value."""
        weights.save(self.module, self.tokenizer, folder / FOLDER, world=self.world, adapter=self.uses_adapter)

    def load(self, folder: Path) -> None:
        """Put it back, bit for bit."""
        weights.load(self.module, folder / FOLDER, adapter=self.uses_adapter)


class SharedHead(nn.Module):
    """What a value function on a shared base has of its own besides its adapter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        head: Any = nn.utils.skip_init(nn.Linear, weight.shape[-1], 1, bias=False)
        head.weight.data.copy_(weight)
        self.score = head


class SharedValue:
    """A second adapter on the policy's base: one copy of the large weights for policy, reference and value function."""

    def __init__(self, policy: TextPolicy, module: SharedHead, *, mean: float, how: str) -> None:
        self.policy = policy
        self.module = module
        self.mean = mean
        self.how = how

    @classmethod
    def create(cls, policy: TextPolicy, adapter: Path) -> Self:
        """Put a reward model's adapter on the policy's base as the value function's start."""
        from peft import LoraConfig, set_peft_model_state_dict

        state = load_file(adapter / "adapter_model.safetensors")
        heads = [name for name in state if name.endswith(("score.weight", "score.modules_to_save.weight"))]
        if len(heads) != 1:
            raise InputError(
                "holds no head of a reward model", where=str(adapter), mend="name a run of `prefkit reward`"
            )
        settings: Any = LoraConfig.from_pretrained(str(adapter))
        settings.modules_to_save, settings.task_type, settings.inference_mode = None, "CAUSAL_LM", False
        model: Any = policy.model
        with torch.random.fork_rng():  # peft draws from the global generator, weights that are replaced at once
            model.add_adapter(ADAPTER, settings)
        head = state.pop(heads[0])
        outcome: Any = set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
        if outcome.unexpected_keys:
            raise InputError(f"does not fit the policy: {outcome.unexpected_keys[0]}", where=str(adapter))
        without_dropout(model)
        made = cls(
            policy,
            SharedHead(head.float()).to(policy.world.device),
            mean=float(weights.extra(adapter).get(MEAN, 0.0)),
            how=f"a value adapter on the policy's own base, begun as the reward model's ({adapter})",
        )
        made._require_gradients()
        loading.widen(model, policy.dtype)
        model.to(policy.world.device)
        return made

    def values(self, groups: Sequence[Group]) -> Tensor:
        """(b * K, t) value before each answer token, with gradient."""
        policy = self.policy
        layout = policy.module.lay_out(groups, pad=policy.tokenizer.pad_token_id, device=policy.world.device)
        with self._active():
            decoder = causal_lm(policy.model).get_decoder()
            return read_values(decoder, self.module.score, layout, policy.dtype, self.mean)

    @contextmanager
    def _active(self) -> Iterator[None]:
        model: Any = self.policy.model
        model.set_adapter(ADAPTER)
        try:
            yield
        finally:
            model.set_adapter("default")
            self._require_gradients()

    def _require_gradients(self) -> None:
        """peft freezes every adapter but the active one; both train here."""
        for name, weight in self.policy.module.named_parameters():
            if ".default." in name or f".{ADAPTER}." in name:
                weight.requires_grad_(True)

    def _adapter(self) -> dict[str, Tensor]:
        return {n: w for n, w in self.policy.module.state_dict().items() if f".{ADAPTER}." in n}

    def save(self, folder: Path) -> None:
        """Write FOLDER/value.safetensors: adapter and head."""
        if self.policy.world.is_main:
            own = {f"head.{name}": weight for name, weight in self.module.state_dict().items()}
            tensors = {name: value.detach().cpu().contiguous() for name, value in {**self._adapter(), **own}.items()}
            save_file(tensors, folder / SHARED_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Put them back, bit for bit."""
        stored = load_file(folder / SHARED_FILE)
        own = {f"head.{name}": weight for name, weight in self.module.state_dict().items()}
        for name, weight in {**self._adapter(), **own}.items():
            weight.copy_(stored[name])


Value = SeparateValue | SharedValue


def value_of(options: Any, policy: TextPolicy, *, reward: str, keeping: Keeping) -> Value:
    """The value function of a run: shared where that was asked for, or with LoRA where it can be ("auto").

    Raises InputError where `shared` is asked for and cannot be.
    """
    why = why_not_shared(options, policy, reward)
    if keeping == "separate" or (keeping == "auto" and not options.use_peft):
        return SeparateValue.create(options, policy, reward=reward)
    if why and keeping == "shared":
        raise InputError(f"the value function cannot share the policy's base: {why}", where="--value_model shared")
    if why:
        how = f"a separate value model ({why}, so the base is not shared)"
        return SeparateValue.create(options, policy, reward=reward, how=how)
    found = reward_adapter(reward)
    assert found is not None
    if (found / "tokenizer_config.json").is_file():
        same_tokens(loading.load_tokenizer(options, str(found)), policy.tokenizer, reward)
    return SharedValue.create(policy, found)


def why_not_shared(options: Any, policy: TextPolicy, reward: str) -> str:
    """Why policy and value function cannot have one base; empty where they can."""
    if not isinstance(policy.reference, AdaptersOff):
        return "the policy is not a fresh LoRA adapter on its base"
    if policy.world.in_step:
        return "its weights are sharded"
    if options.gradient_checkpointing:
        return "recomputed activations would see the other adapter"
    if not reward:
        return "it begins as no reward model"
    found = reward_adapter(reward)
    if found is None:
        return "the reward model is no adapter"
    base = loading.adapter_base(found)
    if not base or loading.resolve(base) != policy.source:
        return "the reward model is an adapter on another base"
    return ""


def reward_adapter(name: str) -> Path | None:
    """The adapter folder of a reward model given by its run or adapter folder; None for a whole model."""
    for folder in (Path(name), Path(name) / "adapter"):
        if (folder / loading.ADAPTER).is_file():
            return folder
    return None


def same_tokens(one: Any, other: Any, name: str) -> None:
    """InputError where a reward model reads other tokens than the policy writes."""
    if one.get_vocab() != other.get_vocab():
        raise InputError(
            f"{name} has another tokenizer than the policy, so it cannot begin the value function",
            where="--value_init",
            mend="--value_init policy",
        )


def _without_start(options: Any) -> Any:
    """LoRA options for a fresh adapter: the policy's start adapter is not the value function's."""
    return dataclasses.replace(options, adapter_name_or_path="")


@torch.no_grad()
def _from_policy(options: Any, policy: TextPolicy) -> Any:
    """The start model's backbone as a sequence classifier whose head says 0."""
    if policy.source:
        made = loading.load_model(options, options, policy.source, policy.dtype, kind="reward")
    else:
        made = from_causal(causal_lm(policy.model))
    made.score.weight.zero_()
    return made
