"""Latent attention in GGUF: what DeepSeek's, Kimi's and GLM-4.7-Flash's models are called there."""

from functools import partial

import torch
from torch import Tensor

from model import ModelArgs
from weights.gguf_file import GGUFFile
from weights.layout import Readers

SOFTMAX, SIGMOID = 1, 2  # how experts are scored
UNSAID = 154880, (47, 48)  # the vocabulary and the layers of GLM-4.7-Flash, whose first files do not say it


def latent_layers(file: GGUFFile, values: dict) -> dict:
    """The keys of latent attention; values: what the file says else."""

    def of_file(key: str, default=None):
        return file.metadata.get(f"deepseek2.{key}", default)

    turned = of_file("rope.dimension_count")
    head_dim, value_dim = of_file("attention.key_length_mla"), of_file("attention.value_length_mla")
    if type(turned) is not int or type(head_dim) is not int or type(value_dim) is not int or turned >= head_dim:
        raise ValueError(
            f"{file.path}: deepseek2.attention.key_length_mla {head_dim!r} must be above "
            f"deepseek2.rope.dimension_count {turned!r}, and value_length_mla {value_dim!r} be a size; "
            "files from before 2025-04 lack them: convert the model again"
        )
    scaling = values["rope_scaling"]
    if scaling and (growth := of_file("rope.scaling.yarn_log_multiplier")):  # a tenth of mscale_all_dim, as mscale is
        scaling = scaling | {"mscale": 10 * growth, "mscale_all_dim": 10 * growth}
    keys = {
        "rope_scaling": scaling,
        "head_dim": head_dim,
        "rotary_dim": None,
        "num_key_value_heads": None,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": head_dim - turned,
        "v_head_dim": value_dim,
        "q_lora_rank": of_file("attention.q_lora_rank"),
        "kv_lora_rank": of_file("attention.kv_lora_rank"),
        "intermediate_size": of_file("feed_forward_length"),
    }
    return keys | (latent_experts(file, values) if values["num_experts"] else {"model_type": "youtu"})


def glm_experts(file: GGUFFile, values: dict) -> dict:
    """The keys of GLM-4.5, whose experts are DeepSeek's; its files have biases and norms of heads, or not."""
    return latent_experts(file, values) | {
        "model_type": "glm4_moe",
        "intermediate_size": file.metadata.get("glm4moe.feed_forward_length"),
        "topk_method": None,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
    }


def latent_experts(file: GGUFFile, values: dict) -> dict:
    """The keys of a mixture of experts, and whose model it is."""

    def of_file(key: str, default=None):
        return file.metadata.get(f"{file.metadata['general.architecture']}.{key}", default)

    unsaid = SIGMOID if values["vocab_size"] == UNSAID[0] and values["num_hidden_layers"] in UNSAID[1] else SOFTMAX
    scored = of_file("expert_gating_func") or unsaid
    if scored not in (SOFTMAX, SIGMOID):
        raise ValueError(f"{file.path}: expert_gating_func {scored!r} is not supported; 1 and 2 are")
    groups = of_file("expert_group_count", 1)
    return {
        "model_type": "deepseek_v3" if scored == SIGMOID else "deepseek_v2",
        "n_routed_experts": values["num_experts"],
        "n_shared_experts": of_file("expert_shared_count", 0),
        "first_k_dense_replace": of_file("leading_dense_block_count", 0),
        "norm_topk_prob": bool(of_file("expert_weights_norm", False)),
        "routed_scaling_factor": of_file("expert_weights_scale") or 1.0,
        "n_group": groups,
        "topk_group": of_file("expert_group_used_count"),
        # a matter of softmax scores alone
        "topk_method": None if scored == SIGMOID else "greedy" if groups == 1 else "group_limited_greedy",
    }


def joined_latents(args: ModelArgs, raw: Readers) -> Readers:
    """With wkv_b as one matrix, where a file has its rows of keys, transposed, and those of values by head.

    Codes of keys are those of other groups: of the keys' numbers, not of the latent's. So this layer becomes float.
    """

    def joined(keys, values) -> Tensor:  # [H, latent, unturned] and [H, value_dim, latent]
        return torch.cat((keys().mT, values()), 1).flatten(0, 1)

    out = dict(raw)
    for name in raw:
        values = name.replace(".attn_k_b.", ".attn_v_b.")
        if values != name and values in raw:
            out[name.replace(".attn_k_b.", ".attn_kv_b.")] = partial(joined, out.pop(name), out.pop(values))
    return out
