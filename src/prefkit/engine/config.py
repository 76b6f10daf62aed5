"""Options every training method shares, whatever the domain: optimisation, cadence, output.

Each class is a group in `--help`; a method's `Config` inherits the groups it uses, so every field is a top-level
flag and a keyword of the Config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """optimisation"""

    learning_rate: float = 1e-6
    """peak learning rate"""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """how the learning rate falls after warm-up"""
    warmup_ratio: float = 0.0
    """share of the steps over which the learning rate rises from 0"""
    optim: str = "adamw"
    """adamw | adamw_8bit (extra `quant`) | adafactor; TRL's spellings adamw_torch, adamw_bnb_8bit also work"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    adam_beta1: float = 0.9
    """AdamW's first-moment decay"""
    adam_beta2: float = 0.999
    """AdamW's second-moment decay"""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this global norm; 0 switches clipping off"""
    per_device_train_batch_size: int = 8
    """examples (pairs, rows) per process and forward pass"""
    gradient_accumulation_steps: int = 1
    """forward passes per optimizer step; N small ones equal one big one exactly"""
    num_train_epochs: float = 1.0
    """passes over the training data, unless max_steps is given"""
    max_steps: int = -1
    """optimizer steps; -1 follows num_train_epochs"""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """evaluation and selection"""

    eval_steps: int = 0
    """evaluate every so many steps; 0 evaluates at the start and the end only"""
    num_eval_samples: int = 0
    """use at most this many held-out rows; 0 uses all"""
    num_eval_prompts: int = 32
    """held-out prompts answered for the KL and the sample table"""
    keep_best: str = ""
    """eval metric whose best checkpoint becomes the final model; a leading - means lower is better"""
    stop_at_kl: float = 0.0
    """stop when the KL to the reference on own samples passes this many nats; 0 never stops"""
    patience: int = 0
    """stop after so many evaluations without a better keep_best metric; 0 never stops"""


@dataclass(frozen=True, kw_only=True)
class Output:
    """output"""

    output_dir: str = ""
    """run directory; empty means runs/METHOD-PRESET"""
    seed: int = 0
    """seed of everything random: data order, samples, new weights"""
    save_steps: int = 100
    """write a checkpoint every so many steps; 0 writes the last one only"""
    save_total_limit: int = 2
    """keep this many newest checkpoints (the best one is kept besides); 0 keeps all"""
    logging_steps: int = 1
    """write a line of metrics.jsonl every so many steps"""
    report_to: str = "none"
    """none | tensorboard | wandb, comma separated; metrics.jsonl is always written"""
    overwrite: bool = False
    """start anew in a used output_dir, deleting what the earlier run wrote"""
    dry_run: bool = False
    """check the data, print memory, time and disk forecasts, train nothing"""
