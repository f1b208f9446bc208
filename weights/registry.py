"""Sizes of well-known models, for benchmarks and tests: a checkpoint brings its own."""

import math

from mixers.rope import RopeScaling
from model import ModelArgs


def _llama(dim, n_layer, n_head, n_kv_head, intermediate_size, vocab_size, max_seq_length, **others) -> ModelArgs:
    head_dim = others.pop("head_dim", dim // n_head)
    return ModelArgs(dim, n_layer, n_head, n_kv_head, head_dim, intermediate_size, vocab_size, max_seq_length, **others)


_LLAMA_3 = {"rope_base": 500000.0}
_LLAMA_31 = _LLAMA_3 | {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)}
_LLAMA_32 = _LLAMA_3 | {"rope_scaling": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), "tie_embeddings": True}
_QWEN_3 = {"norm_eps": 1e-6, "rope_base": 1e6, "qk_norm": True, "head_dim": 128}
_DEEPSEEK_YARN = {"rope_scaling": RopeScaling("yarn", 40.0, 1.0, 32.0, 4096), "max_seq_length": 163840}
_DEEPSEEK_YARN |= {"attention_scale": 192**-0.5 * (0.0707 * math.log(40) + 1) ** 2}
_DEEPSEEK = {"norm_eps": 1e-6, "head_dim": 192, "rope_dim": 64, "kv_latent": 512, "value_dim": 128}
_DEEPSEEK |= {"n_expert": 64, "n_expert_used": 6, "normalize_experts": False, "shared_size": 2816, "shared_gate": False}
_DEEPSEEK |= {"dense_layers": (0,), "dense_size": 10944}

REGISTRY = {
    "Llama-2-7B": _llama(4096, 32, 32, 32, 11008, 32000, 4096),
    "Llama-2-13B": _llama(5120, 40, 40, 40, 13824, 32000, 4096),
    "Llama-2-70B": _llama(8192, 80, 64, 8, 28672, 32000, 4096),
    "CodeLlama-7B": _llama(4096, 32, 32, 32, 11008, 32016, 16384, rope_base=1e6),
    "CodeLlama-34B": _llama(8192, 48, 64, 8, 22016, 32000, 16384, rope_base=1e6),
    "Llama-3-8B": _llama(4096, 32, 32, 8, 14336, 128256, 8192, **_LLAMA_3),
    "Llama-3-70B": _llama(8192, 80, 64, 8, 28672, 128256, 8192, **_LLAMA_3),
    "Llama-3.1-8B": _llama(4096, 32, 32, 8, 14336, 128256, 131072, **_LLAMA_31),
    "Llama-3.1-70B": _llama(8192, 80, 64, 8, 28672, 128256, 131072, **_LLAMA_31),
    "Llama-3.1-405B": _llama(16384, 126, 128, 8, 53248, 128256, 131072, **_LLAMA_31),
    "Llama-3.2-1B": _llama(2048, 16, 32, 8, 8192, 128256, 131072, **_LLAMA_32),
    "Llama-3.2-3B": _llama(3072, 28, 24, 8, 8192, 128256, 131072, **_LLAMA_32),
    "Mistral-7B": _llama(4096, 32, 32, 8, 14336, 32000, 32768, sliding_window=4096),
    "TinyLlama-1.1B": _llama(2048, 22, 32, 4, 5632, 32000, 2048),
    "Qwen2.5-7B": _llama(3584, 28, 28, 4, 18944, 152064, 32768, norm_eps=1e-6, rope_base=1e6, qkv_bias=True),
    "Qwen3-8B": _llama(4096, 36, 32, 8, 12288, 151936, 40960, **_QWEN_3),
    "Mixtral-8x7B": _llama(4096, 32, 32, 8, 14336, 32000, 32768, rope_base=1e6, n_expert=8, n_expert_used=2),
    "Qwen3-30B-A3B": _llama(2048, 48, 32, 4, 768, 151936, 40960, **_QWEN_3, n_expert=128, n_expert_used=8),
    "DeepSeek-V2-Lite": _llama(2048, 27, 16, 16, 1408, 102400, **_DEEPSEEK_YARN, **_DEEPSEEK),
    "stories15M": _llama(288, 6, 6, 6, 768, 32000, 256, tie_embeddings=True),
    "stories110M": _llama(768, 12, 12, 12, 2048, 32000, 1024, tie_embeddings=True),
    "SmolLM2-135M": _llama(576, 30, 9, 3, 1536, 49152, 8192, rope_base=1e5, tie_embeddings=True),
}


def args_from_name(name: str) -> ModelArgs:
    """A registry entry by its exact name."""
    if name not in REGISTRY:
        raise ValueError(f"no model is named {name!r}; known: {', '.join(REGISTRY)}")
    return REGISTRY[name]
