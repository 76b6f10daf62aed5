#!/usr/bin/env bash
# Peak memory above weights, gradients and optimizer at a vocabulary of 150 000, each arm in its own process.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p results
for shape in 256/64 64/128; do
    prefkit bench dpo --against trl --memory --shape "$shape" --batch 4 --arms trl,naive,padded,engine \
        --json "results/memory-${shape/\//-}.json"
done
