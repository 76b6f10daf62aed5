"""DPO on rows in memory: wherever an option takes a path, Python may pass the object itself.

python examples/03_dpo.py --model MODEL      (default: the packaged model)
"""

from __future__ import annotations

import argparse

from prefkit import dpo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-135m-instruct")
parser.add_argument("--steps", type=int, default=8)
options = parser.parse_args()

CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Tokyo", "Delhi", "Seoul", "Accra", "Quito", "Berlin", "Madrid")


def row(city: str) -> dict[str, object]:
    """A short answer preferred to a long-winded one."""
    return {
        "prompt": [{"role": "user", "content": f"Is {city} worth a visit?"}],
        "chosen": [{"role": "assistant", "content": "Yes, very much so."}],
        "rejected": [
            {"role": "assistant", "content": f"Well, {city} is one of those places about which one could say a lot."}
        ],
    }


result = dpo.run(
    dpo.Config(
        model_name_or_path=options.model,
        output_dir="runs/example-dpo",
        overwrite=True,
        beta=0.1,
        use_peft=True,
        learning_rate=1e-3,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        max_new_tokens=16,
        num_eval_prompts=4,
    ),
    train=[row(city) for city in CITIES[:8]],
    evaluation=[row(city) for city in CITIES[8:]],
)
print("held-out accuracy:", result.metrics["eval_rewards/accuracies"])
print("held-out margin:  ", round(result.metrics["eval_rewards/margins"], 3))
print("report:           ", result.directory / "report.html")
