"""Options of the text domain; each class is a group in `--help` (see engine/config.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Model:
    """model"""

    model_name_or_path: str = ""
    """Hub id, folder, prefkit run directory, or packaged asset (see `prefkit assets`)"""
    model_revision: str = "main"
    """branch, tag or commit on the Hub"""
    adapter_name_or_path: str = ""
    """start from this LoRA adapter; its frozen copy is the reference"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """compute dtype; auto is bfloat16 where the device does it well; what trains stays float32"""
    load_in_4bit: bool = False
    """quantise frozen base weights to 4 bit (extra `quant`, needs use_peft)"""
    load_in_8bit: bool = False
    """quantise frozen base weights to 8 bit (extra `quant`, needs use_peft)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    attn_implementation: str = ""
    """attention kernel for transformers; empty lets it choose"""
    log_token_metrics: bool = False
    """also log entropy and mean_token_accuracy of the stored answers (a further pass over the logits)"""
    scoring_backend: Literal["auto", "sdpa", "flex", "padded"] = "auto"
    """how answers are scored: packed rows with each prompt once (sdpa, flex), or padded rows; auto takes what works"""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA"""

    use_peft: bool = False
    """train a LoRA adapter instead of all weights"""
    lora_r: int = 16
    """rank"""
    lora_alpha: float = 32.0
    """scale: the update is multiplied by alpha / r"""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """module names to adapt, or all-linear"""


@dataclass(frozen=True, kw_only=True)
class Data:
    """data"""

    dataset_name: str = ""
    """training data: file (jsonl, json, csv, parquet), folder saved by `datasets`, Hub id, or packaged asset"""
    dataset_config: str = ""
    """configuration name on the Hub"""
    dataset_train_split: str = "train"
    """split to train on"""
    dataset_eval_split: str = ""
    """split of dataset_name to evaluate on; empty takes test or validation if there is one"""
    eval_dataset: str = ""
    """held-out data, same forms as dataset_name; empty with no eval split holds out 5 % of the rows by prompt"""
    num_train_samples: int = 0
    """use at most this many training rows; 0 uses all"""
    max_length: int = 1024
    """prompt + answer tokens; longer answers are cut, marked, and get no end-of-sequence token"""
    tokens_per_batch: int = 0
    """most tokens in a forward pass, into which a step's rows are packed; 0: per_device_train_batch_size rows a pass"""
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """what to do with a row whose prompt leaves no room for an answer"""
    append_eos: bool = True
    """end every whole answer with the model's end-of-sequence token"""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """sampling"""

    max_new_tokens: int = 64
    """longest answer sampled"""
    temperature: float = 1.0
    """sampling temperature"""
    top_p: float = 1.0
    """nucleus: smallest set of tokens with this much probability"""
    stop_strings: tuple[str, ...] = ()
    """an answer also ends after any of these strings"""
    generator: Literal["transformers", "vllm"] = "transformers"
    """engine that samples; vllm is an extra"""
    gold_reward: str = ""
    """judge of own samples in evaluation: module:function (prompts, completions -> numbers), or a packaged one"""
    reward_model: str = ""
    """reward model (folder or Hub id) that scores own samples in evaluation"""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """parts of the data"""

    num_rounds: int = 3
    """rounds of training, each on the next part of the training prompts; max_steps, if given, overrides it"""
    prompts_per_round: int = 0
    """training prompts of a round; 0 cuts the data into num_rounds equal parts"""
    replay_rounds: int = 0
    """earlier rounds whose pairs are trained on again"""
    learning_rates: tuple[float, ...] = ()
    """peak learning rate of each round; empty uses learning_rate in all of them"""
    reset_reference: bool = True
    """the reference of a round is the model it starts with; off: the start model in all rounds"""
    reset_optimizer: bool = True
    """optimizer state and schedule start anew in each round"""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """rounds"""

    steps_per_round: int = 0
    """optimizer steps from one sampling to the next; 1: fresh at every step, 0: num_train_epochs over a round's part"""
    num_generations: int = 1
    """answers drawn to each prompt of a round"""
    candidates: Literal["own", "data", "both"] = "both"
    """answers that are ranked: the model's own, the data set's chosen and rejected, or all of them"""
    pairing: Literal["best_worst", "best_random", "all"] = "best_worst"
    """which ranked answers meet in the loss"""
    unfinished: Literal["keep", "drop"] = "keep"
    """own answers that max_new_tokens cut off: ranked without an end token, or left out"""
    offline_rounds: int = 0
    """first rounds that train on the stored pairs as they are: nothing is sampled or judged"""
    share_samples: str = ""
    """run directory whose answers are taken where they are the ones this run would draw (arms of an experiment)"""
