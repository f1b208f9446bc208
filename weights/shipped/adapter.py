"""LoRA adapters as peft writes them: y = W x + s B A x, where A [r, in] and B [out, r] are small."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from cli import listed
from layers.formats import QuantizedLinear
from model import ModelArgs
from weights.files import read_json, read_torch
from weights.huggingface import INTERLEAVED, hf_modules, safetensors_file, with_usual_names
from weights.layout import ModelFile, Pair, Readers, in_our_order, readers, rope_order, source_modules

Scale = Callable[[int], float]  # of the product of two matrices, by their rank
PREFIX = "base_model.model."
MERGE = "merge it with merge_and_unload of peft"
# what changes nothing of a trained adapter, or is told by its tensors; any other field that is set is refused
KNOWN = {"peft_type", "bias", "r", "lora_alpha", "use_rslora", "init_lora_weights", "rank_pattern", "target_modules"}
KNOWN |= {"task_type", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "auto_mapping"}
KNOWN |= {"exclude_modules", "layers_to_transform", "layers_pattern", "peft_version", "megatron_core", "runtime_config"}
KNOWN |= {"loftq_config", "eva_config", "corda_config", "qalora_group_size", "ensure_weight_tying"}
OTHER_BASES = ("pissa", "olora", "corda", "loftq")  # initialisations that change the weights of the base model


def adapted(opened: ModelFile, adapter: Path, base: Path) -> ModelFile:
    """The model in an open file with an adapter of peft: its floats take it in, and it goes beside codes.

    adapter: a folder, or its adapter_model file. base: the path of the model, beside which config.json may lie.
    """
    if not adapter.exists():
        raise ValueError(f"there is no adapter at {adapter}; give its folder, or OWNER/NAME of one in checkpoints/")
    folder = adapter if adapter.is_dir() else adapter.parent
    scale_of, raw = read_adapter(folder)
    tensors, beside, args = dict(opened.tensors), {}, opened.args
    model_type = base_type(base, args)
    order = rope_order(args, model_type in INTERLEAVED)
    unused = set(raw)
    for module, layer in opened.layout.model.named_modules():
        if not isinstance(layer, (nn.Linear, QuantizedLinear)) or f"{module}.weight" not in tensors:
            continue
        parts = source_modules(module, hf_modules(model_type), args)[0]
        names = [f"{part}.lora_{leaf}.weight" for part in parts for leaf in "AB"]
        if not unused.intersection(names):
            continue
        unused.difference_update(names)
        if ".attention." in module and orders_rows(args):
            raise ValueError(
                f"{folder} adapts attention ({parts[0]}), which is not supported in models with gated DeltaNet, latent "
                f"attention or layers of two sizes; {MERGE}"
            )
        n_out, turns = layer.weight.shape[-2], order if module.endswith("wqkv") else None
        pair = partial(read_pair, parts, rows_of(parts, n_out, args), layer.in_features, raw, scale_of, folder)
        if turns is not None:
            pair = partial(turned, pair, module, args, turns)
        if opened.layout.is_coded(f"{module}.weight"):
            beside[module] = pair
        else:
            tensors[f"{module}.weight"] = partial(merged, tensors[f"{module}.weight"], pair)
    if unused:
        raise ValueError(no_place(folder, sorted(unused), args))
    paths = (*opened.paths, *sorted(folder.glob("adapter_*")))
    return replace(opened, tensors=tensors, beside=beside, paths=paths)


def no_place(folder: Path, unused: list[str], args: ModelArgs) -> str:
    """What is said of an adapter of which some tensors are for no layer of the model."""
    if args.tie_embeddings and any(name.startswith("lm_head.") for name in unused):
        return f"{folder} adapts a head that shares the embedding's weight, which is not supported; {MERGE}"
    return (
        f"{folder} has {unused[0]}, for which this model, of {args.n_layer} layers, has no place; give the adapter's "
        "own base model, or merge it into that with merge_and_unload of peft"
    )


def read_adapter(folder: Path) -> tuple[Scale, Readers]:
    """The scale of an adapter by its rank, and its tensors by the names of the base model's modules."""
    if not (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} has no adapter_config.json; give the folder of an adapter, as peft writes it")
    config = read_json(folder / "adapter_config.json")
    check_config(config, folder)
    path = next((p for p in (folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")) if p.exists()), None)
    if path is None:
        raise ValueError(f"{folder} has no adapter_model.safetensors; download the adapter again")
    raw = safetensors_file(path) if path.suffix == ".safetensors" else readers(read_torch(path), path)
    alpha, root = config["lora_alpha"], config.get("use_rslora")
    named = {name.removeprefix(PREFIX): read for name, read in raw.items()}
    return lambda r: alpha / (math.sqrt(r) if root else r), with_usual_names(named, path)


def check_config(config: dict, folder: Path) -> None:
    """Refuse, by its name, what is not plain LoRA."""
    kind, bias, start = config.get("peft_type"), config.get("bias"), str(config.get("init_lora_weights")).lower()
    others = sorted(name for name, value in config.items() if name not in KNOWN and value)
    others += ["bias"] * (bias not in (None, "none")) + ["init_lora_weights"] * start.startswith(OTHER_BASES)
    if kind != "LORA":
        raise ValueError(f"{folder} is an adapter of the kind {kind}, which is not supported; LORA is")
    if others:
        values = listed([f"{name}: {config[name]}" for name in others])
        raise ValueError(f"{folder} is an adapter with {values}, which is not supported; merge it with peft")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(f"{folder}: lora_alpha is {config.get('lora_alpha')!r}; it must be a number")


def base_type(base: Path, args: ModelArgs) -> str | None:
    """The model_type in config.json beside the base model, which tells how its modules are called; None: as usual."""
    file = (base if base.is_dir() else base.parent) / "config.json"
    if file.exists():
        config = read_json(file)
        return (config.get("text_config") or config).get("model_type")
    if args.parallel or args.turned != args.head_dim:  # families of which some turn neighbours
        raise ValueError(f"{file} is missing, which tells in what order the adapter has the rows; copy it there")
    return None


def rows_of(parts: list[str], n_out: int, args: ModelArgs) -> list[int]:
    """The rows of a layer that each module of the file has."""
    if len(parts) == 3:
        return [n * args.head_dim for n in (args.n_head, args.n_kv_head, args.n_kv_head)]
    return [n_out // len(parts)] * len(parts)


def read_pair(parts: list[str], sizes: list[int], n_in: int, raw: Readers, scale_of: Scale, folder: Path) -> Pair:
    """A of all parts [r, in], one below the other, and s B [out, r], each in the rows and columns of its part."""
    all_a, all_b = [], []
    for part, size in zip(parts, sizes, strict=True):
        names = [f"{part}.lora_{leaf}.weight" for leaf in "AB"]
        if not raw.keys() & {*names}:
            all_b.append(torch.zeros(size, 0))
            continue
        if absent := [name for name in names if name not in raw]:
            raise ValueError(f"{folder} lacks {absent[0]}; download the adapter again")
        a, b = (raw[name]().float() for name in names)
        if a.shape != (len(a), n_in) or b.shape != (size, len(a)):
            raise ValueError(
                f"{folder} is an adapter of another model: at {part} it has A {list(a.shape)} and B {list(b.shape)}; "
                f"this model's layer has {n_in} inputs and {size} outputs"
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{folder}: the adapter of {part} holds NaN or infinite values")
        all_a.append(a)
        all_b.append(scale_of(len(a)) * b)
    return torch.cat(all_a), torch.block_diag(*all_b)


def orders_rows(args: ModelArgs) -> bool:
    """Whether files have the rows of attention in orders and sizes of their own."""
    differs = (args.full_head_dim, args.full_kv_head, args.keys_as_values, args.n_reusing_layer, args.attention_gate)
    return args.delta is not None or args.kv_latent is not None or any(differs)


def turned(pair: Callable[[], Pair], module: str, args: ModelArgs, order: Tensor) -> Pair:
    """The pair of wqkv with its rows in our order, see `rope_order`."""
    a, b = pair()
    return a, in_our_order(b, module, args, order)


def merged(read: Callable[[], Tensor], pair: Callable[[], Pair]) -> Tensor:
    """The weight with an adapter in it, in float32."""
    a, b = pair()
    return read().float() + b @ a
