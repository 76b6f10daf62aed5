"""Where a published ranker's folder keeps its configuration, tokenizer and weights.

Two layouts are in use. llm-blender/PairRM: config.json holds LLM-Blender's own settings and names the backbone
(`ranker_type`, `model_name`, `source_maxlength`, ...). llm-blender/PairRM-hf: config.json is the backbone's, with the
markers' ids and `n_tasks`. Both have their tensors in safetensors; pickled weights are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prefkit.engine.files import read_json
from prefkit.errors import InputError
from prefkit.feedback.ranker_input import Form, ReadOut

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""files of a Hub repository that are fetched"""
MARKED = "source_prefix_id"
CONVERT = (
    'write it as safetensors once, where you trust the file: python -c "import torch, safetensors.torch as s; '
    "s.save_file({k: v.contiguous().clone() for k, v in torch.load('pytorch_model.bin', weights_only=True).items()}, "
    "'model.safetensors')\""
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a ranker's folder says of itself."""

    folder: Path
    name: str
    config: Any
    """the backbone's transformers config"""
    files: Sequence[Path]
    """weights, in order"""
    form: Form
    tasks: int
    drop_out: float
    tokenizers: Sequence[str]
    """where the tokenizer is looked for, in order"""
    markers: Mapping[str, int]
    """ids of the markers as config.json gives them"""

    def tokenizer(self, markers: Sequence[str]) -> Any:
        """Its tokenizer, with the markers added where it lacks them, as LLM-Blender adds them. Raises InputError."""
        from transformers import AutoTokenizer

        reasons: list[str] = []
        for source in self.tokenizers:
            try:
                found: Any = AutoTokenizer.from_pretrained(source)
            except (OSError, ValueError, KeyError, ImportError) as error:
                reasons.append(str(error).strip().split("\n")[0][:200])
                continue
            found.add_tokens([marker for marker in markers if marker not in found.get_added_vocab()])
            return found
        raise InputError(
            f"no tokenizer could be loaded: {reasons[0]}",
            where=str(self.folder),
            mend="put the ranker's tokenizer files into its folder",
        )

    def check_markers(self, found: Mapping[str, int]) -> None:
        """InputError where the tokenizer numbers a marker otherwise than the weights' config."""
        for key, value in self.markers.items():
            if key in found and found[key] != value:
                raise InputError(
                    f"{key} is {value} in config.json, the tokenizer has {found[key]}",
                    where=str(self.folder),
                    mend="put the tokenizer that belongs to these weights into the folder",
                )

    def misfit(self, what: str) -> InputError:
        """The error for weights that are not those of the architecture that config.json names."""
        return InputError(
            f"the weights do not fit a pairwise ranker: the file {what}",
            where=str(self.files[0]),
            mend="download the folder anew, or make it with `prefkit ranker`",
        )


def is_ranker(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a pairwise ranker, in either layout."""
    return MARKED in config or "ranker_type" in config


def read_out_of(config: Any) -> ReadOut:
    """Where features of a backbone stand: at the markers of an encoder, at the parts' ends of a causal model.

    Raises InputError for what is neither.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = str(config.model_type)
    if not config.is_encoder_decoder and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "markers"
    if not config.is_encoder_decoder and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "ends"
    raise InputError(
        f"a {kind} model is neither an encoder nor a causal model of text",
        where="--model_name_or_path",
        mend="take an encoder (DeBERTa, RoBERTa, ModernBERT, BERT) or a causal language model",
    )


def context_of(config: Any) -> int:
    """Most tokens of a row that a backbone takes; 0 for any number (DeBERTa's positions are relative)."""
    text = config.get_text_config()
    positions = int(getattr(text, "max_position_embeddings", None) or 0)
    if text.model_type == "deberta-v2" and not text.position_biased_input:
        return 0
    if text.model_type in ("roberta", "xlm-roberta", "camembert"):  # its positions are counted from the pad token's id
        return positions - text.pad_token_id - 1
    return positions


def folder_of(name: str | Path) -> Path:
    """The folder behind a name: a run of `prefkit ranker`, a folder, or a Hub id. Raises InputError."""
    path = Path(name).expanduser()
    if (path / "metrics.jsonl").is_file():
        path = path / "model"
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise InputError(
            f"there is no ranker folder {name}",
            mend="give a folder, a finished run of `prefkit ranker`, or a Hub id such as llm-blender/PairRM",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(PATTERNS)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(
            f"the ranker {name} could not be fetched: {reason}",
            mend="without a network only folders and cached Hub models can be loaded",
        ) from error


def read_layout(name: str | Path) -> Layout:
    """What is at `name` (see `folder_of`). Raises InputError for what is no ranker, or has no safetensors."""
    from transformers import AutoConfig

    folder = folder_of(name)
    values = read_json(folder / "config.json")
    if not is_ranker(values) or values.get("ranker_type", "pairranker") != "pairranker":
        kinds = values.get("architectures") or [values.get("ranker_type") or "of no known kind"]
        raise InputError(
            f"{folder} is no pairwise ranker ({', '.join(map(str, kinds))})",
            where=str(folder / "config.json"),
            mend="train one with `prefkit ranker`; a model with one score per answer is judged by reward:MODEL",
        )
    backbone = str(folder)
    if "ranker_type" in values:
        backbone = str(values.get("model_name") or "microsoft/deberta-v3-large")
        backbone = str(folder / backbone) if (folder / backbone / "config.json").is_file() else backbone
    try:
        config = AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(
            f"the config of its backbone {backbone} cannot be read: {reason}",
            where=str(folder / "config.json"),
            mend="take the layout of llm-blender/PairRM-hf, or let model_name name a folder beside the weights",
        ) from error
    return Layout(
        folder=folder,
        name=_name(Path(name)),
        config=config,
        files=_weights(folder),
        form=_form(values),
        tasks=int(values.get("n_tasks") or 1),
        drop_out=float(values.get("drop_out") or 0.0),
        tokenizers=list(dict.fromkeys([str(folder), backbone])) if _has_tokenizer(folder) else [backbone],
        markers={key: int(value) for key, value in values.items() if key.endswith("_prefix_id")},
    )


def read_weights(layout: Layout) -> dict[str, Tensor]:
    """Every tensor of the folder, by its published name. Raises InputError for damaged files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in layout.files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"the weights cannot be read: {error}", where=str(file), mend="download it anew"
            ) from error
    return state


def _name(path: Path) -> str:
    """What a ranker is called in records: its run, its folder, or the Hub id's last part."""
    path = path.expanduser()
    place = path if not path.is_dir() else path.resolve()
    return place.parent.name if place.name == "model" and (place.parent / "metrics.jsonl").is_file() else place.name


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "spm.model"))


def _form(values: Mapping[str, Any]) -> Form:
    ours = values.get("prefkit_ranker") or {}
    standard = Form()
    return Form(
        source_maxlength=int(values.get("source_maxlength") or standard.source_maxlength),
        candidate_maxlength=int(values.get("candidate_maxlength") or standard.candidate_maxlength),
        read_out=ours.get("read_out", standard.read_out),
        cut_source=ours.get("cut_source", standard.cut_source),
    )


def _weights(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt")])
    if pickled:
        raise InputError(
            "the weights are pickled, and a pickle can run any code when it is read",
            where=str(pickled[0]),
            mend=CONVERT,
        )
    raise InputError("holds no weights (model.safetensors)", where=str(folder), mend="download the folder anew")
