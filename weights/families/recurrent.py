"""Layers that keep a state of all tokens: their fields, from a config in Hugging Face's words; rows in its files."""

import torch
from torch import Tensor

from mixers.recurrent.delta_net import DeltaSizes
from model import ModelArgs
from weights.families.experts import experts
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
