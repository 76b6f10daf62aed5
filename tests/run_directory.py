"""Writes synthetic run directories in the format of docs/evaluation.md, for tests of everything that reads
them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

FILMS = (
    "Amélie",
    "Heat",
    "Paprika",
    "Alien",
    "The Third Man",
    "Ran",
    "Brazil",
    "Fargo",
    "Solaris",
    "Playtime",
    "Stalker",
    "M",
    "Rashomon",
    "Vertigo",
    "Up",
    "Network",
    "Gravity",
    "Once",
    "Zodiac",
    "Moon",
)
BEFORE = (
    "The film is about a man who goes to the city and the film is about a man who",
    "It's a movie that tries to be many things and ends up as none of them.",
    "I don't know what to say about this one, except that it is long and rather dull",
    "A disappointing and confused picture.",
)
AFTER = (
    "A warm, beautifully acted film that earns every one of its quiet surprises.",
    "One of the year's most inventive and moving pictures, with a wonderful lead performance.",
    "It's charming, funny and smart enough to leave you smiling <long> after the credits & the lights.",
    "A gripping story told with great care",
)
CONFIG: dict[str, Any] = {
    "model_name_or_path": "smollm2-135m-instruct",
    "model_revision": "main",
    "adapter_name_or_path": "",
    "dtype": "auto",
    "load_in_4bit": False,
    "gradient_checkpointing": False,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32.0,
    "lora_target_modules": ["all-linear"],
    "dataset_name": "rotten-tomatoes",
    "dataset_config": "",
    "dataset_train_split": "train",
    "eval_dataset": "",
    "num_train_samples": 0,
    "max_length": 96,
    "max_new_tokens": 32,
    "temperature": 1.0,
    "top_p": 1.0,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "optim": "adamw",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1.0,
    "max_steps": 120,
    "eval_steps": 20,
    "num_eval_samples": 0,
    "num_eval_prompts": 32,
    "keep_best": "",
    "stop_at_kl": 0.0,
    "patience": 0,
    "output_dir": "runs/hypo-demo",
    "seed": 0,
    "save_steps": 100,
    "save_total_limit": 2,
    "logging_steps": 1,
    "report_to": "none",
    "overwrite": False,
    "dry_run": False,
    "beta": 0.1,
    "kl_weight": 0.01,
    "num_samples": 2,
    "estimator": "rloo",
}
CHANGED = {
    "model_name_or_path": "",
    "use_peft": False,
    "dataset_name": "",
    "max_length": 1024,
    "max_new_tokens": 64,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "max_steps": -1,
    "eval_steps": 0,
    "output_dir": "",
    "kl_weight": 1e-4,
}


def build(
    folder: Path,
    *,
    method: str = "hypo",
    preset: str = "demo",
    steps: int = 120,
    num_pairs: int = 60,
    num_prompts: int = 8,
    effect: float = 1.0,
    seed: int = 0,
    gold: bool = True,
    reference: bool = False,
    finished: bool = True,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A whole run whose margin grows with `effect` (0: nothing was learned). Returns the folder."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    settings = CONFIG | {"max_steps": steps, "seed": seed} | dict(config or {})
    head = {"method": method, "preset": preset, "prefkit": "0.1.0", "config": settings}
    write(folder / "config.json", head | {"defaults": CONFIG | CHANGED})
    write(
        folder / "environment.json",
        {
            "command": f"prefkit {method} {preset}".strip(),
            "versions": {
                "python": "3.12.3",
                "prefkit": "0.1.0",
                "torch": "2.13.0+cpu",
                "transformers": "5.23.0",
            },
            "device": "cpu",
            "cores": 2,
            "memory_gib": 15.6,
            "processes": 1,
            "dtype": "float32",
        },
    )
    write(folder / "data.json", DATA)
    rows(folder / "metrics.jsonl", metrics(draw, steps, effect))
    pairs = [_pair(draw, place, effect) for place in range(num_pairs)]
    samples = [_sample(draw, place, effect, gold, reference) for place in range(num_prompts)]
    rows(folder / "evaluation" / "pairs.jsonl", pairs)
    rows(folder / "evaluation" / "samples.jsonl", samples)
    write(folder / "evaluation.json", evaluation(pairs, samples, gold))
    if finished:
        write(
            folder / "result.json",
            {
                "status": "complete",
                "reason": "",
                "steps": steps,
                "selected_step": steps,
                "rule": "last step",
                "seconds": 497.3,
                "model": "model",
                "adapter": "adapter",
            },
        )
    return folder


def metrics(draw: random.Random, steps: int, effect: float) -> list[dict[str, Any]]:
    """Rows as training logs them: train values at every step, held-out ones at every twentieth."""
    logged = [{"step": 0, "epoch": 0.0, **_held_out(0.0)}]
    for step in range(1, steps + 1):
        grown = effect * (1 - math.exp(-3 * step / steps))
        margin = 0.55 * grown + draw.gauss(0, 0.18)
        row: dict[str, Any] = {
            "step": step,
            "epoch": step / steps,
            "loss": math.log1p(math.exp(-margin)) + draw.gauss(0, 0.02),
            "grad_norm": 1.4 + 0.6 * draw.random(),
            "learning_rate": 1e-4 * min(1, step / 12) * (1 - step / steps),
            "rewards/chosen": 0.2 * grown + draw.gauss(0, 0.1),
            "rewards/rejected": 0.2 * grown - margin,
            "rewards/margins": margin,
            "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.2 * grown + draw.gauss(0, 0.15))),
            "objective/kl": max(0.0, 2.4 * grown + draw.gauss(0, 0.5)),
            "seconds": 3.9,
        }
        if step % 20 == 0 or step == steps:
            row |= _held_out(grown)
        logged.append(row)
    return logged


def _held_out(grown: float) -> dict[str, float]:
    return {
        "eval_loss": 0.6931 - 0.09 * grown,
        "eval_rewards/margins": 0.3 * grown,
        "eval_rewards/accuracies": 0.5 + 0.12 * grown,
        "eval_objective/kl": 2.1 * grown,
        "eval_gold": 0.46 + 0.2 * grown,
    }


def _pair(draw: random.Random, place: int, effect: float) -> dict[str, Any]:
    film = FILMS[place % len(FILMS)]
    margin = 0.3 * effect + draw.gauss(0, 0.7)
    chosen = 0.1 * effect + margin / 2
    return {
        "row": place,
        "group": film,
        "prompt": f"Write a one-sentence review of {film}.",
        "reward_chosen": chosen,
        "reward_rejected": chosen - margin,
        "margin": margin,
        "accuracy": 1.0 if margin > 0 else 0.0,
    }


def _sample(draw: random.Random, place: int, effect: float, gold: bool, reference: bool) -> dict[str, Any]:
    film = FILMS[place % len(FILMS)]
    row: dict[str, Any] = {
        "row": place,
        "group": film,
        "prompt": f"Write a one-sentence review of {film}.",
        "answer_start": BEFORE[place % len(BEFORE)],
        "answer_final": AFTER[place % len(AFTER)],
        "log_ratio": 2.0 * effect + draw.gauss(0, 1.2),
        "length": draw.randint(9, 32),
        "finished": place % 4 != 3,
    }
    if gold:
        row |= {
            "gold_start": 0.4 + 0.1 * draw.random(),
            "gold_final": min(1.0, 0.45 + 0.3 * effect * draw.random()),
        }
    if reference:
        row |= {"gold_reference": 0.55 + 0.1 * draw.random()}
    return row


def evaluation(pairs: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]], gold: bool) -> dict[str, Any]:
    """Means as an evaluation writes them; the intervals are made up (mean ± a little), only their shape counts."""
    final = {
        "eval_rewards/accuracies": fmean(row["accuracy"] for row in pairs),
        "eval_rewards/margins": fmean(row["margin"] for row in pairs),
        "eval_objective/kl": fmean(row["log_ratio"] for row in samples),
        "eval_completions/mean_length": fmean(row["length"] for row in samples),
        "eval_val/contain_eos_token": fmean(row["finished"] for row in samples),
    }
    start = {
        "eval_rewards/accuracies": 0.5,
        "eval_rewards/margins": 0.0,
        "eval_objective/kl": 0.0,
        "eval_completions/mean_length": 21.4,
        "eval_val/contain_eos_token": 0.5,
    }
    spread = {"eval_rewards/accuracies": 0.07, "eval_rewards/margins": 0.12, "eval_objective/kl": 0.6}
    if gold:
        before, after = ([row[name] for row in samples] for name in ("gold_start", "gold_final"))
        start["eval_gold"], final["eval_gold"] = fmean(before), fmean(after)
        final["eval_win_rate_over_start/gold"] = fmean(b > a for a, b in zip(before, after, strict=True))
        spread |= {"eval_gold": 0.06, "eval_win_rate_over_start/gold": 0.1}
    intervals = {
        name: interval(final[name], width, n=len(pairs), groups=min(len(FILMS), len(pairs)))
        for name, width in spread.items()
    }
    return {"start": start, "final": final, "intervals": intervals}


def interval(mean: float, width: float, *, n: int = 60, groups: int = 20) -> dict[str, Any]:
    return {
        "mean": mean,
        "low": mean - width,
        "high": mean + width,
        "n": n,
        "groups": groups,
        "level": 0.95,
        "method": "bootstrap",
    }


DATA: dict[str, Any] = {
    "train": {
        "name": "rotten-tomatoes",
        "rows": 2780,
        "kept": 2779,
        "dropped": 1,
        "duplicates": 1,
        "ties": 0,
        "lengths": {
            "prompt": {"unit": "tokens", "quantiles": {"0": 14, "0.5": 22, "0.95": 33, "1": 41}, "edges": [14, 41]},
            "chosen": {"unit": "tokens", "quantiles": {"0": 3, "0.5": 24, "0.95": 46, "1": 71}, "edges": [3, 71]},
        },
        "overlap": None,
        "problem_counts": {"warning: duplicate": 1},
        "problems": [
            {
                "level": "warning",
                "kind": "duplicate",
                "where": "row 113",
                "row": 112,
                "field": "chosen",
                "what": "the same pair as row 80",
                "mend": "remove one of them",
            }
        ],
        "fingerprint": "9f2c",
    },
    "evaluation": {"name": "rotten-tomatoes", "rows": 214, "kept": 214, "dropped": 0, "problems": []},
    "parts": {"train": 2779, "test": 214, "selection": 0},
    "fingerprint": "51aa",
}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def rows(path: Path, content: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
