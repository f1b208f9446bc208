"""Models in GGUF files: their metadata as a config in Hugging Face's words, and their tensors by our names."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from layers.quantized import QuantSpec, can_be_rounded
from mixers.rope import RopeScaling
from model import ModelArgs
from weights.architectures.architecture import Architecture
from weights.architectures.table import ARCHITECTURES
from weights.families.table import FAMILIES, args_from_config
from weights.files import Config
from weights.gguf_file import GGUFFile, GGUFTensor, open_parts
from weights.huggingface import hf_modules
from weights.layout import Layout, ModelFile, Readers, is_unused, rename, rope_order, source_modules
from weights.shipped.gguf_blocks import common_spec, read_codes
from weights.shipped.guesses import guess_layout, guesses_in, without_guesses

KEYS = {  # of Hugging Face's config -> of the metadata, after the name of the architecture
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope_theta": "rope.freq_base",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "rotary_dim": "rope.dimension_count",
    "num_nextn_predict_layers": "nextn_predict_layers",
}


def gguf_modules(architecture: str, model_type: str) -> dict[str, tuple[str, ...]]:
    """Our module -> the file's, see `source_modules`: what the package `gguf` calls the modules of Hugging Face."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    names = get_tensor_name_map({name: number for number, name in MODEL_ARCH_NAMES.items()}[architecture], 1)

    def renamed(part: str) -> str:
        part = part.replace(".#.", ".0.").replace(".@", "")  # experts are one stack
        return (names.get_name(part) or part).replace(".0.", ".#.")

    theirs = hf_modules(model_type) | ARCHITECTURES[architecture].modules
    modules = {module: tuple(map(renamed, parts)) for module, parts in theirs.items()}
    return modules | {"output": ("output",)}  # the package lacks it where the head is tied


def config_from_gguf(file: GGUFFile, architecture: Architecture) -> Config:
    """The config that Hugging Face would have written for the model."""
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} lacks the tensor token_embd.weight")
    name, keys = file.metadata["general.architecture"], dict(KEYS)
    if file.metadata.get(f"{name}.expert_count") and f"{name}.expert_feed_forward_length" in file.metadata:
        keys["intermediate_size"] = "expert_feed_forward_length"
    keys["moe_intermediate_size"] = keys["intermediate_size"]
    names = {key: f"{name}.{of_file}" for key, of_file in keys.items()}
    values = architecture.config | {key: file.metadata.get(of_file) for key, of_file in names.items()}
    known = Config(values, file.path, names)
    n_guess = known.count("num_nextn_predict_layers", 0)  # layers after the model's own, which guess further tokens
    model_type = architecture.model_type
    if values["num_experts"]:
        model_type = architecture.with_experts or model_type
    if values["sliding_window"]:
        model_type = architecture.with_window or model_type
    values |= {
        "model_type": model_type,
        "num_hidden_layers": known.whole("num_hidden_layers") - n_guess,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "sliding_window": values["sliding_window"] or None,
        "rope_theta": 10000.0 if values["rope_theta"] is None else values["rope_theta"],
        "rope_scaling": rope_scaling_from_gguf(file, values, name),
    }
    return Config(values | architecture.by_layer(file, values), file.path, names)


def rope_scaling_from_gguf(file: GGUFFile, values: dict, name: str) -> dict | None:
    rope_type, trained = file.metadata.get(f"{name}.rope.scaling.type", "none"), "original_max_position_embeddings"
    if "rope_factors_long.weight" in file.tensors:
        lists = {each: file.tensors[f"rope_factors_{each}.weight"].read().tolist() for each in ("short", "long")}
        factors = {f"{each}_factor": values for each, values in lists.items()}
        growth = {"attention_factor": file.metadata.get(f"{name}.rope.scaling.attn_factor")}
        return {"rope_type": "longrope", trained: values[trained]} | factors | growth
    if rope_type not in ("none", "linear", "yarn"):
        raise ValueError(f"{file.path}: rope type {rope_type!r} is not supported; supported: none, linear, yarn")
    if rope_type == "none" or "rope_freqs.weight" in file.tensors:
        return None
    keys = ("factor", trained, "beta_fast", "beta_slow")
    return {"rope_type": rope_type} | {key: values[key] for key in keys}


def args_from_gguf(file: GGUFFile, config: Config, architecture: Architecture) -> ModelArgs:
    for key in ("max_position_embeddings", FAMILIES[config.get("model_type")].norm_eps, *architecture.required):
        config.number(key)
    if architecture.layers_scaled_by_dim is not None:
        scaled_by_dim = config.whole("num_hidden_layers") == architecture.layers_scaled_by_dim
        width = config.whole("hidden_size") / config.whole("num_attention_heads")
        config.values["query_pre_attn_scalar"] = width if scaled_by_dim else config.whole("head_dim")
    head_dim = config.whole("head_dim", config.whole("hidden_size") // config.whole("num_attention_heads"))
    config.values["partial_rotary_factor"] = config.whole("rotary_dim", head_dim) / head_dim
    args = args_from_config(config)
    if "rope_freqs.weight" in file.tensors:  # Llama 3.1's scaling, already worked out
        factors = tuple(file.tensors["rope_freqs.weight"].read().tolist())
        return replace(args, rope_scaling=RopeScaling("factors", factors=factors))
    return args


NAMES = {  # of tensors of a layer, which are those of no module -> by what module of the family, or of the file
    "layer_output_scale.weight": "model.layers.#.layer_scalar",
    "ffn_gate_inp.scale": "model.layers.#.router.scale",
    "ffn_down_exps.scale": "model.layers.#.router.per_expert_scale",
    "exp_probs_b.bias": "blk.#.ffn_gate_inp.e_score_correction_bias",
    "ssm_a": "model.layers.#.linear_attn.A_log",
    "ssm_dt.bias": "model.layers.#.linear_attn.dt_bias",
}


def name_in_module(name: str) -> str:
    """A tensor's name or, if it is in `NAMES`, the one there."""
    layer = re.fullmatch(r"blk\.(\d+)\.(.*)", name)
    return NAMES[layer[2]].replace("#", layer[1]) if layer and layer[2] in NAMES else name


def as_in_family(stored: GGUFTensor, name: str, args: ModelArgs) -> Tensor:
    """A tensor of a file as Hugging Face has it."""
    tensor = stored.read()
    if args.norm_offset and name.endswith("norm.weight") and not name.endswith("ssm_norm.weight"):
        return tensor - 1  # which is 1 + weight in these files
    if name.endswith("ssm_a"):  # the decay itself, below 0
        return torch.log(-tensor)
    if name.endswith(("ssm_conv1d.weight", "shortconv.conv.weight")):
        return tensor[:, None]
    return tensor.view(1, -1) if name.endswith("gate_inp_shexp.weight") else tensor  # a matrix of one row, or a vector


def kept_spec(tensors: dict[str, GGUFTensor], names: list[str], shape: torch.Size) -> QuantSpec | None:
    """How a weight of this shape, whose parts are the tensors `names`, is quantised, if its types are kept."""
    parts, (*experts, rows, columns) = [tensors[name] for name in names], shape
    # sizes that are a lie are refused on reading; a meta model of quantised layers would take minutes to build
    fits = sum(part.shape[-2] for part in parts) == rows
    fits = fits and all(part.shape == (*experts, part.shape[-2], columns) for part in parts)
    return common_spec({part.kind.name for part in parts}) if fits else None


def kept_layers(tensors: dict[str, GGUFTensor], layout: Layout, modules: dict) -> tuple[dict[str, QuantSpec], Readers]:
    """The linear layers that can be kept, and what reads their tensors, by the file's names of their parts."""
    table, codes, args = {}, {}, layout.args
    for module, layer in layout.model.named_modules():
        names = [f"{part}.weight" for part in source_modules(layout.weight_source(module), modules, layout.args)[0]]
        if not can_be_rounded(layer) or any(name not in tensors for name in names):
            continue
        spec = kept_spec(tensors, names, layer.weight.shape)
        cut = args.delta is not None and args.delta.value_dim % (spec.groupsize if spec else 1)
        if spec is None or cut:  # a group of inputs of more than one value head, which may stand in another order
            continue
        table[module] = spec
        for part, name in zip(source_modules(module, modules, layout.args)[0], names, strict=True):
            codes |= {f"{part}.{leaf}": partial(read_codes, tensors[name], spec, leaf) for leaf in spec.leaves}
    return table, codes


def open_gguf(path: Path, keep_codes: bool = True) -> ModelFile:
    """A GGUF file, or any part of one. keep_codes: of layers in types that are kept, not rounded; others become float.

    Where floats are wanted, those of the package `gguf` are the file's own: made of our zeros they may be an ulp away.
    """
    file = open_parts(path)
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architecture {name!r} is not supported; supported in GGUF: {known}")
    architecture = ARCHITECTURES[name]
    config = config_from_gguf(file, architecture)
    args, n_guess = args_from_gguf(file, config, architecture), config.count("num_nextn_predict_layers", 0)
    modules = gguf_modules(name, config.get("model_type"))

    def opened(layout: Layout, tensors: dict[str, GGUFTensor]) -> ModelFile:
        args = layout.args
        tensors = {name: tensor for name, tensor in tensors.items() if not is_unused(name, args)}
        raw = {name_in_module(name): partial(as_in_family, each, name, args) for name, each in tensors.items()}
        table, codes = kept_layers(tensors, layout, modules) if keep_codes else ({}, {})
        raw, layout = architecture.tensors(args, raw | codes), layout.quantized(table)
        order = rope_order(args, architecture.interleaved)
        return ModelFile(layout, rename(layout, raw, modules, path, order, architecture.rows(args)), file.paths)

    model = opened(Layout(args), without_guesses(file.tensors, args.n_layer, n_guess))
    guesses = guesses_in(file.tensors, args.n_layer) if n_guess else {}
    return replace(model, gguf=file.path, guesses=(lambda: opened(guess_layout(args), guesses)) if guesses else None)
