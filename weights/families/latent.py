"""The fields of latent attention, from a config in Hugging Face's words."""

import math

from weights.families.experts import only, routed_experts, sigmoid_experts
from weights.families.rope import latent_scale
from weights.files import Config


def latent(config: Config) -> dict:
    n_head = config.whole("num_attention_heads")
    if (n_key := config.whole("num_key_value_heads", n_head)) != n_head:
        raise config.error(f"num_key_value_heads is {n_key}; in latent attention it is num_attention_heads, {n_head}")
    turned = config.whole("qk_rope_head_dim")
    head_dim = config.whole("qk_nope_head_dim") + turned
    return {
        "n_kv_head": n_head,
        "head_dim": head_dim,
        "rope_dim": turned,
        "kv_latent": config.whole("kv_lora_rank"),
        "q_latent": config.whole("q_lora_rank") if config.get("q_lora_rank") else None,
        "value_dim": config.whole("v_head_dim", config.whole("hidden_size") // n_head),
        "attention_scale": latent_scale(config, head_dim),
    }


def latent_with_softmax_experts(config: Config) -> dict:
    only(config, "scoring_func", "softmax")
    only(config, "topk_method", "greedy", "group_limited_greedy")
    only(config, "norm_topk_prob", False)  # of the scaled weights or of others: implementations differ
    fields = latent(config) | routed_experts(config)
    if config.get("topk_method", "greedy") == "greedy":  # among all, whatever groups there are
        fields |= {"n_expert_group": None, "n_group_used": None}
    return fields


def latent_with_sigmoid_experts(config: Config) -> dict:
    return latent(config) | sigmoid_experts(config)


def latent_with_scales(config: Config) -> dict:
    dim, depth = config.whole("hidden_size"), math.sqrt(config.whole("num_hidden_layers"))
    return latent(config) | {
        "embedding_scale": config.number("scale_emb"),
        "residual_scale": config.number("scale_depth", depth) / depth,
        "logit_scale": config.whole("dim_model_base", dim) / dim,
    }
