#!/usr/bin/env bash
# The checks and measurements that need a CUDA device, as they stand: `bash benchmarks/gpu.sh OUT`.
# Needs i3lm with its dev extra, and flash-linear-attention (pip install fla-core) for the peer.
# All of it runs, whatever fails; what failed is named at the end, and the exit status is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
failed=()
run() {
  echo "== $*"
  "$@" || failed+=("$*")
}
run python -m i3lm doctor
run python -m pytest -q -m gpu tests
for op in wkv state_space; do
  run python benchmarks/ops.py --device cuda --op "$op" --batch 8 --lengths 256 1024 4096 16384 \
    --dtypes float32 bfloat16 --implementations triton scan --peer fla --seconds 20 \
    --output "$out/gpu_ops.jsonl"
done
for preset in i3-80m i3-200m i3-1b; do
  run python benchmarks/training_step.py --device cuda --preset "$preset" --context 1024 \
    --batch 8 --precision bf16 --peer gpt2 --output "$out/gpu_training_step.jsonl"
done
for preset in i3-80m i3-200m i3-1b; do
  run python benchmarks/compiled_generation.py --device cuda --preset "$preset" \
    --output "$out/gpu_compiled_generation.jsonl"
done
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
