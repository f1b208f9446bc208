#!/usr/bin/env bash
# Everything CI checks, in .venv: bash scripts/test.sh [--quick | --cuda-offline] [arguments for pytest]
# --quick leaves out the tests that start processes or ranks, or that compile.
# --cuda-offline runs only the CUDA path's tests, in all of its cases; they need no GPU, and twenty minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

make_venv requirements-dev.txt
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# several tests side by side, each with a thread: most of them start processes that have work for one
export OMP_NUM_THREADS=1
if [[ ${1:-} == --quick ]]; then
    set -- -m "not slow and not cuda_offline" "${@:2}"
elif [[ ${1:-} == --cuda-offline ]]; then
    set -- -m "cuda_offline or not cuda_offline" tests/cuda_offline tests/kernels/test_gpu_*.py "${@:2}"
fi
# one cache of compiled code for all of this run, and for no other: a run that was killed may leave half a library in it
TORCHINDUCTOR_CACHE_DIR=$(mktemp -d)
export TORCHINDUCTOR_CACHE_DIR
trap 'rm -rf "$TORCHINDUCTOR_CACHE_DIR"' EXIT
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
