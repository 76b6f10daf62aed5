"""A causal language model as a policy: what it is, what it scores, where it is saved."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from prefkit.domains.text import backends, loading, quantised, weights
from prefkit.domains.text.backends import TOLERANCE
from prefkit.domains.text.cache import weights_fingerprint
from prefkit.domains.text.config import Lora
from prefkit.domains.text.reference import AdaptersOff, FrozenAdapter, FrozenCopy, Reference, without_dropout
from prefkit.domains.text.scoring import LanguageModel, Layout, causal_lm, check_scoring, logit_transform
from prefkit.engine.precision import resolve_dtype
from prefkit.engine.sharding import shard
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.records import Group


class TextPolicy:
    """A causal LM with its tokenizer and its reference.

    Scores are summed (or per-token) log-probabilities in float32. Dropout is off. Trained weights are float32;
    with LoRA the frozen ones have the compute dtype.
    """

    def __init__(
        self,
        module: LanguageModel,
        tokenizer: Any,
        *,
        reference: Reference | None,
        world: World,
        source: str,
        revision: str = "main",
        fingerprint: str = "",
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self._reference = reference
        self.world = world
        self.source = source
        """folder or Hub id of the start model; empty for a model given in memory"""
        self.revision = revision
        """branch, tag or commit of the source"""
        self.fingerprint = fingerprint
        """sha256 of the start weights; a run is continued with no others"""

    @classmethod
    def create(
        cls, options: Any, world: World, *, model: Any = None, tokenizer: Any = None, copy_reference: bool = True
    ) -> Self:
        """The start model of a training run, from `options` (a Config with Model and Lora) or from memory.

        `copy_reference` False spares full fine-tuning the second model where no reference is needed (SFT).
        Raises InputError for a model that cannot be loaded or scored, and for combinations that cannot work.
        """
        source = "" if model is not None else loading.resolve(options.model_name_or_path)
        dtype = resolve_dtype(options.dtype, world.device)
        if tokenizer is None:
            if model is not None:
                raise InputError("a model given in memory needs its tokenizer", mend="pass tokenizer=...")
            tokenizer = loading.load_tokenizer(options, source)
        if model is None:
            model = loading.load_model(options, options, source, dtype)
        else:
            quantised.refuse_given_model(options)
            loading.refuse_adapted(model)
            loading.refuse_sharded_merge(options, world)
        if options.use_peft:
            model = loading.add_adapter(model, options, options, seed=options.seed)
        elif options.adapter_name_or_path:
            raise InputError(
                "an adapter to start from is given but LoRA is off",
                where="--adapter_name_or_path",
                mend="add --use_peft, or merge the adapter first with `prefkit export --merge`",
            )
        loading.widen(model, dtype)
        module = cls._module(model, dtype, options.gradient_checkpointing).to(world.device)
        _check(module, tokenizer, options.scoring_backend)
        fingerprint = weights_fingerprint(module)
        reference = cls._make_reference(module, options, copy_reference)
        shard(module, world)
        if isinstance(reference, FrozenCopy):
            shard(reference.module, world)
        return cls(
            module,
            loading.prepare_tokenizer(tokenizer),
            reference=reference,
            world=world,
            source=source,
            revision=options.model_revision,
            fingerprint=fingerprint,
        )

    @classmethod
    def pretrained(cls, name: str, *, dtype: str = "auto") -> Self:
        """A policy to sample from and score with: run directory, model or adapter folder, Hub id or packaged asset.

        Nothing of it trains and it has no reference. Raises InputError for a model that cannot be loaded or scored.
        """
        world = World.start()
        compute = resolve_dtype(dtype, world.device, training=False)
        found = loading.trained(name)
        # As frozen base weights are loaded for LoRA: in the compute dtype.
        model = loading.load_model(found.options, Lora(use_peft=True), found.model, compute)
        if found.adapter is not None:
            model = loading.load_adapter(model, found.adapter)
        tokenizer = loading.load_tokenizer(found.options, str(found.adapter or found.model))
        module = cls._module(model, compute, False).requires_grad_(False).to(world.device)
        _check(module, tokenizer, "auto")
        return cls(
            module,
            tokenizer,
            reference=None,
            world=world,
            source=found.model,
            revision=found.options.model_revision,
        )

    @staticmethod
    def _module(model: Any, dtype: torch.dtype, checkpointing: bool) -> LanguageModel:
        without_dropout(model)
        quantised.evaluation_mode(model)
        if checkpointing:
            # transformers checkpoints activations in training mode only; dropout is already zero.
            model.train()
            causal_lm(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            causal_lm(model).enable_input_require_grads()
        config = causal_lm(model).config.get_text_config()
        scale, cap = logit_transform(config)
        return LanguageModel(model, dtype=dtype, logit_scale=scale, soft_cap=cap)

    @staticmethod
    def _make_reference(module: LanguageModel, options: Any, copy_reference: bool) -> Reference | None:
        if options.use_peft and options.adapter_name_or_path:
            return FrozenAdapter(module, loading.adapter_folder(options.adapter_name_or_path))
        if options.use_peft:
            return AdaptersOff(module)
        return FrozenCopy(module) if copy_reference else None

    @property
    def model(self) -> Any:
        """The transformers model, or peft's wrapper around it."""
        return self.module.model

    def describe(self) -> str:
        """One line for the log: parameters, what trains, dtype."""
        total = sum(p.numel() for p in self.module.parameters())
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        how = "LoRA" if self.uses_adapter else "all weights"
        name = str(self.dtype).removeprefix("torch.")
        size = f"{total / 1e6:.1f} M parameters, {trained / 1e6:.2f} M trained ({how})"
        return f"{size}, computing in {name}, {self.module.how}"

    @property
    def uses_adapter(self) -> bool:
        return isinstance(self._reference, AdaptersOff | FrozenAdapter)

    @property
    def has_reference(self) -> bool:
        return self._reference is not None

    @property
    def reference(self) -> Reference:
        """The frozen start policy."""
        assert self._reference is not None, "this policy was created without a reference"
        return self._reference

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    def token_log_probs(self, groups: Sequence[Group], *, temperature: float = 1.0) -> Tensor:
        """(b * K, t) log-probability of each answer token, zero where an answer has ended; with gradient."""
        return self.module(self._layout(groups), temperature=temperature)

    def token_details(self, groups: Sequence[Group], *, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """`token_log_probs`, entropy of each next-token distribution in nats, and 1 where the token was the likeliest.

        (b * K, t) each, zero where an answer has ended, from one pass; the last two without gradient.
        """
        return self.module(self._layout(groups), temperature=temperature, details=True)

    def log_probs(self, groups: Sequence[Group], *, temperature: float = 1.0) -> Tensor:
        """(b, K) summed log-probability of every answer, in nats, end-of-sequence token included; with gradient.

        Raises ValueError where groups have different numbers of answers.
        """
        answers = {len(g.answers) for g in groups}
        if len(answers) != 1:
            raise ValueError(f"all groups of a batch need the same number of answers, not {sorted(answers)}")
        return self.token_log_probs(groups, temperature=temperature).sum(-1).view(len(groups), -1)

    @torch.no_grad()
    def reference_token_log_probs(self, groups: Sequence[Group], *, temperature: float = 1.0) -> Tensor:
        """(b * K, t), as `token_log_probs`, under the reference, without gradient."""
        with self.reference.active() as module:
            return module(self._layout(groups), temperature=temperature)

    def reference_log_probs(self, groups: Sequence[Group]) -> Tensor:
        """(b, K) summed log-probabilities under the reference, without gradient."""
        return self.reference_token_log_probs(groups).sum(-1).view(len(groups), -1)

    def state_kl(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor]:
        """Token log-probs of policy and reference and the exact KL of each next-token distribution, (b * K, t) each.

        Needs the whole vocabulary at every answer token of both models: for small vocabularies and short answers.
        """
        layout = self._layout(groups)
        policy = self.module(layout, distributions=True)
        with torch.no_grad(), self.reference.active() as module:
            reference = module(layout, distributions=True)
        kl = (policy.exp() * (policy - reference)).sum(-1)
        index = layout.targets[:, None]

        def padded(values: Tensor) -> Tensor:
            flat = values.new_zeros(layout.num_answers * layout.longest_answer)
            return flat.scatter(0, layout.slots, values).view(layout.num_answers, -1)

        return padded(policy.gather(-1, index)[:, 0]), padded(reference.gather(-1, index)[:, 0]), padded(kl)

    def _layout(self, groups: Sequence[Group]) -> Layout:
        return self.module.lay_out(groups, pad=self.tokenizer.pad_token_id, device=self.world.device)

    def save(self, folder: Path) -> None:
        """Write the trained weights in Hugging Face layout: the adapter with LoRA, else the whole model."""
        weights.save(self.module, self.tokenizer, folder, world=self.world, adapter=self.uses_adapter)

    def load(self, folder: Path) -> None:
        """Put the weights that `save` wrote back into this policy, bit for bit."""
        weights.load(self.module, folder, adapter=self.uses_adapter)

    def save_final(self, directory: Path) -> dict[str, str | None]:
        """Write DIRECTORY/adapter where LoRA was used, and DIRECTORY/model, the base of the next stage."""
        return weights.save_final(
            self.module,
            self.tokenizer,
            directory,
            world=self.world,
            adapter=self.uses_adapter,
            source=self.source,
            revision=self.revision,
            kind="causal",
        )


@contextmanager
def reference_policy(policy: TextPolicy) -> Generator[TextPolicy]:
    """The reference as a policy of its own, to sample from; while it is active the policy itself must not be used."""
    with policy.reference.active() as module:
        yield TextPolicy(
            module,
            policy.tokenizer,
            reference=None,
            world=policy.world,
            source=policy.source,
            revision=policy.revision,
            fingerprint=policy.fingerprint,
        )


def _check(module: LanguageModel, tokenizer: Any, backend: str) -> None:
    """Choose how the model is scored. InputError where its scores would not be its own log-probs."""
    vocabulary = causal_lm(module.model).config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {vocabulary}",
            where="--model_name_or_path",
            mend="use the tokenizer the model was trained with",
        )
    pad = tokenizer.pad_token_id or 0
    try:
        gap = check_scoring(module, pad=pad, vocabulary=vocabulary)
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"{type(causal_lm(module.model)).__name__} is not built as prefkit expects, a decoder and an output "
            f"head: {error}",
            where="--model_name_or_path",
            mend="use a decoder-only causal LM",
        ) from error
    if not gap <= TOLERANCE[module.dtype]:
        raise InputError(
            f"log-probs differ from the model's own forward pass by {gap:.3g} nats: it transforms its logits "
            "in a way prefkit does not know",
            where="--model_name_or_path",
            mend="please report the model; training it would optimise a wrong objective",
        )
    backends.choose(module, backend, pad=pad, vocabulary=vocabulary)
