#!/usr/bin/env bash
# Episodes and tokens per second of rloo and grpo against TRL, and of ppo and drpo alone; float32, all weights, 8 prompts
# of 64 to 128 tokens, 4 answers of 64 to each, one pass. Run it on a machine with nothing else to do.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p results
rounds=(--steps 4 --repeats 5)
for method in rloo grpo; do
    prefkit bench "$method" --against trl "${rounds[@]}" --json "results/$method-llama-16k.json"
done
for method in ppo drpo; do
    prefkit bench "$method" "${rounds[@]}" --json "results/$method-llama-16k.json"
done
