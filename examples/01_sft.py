"""Supervised fine-tuning: learn the chosen answers of preference data, then answer a prompt.

python examples/01_sft.py --model MODEL --data FILE      (default: the packaged model and film reviews)
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from prefkit import sft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-135m-instruct")
parser.add_argument("--data", default="rotten-tomatoes")
parser.add_argument("--steps", type=int, default=8)
options = parser.parse_args()

result = sft.run(
    sft.Config(
        model_name_or_path=options.model,
        dataset_name=options.data,
        output_dir="runs/example-sft",
        overwrite=True,
        use_peft=True,
        learning_rate=2e-4,
        max_steps=options.steps,
        max_length=128,
        max_new_tokens=16,
        num_eval_prompts=4,
    )
)
print("held-out loss per token:", round(result.metrics["eval_loss"], 3))

# What was written is a stock transformers folder; nothing of prefkit is needed to use it.
folder = result.directory / "model"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "How was the film?"}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
