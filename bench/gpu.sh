#!/usr/bin/env bash
# Everything worth running on a CUDA GPU, within 9 minutes, most important first: the kernels' correctness (bfloat16
# too), the device's rates, layers, steps, sweeps; tables last. What came before an interruption is on disk.
#   bash bench/gpu.sh [results folder]        PYTHON=... names another Python
set -uo pipefail
results=${1:+$(realpath -m -- "$1")}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${results:-bench/results}
mkdir -p "$results"
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "bench/gpu.sh needs a CUDA GPU that torch can see")' \
    || exit 1
status=0
# Without what a GPU changes nothing in: builds without a GPU, attention on a CPU, the choice with made-up times. Where
# time runs out they are interrupted: pytest tells what failed at its end, which it would not reach if it were killed.
tests=(tests/training/test_cuda_graphs.py tests/kernels tests/fused_s2lora --ignore=tests/kernels/test_{aot,attention,choice}.py)
timeout --signal=INT --kill-after=10 180 "$python" -m pytest "${tests[@]}" -q -n 8 --maxfail=20 2>&1 \
    | tee "$results/gpu-tests.txt" | tail -n 25 || status=1
timeout $((530 - SECONDS)) "$python" -m bench.run --minutes $(((440 - SECONDS) / 60)) --results "$results" \
    || { status=1; timeout 40 "$python" -m bench.report "$results"; }  # tables of what there is
tail -n 3 "$results/gpu-tests.txt"
exit $status
