#!/usr/bin/env bash
# Against TRL on a GPU: random models of two sizes, bfloat16, all weights and LoRA.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p results
for model in llama-135m llama-1b; do
    for shape in 256/64 ultrafeedback hh; do
        bench=(prefkit bench dpo --against trl --model "$model" --shape "$shape" --dtype bfloat16 --steps 9)
        "${bench[@]}" --json "results/gpu-$model-${shape/\//-}.json"
        "${bench[@]}" --use_peft --json "results/gpu-$model-${shape/\//-}-lora.json"
    done
done
