#!/usr/bin/env bash
# Operation counts: the same on every machine.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p results
for shape in 256/64 ultrafeedback hh; do
    prefkit bench dpo --counts --shape "$shape" --steps 8 --json "results/counts-${shape/\//-}.json"
done
