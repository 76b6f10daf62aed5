"""The peer of `rloo` and `grpo`: TRL's trainers on the same prompts in the same order, with their best settings.

One generation and one forward pass for each step's episodes, no gradient checkpointing, the same dtype, model object,
AdamW, clipping and schedule, the same weight of the KL to a reference of the same weights, default metrics logged at
every step. Generation is `model.generate`: transformers' continuous batching takes seconds to begin on a CPU, at every
batch. The tokenizer's end token lies behind the model's vocabulary: no answer ends early, and no logits processor
is needed for that. GRPO's loss is `grpo` (answers of equal length make it `dapo`, its default, too).
"""

from __future__ import annotations

import copy
import gc
import os
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from prefkit.bench.arms import plain_attention, restore
from prefkit.bench.blocks import now
from prefkit.bench.peer import step_clock, version
from prefkit.bench.rl_workloads import even, text
from prefkit.bench.rollouts import RolloutBlock, Setup, Spent
from prefkit.bench.workloads import word, word_tokenizer
from prefkit.engine.precision import resolve_dtype

PEERS = ("rloo", "grpo")
"""methods that TRL has a trainer of, with generation and reward inside"""
Answers = Callable[[Sequence[Sequence[int]]], list[list[int]]]
"""prompts in token ids -> an answer to each"""


class RolloutPeer:
    """A trainer of TRL's that trains the episodes' workload again and again from the same start weights."""

    def __init__(self, setup: Setup) -> None:
        """It trains the very model object of `setup`."""
        version()
        self.setup = setup
        self._folder = tempfile.TemporaryDirectory()
        model = setup.policy.model
        self._generation, self._end = copy.deepcopy(model.generation_config), model.config.eos_token_id
        with plain_attention(model), _quiet():
            self.trainer = _trainer(setup, self._folder.name)
        # TRL puts a forward of its own on the model object; only its own blocks run with it.
        self._forward = model.__dict__.pop("forward")
        self._restore_settings()

    def block(self, given: Answers | None = None) -> RolloutBlock:
        """A block from the start weights: one call of `train`. `given` answers the prompts in place of sampling."""
        from transformers import set_seed

        trainer, epochs = self.trainer, self.setup.episodes.epochs
        restore(trainer.model, self.setup.start)
        trainer.optimizer = trainer.lr_scheduler = None  # `train` makes new ones, as for a new trainer
        set_seed(self.setup.config.seed)
        gc.collect()
        clock = step_clock(self.setup.device)
        trainer.add_callback(clock)
        try:
            with self._watched(given) as parts, _quiet():
                trainer.train()
        finally:
            trainer.remove_callback(clock)
        return RolloutBlock(
            seconds=[after - before for before, after in pairwise(clock.stamps[::epochs])],
            processor=[after - before for before, after in pairwise(clock.processor[::epochs])],
            sampling=parts["sampling"],
            scoring=[made - drawn for made, drawn in zip(parts["making"], parts["sampling"], strict=True)],
            tokens=parts["tokens"],
            scores=[float(row["reward"]) for row in clock.rows[::epochs]],
            losses=[float(row["loss"]) for row in clock.rows],
            grad_norms=[float(row["grad_norm"]) for row in clock.rows],
        )

    @contextmanager
    def _watched(self, given: Answers | None) -> Iterator[dict[str, list[Any]]]:
        """The trainer in its own forward, telling the seconds of its parts and the tokens it draws."""
        trainer, model, device = self.trainer, self.setup.policy.model, self.setup.device
        spent = Spent(device)
        parts: dict[str, list[Any]] = {"sampling": [], "making": [], "tokens": []}
        draw, make = trainer._generate_single_turn, trainer._generate_and_score_completions

        def drawn(prompts: Sequence[Sequence[int]], *rest: Any, **settings: Any) -> Any:
            start = now(device)
            if given is None:
                found = draw(prompts, *rest, **settings)
            else:
                answers = given(prompts)
                found = (answers, None) if self.setup.episodes.method == "grpo" else answers
            parts["sampling"].append(now(device) - start)
            answers = found[0] if isinstance(found, tuple) else found
            parts["tokens"].append(sum(map(len, answers)))
            return found

        def made(*rest: Any, **settings: Any) -> Any:
            found = spent.timed("making", make)(*rest, **settings)
            parts["making"].append(spent.take("making"))
            return found

        model.__dict__["forward"] = self._forward
        trainer._generate_single_turn, trainer._generate_and_score_completions = drawn, made
        try:
            with plain_attention(model):
                yield parts
        finally:
            del trainer._generate_single_turn, trainer._generate_and_score_completions
            model.__dict__.pop("forward", None)
            self._restore_settings()

    def _restore_settings(self) -> None:
        """The model's own settings, from which prefkit learns what ends an answer; TRL's trainer changes them."""
        model = self.setup.policy.model
        model.generation_config, model.config.eos_token_id = copy.deepcopy(self._generation), self._end


@contextmanager
def _quiet() -> Iterator[None]:
    """TRL and transformers of one day still speak of an option by its older name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


def _trainer(setup: Setup, folder: str) -> Any:
    # Progress bars are off on both sides; TRL asks the variable at every bar.
    os.environ.setdefault("TQDM_DISABLE", "1")
    import trl  # pyright: ignore[reportMissingImports]
    from transformers import PrinterCallback
    from transformers.utils import logging

    logging.disable_progress_bar()
    config, episodes, policy = setup.config, setup.episodes, setup.policy
    name = str(resolve_dtype(episodes.workload.dtype, setup.device)).removeprefix("torch.")
    grpo: dict[str, Any] = {"loss_type": "grpo", "scale_rewards": "group"} if episodes.method == "grpo" else {}
    kind = episodes.method.upper()
    settings = getattr(trl, f"{kind}Config")(
        output_dir=folder,
        max_steps=config.max_steps,
        per_device_train_batch_size=episodes.per_batch,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        num_generations=episodes.num_generations,
        num_iterations=episodes.epochs,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        shuffle_dataset=False,
        beta=config.kl_coef,
        epsilon=config.cliprange,
        bf16=name == "bfloat16",
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=setup.device.type == "cpu",
        dataloader_pin_memory=setup.device.type == "cuda",
        seed=config.seed,
        **grpo,
    )
    model = policy.model
    # TRL loads its reference from where the model says it came from.
    model.save_pretrained(f"{folder}/start")
    named, model.config._name_or_path = model.config._name_or_path, f"{folder}/start"
    try:
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model,
            reward_funcs=even,
            args=settings,
            train_dataset=_prompts(setup),
            processing_class=_endless(model.config.get_text_config().vocab_size),
        )
    finally:
        model.config._name_or_path = named
    assert isinstance(model.__dict__.get("forward"), types.MethodType), "TRL is known to patch the model's forward"
    trainer.remove_callback(PrinterCallback)
    return trainer


def _endless(vocabulary: int) -> Any:
    """The word tokenizer with an end token that no model of this vocabulary can draw."""
    tokenizer = word_tokenizer(vocabulary + 1)
    tokenizer.eos_token = word(vocabulary)
    tokenizer.padding_side = "left"
    return tokenizer


def _prompts(setup: Setup) -> Any:
    """The prompts of a block in the order our side takes them, as text for TRL, which tokenizes itself."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    rows = [setup.data.data.train[row] for batch in setup.batches for row in setup.data.prompts(batch)]
    return Dataset.from_list([{"prompt": text(row.prompt)} for row in rows])
