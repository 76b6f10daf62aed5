"""Two runs on the same data, compared on the same held-out rows with intervals, and one page for both.

python examples/06_evaluate_and_compare.py --model MODEL --data FILE      (default: the packaged model and reviews)
prefkit compare runs/example-weak runs/example-strong
"""

from __future__ import annotations

import argparse
import json

from prefkit import cli, dpo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-135m-instruct")
parser.add_argument("--data", default="rotten-tomatoes")
parser.add_argument("--steps", type=int, default=8)
options = parser.parse_args()

runs = {"weak": 2e-5, "strong": 5e-4}
for name, learning_rate in runs.items():
    config = dpo.Config(
        model_name_or_path=options.model,
        dataset_name=options.data,
        output_dir=f"runs/example-{name}",
        overwrite=True,
        use_peft=True,
        learning_rate=learning_rate,
        max_steps=options.steps,
        max_length=128,
        max_new_tokens=16,
        num_eval_samples=64,
        num_eval_prompts=8,
    )
    directory = dpo.run(config).directory
    found = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))["intervals"]
    print(name, {metric: (interval["mean"], interval["low"], interval["high"]) for metric, interval in found.items()})

folders = [f"runs/example-{name}" for name in runs]
assert cli.run(["compare", *folders, "--json", "runs/comparison.json"]) == 0
assert cli.run(["report", *folders, "--out", "runs/comparison.html"]) == 0
