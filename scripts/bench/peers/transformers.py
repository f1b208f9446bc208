"""transformers on the weights of a GGUF file; as a program, it writes the folder that `transformers serve` reads.

    python -m scripts.bench.peers.transformers FOLDER GGUF

Its weights are bfloat16, whatever the file has.
"""

import sys
from pathlib import Path

from scripts.bench.peers.environment import make_once

NAME = "transformers"  # of the environment in which it serves


def read(gguf: Path):
    """Its own model of the file, whose layers would else compute on packed codes where it has kernels for them."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    how = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **how)


def transformers_folder(gguf: Path) -> Path:
    return make_once(gguf.with_name("peer-transformers-bf16"), sys.executable, "scripts.bench.peers.transformers", gguf)


def export(folder: str, gguf: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    read(gguf).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_file=str(gguf.with_name("tokenizer.json"))).save_pretrained(folder)


if __name__ == "__main__":
    folder, gguf = sys.argv[1:]
    export(folder, Path(gguf))
