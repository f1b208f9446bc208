#!/usr/bin/env bash
# From a fresh clone to text: bash scripts/quickstart.sh [arguments for generate.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

model=HuggingFaceTB/SmolLM2-135M-Instruct

make_venv requirements.txt
if [ ! -f "checkpoints/$model/model.pth" ]; then
    say "Fetching the default model, $model ..."
    PYTHON=.venv/bin/python bash scripts/prepare.sh "$model" >&2
fi

if [ $# -eq 0 ]; then
    set -- --chat --prompt "What is the capital of France?" --temperature 0 --num_samples 1
    say "No arguments given, so: generate.py $(printf '%q ' "$@")"
fi

# torch.compile writes C++ that includes Python.h and has g++ compile it, unless CXX names another compiler
python_h=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
if command -v "${CXX:-g++}" >/dev/null && [ -f "$python_h" ]; then
    exec .venv/bin/python generate.py --compile "$@"
fi
say "No C++ compiler or no Python.h: running uncompiled, which is slower. To compile: apt-get install g++ python3-dev"
exec .venv/bin/python generate.py "$@"
