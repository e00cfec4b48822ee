#!/usr/bin/env bash
# What only a GPU can tell, in under 8 minutes: `tests/benchmarks/gpu.sh [folder for the results]`.
#
# Correctness of the kernel, CUDA graphs, bf16 and 16-mixed with a scaler, no host sync between windows; then kernels
# per observation, and cost on ResNet-50 and OPT-1.3B's blocks, eager and compiled, against one read of the
# activations at the card's bandwidth. Without a GPU the same code runs on a CPU, on models of no importance.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-${OUT:-gpu-results}}
mkdir -p "$out"
export PYTHONPATH=$PWD:$PWD/tests:$PWD/tests/benchmarks WANDB_MODE=offline PYTHONUNBUFFERED=1
python=${PYTHON:-python}
failed=0

step() {  # seconds, name, command...
    local limit=$1 name=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt" | tail -n 40
    [ "${PIPESTATUS[0]}" -eq 0 ] || { echo "== $name FAILED"; failed=1; }
}

if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/card.txt"
    device=(--device cuda --gpu-models large)
else
    echo "no GPU: the same code on a CPU"
    device=(--gpu-models small)
fi
# what a card, its driver or its versions of torch and transformers warn of is no failure of ours
tests=("$python" -m pytest -q -n0 -p no:cacheprovider -W default --durations=5)
step 120 kernel "${tests[@]}" tests/statistics/test_triton_counts.py
step 140 promises "${tests[@]}" tests/promises/test_gpu.py
step 200 cost "$python" tests/benchmarks/cost.py "${device[@]}" --rounds "${ROUNDS:-2}"
exit "$failed"
