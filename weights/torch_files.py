"""Files of torch.save: ours, gpt-fast's, llama2.c's."""

import re
from functools import partial
from pathlib import Path

from layers.quantized import QuantSpec, linear_table, table_from_json
from layers.two_four import checked_positions
from model import ModelArgs
from weights.families.table import args_from_config
from weights.files import Config, read_json, read_torch
from weights.huggingface import open_hf
from weights.layout import Layout, ModelFile, Readers, head_as_stored, readers, rename, rope_order
from weights.registry import REGISTRY, args_from_name

# Our module -> theirs, see `source_modules`.
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

LLAMA2C_KEYS = {  # of Hugging Face's config -> of the model_args that llama2.c's train.py saves
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
}


def open_torch(path: Path, model_name: str | None) -> ModelFile:
    """Our self-describing file, a gpt-fast one (a bare state dict), a llama2.c one or one of a Hugging Face folder."""
    content = read_torch(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    if isinstance(content.get("args"), dict) and isinstance(content.get("model"), dict):
        return open_ours(content, path)
    raw = readers(content["model"] if isinstance(content.get("model"), dict) else content, path)
    raw = {name.removeprefix("_orig_mod."): read for name, read in raw.items()}
    if any(".self_attn." in name or "embed_tokens." in name for name in raw):
        return open_hf(path.parent, path)
    if "tok_embeddings.weight" not in raw:
        raise ValueError(f"{path} is not a model this toolkit knows: it has no tok_embeddings.weight")
    if any(name.endswith("scales_and_zeros") for name in raw):
        raise ValueError(f"{path} holds int4 tiles made for one kind of device; quantise again from the float file")
    if isinstance(content.get("model_args"), dict):
        args = args_from_llama2c(content["model_args"], raw, path)
    else:
        args = args_of_bare(path, model_name)
    args, raw = head_as_stored(args, raw)
    return open_bare(Layout(args), raw, path)


def open_ours(content: dict, path: Path) -> ModelFile:
    raw = readers(content["model"], path)
    try:
        args, table = ModelArgs.from_dict(content["args"]), table_from_json(content.get("quant"))
        if "output" not in table:  # a quantised head has codes of its own
            args, raw = head_as_stored(args, raw)
        layout = Layout(args, table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors = rename(layout, raw, {}, path)
    for name in [name for name in tensors if name.endswith(".positions")]:
        tensors[name] = partial(checked_positions, name, tensors[name])
    return ModelFile(layout, tensors, (path,))


def open_bare(layout: Layout, raw: Readers, path: Path) -> ModelFile:
    """The tensors of a state dict with the names of gpt-fast or of Meta's own files."""
    modules = GPT_FAST_MODULES if "layers.0.attention.wqkv.weight" in raw else META_MODULES
    if layout.args.n_expert:  # whose tensors are cond_ffn.w1 and cond_ffn.scales1
        leaf = {"w": "weight", "scales": "scales"}
        pattern = re.compile(r"cond_ffn\.(w|scales)(\d)$")
        raw = {pattern.sub(lambda m: f"cond_ffn.w{m[2]}.{leaf[m[1]]}", name): read for name, read in raw.items()}
        modules = GPT_FAST_EXPERTS
    if any(name.endswith(".scales") for name in raw):  # int8: every linear layer, one scale a row
        layout = layout.quantized(linear_table(layout.model, QuantSpec(8), QuantSpec(8)))
        columns = {n: lambda read=read: read().unsqueeze(-1) for n, read in raw.items() if n.endswith(".scales")}
        raw = raw | columns
    return ModelFile(layout, rename(layout, raw, modules, path, rope_order(layout.args, interleaved=True)), (path,))


def args_from_llama2c(model_args: dict, raw: Readers, path: Path) -> ModelArgs:
    values = {key: model_args.get(name) for key, name in LLAMA2C_KEYS.items()}
    w1 = raw.get("layers.0.feed_forward.w1.weight", lambda: None)()
    values |= {
        "model_type": "llama",
        "intermediate_size": None if w1 is None or w1.ndim == 0 else len(w1),
        "rms_norm_eps": model_args.get("norm_eps", 1e-5),
        "tie_word_embeddings": True,
    }
    return args_from_config(Config(values, path, LLAMA2C_KEYS))


def args_of_bare(path: Path, model_name: str | None) -> ModelArgs:
    """The sizes of a file that does not carry them: config.json beside it, or --model_name."""
    if (path.parent / "config.json").exists():
        return args_from_config(Config(read_json(path.parent / "config.json"), path.parent / "config.json"))
    if model_name is None:
        raise ValueError(
            f"{path} does not say which model it is; put its config.json beside it, or give --model_name "
            f"(one of {', '.join(REGISTRY)})"
        )
    return args_from_name(model_name)
