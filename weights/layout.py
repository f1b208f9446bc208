"""Every tensor of a model's file: name, shape, dtype; and how the tensors of other formats become these."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from layers.quantized import QuantSpec, quantize_
from mixers.experts import MixtureOfExperts
from mixers.latent import LatentAttention
from mixers.layer_kinds import projected_heads
from model import ModelArgs, Transformer

Readers = dict[str, Callable[[], Tensor]]  # tensors by name, each as a function that fetches it

TURNED = ("wqkv", "q_norm", "k_norm", ".wq", ".wq_b", ".wkv_a")  # ends of the modules whose rows rope turns
Pair = tuple[Tensor, Tensor]  # of an adapter: A [r, in], and B [out, r] times the scale

LEAVES = ("weight", "positions", "scales", "zeros", "order")  # of a quantised layer, but its bias
EXACT = (".e_score_correction_bias", ".A_log", ".dt_bias")  # rounded, a bias would choose others, a decay add up
# left in files by older versions of their writers: rope tables and masks
IGNORED = re.compile(
    r".*(rotary_emb\.inv_freq|rotary\.inv_freq|rope\.freqs)|rope_(freqs|factors_(short|long))\.weight"
    r"|freqs_(cis|cos|sin)|causal_mask"
)


class Undrawn(TorchFunctionMode):
    """Layers are made without drawing their first weights, a quarter of the time, because those of a file follow."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", *args[:1])
        return function(*args, **(kwargs or {}))


class Layout:
    """What the file of a model holds: its tensors, as meta tensors by name, and the table of layers with a spec.

    model: the meta model, of class `kind` (None: `Transformer`), which `fill` gives its tensors. head_source: that
    whose weight the output head has.
    """

    def __init__(
        self,
        args: ModelArgs,
        table: dict[str, QuantSpec] | None = None,
        model: Transformer | None = None,
        kind: type[Transformer] | None = None,
    ) -> None:
        if model is None:
            with torch.device("meta"), Undrawn():
                model = (kind or Transformer)(args)
        self.args = args = model.args
        self.table, self.model = table or {}, model
        quantize_(model, self.table)
        self.tensors = model.state_dict()
        self.head_source = "output"
        if args.tie_embeddings and "output" not in self.table:  # a quantised head has codes of its own
            self.head_source = "tok_embeddings"
            del self.tensors["output.weight"]

    def quantized(self, table: dict[str, QuantSpec]) -> "Layout":
        """The layout once the float layers in `table` are quantised. It takes over the meta model."""
        return Layout(self.args, table, self.model) if table else self

    def weight_source(self, module: str) -> str:
        """The module whose weight `module` has: the embedding for a tied head, else itself."""
        return self.head_source if module == "output" else module

    def is_coded(self, name: str) -> bool:
        """Whether a tensor is part of what stands for a weight: codes, scales, zeros, an order of inputs, positions."""
        module, _, leaf = name.rpartition(".")
        return module in self.table and self.table[module].has_codes and leaf != "bias"

    def keeps_dtype(self, name: str) -> bool:
        """Whether a tensor is not converted on loading."""
        module, _, leaf = name.rpartition(".")
        is_float = leaf == "weight" and module in self.table and self.table[module].bits is None  # kept values
        return (self.is_coded(name) and not is_float) or name.endswith(EXACT)

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the tensors if the floats are `dtype`."""
        sizes = {name: t.itemsize if self.keeps_dtype(name) else dtype.itemsize for name, t in self.tensors.items()}
        return sum(self.tensors[name].numel() * size for name, size in sizes.items())

    def loaded_bytes(self, dtype: torch.dtype) -> int:
        """... with the copies that `AbsorbedAttention` makes beside them."""
        absorbed = [each.wkv_b for each in self.model.modules() if isinstance(each, LatentAttention)]
        return self.bytes(dtype) + dtype.itemsize * sum(each.weight.shape[0] * each.in_features for each in absorbed)


@dataclass
class ModelFile:
    """A model's file, or folder, that is open but not read."""

    layout: Layout
    tensors: Readers  # by our names
    paths: tuple[Path, ...] = ()  # of the files that hold them
    gguf: Path | None = None  # a GGUF file, whose metadata holds the tokenizer too
    beside: dict[str, Callable[[], Pair]] = field(default_factory=dict)  # adapters of quantised layers, by module
    guesses: Callable[[], "ModelFile"] | None = None  # opens the layer of guesses, if the file has one

    @property
    def args(self) -> ModelArgs:
        return self.layout.args

    @property
    def table(self) -> dict[str, QuantSpec]:
        return self.layout.table


class Kept(NamedTuple):
    """A layer, or some rows of one, whose codes a file has: how, and its tensors by the names of `QuantizedLinear`."""

    spec: QuantSpec
    tensors: Readers

    def weight(self) -> Tensor:
        """What the codes stand for, in float32."""
        return self.spec.layer(**{name: read() for name, read in self.tensors.items()}).dequantize()


def dequantized(opened: ModelFile) -> ModelFile:
    """The model in an open file with float weights in the place of codes."""
    layout = opened.layout
    coded = {module: spec for module, spec in layout.table.items() if spec.has_codes}
    if not coded:
        return opened
    tensors = {name: read for name, read in opened.tensors.items() if not layout.is_coded(name)}
    for module, spec in coded.items():
        names = {leaf: f"{module}.{leaf}" for leaf in LEAVES if f"{module}.{leaf}" in opened.tensors}
        tensors[f"{module}.weight"] = Kept(spec, {leaf: opened.tensors[name] for leaf, name in names.items()}).weight
    args, tensors = head_as_stored(layout.args, tensors)
    table = {module: spec.as_floats() for module, spec in layout.table.items() if spec.threshold is not None}
    return replace(opened, layout=Layout(args, table, kind=type(layout.model)), tensors=tensors)


def readers(state: Any, path: Path) -> Readers:
    """The tensors of a dictionary that holds nothing else, each of them plain: strided, with its data."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no dictionary of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} is not a checkpoint: beside tensors it holds {name!r}, a {type(value).__name__}")
        if value.layout is not torch.strided or value.is_nested or value.is_meta:
            raise ValueError(f"{path}: {name} is a sparse, nested or meta tensor; a plain one is needed")
    return {name: lambda value=value: value for name, value in state.items()}


def head_as_stored(
    args: ModelArgs, raw: Readers, embedding: str = "tok_embeddings.weight", head: str = "output.weight"
) -> tuple[ModelArgs, Readers]:
    """The args and tensors of a file whose tensors may say otherwise than its config that the head is tied.

    A file may hold the shared weight under either name, or under both; a head with other values was trained by itself.
    """
    if not args.tie_embeddings or head not in raw:
        return args, raw
    if embedding not in raw:
        return args, {embedding if name == head else name: read for name, read in raw.items()}
    weight, shared = raw[head](), raw[embedding]()
    if weight.dtype == shared.dtype and torch.equal(weight, shared):
        return args, {name: read for name, read in raw.items() if name != head}
    return replace(args, tie_embeddings=False), raw


def source_modules(module: str, modules: dict, args: ModelArgs) -> list[list[str]]:
    """The file's modules whose rows our `module` holds, in order: a list for each expert if the file has them apart.

    modules: our module -> the file's modules, where names differ; # is the layer's number, and @ that of an expert. The
    feed_forward of a layer without experts is called dense.
    """
    layer = re.search(r"(?<=layers\.)\d+", module)
    number = layer[0] if layer else ""
    pattern = module.replace(f"layers.{number}", "layers.#")
    if layer and int(number) in args.dense_layers:
        pattern = pattern.replace("feed_forward", "dense")
    parts = [part.replace("#", number) for part in modules.get(pattern, (module,))]
    if pattern.endswith("attention.wqkv"):  # only of what the layer makes
        parts = parts[: sum(n_head > 0 for n_head in projected_heads(args, int(number))[:3])]
    n_list = args.n_expert if "@" in parts[0] else 1
    return [[part.replace("@", str(e)) for part in parts] for e in range(n_list)]


KEYS_OR_VALUES = re.compile(r"(?:blk|model\.layers)\.(\d+)\.(?:self_attn\.|attn_)[kv](?:_proj|_norm)?\..*")


def is_unused(name: str, args: ModelArgs) -> bool:
    """Whether a tensor makes keys or values of a layer that takes those of another; files hold such all the same."""
    match = KEYS_OR_VALUES.fullmatch(name)
    return match is not None and int(match[1]) in range(args.n_layer)[args.n_layer - (args.n_reusing_layer or 0) :]


def rename(
    layout: Layout,
    raw: Readers,
    modules: dict,
    where: Path,
    order: Tensor | None = None,
    rows: dict[str, Tensor] | None = None,
) -> Readers:
    """Every tensor of the layout from those of a file: none may be missing or left over.

    modules: see `source_modules`. order: of the file's heads, see `rope_order`. rows: of modules of a layer whose rows
    the file has in another order: the place there of each.
    """
    tensors, used, args = {}, set(), layout.args
    for name in layout.tensors:
        module, _, leaf = name.rpartition(".")
        parts = source_modules(module, modules, args)
        if leaf == "order":  # in which all rows of a layer take the inputs
            parts = [of_expert[:1] for of_expert in parts]
        names = [[f"{part}.{leaf}" for part in of_expert] for of_expert in parts]
        absent = [part for of_expert in names for part in of_expert if part not in raw]
        if absent:
            raise ValueError(f"{where} lacks the tensor {absent[0]}; the file is incomplete, or of another model")
        used.update(*names)
        tensors[name] = Parts([[raw[part] for part in of_expert] for of_expert in names])
        own = (rows or {}).get(module.split(".", 2)[-1])
        if own is not None and leaf != "order":
            tensors[name] = lambda read=tensors[name], own=own: read()[own]
        if order is not None and module.endswith(TURNED) and leaf != "order":
            tensors[name] = lambda read=tensors[name], module=module: in_our_order(read(), module, args, order)
    extra = [name for name in raw if name not in used and not IGNORED.fullmatch(name)]
    if extra:
        raise ValueError(f"{where} has {len(extra)} tensors this model has no place for, the first is {extra[0]}")
    return tensors


class Parts:
    """Reads a tensor whose rows a file has in parts; of several lists of parts, one for each expert, the stack."""

    def __init__(self, parts: list[list[Callable[[], Tensor]]]):
        self.parts = parts

    def __call__(self) -> Tensor:
        if len(self.parts) == 1:
            return joined_rows([read() for read in self.parts[0]])
        return torch.stack([joined_rows([read() for read in of_expert]) for of_expert in self.parts])

    def expert(self, number: int) -> Tensor:
        """Of a stack [E, ...] that of one expert, [1, ...]; of a file that is mapped, nothing else is read."""
        if len(self.parts) == 1:
            return joined_rows([read()[number : number + 1] for read in self.parts[0]])
        return joined_rows([read() for read in self.parts[number]])[None]


def joined_rows(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=-2 if tensors[0].ndim > 1 else 0)


def rope_order(args: ModelArgs, interleaved: bool) -> Tensor | None:
    """For each number of a head as we have it, its place in a file; None: the same.

    Here rope turns number i with i + D/2; in a file it turns neighbours, or the halves of the `args.turned` first. In
    latent attention it turns the last ones here and there.
    """
    turned, still = torch.arange(args.turned), torch.arange(args.turned, args.head_dim).chunk(2)
    if not interleaved and args.turned == args.head_dim:
        return None
    first, second = (turned[::2], turned[1::2]) if interleaved else turned.chunk(2)
    if args.kv_latent is not None:
        n_still = args.head_dim - args.turned
        return torch.cat([torch.arange(n_still), n_still + first, n_still + second])
    return torch.cat([first, still[0], second, *still[1:]])


def in_our_order(rows: Tensor, module: str, args: ModelArgs, order: Tensor) -> Tensor:
    """The rows of a layer, or the numbers of a norm, in `TURNED` with those of each turned head in the `rope_order`."""
    if module.endswith(".wkv_a"):  # a latent, then the turned end of one head
        n_still = args.head_dim - args.turned
        return torch.cat([rows[: args.kv_latent], rows[args.kv_latent :][order[n_still:] - n_still]])
    n_row = min(len(rows), (args.n_head + args.n_kv_head) * args.head_dim)  # values are not turned
    heads = rows[:n_row].unflatten(0, (-1, args.head_dim))
    return torch.cat([heads[:, order].flatten(0, 1), rows[n_row:]])


def weight_bytes(model: Transformer, tokens: float = 1) -> int:
    """Bytes of weights that one decoding step reads: all but the rows of input embeddings not looked up.

    The output head counts, also when it shares the embedding's weight; caches and rope tables do not, nor does a layer
    that `AbsorbedAttention` replaces. Of E experts, K for each token, those of one token count, or as many as `tokens`
    choose if each chooses at random: E (1 - (1 - K/E)^tokens).
    """
    args = model.args
    unread = (1 - args.n_expert_used / args.n_expert) ** tokens if args.n_expert else 0.0
    unused = re.compile(r"(tok_embeddings|positions|layer_inputs\.embeddings)\.weight|.*\.wkv_b\..*")
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items() if not unused.fullmatch(name)}
    mixtures = [name for name, layer in model.named_modules() if isinstance(layer, MixtureOfExperts)]
    of_experts = tuple(f"{name}.{layer}." for name in mixtures for layer in ("w13", "w2", "far"))
    experts = sum(size for name, size in sizes.items() if name.startswith(of_experts))
    away = sum(getattr(layer, "bytes_away", 0) for layer in model.modules())  # of feed-forwards in a second tier
    return sum(sizes.values()) + away - round(unread * (experts + (away if mixtures else 0)))
