#!/usr/bin/env bash
# Everything worth running on a CUDA GPU in one go, most important first; tables last.
#   bash bench/gpu.sh [results folder]
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-bench/results}
mkdir -p "$results"
status=0
python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else \"bench/gpu.sh needs a CUDA GPU that torch can see\")" || exit 1
timeout 240 python -m pytest tests/kernels -q -m "not slow" --maxfail=20 > "$results/gpu-tests.txt" 2>&1 || status=1
for case in "large-v3 24000" "large-v3 512" "small 24000" "base 6000"; do
    read -r size frames <<< "$case"
    timeout 60 python -m bench.layer --size "$size" --frames "$frames" --rounds 50 --output "$results/layer.jsonl" \
        >> "$results/gpu-layer.txt" 2>&1 || status=1
done
for case in "small 16" "large-v3 8"; do
    read -r size batch <<< "$case"
    timeout 120 python -m bench.step --size "$size" --batch "$batch" --tokens 32 --output "$results/step.jsonl" \
        >> "$results/gpu-step.txt" 2>&1 || status=1
done
cat "$results/gpu-layer.txt" "$results/gpu-step.txt"
tail -n 15 "$results/gpu-tests.txt"
exit $status
