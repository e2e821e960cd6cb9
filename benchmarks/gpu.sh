#!/usr/bin/env bash
# The checks and measurements that need a CUDA device: `bash benchmarks/gpu.sh [FOLDER]`.
#
# With the Python of .venv where there is one (`make test TORCH=cuda` makes it), else that of PATH.
# It needs i3lm with its dev extra, flash-linear-attention for the peer, and, as Triton does, a C
# compiler and Python's headers. All of it runs, whatever fails; what failed is named at the end,
# and the exit status is then 1. Figures and what was printed go to FOLDER.
set -uo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."
python=python
[[ -x .venv/bin/python ]] && python=.venv/bin/python
if ! "$python" -c 'import fla, i3lm, pytest, torch; assert torch.cuda.is_available(), "PyTorch sees no CUDA device"'; then
  echo "first: make test TORCH=cuda && .venv/bin/pip install fla-core" >&2
  exit 2
fi
mkdir -p "$out"
failed=()
run() {
  echo "== $*"
  "$@" || failed+=("$*")
}
keep() { # FILE COMMAND...: what the command prints is kept too
  local file=$out/$1
  shift
  echo "== $*"
  "$@" 2>&1 | tee "$file" || failed+=("$*")
}
keep gpu_doctor.json "$python" -m i3lm doctor --json
keep gpu_tests.txt "$python" -m pytest -q -m gpu tests
run "$python" -m i3lm quickstart --output "$out/gpu_quickstart" --overwrite
keep gpu_verify.txt "$python" -m i3lm verify "$out/gpu_quickstart" --device cuda
for op in wkv state_space; do
  run "$python" benchmarks/ops.py --device cuda --op "$op" --batch 8 \
    --lengths 256 1024 4096 16384 --dtypes float32 bfloat16 --implementations triton scan \
    --peer fla --seconds 20 --output "$out/gpu_ops.jsonl"
done
for preset in i3-80m i3-200m i3-1b; do
  run "$python" benchmarks/training_step.py --device cuda --preset "$preset" --context 1024 \
    --batch 8 --precision bf16 --peer gpt2 --output "$out/gpu_training_step.jsonl"
done
for preset in i3-80m i3-200m i3-1b; do
  run "$python" benchmarks/compiled_generation.py --device cuda --preset "$preset" \
    --output "$out/gpu_compiled_generation.jsonl"
done
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
