"""Files of torch.save: ours, gpt-fast's, llama2.c's."""

import re
from pathlib import Path

from layers.quantized import QuantSpec, linear_table, table_from_json
from model import ModelArgs
from weights.families import args_from_hf
from weights.files import read_json, read_torch
from weights.layout import Source, readers, rename, shell
from weights.registry import REGISTRY, args_from_name

META_MODULES = {
    "layers.#.attention.wqkv": tuple(f"layers.#.attention.w{x}" for x in "qkv"),
    "layers.#.feed_forward.w13": ("layers.#.feed_forward.w1", "layers.#.feed_forward.w3"),
}


GPT_FAST_MODULES = META_MODULES | {"layers.#.attention.wqkv": ("layers.#.attention.wqkv",)}


GPT_FAST_EXPERTS = GPT_FAST_MODULES | {
    "layers.#.feed_forward.gate": ("layers.#.block_sparse_moe.gate",),
    "layers.#.feed_forward.w13": tuple(f"layers.#.block_sparse_moe.cond_ffn.w{i}" for i in (1, 3)),
    "layers.#.feed_forward.w2": ("layers.#.block_sparse_moe.cond_ffn.w2",),
}


def source_from_torch(path: Path, model_name: str | None) -> Source:
    """Our self-describing file, a gpt-fast one (a bare state dict) or a llama2.c one."""
    content = read_torch(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    if isinstance(content.get("args"), dict) and isinstance(content.get("model"), dict):
        return source_from_ours(content, path)
    raw = content["model"] if isinstance(content.get("model"), dict) else content
    readers(raw, path)  # it holds nothing else
    raw = {name.removeprefix("_orig_mod."): value for name, value in raw.items()}
    if "tok_embeddings.weight" not in raw:
        raise ValueError(f"{path} is not a model this toolkit knows: it has no tok_embeddings.weight")
    if any(name.endswith("scales_and_zeros") for name in raw):
        raise ValueError(f"{path} holds int4 tiles made for one kind of device; quantise again from the float file")
    args = args_of_bare(path, content, model_name)
    modules = GPT_FAST_MODULES if "layers.0.attention.wqkv.weight" in raw else META_MODULES
    if args.n_expert:  # whose tensors are cond_ffn.w1 and cond_ffn.scales1
        raw = {re.sub(r"cond_ffn\.(w|scales)(\d)$", _gpt_fast_expert, name): value for name, value in raw.items()}
        modules = GPT_FAST_EXPERTS
    table = {}
    if any(name.endswith(".scales") for name in raw):  # int8: every linear layer, one scale a row
        table = linear_table(shell(args, {}), QuantSpec(8), QuantSpec(8))
        raw = {name: value.unsqueeze(-1) if name.endswith(".scales") else value for name, value in raw.items()}
    return Source(args, rename(args, readers(raw, path), modules, True, path, table), table)


def _gpt_fast_expert(match: re.Match) -> str:
    return f"cond_ffn.w{match[2]}.{'weight' if match[1] == 'w' else 'scales'}"


def source_from_ours(content: dict, path: Path) -> Source:
    try:
        args, table = ModelArgs.from_dict(content["args"]), table_from_json(content.get("quant"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Source(args, rename(args, readers(content["model"], path), {}, False, path, table), table)


def args_of_bare(path: Path, content: dict, model_name: str | None) -> ModelArgs:
    """The sizes of a file that does not carry them all: llama2.c's own, config.json beside it, or --model_name."""
    if isinstance(content.get("model_args"), dict):
        return args_from_llama2c(content)
    if (path.parent / "config.json").exists():
        return args_from_hf(read_json(path.parent / "config.json"))
    if model_name is None:
        raise ValueError(
            f"{path} does not say which model it is; put its config.json beside it, or give --model_name "
            f"(one of {', '.join(REGISTRY)})"
        )
    return args_from_name(model_name)


def args_from_llama2c(content: dict) -> ModelArgs:
    """ModelArgs from the model_args that llama2.c's train.py saves."""
    sizes = content["model_args"]
    w1 = next((value for name, value in content["model"].items() if name.endswith("feed_forward.w1.weight")), None)
    try:
        return ModelArgs(
            dim=sizes["dim"],
            n_layer=sizes["n_layers"],
            n_head=sizes["n_heads"],
            n_kv_head=sizes.get("n_kv_heads") or sizes["n_heads"],
            head_dim=sizes["dim"] // sizes["n_heads"],
            intermediate_size=w1.shape[0],
            vocab_size=sizes["vocab_size"],
            max_seq_length=sizes["max_seq_len"],
            norm_eps=sizes.get("norm_eps", 1e-5),
            tie_embeddings=True,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"the file's model_args are not those of a llama2.c model: {error!r}") from None
