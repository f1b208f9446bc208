"""Every model file read or written, and the decisions about device, dtype and memory that go with it.

A checkpoint is read as a `Source`: the sizes, and for each tensor a function that fetches it. Tensors are fetched,
converted and moved one at a time, so loading needs little more memory than the weights themselves.
"""

import json
import math
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gguf_file import KEPT, GGUFFile, is_gguf
from model import MAX_LAYERS, MAX_SIZE, REGISTRY, ROPE_TYPES, ModelArgs, RopeScaling, Transformer
from qlinear import (
    QuantSpec,
    can_be_rounded,
    linear_table,
    pack_,
    quantize_,
    quantize_weight,
    table_from_json,
    table_to_json,
)
from tp import Ranks, apply_tp, require_split, shard, share_of

DEFAULT_CHECKPOINT = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/model.pth")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GB = 1e9
EXPERT_TENSOR = re.compile(r"feed_forward\.(layer\.)?w(13|2)\.")  # layer: where ranks share it


@dataclass
class Source:
    """A model file before it is read."""

    args: ModelArgs
    tensors: dict[str, Callable[[], Tensor]]  # by our names
    table: dict[str, QuantSpec] = field(default_factory=dict)  # the layers that are stored quantised
    gguf: Path | None = None  # the file, whose metadata holds the tokenizer too


# ---------------------------------------------------------------- device, dtype, memory


def pick_device(name: str | None, ranks: Ranks | None = None) -> torch.device:
    """The device called `name`, or the first there is of cuda, mps and cpu. Raises ValueError if it is not there.

    ranks: those of a model that is shared; each takes the GPU of its number.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        name = next(kind for kind, is_there in there.items() if is_there and not (ranks and kind == "mps"))
    kind, _, index = name.partition(":")
    if kind not in there or (index and not (index.isdecimal() and kind == "cuda")):
        raise ValueError(f"device {name!r} is unknown; use one of {', '.join(there)}, or cuda:N")
    if not there[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not on this machine; use {pick_device(None).type}")
    return torch.device(name) if ranks is None else ranks.place(name)


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`. Raises ValueError that lists the names."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024
    except (OSError, TypeError):
        return None
    group = Path("/sys/fs/cgroup")  # a container's own limit
    try:
        limit, used = (group / "memory.max").read_text(), int((group / "memory.current").read_text())
        cached = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)", (group / "memory.stat").read_text(), re.M)))
        return free if limit.strip() == "max" else min(free, int(limit) - used + cached)
    except (OSError, ValueError):
        return free


def require_memory(size: int, device: torch.device, what: str, advice: str) -> None:
    """Raise ValueError, before anything is allocated, if `size` bytes for `what` do not fit on `device`."""
    free = free_memory(device)
    if free is not None and size > free:
        raise ValueError(f"{what} need {size / GB:.1f} GB, but {device} has {free / GB:.1f} GB free; {advice}")


# ---------------------------------------------------------------- plain files


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. Raises ValueError if it is missing, broken or no object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def require_writable(path: str | Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise ValueError, before the work, if a file at `path` could not be written after it, or is one of the inputs.

    An input may be a model's folder, or None.
    """
    path = Path(path)
    if path.exists():
        real = path.resolve()
        belongs = real.suffix != ".json" or re.match(r"(config|tokenizer|generation_config|model)\b", real.name)
        for each in (Path(each).resolve() for each in inputs if each is not None):
            if each == real or (each == real.parent and belongs):
                raise ValueError(f"cannot write {path}: this run reads it")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: permission denied")


def require_space(path: Path, size: int) -> None:
    """Raise ValueError if the disk has no room for a file of `size` bytes at `path`."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise ValueError(f"cannot write {path}: it needs {size / GB:.2f} GB, and {free / GB:.2f} GB are free")


def write_json(path: str | Path, value: dict, default: Callable | None = None) -> None:
    """Write a report, whole or not at all; default makes values that JSON lacks into others. Raises ValueError as
    `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=default) + "\n", encoding="utf-8")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it if the block succeeds and removed if it does not.

    Raises ValueError if the file cannot be written (no folder, no right, disk full).
    """
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout is written to, not replaced
        yield Path(path)
        return
    path = Path(os.path.realpath(path))  # a link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_torch(path: Path) -> Any:
    """What torch.save wrote: tensors and plain values only, mapped where the format allows it."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to load without weights_only
        if re.search("GLOBAL|unsupported (global|class)", str(error), re.IGNORECASE):
            raise ValueError(
                f"{path} is refused: its pickle names code that would run on loading, not only tensors; "
                "get the model as safetensors"
            ) from None
        raise ValueError(f"{path} is not a checkpoint, or is damaged") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint, or is cut short or damaged: {reason}") from None


# ---------------------------------------------------------------- names

# Our module -> the source's modules whose rows it holds, in order; # is the layer's number, and @ that of an expert.
HF_MODULES = {
    "tok_embeddings": ("model.embed_tokens",),
    "layers.#.attention.wqkv": tuple(f"model.layers.#.self_attn.{x}_proj" for x in "qkv"),
    "layers.#.attention.wo": ("model.layers.#.self_attn.o_proj",),
    "layers.#.attention.q_norm": ("model.layers.#.self_attn.q_norm",),
    "layers.#.attention.k_norm": ("model.layers.#.self_attn.k_norm",),
    "layers.#.feed_forward.w13": ("model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj"),
    "layers.#.feed_forward.w2": ("model.layers.#.mlp.down_proj",),
    "layers.#.attention_norm": ("model.layers.#.input_layernorm",),
    "layers.#.ffn_norm": ("model.layers.#.post_attention_layernorm",),
    "norm": ("model.norm",),
    "output": ("lm_head",),
}
HF_FUSED = {
    "layers.#.attention.wqkv": ("model.layers.#.self_attn.qkv_proj",),
    "layers.#.feed_forward.w13": ("model.layers.#.mlp.gate_up_proj",),
}
HF_POST_NORMS = {
    "layers.#.post_attention_norm": ("model.layers.#.post_attention_layernorm",),
    "layers.#.post_ffn_norm": ("model.layers.#.post_feedforward_layernorm",),
}
HF_EXPERTS = {
    "layers.#.feed_forward.gate": ("model.layers.#.mlp.gate",),
    "layers.#.feed_forward.w13": ("model.layers.#.mlp.experts.@.gate_proj", "model.layers.#.mlp.experts.@.up_proj"),
    "layers.#.feed_forward.w2": ("model.layers.#.mlp.experts.@.down_proj",),
    "layers.#.feed_forward.shared.w13": tuple(f"model.layers.#.mlp.shared_expert.{x}_proj" for x in ("gate", "up")),
    "layers.#.feed_forward.shared.w2": ("model.layers.#.mlp.shared_expert.down_proj",),
    "layers.#.feed_forward.shared_gate": ("model.layers.#.mlp.shared_expert_gate",),
}
HF_MIXTRAL = {
    "layers.#.feed_forward.gate": ("model.layers.#.block_sparse_moe.gate",),
    "layers.#.feed_forward.w13": tuple(f"model.layers.#.block_sparse_moe.experts.@.w{i}" for i in (1, 3)),
    "layers.#.feed_forward.w2": ("model.layers.#.block_sparse_moe.experts.@.w2",),
}
HF_FOUR_NORMS = HF_POST_NORMS | {"layers.#.ffn_norm": ("model.layers.#.pre_feedforward_layernorm",)}
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

# Left in files by older versions of their writers: rope tables, and the head of a model that has none of its own.
IGNORED = re.compile(
    r".*(rotary_emb\.inv_freq|rotary\.inv_freq|rope\.freqs)|rope_freqs\.weight|freqs_(cis|cos|sin)|causal_mask"
)
SEEING = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
TIED_HEADS = {"lm_head.weight", "output.weight"}


def shell(args: ModelArgs, table: dict[str, QuantSpec]) -> Transformer:
    """A model on the meta device whose layers in `table` are quantised: every name, shape and dtype, no memory."""
    with torch.device("meta"):
        model = Transformer(args)
    quantize_(model, table)
    return model


def expected_tensors(args: ModelArgs, table: dict[str, QuantSpec] | None = None) -> dict[str, Tensor]:
    """Every tensor that a file of such a model holds, as meta tensors; the table names its quantised layers."""
    table = table or {}
    tensors = shell(args, table).state_dict()
    if args.tie_embeddings and "output" not in table:
        del tensors["output.weight"]
    return tensors


def source_modules(module: str, modules: dict, n_expert: int | None = None) -> list[list[str]]:
    """The source's modules whose rows `module` holds, in order; `modules` is one of the tables above.

    A list of them for each expert if the source has them apart, else one list.
    """
    layer = re.search(r"(?<=layers\.)\d+", module)
    number = layer[0] if layer else ""
    pattern = module.replace(f"layers.{number}", "layers.#")
    parts = [part.replace("#", number) for part in modules.get(pattern, (pattern,))]
    n_list = n_expert if "@" in parts[0] else 1
    return [[part.replace("@", str(e)) for part in parts] for e in range(n_list)]


def rename(
    args: ModelArgs,
    raw: dict[str, Callable[[], Tensor]],
    modules: dict,
    interleaved: bool,
    where: Path,
    table: dict[str, QuantSpec] | None = None,
) -> dict[str, Callable[[], Tensor]]:
    """Tensors by our names out of those of another format. Raises ValueError if one is missing or left over.

    interleaved: the source turns neighbouring pairs in its rope, so q and k rows are brought into our order.
    """
    tensors, used = {}, set()
    for name in expected_tensors(args, table):
        module, _, leaf = name.rpartition(".")
        lists = [[f"{part}.{leaf}" for part in parts] for parts in source_modules(module, modules, args.n_expert)]
        absent = [part for parts in lists for part in parts if part not in raw]
        if absent:
            raise ValueError(f"{where} lacks the tensor {absent[0]}; the file is incomplete, or of another model")
        used.update(*lists)
        tensors[name] = joined([[raw[part] for part in parts] for parts in lists])
        if interleaved and module.endswith("wqkv"):
            tensors[name] = halves_from_pairs(tensors[name], args)
    dropped = TIED_HEADS if args.tie_embeddings else set()
    extra = [name for name in raw if name not in used | dropped and not IGNORED.fullmatch(name)]
    if extra:
        raise ValueError(f"{where} has {len(extra)} tensors this model has no place for, the first is {extra[0]}")
    return tensors


def readers(state: Any, path: Path) -> dict[str, Callable[[], Tensor]]:
    """The tensors of a dictionary, each as a function that fetches it. Raises ValueError if it is anything else."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no dictionary of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} is not a checkpoint: beside tensors it holds {name!r}, a {type(value).__name__}")
    return {name: lambda value=value: value for name, value in state.items()}


def joined(lists: list[list[Callable[[], Tensor]]]) -> Callable[[], Tensor]:
    """The parts of each list as rows of one tensor, and those of several lists as a stack."""

    def rows(parts: list[Callable[[], Tensor]]) -> Tensor:
        read = [part() for part in parts]
        return read[0] if len(read) == 1 else torch.cat(read, dim=-2 if read[0].ndim > 1 else 0)

    return lambda: rows(lists[0]) if len(lists) == 1 else torch.stack([rows(parts) for parts in lists])


def halves_from_pairs(read: Callable[[], Tensor], args: ModelArgs) -> Callable[[], Tensor]:
    """Reorder the q and k rows of wqkv from interleaved rope pairs to half-split ones."""

    def reorder(rows: Tensor) -> Tensor:
        pairs = rows.unflatten(0, (-1, args.head_dim // 2, 2))
        return pairs.transpose(1, 2).reshape(rows.shape)

    def converted() -> Tensor:
        sizes = [heads * args.head_dim for heads in (args.n_head, args.n_kv_head, args.n_kv_head)]
        q, k, v = checked_shape(read(), sum(sizes), "wqkv").split(sizes)
        return torch.cat((reorder(q), reorder(k), v))

    return converted


def checked_shape(tensor: Tensor, rows: int, name: str) -> Tensor:
    if tensor.shape[0] != rows:
        raise ValueError(f"{name} has {tensor.shape[0]} rows; the model's sizes need {rows}")
    return tensor


# ---------------------------------------------------------------- Hugging Face


def _number(config: dict, key: str, kind: type = int, default=None):
    """config[key] as a positive number; ValueError if it is missing or anything else."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ValueError(f"config.json: {key} is {value!r}; a number is needed")
    limit = 1e30 if kind is float else MAX_LAYERS if key in ("num_hidden_layers", "block_count") else MAX_SIZE
    if not 0 < value <= limit:
        raise ValueError(f"config.json: {key} is {value!r}, which is no possible size")
    return kind(value)


def _rope(config: dict, window_key: str | None) -> tuple[float, RopeScaling | None, float | None]:
    """Base and scaling, and the base of layers with a window if they have one of their own, without scaling.

    They occur as rope_theta and rope_scaling, or together as rope_parameters, which may be told apart by kind of layer.
    window_key: the number that is the windowed layers' base where they are not told apart.
    """
    parameters = _object(config.get("rope_parameters") or config.get("rope_scaling"))
    window_base = None
    if "full_attention" in parameters:
        windowed, parameters = (_object(parameters.get(f"{kind}_attention")) for kind in ("sliding", "full"))
        if windowed.get("rope_type", "default") != "default":
            raise ValueError(f"config.json: rope type {windowed['rope_type']!r} of windowed layers is not supported")
        window_base = _number(windowed, "rope_theta", float, 10000.0)
    elif window_key is not None:
        window_base = _number(config, window_key, float)
    base = _number({"rope_theta": parameters.get("rope_theta", config.get("rope_theta"))}, "rope_theta", float, 10000.0)
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return base, None if kind in (None, "default") else _rope_scaling(kind, parameters), window_base


def _object(value) -> dict:
    if not isinstance(value, dict | None):
        raise ValueError(f"config.json: the rope settings are {value!r}; an object is needed")
    return value or {}


def _rope_scaling(kind: str, parameters: dict) -> RopeScaling:
    if kind not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise ValueError(f"config.json: rope type {kind!r} is not supported; supported: default, {known}")
    factors = {"factor": _number(parameters, "factor", float)}
    if kind == "llama3":
        factors["low_freq_factor"] = _number(parameters, "low_freq_factor", float)
        factors["high_freq_factor"] = _number(parameters, "high_freq_factor", float)
    if kind == "yarn":
        factors["low_freq_factor"] = _number(parameters, "beta_slow", float, 1.0)
        factors["high_freq_factor"] = _number(parameters, "beta_fast", float, 32.0)
        factors["whole_pairs"] = parameters.get("truncate") is not False
        factors["attention_factor"] = _number(
            parameters, "attention_factor", float, _yarn_growth(factors["factor"], parameters)
        )
    if kind != "linear":
        factors["original_max_position_embeddings"] = _number(parameters, "original_max_position_embeddings")
    return RopeScaling(kind, **factors)


def _yarn_growth(factor: float, parameters: dict) -> float:
    """What YaRN multiplies cosines and sines by, unless told."""

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return growth(_number(parameters, "mscale", float)) / growth(_number(parameters, "mscale_all_dim", float))
    return growth(1.0)


def _windows(config: dict, n_layer: int, period: int | None) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers without one. use_sliding_window: false wins over a window size.

    period: every so many layers one has none, unless the config says which.
    """
    kinds = config.get("layer_types")
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return None, ()
    if kinds is not None:
        known = {"full_attention": True, "sliding_attention": False}
        if not isinstance(kinds, list) or len(kinds) != n_layer or not all(str(kind) in known for kind in kinds):
            raise ValueError(f"config.json: layer_types is {kinds!r}; {n_layer} of {' and '.join(known)} are needed")
        full = tuple(i for i, kind in enumerate(kinds) if known[kind])
    elif period is not None:
        period = _number(config, "sliding_window_pattern", default=period)
        full = tuple(range(period - 1, n_layer, period))
    else:  # the first layers may be full
        n_full = config.get("max_window_layers", 28) if "use_sliding_window" in config else 0
        if type(n_full) is not int:
            raise ValueError(f"config.json: max_window_layers is {n_full!r}; a number is needed")
        full = tuple(range(min(n_full, n_layer)))
    return (None, ()) if len(full) == n_layer else (_number(config, "sliding_window"), full)


def _cap(config: dict, key: str) -> float | None:
    return None if config.get(key) is None else _number(config, key, float)


ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """What a model_type adds to the plain Llama row."""

    fields: dict = field(default_factory=dict)  # of ModelArgs
    fields_from: Callable[[dict], dict] = lambda config: {}  # ... that depend on the config
    defaults: dict = field(default_factory=dict)  # what the config may leave out
    modules: dict = field(default_factory=dict)  # names other than those in HF_MODULES
    full_layers_every: int | None = None  # the period of layers without a window
    window_rope_base: str | None = None  # the config's name of the rope base of layers with one
    expert_size: str = "intermediate_size"  # the config's name of the width of feed-forwards
    activations: dict = field(default_factory=lambda: ACTIVATION_NAMES)


def _granite_scales(config: dict) -> dict:
    return {
        "attention_scale": _number(config, "attention_multiplier", float, 1.0),
        "embedding_scale": _number(config, "embedding_multiplier", float, 1.0),
        "residual_scale": _number(config, "residual_multiplier", float, 1.0),
        "logit_scale": 1 / _number(config, "logits_scaling", float, 1.0),
    }


def _experts(config: dict) -> dict:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise ValueError("config.json: experts in some layers only are not supported")
    count = "num_local_experts" if "num_local_experts" in config else "num_experts"
    shared = config.get("shared_expert_intermediate_size")
    return {
        "n_expert": _number(config, count),
        "n_expert_used": _number(config, "num_experts_per_tok"),
        "normalize_experts": bool(config.get("norm_topk_prob", False)),
        "shared_size": _number(config, "shared_expert_intermediate_size") if shared else None,
    }


def _embedding_scale(config: dict) -> dict:
    return {"embedding_scale": math.sqrt(_number(config, "hidden_size"))}


def _gemma_scales(config: dict) -> dict:
    return _embedding_scale(config) | {
        "attention_scale": _number(config, "query_pre_attn_scalar", float, 256.0) ** -0.5,
        "attention_softcap": _cap(config, "attn_logit_softcapping"),
        "logit_softcap": _cap(config, "final_logit_softcapping"),
    }


GEMMA = {"norm_offset": True}
GEMMA_2 = GEMMA | {"post_norm": True}
# old configs say gelu, but the models are trained with its approximation
GEMMA_ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
GEMMA_CONFIG = {"tie_word_embeddings": True, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA_3_CONFIG = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208, "sliding_window": 4096}
GEMMA_3_CONFIG |= {"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
OLMO = {"pre_norm": False, "post_norm": True, "joint_qk_norm": True}
HF_FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family({"qkv_bias": True}),
    "qwen3": Family({"qk_norm": True}),
    "mixtral": Family({}, _experts, {"norm_topk_prob": True}, HF_MIXTRAL),
    "qwen2_moe": Family({"qkv_bias": True}, _experts, {}, HF_EXPERTS, expert_size="moe_intermediate_size"),
    "qwen3_moe": Family({"qk_norm": True}, _experts, {}, HF_EXPERTS, expert_size="moe_intermediate_size"),
    "phi3": Family(modules=HF_FUSED),
    "granite": Family(fields_from=_granite_scales),
    "olmo2": Family(OLMO, modules=HF_POST_NORMS),
    "olmo3": Family(OLMO, modules=HF_POST_NORMS, full_layers_every=4, window_rope_base="rope_theta"),
    "gemma": Family(GEMMA, _embedding_scale, GEMMA_CONFIG, activations=GEMMA_ACTIVATIONS),
    "gemma2": Family(
        GEMMA_2,
        _gemma_scales,
        GEMMA_CONFIG | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
        HF_FOUR_NORMS,
        full_layers_every=2,
        activations=GEMMA_ACTIVATIONS,
    ),
    "gemma3_text": Family(
        GEMMA_2 | {"qk_norm": True},
        _gemma_scales,
        GEMMA_CONFIG | GEMMA_3_CONFIG,
        HF_FOUR_NORMS,
        full_layers_every=6,
        window_rope_base="rope_local_base_freq",
        activations=GEMMA_ACTIVATIONS,
    ),
}


def family_of(config: dict) -> Family:
    """The row of HF_FAMILIES for a config.json. Raises ValueError, with what is supported, if it has none."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in HF_FAMILIES:
        name = name or config.get("architectures")
        raise ValueError(f"config.json: architecture {name!r} is not supported; supported: {', '.join(HF_FAMILIES)}")
    return HF_FAMILIES[name]


def args_from_hf(config: dict) -> ModelArgs:
    """ModelArgs from a Hugging Face config.json. Raises ValueError on anything that is not supported."""
    family = family_of(config)
    config = family.defaults | config
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if config.get(key):
            raise ValueError(f"config.json: {key} is set, which is not supported; of biases those on q, k and v are")
    dim, n_head, n_layer = (_number(config, f) for f in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    rope_base, rope_scaling, window_rope_base = _rope(config, family.window_rope_base)
    window, full_layers = _windows(config, n_layer, family.full_layers_every)
    fields = {
        "dim": dim,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": _number(config, "num_key_value_heads", default=n_head),
        "head_dim": _number(config, "head_dim", default=dim // n_head),
        "intermediate_size": _number(config, family.expert_size),
        "vocab_size": _number(config, "vocab_size"),
        "max_seq_length": _number(config, "max_position_embeddings", default=2048),
        "norm_eps": _number(config, "rms_norm_eps", float, 1e-6),
        "rope_base": rope_base,
        "rope_scaling": rope_scaling,
        "sliding_window": window,
        "full_layers": full_layers,
        "window_rope_base": None if window is None else window_rope_base,
        "activation": _activation(config, family),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    return ModelArgs(**fields | family.fields | family.fields_from(config))


def _activation(config: dict, family: Family) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in family.activations:
        known = ", ".join(family.activations)
        raise ValueError(f"config.json: activation {name!r} is not supported; supported: {known}")
    return family.activations[name]


def weights_from_hf(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Every tensor of a Hugging Face folder by its own name: safetensors, else .bin; sharded or single."""
    for stem, reader in (("model.safetensors", safetensors_file), ("pytorch_model.bin", torch_file)):
        index = folder / f"{stem}.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise ValueError(f"{index} has no weight_map of tensor names to file names")
            names = sorted(set(weight_map.values()))
        else:
            names = [stem] if (folder / stem).is_file() else []
        if not names and stem.endswith("safetensors"):
            names = [path.name for path in folder.glob("*.safetensors")]
        if names:
            if len(names) > 1 and not index.exists():
                raise ValueError(f"{folder} has several .safetensors files and no {index.name} that says which belong")
            tensors = {}
            for name in names:
                if Path(name).name != name or not (folder / name).is_file():
                    raise ValueError(f"{folder} lacks {name}, which its index names; download it again")
                tensors |= reader(folder / name)
            return tensors
    return {}


def safetensors_file(path: Path) -> dict[str, Callable[[], Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        return {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is cut short or damaged: {error}") from None


def torch_file(path: Path) -> dict[str, Callable[[], Tensor]]:
    return readers(read_torch(path), path)


def source_from_hf(folder: Path) -> Source | None:
    """A Hugging Face model as downloaded; None if the folder holds no weights of one."""
    raw = weights_from_hf(folder)
    if not raw:
        return None
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has weights but no config.json, which tells their architecture")
    config = read_json(folder / "config.json")
    if isinstance(config.get("text_config"), dict):  # of a model that sees, too: Gemma 3 from 4B on
        config, raw = config["text_config"], text_part(raw)
    args = args_from_hf(config)
    return Source(args, rename(args, raw, HF_MODULES | family_of(config).modules, False, folder))


def text_part(raw: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """The tensors of the language model in one that also sees, by the names that they have without the rest."""
    return {name.replace("language_model.", "", 1): read for name, read in raw.items() if not SEEING.match(name)}


def source_from_folder(
    folder: Path, model_name: str | None = None, converted: bool = True, keep_quantized: bool = False
) -> Source:
    """model.pth first (unless not `converted`), then a Hugging Face model, then a single GGUF file.

    keep_quantized: see `source_from_gguf`; a ValueError for a Hugging Face model, which is float.
    """
    if converted and (folder / "model.pth").is_file():
        return source_from_torch(folder / "model.pth", model_name)
    source = source_from_hf(folder)
    if source is not None:
        if keep_quantized:
            raise ValueError(f"{folder} holds float weights; --keep_quantized is for a folder with only a GGUF file")
        return source
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return source_from_gguf(files[0], keep_quantized)
    found = f"{len(files)} .gguf files: name one" if files else "none of these"
    raise ValueError(f"{folder} holds no model: model.pth, *.safetensors with config.json, or *.gguf ({found})")


# ---------------------------------------------------------------- torch files: ours, gpt-fast's, llama2.c's


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
    return ModelArgs.from_name(model_name)


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


# ---------------------------------------------------------------- GGUF


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


# ---------------------------------------------------------------- load and save


def open_source(path: str | Path, model_name: str | None = None) -> Source:
    """Find out what `path` is by its content and read its sizes. Raises ValueError on what cannot be a model."""
    path = Path(path)
    if path.is_dir():
        source = source_from_folder(path, model_name)
    elif not path.is_file():
        raise ValueError(missing_checkpoint(path))
    elif not os.access(path, os.R_OK):
        raise ValueError(f"cannot read {path}: permission denied")
    elif is_gguf(path):
        source = source_from_gguf(path)
    elif path.suffix == ".safetensors":
        source = source_from_folder(path.parent, converted=False)
    else:
        source = source_from_torch(path, model_name)
    if model_name is not None:
        reject_contradiction(source.args, ModelArgs.from_name(model_name), path, model_name)
    return source


def missing_checkpoint(path: Path) -> str:
    repo = "/".join(path.parts[-3:-1]) if path.parts[:1] == ("checkpoints",) and len(path.parts) == 4 else None
    hint = f"fetch it with: scripts/prepare.sh {repo}" if repo else "give --checkpoint_path a file or folder"
    return f"there is no checkpoint at {path}; {hint}"


def reject_contradiction(args: ModelArgs, named: ModelArgs, path: Path, model_name: str) -> None:
    """What a file says about itself wins; a name that says otherwise is an error."""
    named = replace(named, max_seq_length=args.max_seq_length, tie_embeddings=args.tie_embeddings)
    ours, theirs = args.to_dict(), named.to_dict()
    differing = [f"{key} {ours[key]} (not {theirs[key]})" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise ValueError(f"{path} is not {model_name}: it has {', '.join(differing)}; leave out --model_name")


def read_tensors(
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    what: str,
    quantize: dict[str, QuantSpec] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """Fetch every tensor, one at a time, onto `device`: floats as `dtype`, quantised layers as they are stored.

    quantize: float layers to round to nearest on the way. ranks: keep this rank's part only. Raises ValueError on a
    wrong shape or NaN.
    """

    def part(name: str, tensor: Tensor) -> Tensor:
        return tensor if ranks is None else shard(name, tensor, source.args, ranks.rank, ranks.size).contiguous()

    quantize, expected, state = quantize or {}, expected_tensors(source.args, source.table), {}
    for name, read in tqdm(source.tensors.items(), desc=what, unit="tensor", disable=None, leave=False):
        try:
            tensor = read()
        except (RuntimeError, IndexError) as error:  # parts that cannot be joined, types torch does not have
            raise ValueError(f"{name} cannot be read: {str(error).splitlines()[0]}") from None
        if tensor.is_floating_point() and tensor.dtype not in DTYPES.values():
            tensor = tensor.float()  # float8 and float64: few operators take them
        check_tensor(name, tensor, expected[name])
        module, _, leaf = name.rpartition(".")
        tied_head = module == "tok_embeddings" and "output.weight" not in source.tensors
        for layer in (module, "output") if tied_head else (module,):
            if layer in quantize and leaf == "weight":
                check_finite(name, tensor)
                rounded = quantize_weight(tensor.to(device), quantize[layer], layer)
                state |= {f"{layer}.{key}": part(f"{layer}.{key}", value) for key, value in rounded.items()}
        if module not in quantize or leaf != "weight":
            as_stored = module in source.table and leaf != "bias"  # codes, scales and zeros
            kept = part(name, tensor)
            state[name] = kept.to(device=device, dtype=kept.dtype if as_stored else dtype, copy=True)
            check_finite(name, state[name])
    return state


def check_tensor(name: str, tensor: Tensor, expected: Tensor) -> None:
    """Raise ValueError unless the tensor can stand in the place of `expected`."""
    if expected.is_floating_point():
        fits, wanted = tensor.is_floating_point(), "plain floats"
    else:
        fits, wanted = tensor.dtype == expected.dtype, f"codes of {expected.dtype}"
    if not fits or tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(f"{name} is a {tensor.layout} tensor of {tensor.dtype}; {wanted} are needed")
    if tensor.shape != expected.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; the model's sizes need {list(expected.shape)}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a float tensor holds NaN or infinite values."""
    if tensor.is_floating_point() and not all(extreme.isfinite() for extreme in tensor.aminmax()):  # a NaN is both
        raise ValueError(f"{name} holds NaN or infinite values in {str(tensor.dtype).removeprefix('torch.')}")


def build(
    args: ModelArgs,
    state: dict[str, Tensor],
    table: dict[str, QuantSpec] | None = None,
    ranks: Ranks | None = None,
) -> Transformer:
    """A model of these sizes around these tensors, each layer in the fastest form its device has.

    table: the layers that are quantised in `state`. ranks: the tensors are one rank's part.
    """
    table = table or {}
    model = shell(args if ranks is None else share_of(args, ranks.size), table)
    tied = args.tie_embeddings and "output" not in table
    if tied:
        state = state | {"output.weight": state["tok_embeddings.weight"]}
    model.load_state_dict(state, strict=True, assign=True)
    del state  # else the packed forms would stand beside what they are made from
    if tied:
        model.tie()
    pack_(model)
    if ranks is not None:
        apply_tp(model, args, ranks)
    return model.requires_grad_(False).eval()


def model_bytes(args: ModelArgs, dtype: torch.dtype, table: dict[str, QuantSpec] | None = None) -> int:
    """Bytes of the tensors of a model whose floats are `dtype` and whose layers in `table` are quantised."""
    tensors = expected_tensors(args, table)
    stored = {name for name in tensors if name.rpartition(".")[0] in (table or {})}
    return sum(t.numel() * (t.itemsize if name in stored else dtype.itemsize) for name, t in tensors.items())


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    model_name: str | None = None,
    quantize: QuantSpec | None = None,
    ranks: Ranks | None = None,
) -> Transformer:
    """The model in `path`: our .pth, a gpt-fast or llama2.c one, a Hugging Face folder or a GGUF file.

    model_name: a registry name, needed only for a file that does not say what it is. quantize: round the linear layers
    of a float file to nearest. ranks: those that share the model, each with its part of the weights. Raises ValueError,
    in words for the person at the terminal, on every file that cannot be loaded.
    """
    source = open_source(path, model_name)
    return fetch(source, path, torch.device(device), dtype, new_table(source, quantize, path), "Loading", ranks)


def fetch(
    source: Source,
    name: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    table: dict[str, QuantSpec],
    what: str,
    ranks: Ranks | None,
) -> Transformer:
    """The model of a source, whose float layers in `table` are rounded, once it is sure that it fits."""
    whole = source.table | table
    share = source.args
    if ranks is not None:
        require_split(source.args, whole, ranks.size)
        share = share_of(source.args, ranks.size)
    require_weights_fit(share, dtype, whole, device, name)
    return build(source.args, read_tensors(source, device, dtype, what, table, ranks), whole, ranks)


def new_table(source: Source, spec: QuantSpec | None, path: str | Path, head: str = "int8") -> dict[str, QuantSpec]:
    """The layers of a float model to be quantised by `spec`, none if it is None; head: int8, float, or as `spec`.

    Raises ValueError if the source is quantised already, or a groupsize does not fit.
    """
    if spec is None:
        return {}
    if source.table:
        kinds = ", ".join(sorted({str(each) for each in source.table.values()}))
        raise ValueError(f"{path} is quantised already ({kinds}); start from the float file")
    heads = {"int8": QuantSpec(8), "float": None, "int4": spec}
    return linear_table(shell(source.args, {}), spec, heads[head])


def require_weights_fit(
    args: ModelArgs, dtype: torch.dtype, table: dict[str, QuantSpec], device: torch.device, name: str | Path
) -> None:
    """Raise ValueError, before anything is read, if the weights of model `name` do not fit into the device's memory."""
    advice = "use a smaller model, --dtype or --quantize"
    require_memory(model_bytes(args, dtype, table), device, f"the weights of {name}", advice)


def random_model(
    size: str | ModelArgs,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1234,
    quantize: QuantSpec | None = None,
    ranks: Ranks | None = None,
    head: str = "int8",
) -> Transformer:
    """A model of a size, or of that with a name in the registry, with random weights, made on the device.

    head: of a quantised one, as in `new_table`. Raises ValueError on an unknown name.
    """
    args, name = (size, "random weights") if isinstance(size, ModelArgs) else (ModelArgs.from_name(size), size)
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    pool = 0.02 * torch.randn(1 << 22, device=device, generator=generator)  # drawing billions takes minutes on a CPU

    def fill(key: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, float(key.endswith("weight")), dtype=dtype, device=device)  # norms, biases
        tensor = torch.empty(shape, dtype=dtype, device=device)
        for part in tensor.view(-1).split(pool.numel()):
            shift = int(torch.randint(pool.numel(), (1,), device=device, generator=generator))
            part.copy_(pool.roll(shift)[: part.numel()])
        return tensor

    expected = expected_tensors(args)
    source = Source(args, {key: lambda key=key: fill(key, expected[key].shape) for key in expected})
    return fetch(source, name, device, dtype, new_table(source, quantize, name, head), "Filling", ranks)


def save_checkpoint(
    path: str | Path, args: ModelArgs, tensors: dict[str, Tensor], table: dict[str, QuantSpec] | None = None
) -> None:
    """Write our self-describing file, whole or not at all; the table names the layers that `tensors` has quantised.

    Raises ValueError if the disk is full or refuses.
    """
    path = Path(path)
    require_writable(path)
    size = sum(tensor.nbytes for tensor in tensors.values())
    require_space(path, size)
    # torch.save writes the whole storage of a slice
    own = {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            quant = table_to_json(table) if table else None
            torch.save({"args": args.to_dict(), "quant": quant, "model": own}, temporary)
            whole = zipfile.is_zipfile(temporary)  # it has its end: torch.save overlooks a last write that fails
        except RuntimeError:  # all torch.save tells of a full disk is that some position is wrong
            whole = False
        if not whole:
            raise OSError(f"the disk is full, or takes no file of {size / GB:.2f} GB")


def weight_bytes(model: Transformer, tokens: float = 1) -> int:
    """Bytes of weights that one decoding step reads: all but the rows of the input embedding not looked up.

    The output head counts, also when it shares the embedding's weight; caches and rope tables do not. Of E experts, K
    for each token, those of one token count, or as many as `tokens` choose if each chooses at random: E (1 - (1 -
    K/E)^tokens).
    """
    args = model.args
    unread = (1 - args.n_expert_used / args.n_expert) ** tokens if args.n_expert else 0.0
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items() if name != "tok_embeddings.weight"}
    experts = sum(size for name, size in sizes.items() if args.n_expert and EXPERT_TENSOR.search(name))
    return sum(sizes.values()) - round(unread * experts)
