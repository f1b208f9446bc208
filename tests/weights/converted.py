"""What llama.cpp's converter makes of some layers' tensors before it writes them as GGUF."""

import torch

DELTA = {
    "in_proj_ba": "ssm_ba",
    "in_proj_b": "ssm_beta",
    "in_proj_a": "ssm_alpha",
    "conv1d": "ssm_conv1d",
    "norm": "ssm_norm",
    "out_proj": "ssm_out",
    "in_proj_qkv": "attn_qkv",
    "in_proj_z": "attn_gate",
}
LATENT = {
    "q_a_proj": "attn_q_a",
    "q_b_proj": "attn_q_b",
    "q_a_layernorm": "attn_q_a_norm",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_a_layernorm": "attn_kv_a_norm",
}


def tiled(weight, config, dim, size):
    """Value heads of `size` numbers along dim: the first ones of all key heads, then the second ones."""
    n_key, n_value = config.linear_num_key_heads, config.linear_num_value_heads
    return weight.unflatten(dim, (n_key, n_value // n_key, size)).transpose(dim, dim + 1).flatten(dim, dim + 2)


def reordered(config, leaf, weight):
    """A tensor of Qwen3.5's gated DeltaNet with its value heads tiled."""
    size, keys = config.linear_value_head_dim, 2 * config.linear_num_key_heads * config.linear_key_head_dim
    if leaf in ("in_proj_qkv", "conv1d"):
        return torch.cat((weight[:keys], tiled(weight[keys:], config, 0, size)))
    if leaf == "out_proj":
        return tiled(weight, config, 1, size)
    if leaf == "norm":
        return weight
    return tiled(weight, config, 0, size if leaf == "in_proj_z" else 1)


def of_delta(config, blk, leaf, weight):
    if leaf == "in_proj_qkvz":  # of each key head: q, k, the values that share it and their gates
        n_each = config.linear_num_value_heads // config.linear_num_key_heads
        sizes = 2 * [config.linear_key_head_dim] + 2 * [n_each * config.linear_value_head_dim]
        parts = weight.unflatten(0, (config.linear_num_key_heads, -1)).split(sizes, 1)
        q, k, v, z = (part.flatten(0, 1) for part in parts)
        return [(f"{blk}attn_qkv.weight", torch.cat((q, k, v))), (f"{blk}attn_gate.weight", z)]
    if config.model_type != "qwen3_next":
        weight = reordered(config, leaf, weight)
    if leaf == "A_log":
        return [(f"{blk}ssm_a", -weight.exp())]
    if leaf == "dt_bias":
        return [(f"{blk}ssm_dt.bias", weight)]
    return [(f"{blk}{DELTA[leaf]}.weight", weight.squeeze(1) if leaf == "conv1d" else weight)]


def converted(config, name, weight):
    """Names and tensors for one of transformers'; all others keep its name, which is changed with those of all."""
    blk, _, rest = name.partition("linear_attn.")
    if rest:
        return of_delta(config, blk.replace("model.layers", "blk"), rest.removesuffix(".weight"), weight)
    if name.endswith("conv.conv.weight"):
        return [(name, weight.squeeze(1))]
    blk, _, rest = name.partition("self_attn.")
    blk, leaf = blk.replace("model.layers", "blk"), rest.removesuffix(".weight")
    if leaf == "kv_b_proj":
        heads = weight.unflatten(0, (config.num_attention_heads, -1))
        keys, values = heads.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        return [(f"{blk}attn_k_b.weight", keys.mT), (f"{blk}attn_v_b.weight", values)]
    if leaf in LATENT:
        return [(f"{blk}{LATENT[leaf]}.weight", weight)]
    return [(name, weight)]
