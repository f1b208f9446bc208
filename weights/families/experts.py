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


def sigmoid_experts(config: Config) -> dict:
    groups, n_dense = config.whole("n_group"), config.count("first_k_dense_replace")
    return dense_layers(config, tuple(range(n_dense))) | {
        "n_expert": config.whole("n_routed_experts"),
        "n_expert_used": config.whole("num_experts_per_tok"),
        "normalize_experts": bool(config.get("norm_topk_prob")),
        "expert_scale": config.number("routed_scaling_factor"),
        "sigmoid_experts": True,
        "n_expert_group": groups if groups > 1 else None,
        "n_group_used": config.whole("topk_group") if groups > 1 else None,
        "shared_size": config.whole("n_shared_experts") * config.whole("moe_intermediate_size"),
        "shared_gate": False,
        "qk_norm": bool(config.get("use_qk_norm")),
    }


def clamped_experts(config: Config) -> dict:
    for key, wanted in (("swiglu_alpha", SWIGLU_SLOPE), ("swiglu_limit", CLAMP)):
        if config.number(key, wanted) != wanted:
            raise config.error(f"{key} is {config.get(key)}; only {wanted} is supported")
    return experts(config)


def unclipped(config: Config) -> dict:
    if config.get("clip_qkv") is not None:
        raise config.error(f"clip_qkv is {config.get('clip_qkv')}, which is not supported")
    return experts(config)
