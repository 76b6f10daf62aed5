"""Pairwise ranker: compares two answers side by side, in PairRM's form (LLM-Blender), fit to pairs.

    min  -log σ(s(x, y⁺; y⁻) - s(x, y⁻; y⁺))        both scores from one reading of x, y⁺ and y⁻ together

The ranker of arXiv 2306.02561. The result is a folder in the layout of llm-blender/PairRM-hf, and a judge that asks
both orders.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

from prefkit.domains.text import loading
from prefkit.domains.text.config import Data, Lora, Model
from prefkit.domains.text.datasets import TextData, prepare_pairs
from prefkit.engine import limits
from prefkit.engine.config import Optimisation, Output, Selection
from prefkit.engine.run import Run
from prefkit.errors import InputError
from prefkit.feedback.ranker_input import Form
from prefkit.feedback.ranker_layout import Layout, context_of, is_ranker, read_layout, read_out_of
from prefkit.loops.ranker_fit import RankerData, RankerTask, create
from prefkit.loops.training import run_task
from prefkit.objectives.margin import bradley_terry as loss
from prefkit.records import Pair, Result

__all__ = ["PRESETS", "Config", "loss", "run"]

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
"""stands in for the chat template an encoder lacks, where data are checked and counted; a ranker reads none"""


@dataclass(frozen=True, kw_only=True)
class Config(Model, Lora, Data, Optimisation, Selection, Output):
    learning_rate: float = 1e-5
    """peak learning rate"""
    source_maxlength: int = 0
    """most tokens of a prompt; 0: the ranker's own, or 1224 or what of it fits the model"""
    candidate_maxlength: int = 0
    """most tokens of an answer beside a prompt of full length; 0: the ranker's own, or 412 or what of it fits"""
    orders: Literal["random", "both"] = "random"
    """which order of a pair a step shows: one drawn for each pair (PairRM), or both"""


PRESETS = {
    "demo": Config(
        model_name_or_path="smollm2-135m-instruct",
        dataset_name="rotten-tomatoes",
        use_peft=True,
        lora_target_modules=("q_proj", "v_proj"),
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        max_steps=40,
        per_device_train_batch_size=16,
        max_length=128,
        num_eval_samples=120,
        save_steps=10,
    ),
    "pairrm": Config(
        model_name_or_path="microsoft/deberta-v3-large",
        learning_rate=1e-5,
        num_train_epochs=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        max_grad_norm=0.0,
        source_maxlength=1224,
        candidate_maxlength=412,
        max_length=2048,
    ),
    "tiny": Config(max_steps=4, per_device_train_batch_size=2),
}


def run(
    config: Config, *, model: Any = None, tokenizer: Any = None, train: Any = None, evaluation: Any = None
) -> Result:
    """Fit a pairwise ranker. `model` (an encoder or a causal LM), `tokenizer`, `train`, `evaluation` take loaded
    objects; the ranker's markers are added to the tokenizer.

    Returns the run directory, held-out accuracy and agreement between orders, and the model. Raises InputError for
    unusable input.
    """
    _check_options(config)
    source = "" if model is not None else loading.resolve(config.model_name_or_path)
    started, settings, tokenizer = _look(config, source, model, tokenizer)
    form = _form(config, started, settings)
    data = _prepare(config, settings, tokenizer, train, evaluation)

    def task(run: Run) -> RankerTask:
        trained = create(
            config,
            run.world,
            model=model,
            tokenizer=tokenizer,
            form=form,
            source=source,
            is_ranker=started is not None,
        )
        run.fingerprint(model=trained.fingerprint)
        run.say(f"reads at the {form.read_out} of prompt and answers, {form.longest} tokens at most")
        made = RankerTask(trained=trained, pairs=data.train, test=data.test, selection=data.selection, config=config)
        for line in made.describe():
            run.say(line)
        return made

    return run_task(config, "ranker", RankerData(data, settings), task)


def _check_options(config: Config) -> None:
    limits.check(config, dict.fromkeys(("source_maxlength", "candidate_maxlength"), limits.NOT_BELOW_0))
    if config.adapter_name_or_path:
        raise InputError(
            "a ranker starts from a whole model",
            where="--adapter_name_or_path",
            mend="merge the adapter first with `prefkit export RUN --to FOLDER --merge`",
        )
    if config.load_in_4bit or config.load_in_8bit:
        raise InputError(
            "a ranker is not trained on quantised weights, as its markers are new embeddings",
            where="--load_in_4bit / --load_in_8bit",
            mend="leave it off",
        )


def _look(config: Config, source: str, model: Any, tokenizer: Any) -> tuple[Layout | None, Any, Any]:
    """(layout of a ranker to go on from, config of the backbone, tokenizer), without its weights."""
    import transformers

    if model is not None:
        if tokenizer is None:
            raise InputError("a model given in memory needs its tokenizer", mend="pass tokenizer=...")
        return None, model.config, loading.prepare_tokenizer(tokenizer)
    configs: Any = transformers.AutoConfig
    try:
        settings: Any = configs.from_pretrained(source, revision=config.model_revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the config of {source} cannot be read: {str(error).strip().splitlines()[0][:300]}",
            where="--model_name_or_path",
        ) from error
    if is_ranker(settings.to_dict()):
        layout = read_layout(source)
        return layout, layout.config, tokenizer or layout.tokenizer(())
    return None, settings, tokenizer or loading.load_tokenizer(config, source)


def _form(config: Config, started: Layout | None, settings: Any) -> Form:
    """How rows are built. Raises InputError for limits that the model has no positions for."""
    form = started.form if started else Form(read_out=read_out_of(settings), cut_source="left")
    context = context_of(settings)
    if context and form.longest > context:
        share = context / form.longest
        form = replace(
            form,
            source_maxlength=int(form.source_maxlength * share),
            candidate_maxlength=int(form.candidate_maxlength * share),
        )
    form = replace(
        form,
        source_maxlength=config.source_maxlength or form.source_maxlength,
        candidate_maxlength=config.candidate_maxlength or form.candidate_maxlength,
    )
    if context and form.longest > context:
        raise InputError(
            f"a row of {form.source_maxlength} + 2 x {form.candidate_maxlength} tokens is longer than the model's "
            f"context of {context}",
            where="--source_maxlength / --candidate_maxlength",
            mend="lower them, or leave them out",
        )
    return form


def _prepare(config: Config, settings: Any, tokenizer: Any, train: Any, evaluation: Any) -> TextData[Pair]:
    """Checked pairs. They are counted in the tokens of a language model's prompt and answer; a ranker's rows differ."""
    counting = tokenizer
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        counting = copy.deepcopy(tokenizer)
        counting.chat_template = tokenizer.chat_template or TEMPLATE
        counting.eos_token = tokenizer.eos_token or tokenizer.sep_token
    context = SimpleNamespace(max_position_embeddings=context_of(settings))
    # Only its context is asked of a model in memory here: DeBERTa's config names one that its positions do not have.
    sized = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: context))
    return prepare_pairs(config, model=sized, tokenizer=counting, train=train, evaluation=evaluation)
