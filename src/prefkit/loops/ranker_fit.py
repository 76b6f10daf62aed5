"""Fitting a pairwise ranker to stored pairs: the task behind `ranker`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefkit.domains.text import loading, weights
from prefkit.domains.text.cache import weights_fingerprint
from prefkit.domains.text.datasets import TextData
from prefkit.domains.text.metrics import in_order, spread
from prefkit.domains.text.packing import passes
from prefkit.domains.text.prompts import group_of, plain
from prefkit.domains.text.reference import without_dropout
from prefkit.engine.files import UNFINISHED, discard
from prefkit.engine.precision import resolve_dtype
from prefkit.engine.seeds import number
from prefkit.engine.sharding import full_state, load_state, shard
from prefkit.engine.world import World
from prefkit.errors import InputError
from prefkit.feedback.ranker import WEIGHTS, PairRanker, RankerModule
from prefkit.feedback.ranker_input import Form, Part, Row, texts_of
from prefkit.feedback.ranker_layout import read_out_of
from prefkit.objectives.margin import soft_logistic
from prefkit.protocols import Metrics, Trackable
from prefkit.records import HeldOut, Pair, Preference
from prefkit.rewards.fit import accuracy

BACKBONE = "pretrained_model."
HEAD = "head_layer."
HEAD_FILE = "head.safetensors"
"""beside an adapter: the ranker's head"""


class TrainedRanker:
    """A ranker in training: what checkpoints hold of it, and how it is written in the end."""

    def __init__(
        self, ranker: PairRanker, base: Callable[[], PairRanker] | None, world: World, fingerprint: str
    ) -> None:
        """`base`: with LoRA, makes the ranker as it started, in float32, to merge the adapter into.

        fingerprint: sha256 of the start weights.
        """
        self.ranker, self.base, self.world, self.fingerprint = ranker, base, world, fingerprint
        self.model: nn.Module = ranker.module
        self.tokenizer = ranker.tokenizer

    @property
    def _trained(self) -> set[str] | None:
        """Names of the tensors that train, where that is not all of them."""
        if self.base is None:
            return None
        return {name for name in self.model.state_dict() if ".default." in name or name.startswith(HEAD)}

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        state = full_state(self.model, names=self._trained)
        if not self.world.is_main:
            return
        if self.base is None:
            self.ranker.write(folder, state)
            return
        backbone: Any = self.ranker.module.pretrained_model
        adapter = {name.removeprefix(BACKBONE): tensor for name, tensor in state.items() if name.startswith(BACKBONE)}
        # The markers' embeddings come from the seed, though peft finds the matrix larger than its base's.
        backbone.save_pretrained(folder, state_dict=adapter, selected_adapters=["default"], save_embedding_layers=False)
        head = {name: tensor.cpu().contiguous() for name, tensor in state.items() if name.startswith(HEAD)}
        save_file(head, folder / HEAD_FILE, metadata={"format": "pt"})
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote, bit for bit."""
        from safetensors.torch import load_file

        names = self._trained
        if names is None:
            load_state(self.model, load_file(folder / WEIGHTS))
            return
        # peft leaves the adapter's name out of the names in its files
        own = {name.replace(".default.", "."): name for name in names}
        adapter = load_file(folder / "adapter_model.safetensors")
        state = {own.get(BACKBONE + name, BACKBONE + name): tensor for name, tensor in adapter.items()}
        load_state(self.model, {**state, **load_file(folder / HEAD_FILE)}, names=names)

    def save_final(self, directory: Path) -> dict[str, str | None]:
        """Write DIRECTORY/model, a whole ranker, and with LoRA DIRECTORY/adapter, what was trained of it."""
        if self.base is None:
            state = full_state(self.model)
            if self.world.is_main:
                self.ranker.save(directory / "model", state)
            return {"model": "model", "adapter": None}
        unfinished = directory / f"{UNFINISHED}adapter"
        if self.world.is_main:
            discard(unfinished)
            unfinished.mkdir()
        self.world.barrier()
        self.save(unfinished)
        if self.world.is_main:
            discard(directory / "adapter")
            unfinished.rename(directory / "adapter")
            self._merged(self.base(), directory / "adapter").save(directory / "model")
        return {"model": "model", "adapter": "adapter"}

    def _merged(self, base: PairRanker, adapter: Path) -> PairRanker:
        from safetensors.torch import load_file

        base.module.pretrained_model = weights.merge(base.module.pretrained_model, adapter)
        base.module.load_state_dict(load_file(adapter / HEAD_FILE), strict=False)
        return base


def create(
    options: Any, world: World, *, model: Any, tokenizer: Any, form: Form, source: str, is_ranker: bool
) -> TrainedRanker:
    """The ranker that training starts from: a given one, or a fresh head on a backbone.

    model: a transformers model in memory, left as it is, or None for what `source` (folder or Hub id) names. Raises
    InputError.
    """
    dtype = resolve_dtype(options.dtype, world.device)
    if model is not None:
        loading.refuse_adapted(model)
        loading.refuse_sharded_merge(options, world)
        kept: Any = copy.deepcopy(model.base_model).float()

    def make() -> PairRanker:
        if is_ranker:
            return PairRanker.trainable(source, form=form, dtype=dtype)
        backbone: Any = copy.deepcopy(kept) if model is not None else _backbone(options, source)
        return PairRanker.start(backbone, tokenizer, form, seed=options.seed, dtype=dtype)

    ranker = make()
    module = ranker.module
    without_dropout(module)
    backbone: Any = module.pretrained_model
    if options.gradient_checkpointing:
        backbone.train()
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        backbone.enable_input_require_grads()
    if options.use_peft:
        _add_adapter(module, options, dtype)
    module.to(world.device)
    fingerprint = weights_fingerprint(module)
    shard(module, world)
    return TrainedRanker(ranker, make if options.use_peft else None, world, fingerprint)


def _backbone(options: Any, source: str) -> Any:
    """The encoder or causal model without a head, in float32. Raises InputError."""
    from safetensors import SafetensorError
    from transformers import AutoModel

    arguments: dict[str, Any] = {"revision": options.model_revision, "dtype": torch.float32}
    if options.attn_implementation:
        arguments["attn_implementation"] = options.attn_implementation
    try:
        model, found = AutoModel.from_pretrained(source, output_loading_info=True, **arguments)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"the model {source} could not be loaded: {str(error).strip().splitlines()[0][:300]}",
            where="--model_name_or_path",
            mend="check the name; without a network only folders, cached Hub models and packaged assets can be loaded",
        ) from error
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:
        raise InputError(
            f"the model {source} lacks {missing[0]} ({len(missing)} weights in all); they would be random numbers",
            where="--model_name_or_path",
            mend="give a folder with all the weights its config.json asks for",
        )
    return model


def _add_adapter(module: RankerModule, options: Any, dtype: torch.dtype) -> None:
    """LoRA on the backbone; its own weights are frozen in the compute dtype, the head trains whole in float32."""
    from peft import LoraConfig, get_peft_model

    backbone: Any = module.pretrained_model
    targets: list[str] = list(options.lora_target_modules)
    settings = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    backbone.to(dtype)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():  # peft draws from the global generator
            # ... and asks transformers for an attribute that was renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            torch.manual_seed(number(options.seed, "adapter"))
            wrapped: Any = get_peft_model(backbone, settings)
    except ValueError as error:
        raise InputError(
            f"LoRA cannot be put on {targets}: {str(error).strip().splitlines()[0][:300]}",
            where="--lora_target_modules",
            mend="name linear modules of this model, or all-linear",
        ) from error
    loading.widen(wrapped, dtype)
    module.pretrained_model = wrapped


@dataclass(frozen=True)
class Parts:
    """A pair as the ranker reads it."""

    source: Part
    chosen: Part
    rejected: Part


@dataclass(frozen=True)
class Shown:
    """A pair in one or both orders: a row each, and whether it has the rejected answer first."""

    pair: Preference
    rows: tuple[Row, ...]
    swapped: tuple[bool, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)


@dataclass(kw_only=True)
class RankerTask:
    """Stored pairs and the logistic loss of their logits. See `protocols.Task`."""

    trained: TrainedRanker
    pairs: Sequence[Pair]
    test: Sequence[Pair]
    selection: Sequence[Pair]
    config: Any

    def __post_init__(self) -> None:
        self.num_rows = len(self.pairs)
        self.module: nn.Module = self.trained.model
        self.micro = self.config.per_device_train_batch_size
        self.ranker = self.trained.ranker
        self._parts = {
            name: self._read(pairs)
            for name, pairs in (("train", self.pairs), ("test", self.test), ("selection", self.selection))
        }
        budget = self.config.tokens_per_batch
        largest = max((self._shown("train", row, (False, True)).num_tokens for row in range(self.num_rows)), default=0)
        largest = largest if self.config.orders == "both" else -(-largest // 2)
        if budget and largest > budget:
            raise InputError(
                f"a pair takes {largest} tokens, tokens_per_batch is {budget}",
                where="--tokens_per_batch",
                mend=f"raise it to {largest} or more, or lower --source_maxlength and --candidate_maxlength",
            )

    def _read(self, pairs: Sequence[Pair]) -> list[Parts]:
        read = [texts_of(pair.source.prompt, (pair.source.chosen, pair.source.rejected)) for pair in pairs]
        reader = self.ranker.reader
        sources = reader.sources([source for source, _ in read])
        answers = reader.candidates([answer for _, both in read for answer in both])
        return [Parts(source, answers[2 * i], answers[2 * i + 1]) for i, source in enumerate(sources)]

    def describe(self) -> list[str]:
        """Lines on what was cut of the training data, where anything was."""
        rows = [self._shown("train", row, (False,)).rows[0] for row in range(self.num_rows)]
        sources = sum(row.cut_source for row in rows)
        answers = sum(row.cut_first + row.cut_second for row in rows)
        if not sources + answers:
            return []
        form = self.ranker.form
        return [
            f"cut: {sources} of {len(rows)} prompts and {answers} of {2 * len(rows)} answers (at most "
            f"{form.source_maxlength} tokens of a prompt, {form.longest} of a row)"
        ]

    def _shown(self, part: str, index: int, orders: Sequence[bool]) -> Shown:
        pairs = {"train": self.pairs, "test": self.test, "selection": self.selection}[part]
        parts = self._parts[part][index]
        rows = [
            self.ranker.reader.row(parts.source, *pair)
            for swapped in orders
            for pair in [(parts.rejected, parts.chosen) if swapped else (parts.chosen, parts.rejected)]
        ]
        return Shown(pairs[index].source, tuple(rows), tuple(orders))

    def tracked(self) -> Mapping[str, Trackable]:
        return {"policy": self.trained}

    def batches(self, step: int, rows: Sequence[int], first: int) -> Sequence[Sequence[Shown]]:
        shown: list[Shown] = []
        for place, row in enumerate(rows, start=first):
            # by step and place in the global batch: the same on any number of processes, and after a resume
            drawn = bool(number(self.config.seed, "ranker order", step, place) & 1)
            shown.append(self._shown("train", row, (False, True) if self.config.orders == "both" else (drawn,)))
        world = self.trained.world
        agree = world.most if world.in_step else None
        sizes = [item.num_tokens for item in shown]
        places = passes(sizes, rows=self.micro, budget=self.config.tokens_per_batch, agree=agree)
        return [[shown[i] for i in piece] for piece in places]

    def compute(self, batch: Sequence[Shown]) -> tuple[Tensor, Metrics]:
        logits = self._logits(batch)
        given = [item.pair.strength for item in batch]
        strengths = [1.0 if value is None else value for value in given]
        label = torch.tensor(strengths, device=logits.device)[:, None]
        losses = soft_logistic(logits, label).mean(-1)
        margins = logits.detach().mean(-1)
        return losses, {"rewards/margins": margins, "rewards/accuracies": accuracy(margins)}

    def _logits(self, batch: Sequence[Shown]) -> Tensor:
        """(b, orders): logits of the chosen answer being the better one."""
        logits = self.ranker.logits([row for item in batch for row in item.rows])
        signs = [-1.0 if swapped else 1.0 for item in batch for swapped in item.swapped]
        return (logits * torch.tensor(signs, device=logits.device)).view(len(batch), -1)

    def weight(self, batch: Sequence[Shown]) -> float:
        return float(len(batch))

    @torch.no_grad()
    def evaluate(self, *, selecting: bool = False) -> HeldOut:
        part = "selection" if selecting and self.selection else "test"
        pairs = self.selection if part == "selection" else self.test
        mine = spread(self.trained.world, len(pairs)) if pairs else []
        rows: list[dict[str, Any]] = []
        for start in range(0, len(mine), self.micro):
            indices = mine[start : start + self.micro]
            logits = self._logits([self._shown(part, i, (False, True)) for i in indices])
            margins = logits.mean(-1)
            losses, right = soft_logistic(margins, 1.0).tolist(), accuracy(margins).tolist()
            agree = ((logits[:, 0] > 0) == (logits[:, 1] > 0)).float().tolist()
            for j, i in enumerate(indices):
                source = pairs[i].source
                rows.append(
                    {
                        "index": i,
                        "row": source.row,
                        "group": group_of(source),
                        "prompt": plain(source.prompt),
                        "margin": float(margins[j]),
                        "accuracy": right[j],
                        "order_agreement": agree[j],
                        "loss": losses[j],
                    }
                )
        rows = in_order(self.trained.world, rows)
        return HeldOut(metrics=summarize(rows), pairs=rows)

    def finish(self) -> None:
        """Nothing: the last step's weights are final."""

    def save_final(self, directory: Path) -> Mapping[str, str | None]:
        return self.trained.save_final(directory)


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over held-out pairs, both orders averaged; the loss in nats, log 2 where nothing is known."""
    names = {
        "margin": "eval_rewards/margins",
        "accuracy": "eval_rewards/accuracies",
        "order_agreement": "eval_order_agreement",
        "loss": "eval_loss",
    }
    return {name: sum(row[key] for row in rows) / len(rows) for key, name in names.items()} if rows else {}


@dataclass(frozen=True)
class RankerData:
    """Prepared pairs (see `loops.training.Prepared`), with a forecast for models that are no causal LMs too."""

    pairs: TextData[Pair]
    settings: Any
    """the backbone's config"""

    @property
    def fingerprint(self) -> str:
        return self.pairs.fingerprint

    def report(self) -> dict[str, Any]:
        return self.pairs.report()

    def describe(self) -> Sequence[str]:
        return self.pairs.describe()

    def rows(self, step: int, rank: int, size: int) -> tuple[list[int], int]:
        return self.pairs.rows(step, rank, size)

    def num_tokens(self, step: int, size: int) -> int:
        return self.pairs.num_tokens(step, size)

    def total_steps(self, size: int) -> int:
        return self.pairs.total_steps(size)

    def steps_per_epoch(self, size: int) -> float:
        return self.pairs.steps_per_epoch(size)

    def forecast(self) -> Sequence[str]:
        from transformers import AutoModel

        if read_out_of(self.settings) == "ends":
            return self.pairs.forecast()
        with torch.device("meta"):
            model: Any = AutoModel.from_config(self.settings)
        parameters = sum(weight.numel() for weight in model.parameters())
        kept = 4 * parameters if self.pairs.config.use_peft else 16 * parameters
        return [
            f"model     {parameters / 1e6:.0f} M parameters",
            f"memory    at least {kept / 2**30:.1f} GiB (weights, gradients and AdamW's moments), and the activations",
            f"disk      {4 * parameters / 2**30:.1f} GiB for the final model, and the checkpoints",
            "time      not forecast for an encoder",
        ]
