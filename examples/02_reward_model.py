"""A reward model: fit a Bradley-Terry head to pairs, then score answers with plain transformers.

python examples/02_reward_model.py --model MODEL --data FILE      (default: the packaged model and film reviews)
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefkit import reward

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-135m-instruct")
parser.add_argument("--data", default="rotten-tomatoes")
parser.add_argument("--steps", type=int, default=16)
options = parser.parse_args()

result = reward.run(
    reward.Config(
        model_name_or_path=options.model,
        dataset_name=options.data,
        output_dir="runs/example-reward",
        overwrite=True,
        use_peft=True,
        learning_rate=2e-4,
        max_steps=options.steps,
        max_length=128,
    )
)
print("held-out accuracy:", round(result.metrics["eval_rewards/accuracies"], 3))

folder = result.directory / "model"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
for answer in ("A film of great warmth and wit.", "Dull, long and badly acted."):
    messages = [{"role": "user", "content": "How was the film?"}, {"role": "assistant", "content": answer}]
    tokens = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        print(f"{model(**tokens).logits.item():+.3f}  {answer}")
