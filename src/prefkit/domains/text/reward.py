"""A reward model over text: a transformers sequence-classification model with one output.

The reward is read at the last token of prompt + answer (the end-of-sequence token of a whole answer), found by
counting and not by looking for padding, so that any padding and pad == eos are right. A model made elsewhere is read
at the last token its chat template writes, as published reward models are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from prefkit.domains.text import backends, loading, quantised, weights
from prefkit.domains.text.cache import weights_fingerprint
from prefkit.domains.text.config import Lora
from prefkit.domains.text.prompts import last_content
from prefkit.domains.text.reference import without_dropout
from prefkit.domains.text.render import encode, finished
from prefkit.domains.text.scoring import Backend, Layout, causal_lm, hidden_states, lay_out
from prefkit.domains.text.tokenize import tokenize_completions
from prefkit.engine.precision import autocast, resolve_dtype
from prefkit.engine.seeds import generator
from prefkit.engine.sharding import shard
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.records import Completion, Group, Text

MEAN = "prefkit_reward_mean"
"""key of config.json that holds the mean reward of reference answers, subtracted from every reward"""


class RewardModule(nn.Module):
    """Rewards of token sequences; the module the learner trains and the engine shards."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.backend: Backend = "padded"
        """how batches are laid out; `backends.choose` sets it, and why in `how`"""
        self.how = ""

    def forward(self, layout: Layout) -> Tensor:
        """A batch laid out with its answers' last tokens -> rewards (n,), float32."""
        inner: Any = causal_lm(self.model)
        with autocast(self.dtype, layout.ids.device):
            hidden = hidden_states(inner.base_model, layout).flatten(0, 1).index_select(0, layout.ends)
        head = inner.score if "score" in dict(inner.named_children()) else inner.classifier
        # The head is tiny, and its differences are the training signal: float32.
        return nn.functional.linear(hidden.float(), *float_weights(head))[:, 0]


def float_weights(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear head in float32, whichever wrapper peft has put around it."""
    active = head.modules_to_save["default"] if "modules_to_save" in dict(head.named_children()) else head
    bias = active.bias
    return active.weight.float(), None if bias is None else bias.float()


class RewardModel:
    """A reward model with its tokenizer. Scores are centred: reference answers have mean 0 once `centre` has run."""

    def __init__(
        self,
        module: RewardModule,
        tokenizer: Any,
        *,
        world: World,
        source: str,
        adapter: bool,
        revision: str = "main",
        fingerprint: str = "",
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.world = world
        self.source = source
        self.uses_adapter = adapter
        self.revision = revision
        self.fingerprint = fingerprint
        """sha256 of the start weights"""
        self.reads_last_token = True
        """False for a model whose own forward pass reads elsewhere: `rewards` and `judge` are not for it"""
        self.made_elsewhere = False
        """whether `judge` reads a conversation to the end of its template, and not to the end-of-sequence token"""

    @classmethod
    def create(cls, options: Any, world: World, *, model: Any = None, tokenizer: Any = None) -> Self:
        """A fresh head on any causal LM (or a given model), to be trained. Raises InputError."""
        source = "" if model is not None else loading.resolve(options.model_name_or_path)
        dtype = resolve_dtype(options.dtype, world.device)
        if tokenizer is None:
            tokenizer = loading.load_tokenizer(options, source)
        if model is None:
            model = loading.load_model(options, options, source, dtype, kind="reward")
        else:
            quantised.refuse_given_model(options)
            loading.refuse_adapted(model)
            loading.refuse_sharded_merge(options, world)
            if model.get_output_embeddings() is not None:
                model = from_causal(model)
        _reset_head(model, options.seed)
        _name_pad(model, tokenizer)
        setattr(model.config, MEAN, 0.0)
        if options.use_peft:
            model = loading.add_adapter(model, options, options, seed=options.seed, modules_to_save=["score"])
        loading.widen(model, dtype)
        without_dropout(model)
        quantised.evaluation_mode(model)
        if options.gradient_checkpointing:
            model.train()
            inner: Any = causal_lm(model)
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            inner.enable_input_require_grads()
        module = RewardModule(model, dtype).to(world.device)
        _choose(module, tokenizer, options.scoring_backend)
        fingerprint = weights_fingerprint(module)
        shard(module, world)
        return cls(
            module,
            loading.prepare_tokenizer(tokenizer),
            world=world,
            source=source,
            adapter=options.use_peft,
            revision=options.model_revision,
            fingerprint=fingerprint,
        )

    @classmethod
    def load(cls, name: str, *, device: str | torch.device = "", dtype: str = "auto") -> Self:
        """A trained sequence-classification model with one output: folder, run directory or Hub id.

        An adapter folder, or the run of one, is put on its base. Raises InputError for what is no reward model.
        """
        found = loading.trained(name)
        if found.adapter is None:
            _require_reward_model(found.model)
        world = World.start()
        place = torch.device(device) if device else world.device
        compute = resolve_dtype(dtype, place, training=False)
        model = loading.load_model(found.options, Lora(use_peft=True), found.model, compute, kind="reward")
        ours = MEAN in model.config.to_dict()
        if found.adapter is not None:
            extra = weights.extra(found.adapter)
            ours = MEAN in extra
            model = loading.load_adapter(model, found.adapter)
            setattr(causal_lm(model).config, MEAN, extra.get(MEAN, 0.0))
        without_dropout(model)
        quantised.evaluation_mode(model)
        module = RewardModule(model.requires_grad_(False), compute).to(place)
        tokenizer = loading.load_tokenizer(found.options, str(found.adapter or found.model))
        fingerprint = weights_fingerprint(module)
        made = cls(module, tokenizer, world=world, source=found.model, adapter=False, fingerprint=fingerprint)
        made.reads_last_token, made.made_elsewhere = _reads_last_token(module), not ours
        if made.reads_last_token:
            _choose(module, tokenizer, "auto")
        return made

    @property
    def model(self) -> Any:
        return self.module.model

    @property
    def mean(self) -> float:
        """Mean reward of reference answers before centring."""
        return float(getattr(causal_lm(self.model).config, MEAN, 0.0) or 0.0)

    def centre(self, mean: float) -> None:
        """Subtract `mean` from every reward from now on; it is saved with the model."""
        setattr(causal_lm(self.model).config, MEAN, mean)

    def rewards(self, groups: Sequence[Group]) -> Tensor:
        """(b, K) centred rewards of every answer of every group, float32, with gradient."""
        device = next(self.module.parameters()).device
        layout = lay_out(groups, self.tokenizer.pad_token_id, device, backend=self.module.backend, last=True)
        return self.module(layout).view(len(groups), -1) - self.mean

    @torch.no_grad()
    def judge(self, prompts: Sequence[Text], completions: Sequence[str], *, batch_size: int = 16) -> list[float]:
        """Centred rewards of answers given as text; the model's own tokenizer and template are used.

        Read at the last token that is not config.json's pad token, as transformers' own forward pass does: a model that
        was trained with its end token as padding is read before it. `create` names no such pad token.
        """
        rows = [
            Completion(
                prompt=prompt,
                completion=answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}],
                row=i,
            )
            for i, (prompt, answer) in enumerate(zip(prompts, completions, strict=True))
        ]
        longest = getattr(causal_lm(self.model).config, "max_position_embeddings", 1 << 20)
        ended = [row for row in rows if isinstance(row.prompt, str) or not self.made_elsewhere]
        examples = tokenize_completions(self.tokenizer, ended, max_length=longest)
        groups = {row.row: example.group for row, example in zip(ended, examples, strict=True)}
        groups |= {row.row: self._to_its_end(row, longest) for row in rows if row.row not in groups}
        scores: list[float] = []
        for start in range(0, len(rows), batch_size):
            read = [self._read_group(groups[row.row]) for row in rows[start : start + batch_size]]
            scores += self.rewards(read)[:, 0].tolist()
        return scores

    def _to_its_end(self, row: Completion, longest: int) -> Group:
        """A conversation as its template writes it, cut at the model's context."""
        assert not isinstance(row.prompt, str)
        start, text = finished(self.tokenizer, row.prompt, last_content(row.completion))
        prompt, whole = encode(self.tokenizer, [start, text])
        require_room(len(prompt), longest, row.row)
        return Group(whole[:1], [whole[1:longest]])

    def _read_group(self, group: Group) -> Group:
        """The group without what stands behind the token that is read."""
        pad = causal_lm(self.model).config.get_text_config().pad_token_id
        whole = [*group.prompt, *group.answers[0]]
        end = next((i for i in range(len(whole), 1, -1) if whole[i - 1] != pad), len(whole))
        border = min(len(group.prompt), end - 1)
        return Group(whole[:border], [whole[border:end]])

    def save(self, folder: Path) -> None:
        weights.save(self.module, self.tokenizer, folder, world=self.world, adapter=self.uses_adapter)

    def restore(self, folder: Path) -> None:
        weights.load(self.module, folder, adapter=self.uses_adapter)

    def save_final(self, directory: Path) -> dict[str, str | None]:
        """Write DIRECTORY/model as a stock sequence-classification folder (and DIRECTORY/adapter with LoRA)."""
        pad = causal_lm(self.model).config.pad_token_id
        tokenizer = copy.deepcopy(self.tokenizer)
        if pad is not None:
            tokenizer.pad_token_id = pad
        return weights.save_final(
            self.module,
            tokenizer,
            directory,
            world=self.world,
            adapter=self.uses_adapter,
            source=self.source,
            revision=self.revision,
            kind="reward",
            extra_config={MEAN: self.mean, "pad_token_id": pad},
        )


def require_room(used: int, longest: int, row: int, *, added: int = 0) -> None:
    """InputError for a prompt of `used` tokens that leaves no room for an answer beside the `added` special ones."""
    if used + added >= longest:
        raise InputError(
            f"the prompt has {used} tokens, and the reward model takes {longest} with the answer",
            where=f"row {row + 1}",
            mend="leave the row out, or take a reward model with a longer context",
        )


def _choose(module: RewardModule, tokenizer: Any, backend: str) -> None:
    vocabulary = causal_lm(module.model).config.get_text_config().vocab_size
    backends.choose(module, backend, pad=tokenizer.pad_token_id or 0, vocabulary=vocabulary)


@torch.no_grad()
def _reads_last_token(module: RewardModule) -> bool:
    """Whether the rewards of `module` are those of the model's own forward pass, tried on one sequence."""
    inner: Any = causal_lm(module.model)
    config = inner.config.get_text_config()
    if "score" not in dict(inner.named_children()) or getattr(config, "is_encoder_decoder", False):
        return False
    device = next(module.parameters()).device
    ids = [token for token in range(3, config.vocab_size) if token != config.pad_token_id][:8]
    ours = module(lay_out([Group(ids[:4], [ids[4:]])], 0, device, last=True))
    with autocast(module.dtype, device):
        own = inner(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()
    return bool((ours - own).abs().max() <= backends.TOLERANCE[module.dtype] * own.abs().clamp(min=1.0).max())


def _require_reward_model(source: str) -> None:
    """InputError for a model without a head of one output: loading it would make one up."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    kinds = config.architectures or []
    if not any("SequenceClassification" in kind for kind in kinds) or config.num_labels != 1:
        raise InputError(
            f"{source} is no reward model ({', '.join(kinds) or 'of no known kind'}, {config.num_labels} outputs; "
            "a reward model has one)",
            where="--reward_model",
            mend="train one with `prefkit reward`",
        )


def _reset_head(model: Any, seed: int) -> None:
    """Fresh head weights from N(0, 1/(hidden + 1)), the same for the same seed."""
    head = model.score
    size = head.weight.shape[-1]
    drawn = torch.randn(head.weight.shape, generator=generator(seed, "reward head")) / (size + 1) ** 0.5
    with torch.no_grad():
        head.weight.copy_(drawn)


def _name_pad(model: Any, tokenizer: Any) -> None:
    """Give config.json a pad token other than EOS, or none where the vocabulary has no other special token.

    transformers' own sequence classifier reads the last token that is not padding: with pad == eos it would read the
    token before the end of a whole answer; without a pad token it takes one sequence at a time, and that right. Our
    own reading does not depend on it.
    """
    ends, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    others = [i for i in [*tokenizer.all_special_ids, *added] if i != ends]
    model.config.pad_token_id = pad if pad not in (None, ends) else next(iter(others), None)


def from_causal(model: Any) -> Any:
    """A sequence-classification model with a copy of the backbone of a causal LM given in memory, adapters left out."""
    from transformers import AutoModelForSequenceClassification

    settings = type(model.config).from_dict({**model.config.to_dict(), "num_labels": 1})
    made: Any = AutoModelForSequenceClassification.from_config(settings)
    state = model.base_model.state_dict()
    plain = {name.replace(".base_layer.", "."): weight for name, weight in state.items() if ".lora_" not in name}
    made.base_model.load_state_dict(plain)
    return made
