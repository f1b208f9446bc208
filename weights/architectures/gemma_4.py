"""Gemma 4 in GGUF: lists with an entry for each layer."""

from weights.gguf_file import GGUFFile


def gemma_4_layers(file: GGUFFile, values: dict) -> dict:
    """The keys of Gemma 4 from lists with an entry a layer; values: what the file says else."""

    def of_file(key: str, default=None):
        return file.metadata.get(f"gemma4.{key}", default)

    windowed = of_file("attention.sliding_window_pattern")

    def by_layer(key: str) -> list:
        each = of_file(key) if isinstance(of_file(key), list) else [of_file(key)] * len(windowed)
        if len(each) != len(windowed):
            raise ValueError(f"{file.path}: gemma4.{key} has {len(each)} entries, not one for each layer")
        return each

    if not isinstance(windowed, list) or False not in windowed or not all(each in (True, False) for each in windowed):
        raise ValueError(f"{file.path}: gemma4.attention.sliding_window_pattern must say which layers have a window")
    full, first = windowed.index(False), windowed.index(True) if True in windowed else 0
    n_kv_heads, sizes = by_layer("attention.head_count_kv"), by_layer("feed_forward_length")
    return {
        "layer_types": ["sliding_attention" if each else "full_attention" for each in windowed],
        "head_dim": of_file("attention.key_length_swa"),
        "global_head_dim": values["head_dim"],
        "rotary_dim": None,
        "num_key_value_heads": n_kv_heads[first],
        "num_global_key_value_heads": n_kv_heads[full],
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in file.tensors,
        "rope_parameters": {
            "full_attention": {"rope_theta": values["rope_theta"]},
            "sliding_attention": {"rope_theta": of_file("rope.freq_base_swa", 10000.0)},
        },
        "num_kv_shared_layers": of_file("attention.shared_kv_layers", 0),
        "intermediate_size": sizes[0],
        "use_double_wide_mlp": sizes[-1] != sizes[0],
        "hidden_size_per_layer_input": of_file("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": values["vocab_size"],
        "enable_moe_block": bool(values["num_experts"]),
        "top_k_experts": values["num_experts_per_tok"],
        "moe_intermediate_size": of_file("expert_feed_forward_length"),
    }
