"""Models in GGUF files."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from layers.quantized import QuantSpec, can_be_rounded
from mixers.rope_scaling import RopeScaling
from model import ModelArgs
from weights.families import OLMO, _number, _rope_scaling
from weights.gguf_file import KEPT, GGUFFile
from weights.layout import Source, rename, shell, source_modules

GGUF_MODULES = {
    "tok_embeddings": ("token_embd",),
    "layers.#.attention.wqkv": tuple(f"blk.#.attn_{x}" for x in "qkv"),
    "layers.#.attention.wo": ("blk.#.attn_output",),
    "layers.#.attention.q_norm": ("blk.#.attn_q_norm",),
    "layers.#.attention.k_norm": ("blk.#.attn_k_norm",),
    "layers.#.feed_forward.w13": ("blk.#.ffn_gate", "blk.#.ffn_up"),
    "layers.#.feed_forward.w2": ("blk.#.ffn_down",),
    "layers.#.attention_norm": ("blk.#.attn_norm",),
    "layers.#.post_attention_norm": ("blk.#.post_attention_norm",),
    "layers.#.ffn_norm": ("blk.#.ffn_norm",),
    "layers.#.post_ffn_norm": ("blk.#.post_ffw_norm",),
    "norm": ("output_norm",),
    "output": ("output",),
}


GGUF_EXPERTS = {
    "layers.#.feed_forward.gate": ("blk.#.ffn_gate_inp",),
    "layers.#.feed_forward.w13": ("blk.#.ffn_gate_exps", "blk.#.ffn_up_exps"),
    "layers.#.feed_forward.w2": ("blk.#.ffn_down_exps",),
    "layers.#.feed_forward.shared.w13": ("blk.#.ffn_gate_shexp", "blk.#.ffn_up_shexp"),
    "layers.#.feed_forward.shared.w2": ("blk.#.ffn_down_shexp",),
    "layers.#.feed_forward.shared_gate": ("blk.#.ffn_gate_inp_shexp",),
}


GGUF_FUSED = {"layers.#.attention.wqkv": ("blk.#.attn_qkv",), "layers.#.feed_forward.w13": ("blk.#.ffn_up",)}


@dataclass(frozen=True)
class GGUFFamily:
    """What an architecture adds to the plain row; `number(key, kind, default)` reads the file's metadata."""

    interleaved: bool = False  # rope turns neighbouring pairs
    fields: dict = field(default_factory=dict)
    fields_from: Callable[[Callable], dict] = lambda number: {}
    modules: dict = field(default_factory=dict)  # names other than those in GGUF_MODULES
    normalize_experts: bool = True
    full_layers_every: int | None = None  # the period of layers without a window
    window_rope_base: float | None = None  # of layers with one, whose rope is not scaled; 0: the base of the others


def _gguf_granite(number: Callable) -> dict:
    return {
        "attention_scale": number("attention.scale", float),
        "embedding_scale": number("embedding_scale", float, 1.0),
        "residual_scale": number("residual_scale", float, 1.0),
        "logit_scale": 1 / number("logit_scale", float, 1.0),
    }


def _gguf_gemma(number: Callable) -> dict:
    return {"embedding_scale": math.sqrt(number("embedding_length"))}


def _gguf_gemma_3(number: Callable, n_layer_by_dim: int = 62) -> dict:
    """n_layer_by_dim: layers of the one size whose scale is that of dim / n_head, which files do not say."""
    by_dim = number("block_count") == n_layer_by_dim
    width = number("embedding_length") / number("attention.head_count") if by_dim else number("attention.key_length")
    return _gguf_gemma(number) | {"attention_scale": width**-0.5}


def _gguf_gemma_2(number: Callable) -> dict:
    return _gguf_gemma_3(number, n_layer_by_dim=46) | {
        "attention_softcap": number("attn_logit_softcapping", float),
        "logit_softcap": number("final_logit_softcapping", float),
    }


GGUF_GEMMA = {"norm_offset": True, "activation": "gelu_tanh"}


GGUF_FAMILIES = {
    "llama": GGUFFamily(interleaved=True),
    "qwen2": GGUFFamily(fields={"qkv_bias": True}),
    "qwen3": GGUFFamily(fields={"qk_norm": True}),
    "qwen2moe": GGUFFamily(fields={"qkv_bias": True}, normalize_experts=False),
    "qwen3moe": GGUFFamily(fields={"qk_norm": True}),
    "phi3": GGUFFamily(modules=GGUF_FUSED),
    "granite": GGUFFamily(interleaved=True, fields_from=_gguf_granite),
    "olmo2": GGUFFamily(fields=OLMO, full_layers_every=4, window_rope_base=0),
    "gemma": GGUFFamily(fields=GGUF_GEMMA, fields_from=_gguf_gemma),
    "gemma2": GGUFFamily(fields=GGUF_GEMMA | {"post_norm": True}, fields_from=_gguf_gemma_2, full_layers_every=2),
    "gemma3": GGUFFamily(
        fields=GGUF_GEMMA | {"post_norm": True, "qk_norm": True},
        fields_from=_gguf_gemma_3,
        full_layers_every=6,
        window_rope_base=1e4,
    ),
}


def gguf_number(file: GGUFFile, key: str, kind: type = int, default=None):
    """A positive number of the file's architecture. Raises ValueError if it is missing, unless there is a default."""
    try:
        return _number(file.metadata, f"{file.metadata['general.architecture']}.{key}", kind, default)
    except ValueError as error:
        raise ValueError(str(error).replace("config.json", str(file.path))) from None


def args_from_gguf(file: GGUFFile) -> ModelArgs:
    """ModelArgs from the metadata and tensor shapes. Raises ValueError on what is missing or not supported."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        known = ", ".join(GGUF_FAMILIES)
        raise ValueError(f"{file.path}: architecture {name!r} is not supported; supported in GGUF: {known}")
    family, number = GGUF_FAMILIES[name], partial(gguf_number, file)
    dim, n_layer, n_head = number("embedding_length"), number("block_count"), number("attention.head_count")
    head_dim = number("attention.key_length", default=dim // n_head)
    if number("rope.dimension_count", default=head_dim) != head_dim:
        raise ValueError(f"{file.path}: partial rope is not supported")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} lacks the tensor token_embd.weight")
    rope_base, window = number("rope.freq_base", float, 10000.0), file.metadata.get(f"{name}.attention.sliding_window")
    full_layers, window_rope_base = (), None
    if window and family.full_layers_every:
        full_layers = tuple(range(family.full_layers_every - 1, n_layer, family.full_layers_every))
    if window and family.window_rope_base is not None:
        window_rope_base = family.window_rope_base or rope_base
    fields = {
        "dim": dim,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": number("attention.head_count_kv", default=n_head),
        "head_dim": head_dim,
        "intermediate_size": number("feed_forward_length"),
        "vocab_size": file.tensors["token_embd.weight"][1][0],
        "max_seq_length": number("context_length"),
        "norm_eps": number("attention.layer_norm_rms_epsilon", float),
        "rope_base": rope_base,
        "rope_scaling": gguf_rope_scaling(file, name),
        "sliding_window": window or None,
        "full_layers": full_layers,
        "window_rope_base": window_rope_base,
        "tie_embeddings": "output.weight" not in file.tensors,
    }
    return ModelArgs(**fields | family.fields | family.fields_from(number) | gguf_experts(file, name))


def gguf_experts(file: GGUFFile, name: str) -> dict:
    """The fields of a mixture of experts, none if the file has no experts; `name` is its architecture."""
    if not file.metadata.get(f"{name}.expert_count"):
        return {}
    number = partial(gguf_number, file)
    fields = {
        "n_expert": number("expert_count"),
        "n_expert_used": number("expert_used_count"),
        "normalize_experts": GGUF_FAMILIES[name].normalize_experts,
    }
    for key, of_file in (
        ("intermediate_size", "expert_feed_forward_length"),
        ("shared_size", "expert_shared_feed_forward_length"),
    ):
        if f"{name}.{of_file}" in file.metadata:
            fields[key] = number(of_file)
    return fields


def gguf_rope_scaling(file: GGUFFile, name: str) -> RopeScaling | None:
    kind = file.metadata.get(f"{name}.rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn") or any(key.startswith("rope_factors") for key in file.tensors):
        kind = "longrope" if kind in ("none", "linear", "yarn") else kind
        raise ValueError(f"{file.path}: rope type {kind!r} is not supported; supported: none, linear, yarn")
    if "rope_freqs.weight" in file.tensors:  # Llama 3.1's scaling, already worked out
        return RopeScaling("factors", factors=tuple(file.read("rope_freqs.weight").tolist()))
    if kind == "none":
        return None
    factor = gguf_number(file, "rope.scaling.factor", float)
    if kind == "linear":
        return RopeScaling("linear", factor)
    context = gguf_number(file, "rope.scaling.original_context_length")
    return _rope_scaling("yarn", {"factor": factor, "original_max_position_embeddings": context})


def gguf_tensor(part: str, args: ModelArgs) -> str:
    """The tensor with the weight of `part`, a name of GGUF_MODULES; a tied head has the embedding's."""
    return "token_embd.weight" if part == "output" and args.tie_embeddings else f"{part}.weight"


def kept_layers(file: GGUFFile, args: ModelArgs, modules: dict) -> dict[str, QuantSpec]:
    """The linear layers that can be kept: their parts are all of types in KEPT, and of the same bits.

    Raises ValueError if there are none.
    """
    table = {}
    for module, layer in shell(args, {}).named_modules():
        (parts,) = source_modules(module, modules)
        names = [gguf_tensor(part, args) for part in parts]
        if not can_be_rounded(layer) or any(name not in file.tensors for name in names):
            continue
        kinds, shapes, _ = zip(*(file.tensors[name] for name in names), strict=True)
        specs = {KEPT.get(kind.name) for kind in kinds}
        *experts, rows, columns = layer.weight.shape
        # sizes that are a lie are refused on reading; a quantised shell of such sizes would first be built for minutes
        fits = sum(shape[-2] for shape in shapes) == rows
        fits = fits and all(shape == (*experts, shape[-2], columns) for shape in shapes)
        if fits and len(specs) == 1 and None not in specs:
            table[module] = specs.pop()
    if not table:
        there = ", ".join(sorted({kind.name for kind, _, _ in file.tensors.values()}))
        raise ValueError(
            f"{file.path} has no whole layer in {' or '.join(KEPT)} to keep; "
            f"its types are {there}: convert it without --keep_quantized"
        )
    return table


def source_from_gguf(path: Path, keep_quantized: bool = False) -> Source:
    """A GGUF file; keep_quantized: layers in Q4_0, Q4_1 or Q8_0 keep their codes and scales, not rounded again.

    Raises ValueError if there is nothing to keep.
    """
    file = GGUFFile(path)
    args = args_from_gguf(file)
    family = GGUF_FAMILIES[file.metadata["general.architecture"]]
    modules = GGUF_MODULES | family.modules | (GGUF_EXPERTS if args.n_expert else {})

    def read(name: str) -> Tensor:
        tensor = file.read(name)
        if args.norm_offset and name.endswith("norm.weight"):  # which is 1 + weight in these files
            return tensor - 1
        return tensor[None] if name.endswith("gate_inp_shexp.weight") else tensor  # a matrix of one row

    raw = {name: partial(read, name) for name in file.tensors}
    table = kept_layers(file, args, modules) if keep_quantized else {}
    for module, spec in table.items():
        keys = ("weight", "scales", "zeros") if spec.bits == 4 else ("weight", "scales")
        for part in source_modules(module, modules)[0]:
            name = gguf_tensor(part, args)
            raw |= {f"{part}.{key}": partial(file.read_codes, name, key) for key in keys}
    return Source(args, rename(args, raw, modules, family.interleaved, path, table), table, gguf=path)
