#!/usr/bin/env bash
# Pairs per second against TRL, float32, all weights, 8 pairs a step. Run it on a machine with nothing else to do.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p results
for shape in 256/64 ultrafeedback hh; do
    name="${shape/\//-}"
    for model in llama-16k smollm2-135m-instruct; do
        bench=(prefkit bench dpo --against trl --model "$model" --shape "$shape")
        "${bench[@]}" --json "results/$model-$name.json"
        "${bench[@]}" --arms trl,padded,engine --sorted --json "results/$model-$name-sorted.json"
    done
done
for shape in 64/128 96/192; do
    for model in llama-16k smollm2-135m-instruct; do
        prefkit bench dpo --against trl --model "$model" --shape "$shape" --json "results/$model-${shape/\//-}.json"
    done
done
