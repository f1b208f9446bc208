"""The valid files that are damaged."""

from pathlib import Path

import transformers

from tests.tiny import SIZES, make_tiny_checkpoint, save_tiny

FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
}


def write_valid(folder: Path) -> Path:
    for name, config in FAMILIES.items():
        save_tiny(config, folder / name)
    model = transformers.LlamaForCausalLM(FAMILIES["llama"])
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    make_tiny_checkpoint(folder / "ours")
    return folder
