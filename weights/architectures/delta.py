"""Gated DeltaNet in GGUF: its sizes by the names of other recurrent layers, and its value heads in another order."""

import torch
from torch import Tensor

from model import ModelArgs
from weights.families.recurrent import rows_in_file
from weights.gguf_file import GGUFFile
from weights.layout import Readers

SPLIT = {"layers.#.attention.wqkvz": ("blk.#.attn_qkv", "blk.#.attn_gate")}  # which Qwen3-Next has as one


def delta_layers(file: GGUFFile, values: dict) -> dict:
    """The keys of gated DeltaNet layers; values: what the file says else."""
    name = file.metadata["general.architecture"]

    def of_file(key: str):
        return file.metadata.get(f"{name}.{key}")

    n_value_head, width, recurrent = of_file("ssm.time_step_rank"), of_file("ssm.inner_size"), None
    if type(n_value_head) is not int or type(width) is not int or n_value_head < 1 or width % n_value_head:
        sizes = f"{name}.ssm.inner_size {width!r} and {name}.ssm.time_step_rank {n_value_head!r}"
        raise ValueError(f"{file.path}: {sizes} are no sizes of value heads")
    if (said := of_file("attention.recurrent_layers")) is not None:
        flags = said if isinstance(said, list) else [said] * values["num_hidden_layers"]
        kinds = {True: "linear_attention", False: "full_attention"}
        recurrent = [kinds.get(flag, repr(flag)) for flag in flags[: values["num_hidden_layers"]]]
    return {
        "layer_types": recurrent,
        "full_attention_interval": of_file("full_attention_interval") or 4,
        "linear_conv_kernel_dim": of_file("ssm.conv_kernel"),
        "linear_key_head_dim": of_file("ssm.state_size"),
        "linear_value_head_dim": width // n_value_head,
        "linear_num_key_heads": of_file("ssm.group_count"),
        "linear_num_value_heads": n_value_head,
    }


def joined_rows(args: ModelArgs) -> dict[str, Tensor]:
    """The order of Qwen3-Next's rows: that of Hugging Face, but for wqkvz, which has been split by kind."""
    return {module: rows for module, rows in rows_in_file(args, "qwen3_next").items() if module != "attention.wqkvz"}


def value_heads(args: ModelArgs) -> Tensor:
    """The place in a file of each value head: it has the first ones of all key heads, then the second ones."""
    return torch.arange(args.delta.n_value_head).view(-1, args.delta.n_key_head).T.flatten()


def tiled_rows(args: ModelArgs) -> dict[str, Tensor]:
    orders = rows_in_file(args, "qwen3_5_text")
    if args.delta is None:
        return orders
    sizes, heads = args.delta, value_heads(args)
    queries = torch.arange(2 * sizes.key_width)  # and keys
    values = (heads[:, None] * sizes.value_dim + torch.arange(sizes.value_dim)).flatten()
    convolved = torch.cat((queries, len(queries) + values))
    return orders | {
        "attention.wqkvz": torch.cat((convolved, sizes.width + values)),
        "attention.gates": torch.cat((heads, sizes.n_value_head + heads)),
        "attention.conv": convolved,
        "attention": heads,  # the decay and its bias
    }


def untiled_outputs(args: ModelArgs, raw: Readers) -> Readers:
    """The layer after the values takes them in our order. Of floats, codes and scales alike, value heads are blocks."""

    def in_order(read) -> Tensor:
        tensor = read()
        return tensor.unflatten(-1, (args.delta.n_value_head, -1))[..., value_heads(args), :].flatten(-2)

    is_out = {name for name in raw if ".ssm_out." in name}
    return {name: (lambda read=read: in_order(read)) if name in is_out else read for name, read in raw.items()}
