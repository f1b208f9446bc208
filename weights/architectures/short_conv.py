"""Short convolutions in GGUF: layers without key heads have one."""

from weights.architectures.latent import SIGMOID
from weights.gguf_file import GGUFFile


def short_conv_layers(file: GGUFFile, values: dict) -> dict:
    """The keys of LFM2 from a list of key heads, one entry a layer; values: what the file says else."""

    def of_file(key: str, default=None):
        return file.metadata.get(f"{file.metadata['general.architecture']}.{key}", default)

    n_kv_heads = of_file("attention.head_count_kv")
    if not isinstance(n_kv_heads, list) or not all(type(each) is int for each in n_kv_heads) or not any(n_kv_heads):
        raise ValueError(f"{file.path}: attention.head_count_kv is {n_kv_heads!r}; one number for each layer is needed")
    keys = {
        "layer_types": ["full_attention" if each else "conv" for each in n_kv_heads],
        "num_key_value_heads": max(n_kv_heads),
        "conv_L_cache": of_file("shortconv.l_cache"),
        "intermediate_size": of_file("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,  # it is the width of the layers
    }
    if not values["num_experts"]:
        return keys
    if (scored := of_file("expert_gating_func", SIGMOID)) != SIGMOID:
        raise ValueError(f"{file.path}: expert_gating_func {scored!r} is not supported in this architecture; 2 is")
    return keys | {
        "num_dense_layers": of_file("leading_dense_block_count", 0),
        "routed_scaling_factor": of_file("expert_weights_scale") or 1.0,
    }
