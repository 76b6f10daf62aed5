"""A pairwise ranker in PairRM's form (LLM-Blender, arXiv 2306.02561): our own loader and forward, and the judge on it.

    h = encoder(row)                                        see ranker_input for the row
    s1 = head([h_source ; h_candidate1])      s2 = head([h_source ; h_candidate2])
    logit(x, y1, y2) = mean over tasks of s1 - s2           head: linear 2h -> h, tanh, linear h -> tasks

A judge asks both orders and averages their logits, as LLM-Blender does:

    P(a beats b) = σ( (logit(x, a, b) - logit(x, b, a)) / 2 )

Weights are read in both published layouts (llm-blender/PairRM and llm-blender/PairRM-hf), whose tensors have the same
names (`pretrained_model.*`, `head_layer.1.*`, `head_layer.4.*`), and written in the second.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from prefkit.engine.files import UNFINISHED, discard, full_disk_is_an_input_error, sha256, write_json
from prefkit.engine.precision import autocast, resolve_dtype
from prefkit.engine.seeds import generator, number
from prefkit.engine.world import World
from prefkit.feedback.orders import in_both_orders
from prefkit.feedback.ranker_input import EITHER, FIRST, MARKERS, SECOND, SOURCE, Batch, Form, Reader, Row, texts_of
from prefkit.feedback.ranker_layout import Layout, read_layout, read_weights
from prefkit.records import Comparison, Question, Verdict

__all__ = ["PairRanker", "RankerJudge", "RankerModule"]

WEIGHTS = "model.safetensors"
POOLER = "pooler"
"""part of some encoders that rankers do not use"""


class RankerModule(nn.Module):
    """Logits of rows; the module the learner trains and the engine shards."""

    def __init__(self, backbone: nn.Module, *, tasks: int = 1, drop_out: float = 0.05, dtype: torch.dtype) -> None:
        super().__init__()
        config: Any = backbone.config
        hidden = int(config.get_text_config().hidden_size)
        self.pretrained_model = backbone
        self.head_layer = nn.Sequential(
            nn.Dropout(drop_out),
            nn.Linear(2 * hidden, hidden),
            nn.Tanh(),
            nn.Dropout(drop_out),
            nn.Linear(hidden, tasks),
        )
        self.dtype = dtype
        self.tasks, self.drop_out = tasks, drop_out

    def forward(self, batch: Batch) -> Tensor:
        """Logits (b,), float32: above 0 where the first candidate is held better."""
        with autocast(self.dtype, batch.ids.device):
            hidden: Tensor = self.pretrained_model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        row = torch.arange(len(hidden), device=hidden.device)[:, None]
        # The head is tiny, and its differences are the verdict: float32.
        source, first, second = hidden[row, batch.places].float().unbind(1)
        scores = [self.head_layer(torch.cat((source, candidate), -1)) for candidate in (first, second)]
        return (scores[0] - scores[1]).mean(-1)


class PairRanker:
    """A ranker with its tokenizer."""

    def __init__(self, module: RankerModule, tokenizer: Any, form: Form, *, version: str = "") -> None:
        self.module, self.tokenizer, self.form = module, tokenizer, form
        self.reader = Reader(tokenizer, form)
        self.version = version
        """folder name and first 12 digits of the weights' sha256"""
        self.config: Any = module.pretrained_model.config
        """the backbone's"""

    @classmethod
    def start(cls, backbone: Any, tokenizer: Any, form: Form, *, seed: int, dtype: torch.dtype = torch.float32) -> Self:
        """A fresh ranker on any encoder or causal backbone, changed in place as its tokenizer is.

        The markers are added to the tokenizer; their embeddings are drawn with the mean and spread of the others, the
        head from U(±1/√inputs), both by `seed` alone.
        """
        tokenizer.add_tokens([marker for marker in MARKERS if marker not in tokenizer.get_added_vocab()])
        _without_pooler(backbone)
        if "use_cache" in backbone.config.to_dict():
            backbone.config.use_cache = False  # no row is ever continued
        ids = [int(tokenizer.convert_tokens_to_ids(marker)) for marker in MARKERS]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(number(seed, "ranker"))
            known = backbone.get_input_embeddings().weight[: min(ids)].float()
            mean, spread = known.mean(0), known.std(0)
            if len(tokenizer) > backbone.get_input_embeddings().weight.shape[0]:
                backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            weight = backbone.get_input_embeddings().weight
            for marker, place in zip(MARKERS, ids, strict=True):
                drawn = torch.randn(mean.shape, generator=generator(seed, "ranker marker", marker))
                weight[place] = (mean + spread * drawn).to(weight.dtype)
            module = RankerModule(backbone, dtype=dtype)
            _draw_head(module.head_layer, seed)
        module.eval()
        return cls(module, tokenizer, form)

    @classmethod
    def load(cls, name: str | Path, *, device: str | torch.device = "", dtype: str = "auto") -> Self:
        """A ranker from a folder, a run of `prefkit ranker`, or the Hub, ready to judge (frozen, evaluation mode).

        Raises InputError for what is no ranker, for pickled weights, and for tensors that do not fit.
        """
        layout = read_layout(name)
        place = torch.device(device) if device else World.start().device
        compute = resolve_dtype(dtype, place, training=False)
        ranker = cls._of(layout, compute)
        ranker.module.pretrained_model.to(compute)
        ranker.module.requires_grad_(False).to(place)
        return ranker

    @classmethod
    def trainable(cls, name: str | Path, *, form: Form | None = None, dtype: torch.dtype = torch.float32) -> Self:
        """The same in float32 on the CPU, its weights free to train; `form` replaces its own limits."""
        layout = read_layout(name)
        return cls._of(layout if form is None else replace(layout, form=form), dtype)

    @classmethod
    def _of(cls, layout: Layout, dtype: torch.dtype) -> Self:
        from transformers import AutoModel

        state = read_weights(layout)
        tokenizer = layout.tokenizer(MARKERS)
        with torch.random.fork_rng():  # fresh weights are drawn only to be replaced
            backbone: Any = AutoModel.from_config(layout.config)
            _without_pooler(backbone)
            _fit_vocabulary(backbone, state, layout)
            module = RankerModule(backbone, tasks=layout.tasks, drop_out=layout.drop_out, dtype=dtype)
        _load(module, state, layout)
        module.eval()
        ranker = cls(module, tokenizer, layout.form, version=f"{layout.name}@{_digest(layout.files)[:12]}")
        layout.check_markers({key: ranker.reader.markers[marker] for key, marker in _KEYS.items()})
        return ranker

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """(b,) logits of rows, float32, with gradient."""
        return self.module(self.reader.batch(rows, self.device))

    def settings(self) -> dict[str, Any]:
        """config.json in the layout of llm-blender/PairRM-hf, and what that has no place for under `prefkit_ranker`."""
        values: dict[str, Any] = self.config.to_dict()
        values.pop("_name_or_path", None)  # a place on somebody's disk
        family = str(values.get("model_type", ""))
        values["architectures"] = ["DebertaV2PairRM" if family == "deberta-v2" else "PairRanker"]
        values |= {"n_tasks": self.module.tasks, "drop_out": self.module.drop_out, "sep_token_id": self.reader.end}
        values |= {key: self.reader.markers[marker] for key, marker in _KEYS.items()}
        values |= {"source_maxlength": self.form.source_maxlength, "candidate_maxlength": self.form.candidate_maxlength}
        values["prefkit_ranker"] = {"read_out": self.form.read_out, "cut_source": self.form.cut_source}
        values["dtype"] = "float32"
        return values

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write into an existing folder. `state`: the tensors by name, if not the module's own."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach() for name, tensor in (state or self.module.state_dict()).items()}
        tensors = {name: tensor.cpu().float().contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / "config.json", self.settings())
        self.tokenizer.save_pretrained(folder)

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write FOLDER whole or not at all, as `write` does; one that is there is replaced. `load` reads it."""
        unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
        discard(unfinished)
        with full_disk_is_an_input_error(folder.parent):
            unfinished.mkdir(parents=True)
            self.write(unfinished, state)
            discard(folder)
            unfinished.rename(folder)


_KEYS = {
    "source_prefix_id": SOURCE,
    "cand1_prefix_id": FIRST,
    "cand2_prefix_id": SECOND,
    "cand_prefix_id": EITHER,
}
"""config.json's names of the markers"""


@dataclass
class _Work:
    """One row of tokens to score, and what comes of it."""

    row: Row
    logit: float = math.nan


class RankerJudge:
    """A pairwise ranker as a judge: both orders of every pair, averaged. See `protocols.Judge`.

    Rows are sorted by length and batched within one call of `judge`, so the same call gives the same bits; a call with
    other questions may differ in the last one.
    """

    def __init__(self, ranker: PairRanker, *, batch_size: int = 16, say: Callable[[str], None] | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.ranker, self.batch_size = ranker, batch_size
        self.name = f"ranker:{ranker.version or 'in memory'}"
        self.cut_sources = self.cut_answers = 0
        """prompts, and answers, that lost tokens so far"""
        self._say = say or (lambda line: print(line, file=sys.stderr))
        self._said = False

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict per question. Equal answers tie unread; a logit that is no number gives the reason "failed"."""
        asked = [self._rows(question) for question in questions]
        work = [piece for rows in asked for piece in rows.values()]
        self._score(work)
        self._report()
        return [
            Verdict(
                judge=self.name,
                comparisons=[_compare(question, pair, rows) for pair in question.wanted()],
                calls=len(rows),
                tokens=sum(len(piece.row.ids) for piece in rows.values()),
            )
            for question, rows in zip(questions, asked, strict=True)
        ]

    def _rows(self, question: Question) -> dict[tuple[str, str], _Work]:
        """The rows to score, by (shown first, shown second): each once, though a pair be wanted both ways."""
        reader = self.ranker.reader
        source_text, texts = texts_of(question.prompt, question.answers)
        source = reader.sources([source_text])[0]
        parts = dict(zip(question.answers, reader.candidates(texts), strict=True))
        orders = dict.fromkeys(in_both_orders(question))
        rows = {(one, other): _Work(reader.row(source, parts[one], parts[other])) for one, other in orders}
        self.cut_sources += any(piece.row.cut_source for piece in rows.values())
        shown = {one for (one, _), piece in rows.items() if piece.row.cut_first}
        self.cut_answers += len(shown | {other for (_, other), piece in rows.items() if piece.row.cut_second})
        return rows

    @torch.no_grad()
    def _score(self, work: Sequence[_Work]) -> None:
        # The longest first: a batch that does not fit fails at once. Ties by the tokens, whatever the order asked in.
        ordered = sorted(work, key=lambda piece: (-len(piece.row.ids), piece.row.ids))
        for start in range(0, len(ordered), self.batch_size):
            pieces = ordered[start : start + self.batch_size]
            logits = self.ranker.logits([piece.row for piece in pieces]).tolist()
            for piece, logit in zip(pieces, logits, strict=True):
                piece.logit = float(logit)

    def _report(self) -> None:
        if self._said or not (self.cut_sources or self.cut_answers):
            return
        self._said = True
        form = self.ranker.form
        self._say(
            f"{self.name} reads at most {form.source_maxlength} tokens of a prompt and {form.longest} of a row: "
            f"{self.cut_sources} prompts and {self.cut_answers} answers were cut so far; this is said once"
        )


def _compare(question: Question, pair: tuple[int, int], rows: Mapping[tuple[str, str], _Work]) -> Comparison:
    first, second = pair
    one, other = question.answers[first], question.answers[second]
    if one == other:
        return Comparison(first=first, second=second, prob_first=0.5)
    ahead, behind = rows[one, other].logit, -rows[other, one].logit
    mean = (ahead + behind) / 2
    if not math.isfinite(mean):
        return Comparison(first=first, second=second, prob_first=None, orders=(None, None), reason="failed")
    return Comparison(first=first, second=second, prob_first=_sigmoid(mean), orders=(_sigmoid(ahead), _sigmoid(behind)))


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))


def _without_pooler(backbone: Any) -> None:
    """An encoder's pooler plays no part: without it no weight goes untrained."""
    if POOLER in dict(backbone.named_children()):
        backbone.pooler = None


def _draw_head(head: nn.Sequential, seed: int) -> None:
    for name, weight in head.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        else:
            drawn = torch.rand(weight.shape, generator=generator(seed, "ranker head", name))
            weight.copy_((2 * drawn - 1) / weight.shape[1] ** 0.5)


def _fit_vocabulary(backbone: Any, state: Mapping[str, Tensor], layout: Layout) -> None:
    """As many embeddings as the file has: the published ranker's tokenizer is larger than its backbone's."""
    weight = backbone.get_input_embeddings().weight
    name = next(name for name, tensor in backbone.named_parameters() if tensor is weight)
    stored = state.get(f"pretrained_model.{name}")
    if stored is None:
        raise layout.misfit(f"lacks pretrained_model.{name}")
    if stored.shape[0] != weight.shape[0]:
        backbone.resize_token_embeddings(stored.shape[0], mean_resizing=False)


def _load(module: RankerModule, state: Mapping[str, Tensor], layout: Layout) -> None:
    own = module.state_dict()
    known = dict(module.named_parameters()) | {name: own[name] for name in own if name in state}
    unused = (".pooler.", ".position_ids")
    strange = sorted(name for name in state if name not in known and not any(part in f"{name}." for part in unused))
    missing = sorted(name for name in known if name not in state)
    if missing or strange:
        raise layout.misfit(f"lacks {missing[0]}" if missing else f"has {strange[0]}, which its architecture has not")
    for name, target in known.items():
        if target.shape != state[name].shape:
            raise layout.misfit(f"{name} has shape {tuple(state[name].shape)}, not {tuple(target.shape)}")
        with torch.no_grad():
            target.copy_(state[name])


def _digest(files: Sequence[Path]) -> str:
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()
