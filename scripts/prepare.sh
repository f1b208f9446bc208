#!/usr/bin/env bash
# Download a model, convert it to floats and round it to int8: bash scripts/prepare.sh HuggingFaceTB/SmolLM2-135M-Instruct
set -euo pipefail

if [ $# -ne 1 ] || [[ $1 == -* ]]; then
    echo "usage: bash scripts/prepare.sh OWNER/NAME    (a model on the Hugging Face hub)" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

"${PYTHON:-python}" scripts/download.py --repo_id "$1"
"${PYTHON:-python}" scripts/convert_hf_checkpoint.py --checkpoint_dir "checkpoints/$1" --dequantize
"${PYTHON:-python}" quantize.py --checkpoint_path "checkpoints/$1/model.pth" --mode int8
