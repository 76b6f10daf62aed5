"""Options that TRL's users know and prefkit calls otherwise or does not need: what to write instead."""

from __future__ import annotations

_DROP = "leave it out: "

RENAMED = {
    "bf16": "--dtype bfloat16; the default, auto, takes it where the device does it well",
    "fp16": "--dtype bfloat16 or float32: training in float16 is refused",
    "lr": "--learning_rate",
    "warmup_steps": "--warmup_ratio, the share of all steps",
    "eval_strategy": "--eval_steps N; 0 evaluates before and after training",
    "evaluation_strategy": "--eval_steps N; 0 evaluates before and after training",
    "logging_strategy": "--logging_steps N",
    "save_strategy": "--save_steps N; 0 saves at the end only",
    "load_best_model_at_end": "--keep_best METRIC, for instance eval_rewards/margins",
    "metric_for_best_model": "--keep_best METRIC, for instance eval_rewards/margins",
    "greater_is_better": "--keep_best METRIC; a leading - means lower is better",
    "model_init_kwargs": "--dtype, --attn_implementation and --model_revision",
    "max_prompt_length": "--max_length, for prompt and answer together, and --long_prompts",
    "max_completion_length": "--max_new_tokens, for answers that are drawn; --max_length, for prompt and stored answer",
    "max_seq_length": "--max_length",
    "dataset_test_split": "--dataset_eval_split",
    "rpo_alpha": "--sft_weight",
    "reward_funcs": "--gold_reward module:function, in evaluation; --reward gold:module:function, to learn from",
    "generate_during_eval": "--num_eval_prompts N, the held-out prompts that are answered",
    "use_vllm": "--generator vllm",
    "resume_from_checkpoint": "the same command again, or `prefkit resume DIR`",
}
"""what to write instead"""

UNNEEDED = {
    "gradient_checkpointing_kwargs": "--gradient_checkpointing needs no further options",
    "per_device_eval_batch_size": "evaluation takes twice the training batch",
    "lora_dropout": "dropout is always off",
    "disable_dropout": "dropout is always off",
    "remove_unused_columns": "other columns are kept and ignored",
    "dataset_num_proc": "data are tokenized in one process, a batch at a time",
    "dataset_text_field": "the column is called text",
    "packing": "answers are scored in packed rows anyway; --tokens_per_batch says how long",
    "padding_free": "packed rows hold no padding, and padding never changes a number",
    "completion_only_loss": "only answers are learned",
    "assistant_only_loss": "only answers are learned",
    "do_train": "a method always trains",
    "do_eval": "held-out data are always evaluated",
    "push_to_hub": "nothing is sent anywhere; `prefkit export RUN --to FOLDER` writes a folder to upload",
    "hub_model_id": "nothing is sent anywhere; `prefkit export RUN --to FOLDER` writes a folder to upload",
    "trust_remote_code": "code from the Hub is never run",
    "deepspeed": "start the run by `accelerate launch`, see docs/running.md",
    "fsdp": "start the run by `accelerate launch`, see docs/running.md",
}
"""why it is not needed"""

NO_USE = {
    "beta": "it has no implicit reward; methods that learn from a reward weigh the KL by --kl_coef",
    "precompute_ref_log_probs": "it compares no stored pairs with a reference",
    **dict.fromkeys(("loss_type", "label_smoothing"), "its loss has one form"),
    **dict.fromkeys(
        ("max_new_tokens", "temperature", "top_p", "stop_strings", "generator", "gold_reward", "reward_model"),
        "it draws no answers",
    ),
    **dict.fromkeys(("kl_weight", "estimator", "prompt_dataset"), "it shapes the fresh answers of hypo"),
    "num_generations": "it draws no answers to learn from",
}
"""options that some methods have: why another has not"""


def mend(name: str, method: str, *, prefix: str = "") -> str:
    """What to do about an option that `method` does not know; empty for a name that is not in the tables.

    `prefix` stands before the names of options: "--" on the command line, nothing in files.
    """
    if name in RENAMED:
        text = RENAMED[name]
        text = text if text.startswith("the same") else f"write {text}"
    elif name in UNNEEDED:
        text = _DROP + UNNEEDED[name]
    elif name in NO_USE:
        text = f"{_DROP}{method} has no use for it, as {NO_USE[name]}"
    else:
        return ""
    return text if "`prefkit" in text else text.replace("--", prefix)
