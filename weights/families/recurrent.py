"""Layers that keep a state of all tokens: their fields, from a config in Hugging Face's words; rows in its files."""

import torch
from torch import Tensor

from mixers.recurrent.delta_net import DeltaSizes
from mixers.recurrent.short_conv import ConvSizes
from model import ModelArgs
from weights.families.experts import dense_layers, experts, only
from weights.files import Config


def delta_net(config: Config) -> dict:
    """The config says which layers have attention, or that one in so many has it."""
    n_layer, period = config.whole("num_hidden_layers"), config.whole("full_attention_interval")
    kinds = ["full_attention" if (i + 1) % period == 0 else "linear_attention" for i in range(n_layer)]
    kinds = kinds if config.get("layer_types") is None else config.list_of(str, "layer_types")
    if len(kinds) != n_layer or not set(kinds) <= {"linear_attention", "full_attention"}:
        raise config.error(f"layer_types is {kinds}; {n_layer} of linear_attention and full_attention are needed")
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "linear_attention")
    sizes = {
        "n_key_head": config.whole("linear_num_key_heads"),
        "n_value_head": config.whole("linear_num_value_heads"),
        "key_dim": config.whole("linear_key_head_dim"),
        "value_dim": config.whole("linear_value_head_dim"),
        "n_tap": config.whole("linear_conv_kernel_dim"),
    }
    return {
        "attention_gate": bool(config.get("attn_output_gate", True)),
        "delta": DeltaSizes(layers, **sizes) if layers else None,
    }


def delta_experts(config: Config) -> dict:
    return delta_net(config) | experts(config)


def short_convs(config: Config) -> dict:
    """The config says which layers have attention; all do where it does not."""
    n_layer, dim = config.whole("num_hidden_layers"), config.whole("hidden_size")
    full = range(n_layer) if config.get("full_attn_idxs") is None else config.list_of(int, "full_attn_idxs")
    kinds = ["full_attention" if i in full else "conv" for i in range(n_layer)]
    kinds = kinds if config.get("layer_types") is None else config.list_of(str, "layer_types")
    if len(kinds) != n_layer or not set(kinds) <= {"conv", "full_attention"}:
        raise config.error(f"layer_types is {kinds}; {n_layer} of conv and full_attention are needed")
    for key in ("block_dim", "conv_dim", "conv_dim_out"):
        only(config, key, dim)
    only(config, "num_heads", config.whole("num_attention_heads"))
    only(config, "block_use_swiglu", True)
    only(config, "use_pos_enc", True)
    layers, n_tap = tuple(i for i, kind in enumerate(kinds) if kind == "conv"), config.whole("conv_L_cache")
    return {
        "short_conv": ConvSizes(layers, dim, n_tap, bool(config.get("conv_bias"))) if layers else None,
        "tie_embeddings": bool(config.get("tie_embedding", config.get("tie_word_embeddings"))),
    }


def dense_short_convs(config: Config) -> dict:
    """... and a feed-forward of the width that the config gives, or of two thirds of it, rounded up."""
    size = config.whole("block_ff_dim", config.whole("intermediate_size"))
    if config.get("block_auto_adjust_ff_dim"):
        step = config.whole("block_multiple_of")
        size = int(config.number("block_ffn_dim_multiplier", 1.0) * int(2 * size / 3))
        size = -(-size // step) * step
    return short_convs(config) | {"intermediate_size": size}


def short_convs_and_experts(config: Config) -> dict:
    """... and experts in all layers but the first ones."""
    only(config, "use_expert_bias", True)
    fields = experts(config) | dense_layers(config, tuple(range(config.count("num_dense_layers"))))
    scored = {"sigmoid_experts": True, "expert_scale": config.number("routed_scaling_factor")}
    return short_convs(config) | fields | scored


def rows_in_file(args: ModelArgs, model_type: str) -> dict[str, Tensor]:
    """Of modules whose rows a file has in another order than we: the place there of each row of ours."""
    orders = {}
    if args.attention_gate:  # each head of q is followed by its gate
        (q, gate), kv = rows_by_kind(args.n_head, (args.head_dim, args.head_dim)), 2 * args.n_kv_head * args.head_dim
        orders["attention.wqkv"] = torch.cat((q, 2 * len(q) + torch.arange(kv), gate))
    if args.delta is not None and model_type == "qwen3_next":  # each key head is followed by what shares it
        n_head, n_each = args.delta.n_key_head, args.delta.n_value_head // args.delta.n_key_head
        sizes = 2 * (args.delta.key_dim,) + 2 * (n_each * args.delta.value_dim,)
        orders["attention.wqkvz"] = torch.cat(rows_by_kind(n_head, sizes))
        orders["attention.gates"] = torch.cat(rows_by_kind(n_head, (n_each, n_each)))
    return orders


def rows_by_kind(n_head: int, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The rows of each kind, where each of n_head heads has one block of rows of each kind, of these sizes."""
    rows = torch.arange(n_head * sum(sizes)).view(n_head, -1)
    return tuple(part.flatten() for part in rows.split(sizes, 1))
