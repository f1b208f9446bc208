"""The fields of Gemma 4, whose layers differ, from a config in Hugging Face's words."""

import math

from weights.families.windows import windows
from weights.files import Config

PERIOD = 6  # one layer in so many has no window


def gemma_4_fields(config: Config) -> dict:
    n_layer, n_reusing = config.whole("num_hidden_layers"), config.count("num_kv_shared_layers")
    window, full_layers = windows(config, n_layer, PERIOD)
    if window is not None:  # the last layer never has one
        full_layers = tuple(sorted({*full_layers, n_layer - 1}))
    n_kv_head, head_dim = full_heads(config, full_layers if window else tuple(range(n_layer)))
    wide = config.get("use_double_wide_mlp") and n_reusing
    names = ("full_kv_head", "full_head_dim") if window else ("n_kv_head", "head_dim")
    cap = "final_logit_softcapping"
    return dict(zip(names, (n_kv_head, head_dim), strict=True)) | {
        "full_layers": full_layers,
        "embedding_scale": math.sqrt(config.whole("hidden_size")),
        "logit_softcap": config.number(cap) if config.get(cap) is not None else None,
        "keys_as_values": bool(config.get("attention_k_eq_v")),
        "n_reusing_layer": n_reusing or None,
        "reusing_size": 2 * config.whole("intermediate_size") if wide else None,
        "layer_input_size": layer_input_size(config),
        **(experts_beside(config) if config.get("enable_moe_block") else {}),
    }


def full_heads(config: Config, full_layers: tuple[int, ...]) -> tuple[int, int]:
    """Key heads, and the size of all heads, of layers without a window: for all of them, or for each the same."""
    n_kv_head, head_dim = config.whole("num_key_value_heads"), config.whole("head_dim")
    layers = config.get("per_layer_config")
    if layers is None:
        own = config.get("attention_k_eq_v") and config.get("num_global_key_value_heads") is not None
        return config.whole("num_global_key_value_heads") if own else n_kv_head, config.whole("global_head_dim")
    kinds = list(layers.values()) if isinstance(layers, dict) else []
    fits = kinds and [name.lstrip("0") or "0" for name in layers] == [str(layer) for layer in full_layers]
    fits = fits and isinstance(kinds[0], dict) and all(each == kinds[0] for each in kinds)
    if not fits or kinds[0].keys() - {"head_dim", "num_key_value_heads"}:
        raise config.error("per_layer_config must give all layers without a window, and no others, the same heads")
    own = Config(kinds[0], config.where)
    return own.whole("num_key_value_heads", n_kv_head), own.whole("head_dim", head_dim)


def layer_input_size(config: Config) -> int | None:
    size, key = config.count("hidden_size_per_layer_input"), "vocab_size_per_layer_input"
    if size and config.whole(key) != config.whole("vocab_size"):
        raise config.error(
            f"{key} is {config.get(key)}; only that of the model, {config.get('vocab_size')}, is supported"
        )
    return size or None


def experts_beside(config: Config) -> dict:
    return {
        "n_expert": config.whole("num_experts"),
        "n_expert_used": config.whole("top_k_experts"),
        "intermediate_size": config.whole("moe_intermediate_size"),
        "shared_size": config.whole("intermediate_size"),
        "shared_gate": False,
        "separate_experts": True,
    }
