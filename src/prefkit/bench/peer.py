"""The peer: TRL's DPOTrainer on the same rows in the same order, with the best settings it has.

Reference log-probs precomputed, the same dtype, model, AdamW, clipping and schedule, no gradient checkpointing, its
default metrics on and logged at every step, rows taken in order. Its padding-free mode is out of service in 1.16.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from prefkit.bench.arms import Setup, plain_attention, restore, trained
from prefkit.bench.blocks import Block, Watch, now
from prefkit.bench.workloads import build_model, word, word_tokenizer
from prefkit.engine.precision import resolve_dtype
from prefkit.errors import InputError
from prefkit.records import Pair


def version() -> str:
    """The installed TRL's version; InputError where there is none."""
    try:
        import trl  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("TRL is not installed", where="--against trl", mend='pip install "prefkit[bench]"') from error
    return importlib.metadata.version("trl")


class Peer:
    """A DPOTrainer that trains the workload again and again from the same start weights."""

    def __init__(self, setup: Setup) -> None:
        """Full fine-tuning trains the very model object of `setup`; LoRA, another one with the same weights."""
        version()
        self.setup = setup
        self._folder = tempfile.TemporaryDirectory()
        model = setup.policy.model
        if setup.workload.use_peft:
            model = build_model(setup.workload, setup.config, setup.device)
        with plain_attention(model), warnings.catch_warnings():
            # TRL and transformers of one day still speak of an option by its older name.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            self.trainer = _trainer(setup, model, self._folder.name)
        self._forward = self.trainer.model.__dict__.get("forward")
        names = {name for name, _ in trained(self.trainer.model)}
        assert names == set(setup.start), "both sides must train the same weights"

    def block(self, watch: Watch | None = None) -> Block:
        """A block from the start weights: one call of `train`."""
        trainer = self.trainer
        restore(trainer.model, self.setup.start)
        trainer.optimizer = None  # `train` makes a new one, as for a new trainer
        # Mixed precision wraps the model's forward anew in every call of `train`.
        trainer.model.__dict__.pop("forward", None)
        if self._forward is not None:
            trainer.model.__dict__["forward"] = self._forward
        gc.collect()
        clock = step_clock(self.setup.device, watch)
        trainer.add_callback(clock)
        try:
            with plain_attention(trainer.model):
                trainer.train()
        finally:
            trainer.remove_callback(clock)
        return Block(
            seconds=[after - before for before, after in pairwise(clock.stamps)],
            losses=[float(row["loss"]) for row in clock.rows],
            log_probs=[float(row["logps/chosen"]) for row in clock.rows],
            grad_norms=[float(row["grad_norm"]) for row in clock.rows],
        )


def _trainer(setup: Setup, model: Any, folder: str) -> Any:
    # Progress bars are off on both sides; TRL asks the variable at every bar.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer  # pyright: ignore

    config, workload = setup.config, setup.workload
    name = str(resolve_dtype(workload.dtype, setup.device)).removeprefix("torch.")
    settings = DPOConfig(
        output_dir=folder,
        max_steps=workload.steps,
        per_device_train_batch_size=workload.batch,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        max_length=None,
        bf16=name == "bfloat16",
        beta=config.beta,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=setup.device.type == "cpu",
        dataloader_pin_memory=setup.device.type == "cuda",
        seed=workload.seed,
    )
    lora = None
    if workload.use_peft:
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
        )
    vocabulary = model.config.get_text_config().vocab_size
    trainer = DPOTrainer(
        model=model,
        args=settings,
        train_dataset=rows(setup.pairs),
        processing_class=word_tokenizer(vocabulary),
        peft_config=lora,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def rows(pairs: Sequence[Pair]) -> Any:
    """The pairs as text for TRL, which tokenizes itself: one word is one token."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()

    def text(ids: Sequence[int]) -> str:
        return " ".join(word(token) for token in ids)

    return Dataset.from_list(
        [{"prompt": text(p.prompt), "chosen": f" {text(p.chosen)}", "rejected": f" {text(p.rejected)}"} for p in pairs]
    )


def step_clock(device: torch.device, watch: Watch | None = None) -> Any:
    """A callback of a transformers trainer: `stamps`, one at the start and one for each step, and the log's `rows`."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Stamps the end of every step, its logging included: the time between two is all that a step costs."""

        def __init__(self) -> None:
            self.stamps: list[float] = []
            self.processor: list[float] = []
            """the processor time of this process at each stamp"""
            self.rows: list[dict[str, float]] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._stamp()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if watch is not None:
                watch.begin(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if watch is not None:
                watch.end(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self._stamp()
                self.rows.append(dict(logs))

        def _stamp(self) -> None:
            self.stamps.append(now(device))
            self.processor.append(time.process_time())

    return Clock()
