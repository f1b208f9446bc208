"""Every tensor that a file of a model holds: names, shapes, dtypes."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layers.quantized import QuantSpec, quantize_
from model import ModelArgs, Transformer

EXPERT_TENSOR = re.compile(r"feed_forward\.(layer\.)?w(13|2)\.")  # layer: where ranks share it


TIED_HEADS = {"lm_head.weight", "output.weight"}


# Left in files by older versions of their writers: rope tables, and the head of a model that has none of its own.
IGNORED = re.compile(
    r".*(rotary_emb\.inv_freq|rotary\.inv_freq|rope\.freqs)|rope_freqs\.weight|freqs_(cis|cos|sin)|causal_mask"
)


@dataclass
class Source:
    """A model file before it is read."""

    args: ModelArgs
    tensors: dict[str, Callable[[], Tensor]]  # by our names
    table: dict[str, QuantSpec] = field(default_factory=dict)  # the layers that are stored quantised
    gguf: Path | None = None  # the file, whose metadata holds the tokenizer too


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


def model_bytes(args: ModelArgs, dtype: torch.dtype, table: dict[str, QuantSpec] | None = None) -> int:
    """Bytes of the tensors of a model whose floats are `dtype` and whose layers in `table` are quantised."""
    tensors = expected_tensors(args, table)
    stored = {name for name in tensors if name.rpartition(".")[0] in (table or {})}
    return sum(t.numel() * (t.itemsize if name in stored else dtype.itemsize) for name, t in tensors.items())


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
