"""The fields of a mixture of experts, from a config in Hugging Face's words."""

from mixers.activations import CLAMP, SWIGLU_SLOPE
from weights.files import Config


def experts(config: Config) -> dict:
    n_layer, step = config.whole("num_hidden_layers"), config.whole("decoder_sparse_step", 1)
    without = config.list_of(int, "mlp_only_layers") if config.get("mlp_only_layers") else []
    dense = tuple(i for i in range(n_layer) if i in without or (i + 1) % step)
    shared = config.get("shared_expert_intermediate_size")
    return dense_layers(config, dense) | {
        "n_expert": config.whole("num_local_experts" if "num_local_experts" in config.values else "num_experts"),
        "n_expert_used": config.whole("num_experts_per_tok"),
        "normalize_experts": bool(config.get("norm_topk_prob", True)),
        "shared_size": config.whole("shared_expert_intermediate_size") if shared else None,
    }


def dense_layers(config: Config, layers: tuple[int, ...]) -> dict:
    """Of a mixture of experts: the layers that have one feed-forward, and its width."""
    return {"dense_layers": layers, "dense_size": config.whole("intermediate_size") if layers else None}


def only(config: Config, key: str, *supported) -> None:
    """Refuse a setting that is none of those supported, the first of which is meant where it is left out."""
    if config.get(key, supported[0]) not in supported:
        known = " or ".join(map(repr, supported))
        raise config.error(f"{key} is {config.get(key)!r}; only {known} is supported")


def routed_experts(config: Config) -> dict:
    """The first layers are dense; others have experts, maybe in groups, and shared ones, which are one wide one."""
    groups, n_shared = config.whole("n_group", 1), config.count("n_shared_experts", 0)
    return dense_layers(config, first_dense(config)) | {
        "n_expert": config.whole("n_routed_experts"),
        "n_expert_used": config.whole("num_experts_per_tok"),
        "normalize_experts": bool(config.get("norm_topk_prob")),
        "expert_scale": config.number("routed_scaling_factor"),
        "n_expert_group": groups if groups > 1 else None,
        "n_group_used": config.whole("topk_group") if groups > 1 else None,
        "shared_size": n_shared * config.whole("moe_intermediate_size") or None,
        "shared_gate": False,
    }


def first_dense(config: Config) -> tuple[int, ...]:
    if config.get("mlp_layer_types") is None:
        return tuple(range(config.count("first_k_dense_replace")))
    kinds = config.list_of(str, "mlp_layer_types")
    if len(kinds) != config.whole("num_hidden_layers") or not set(kinds) <= {"dense", "sparse"}:
        raise config.error(f"mlp_layer_types is {kinds}; dense or sparse is needed for each layer")
    return tuple(i for i, kind in enumerate(kinds) if kind == "dense")


def sigmoid_experts(config: Config) -> dict:
    only(config, "scoring_func", "sigmoid")
    only(config, "topk_method", "noaux_tc")
    return routed_experts(config) | {"sigmoid_experts": True}


def normed_sigmoid_experts(config: Config) -> dict:
    return sigmoid_experts(config) | {"qk_norm": bool(config.get("use_qk_norm"))}


def clamped_experts(config: Config) -> dict:
    only(config, "swiglu_alpha", SWIGLU_SLOPE)
    only(config, "swiglu_limit", CLAMP)
    return experts(config)


def unclipped(config: Config) -> dict:
    if config.get("clip_qkv") is not None:
        raise config.error(f"clip_qkv is {config.get('clip_qkv')}, which is not supported")
    return experts(config)
