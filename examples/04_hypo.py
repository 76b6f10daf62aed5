"""HyPO: a preset changed in two places, and the same command line.

python examples/04_hypo.py --model MODEL --data FILE      (default: the packaged model and film reviews)
prefkit hypo demo --kl_weight 0.1 --max_steps 8
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from prefkit import hypo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-135m-instruct")
parser.add_argument("--data", default="rotten-tomatoes")
parser.add_argument("--gold_reward", default="", help="module:function, or rotten-tomatoes")
parser.add_argument("--steps", type=int, default=8)
options = parser.parse_args()

config = replace(
    hypo.PRESETS["demo"],
    model_name_or_path=options.model,
    dataset_name=options.data,
    gold_reward=options.gold_reward,
    output_dir="runs/example-hypo",
    overwrite=True,
    max_steps=options.steps,
    max_new_tokens=16,
    num_eval_samples=32,
    num_eval_prompts=8,
    kl_weight=0.1,  # nats of the whole answer's KL: larger keeps the policy's own answers closer to the reference
)
result = hypo.run(config)

print("margin on held-out pairs:       ", round(result.metrics["eval_rewards/margins"], 4))
print("KL to the reference, own samples:", round(result.metrics["eval_objective/kl"], 4), "nats")
