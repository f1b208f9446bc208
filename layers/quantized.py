"""Which layers of a model are quantised, and how: the table that a file has beside its tensors."""

import functools
import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
from torch import Tensor

from layers.formats import (
    PART,
    Float4Linear,
    Float8Linear,
    Int4Linear,
    Int8Linear,
    Int8ZerosLinear,
    NormalFloat4Linear,
    OtherFloat4Linear,
    QuantizedLinear,
)
from layers.two_four import UNIT, TwoFourLinear, compress
from mixers.experts import ExpertLinear, Gate

GROUPSIZES = (16, 32, 64, 128, 256)
MODES = ("int8", "int4")
SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GROUPSIZE_HELP = "inputs that share a scale: 16, 32, 64, 128 or 256 (default: int4 32; int8 one scale a row)"
NAMED = {"int8.zeros": Int8ZerosLinear, "float8": Float8Linear, "float4": Float4Linear}
NAMED |= {"nf4": NormalFloat4Linear, "fp4": OtherFloat4Linear}
LAYERS = {8: Int8Linear, 4: Int4Linear} | NAMED
PATTERNS = {"2:4": TwoFourLinear}


@dataclass(frozen=True)
class QuantSpec:
    """How one layer is stored and computed."""

    bits: int | None = None  # None: floats
    groupsize: int | None = None  # inputs that share a scale; None: all of a row
    format: str | None = None  # one of `LAYERS` that has a name; None: what is made here of so many bits
    ordered: bool = False  # whether the layer holds the order in which its codes take the inputs
    scale_dtype: str = "bfloat16"  # of its scales and zeros; what is rounded here has this one
    threshold: float | None = None  # inputs of at most this magnitude count as 0, see `layers.sparse`; None: all count
    pattern: str | None = None  # one of `PATTERNS`, by which some weights are not stored; None: all are

    def __post_init__(self):
        supported = ", ".join(map(str, GROUPSIZES))
        if self.threshold is not None and not (type(self.threshold) is float and 0 <= self.threshold < math.inf):
            raise ValueError(f"threshold is {self.threshold!r}; it must be a number from 0 on")
        if self.pattern not in (None, *PATTERNS):
            raise ValueError(f"pattern is {self.pattern!r}; supported: {', '.join(PATTERNS)}")
        if self.bits is None:
            if (self.groupsize, self.format, self.ordered) != (None, None, False):
                raise ValueError("a layer of floats has neither groupsize nor format nor order")
            return
        if type(self.bits) is not int or self.bits not in LAYERS:
            raise ValueError(f"bits is {self.bits!r}; it must be 4 or 8")
        if self.groupsize is None and self.bits == 4:
            raise ValueError(f"int4 needs a groupsize; use one of {supported}")
        if self.groupsize is not None and (type(self.groupsize) is not int or self.groupsize not in GROUPSIZES):
            raise ValueError(f"groupsize {self.groupsize!r} is not supported; use one of {supported}")
        if self.format is not None and self.format not in NAMED:
            raise ValueError(f"format {self.format!r} is not supported; supported: {', '.join(NAMED)}")
        if LAYERS[self.format or self.bits].bits != self.bits or type(self.ordered) is not bool:
            raise ValueError(f"there is no format {self.format!r} of {self.bits} bits, ordered: {self.ordered!r}")
        if self.pattern is not None and (self.bits, self.format, self.ordered) != (8, None, False):
            kinds = "floats and for int8 as it is made here"
            raise ValueError(f"the pattern {self.pattern} is for {kinds}, not for {replace(self, pattern=None)}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scales of {self.scale_dtype!r} are not supported; supported: {', '.join(SCALE_DTYPES)}")

    @property
    def has_codes(self) -> bool:
        """Whether other tensors than a float weight are stored: codes, or kept values and their positions."""
        return self.bits is not None or self.pattern is not None

    def as_floats(self) -> "QuantSpec":
        """The same with floats in the place of codes."""
        return QuantSpec(threshold=self.threshold)

    @property
    def layer(self) -> type["QuantizedLinear"]:
        """The class of such a layer of codes."""
        return LAYERS[self.format or self.bits] if self.pattern is None else PATTERNS[self.pattern]

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the tensors that stand for a weight, but for an order of inputs."""
        parts = {"positions": self.pattern is not None, "scales": self.bits is not None, "zeros": self.layer.has_zeros}
        return ("weight", *(name for name, is_there in parts.items() if is_there))

    def groups(self, in_features: int, name: str) -> int:
        """Groups in a row of layer `name`; a ValueError names the groupsizes that divide it, if this one does not."""
        if self.pattern is not None and in_features % UNIT:
            advice = f"the positions of {UNIT} inputs share a byte; leave the layer as it is"
            raise ValueError(f"the pattern {self.pattern} does not fit the {in_features} inputs of {name}: {advice}")
        if self.groupsize is None:
            return 1
        if in_features % self.groupsize:
            fits = ", ".join(str(size) for size in GROUPSIZES if in_features % size == 0)
            advice = f"use {fits}" if fits else "use int8, which needs none"
            raise ValueError(f"groupsize {self.groupsize} does not divide the {in_features} inputs of {name}; {advice}")
        return in_features // self.groupsize

    def __str__(self) -> str:
        group, order = f".g{self.groupsize}" if self.groupsize else "", ".ordered" if self.ordered else ""
        pattern = "" if self.pattern is None else f".{self.pattern.replace(':', '-')}"
        sparse = "" if self.threshold is None else ".sparse"
        kind = self.format or ("float" if self.bits is None else f"int{self.bits}")
        return f"{kind}{group}{order}{pattern}{sparse}"


def quant_spec(mode: str | None, groupsize: int | None) -> QuantSpec | None:
    """What the flags ask for: int4 has groups of 32 by default, int8 none."""
    if mode is None:
        if groupsize is not None:
            raise ValueError("--groupsize needs --quantize int8 or int4")
        return None
    return QuantSpec(8, groupsize) if mode == "int8" else QuantSpec(4, 32 if groupsize is None else groupsize)


def quantize_weight(weight: Tensor, spec: QuantSpec, name: str = "the layer") -> dict[str, Tensor]:
    """Round weight [out, in] or, of experts, [E, out, in] to nearest: the tensors of its class in `LAYERS`."""
    if spec.pattern is not None:
        codes = {"weight": weight} if spec.bits is None else quantize_weight(weight, replace(spec, pattern=None), name)
        return compress(codes)
    rows, n_group = weight.flatten(0, -2), spec.groups(weight.shape[-1], name)
    parts = [
        spec.layer.rounded(part.float().unflatten(1, (n_group, -1)))
        for part in rows.split(max(1, PART // rows.shape[1]))
    ]
    return {key: torch.cat([part[key] for part in parts]).unflatten(0, weight.shape[:-1]) for key in parts[0]}


def linear_table(model: nn.Module, spec: QuantSpec, head: QuantSpec | None) -> dict[str, QuantSpec]:
    """Every linear layer of `model` with its spec; head is that of `output`, None leaves it float."""
    table = {name: spec for name, layer in model.named_modules() if can_be_rounded(layer) and name != "output"}
    if head is not None:
        table["output"] = head
    for name, each in table.items():
        each.groups(model.get_submodule(name).weight.shape[-1], name)
    return table


def can_be_rounded(layer: nn.Module | None) -> bool:
    """Whether a layer has a quantised form."""
    return isinstance(layer, (nn.Linear, ExpertLinear)) and not isinstance(layer, Gate)


def table_to_json(table: dict[str, QuantSpec]) -> dict:
    return {name: asdict(spec) for name, spec in table.items()}


def table_from_json(value) -> dict[str, QuantSpec]:
    """The inverse of `table_to_json`; None is an empty table."""
    try:
        table = {name: QuantSpec(**spec) for name, spec in (value or {}).items()}
    except (TypeError, AttributeError):
        raise ValueError("the table of layers is damaged") from None
    if QuantSpec() in table.values():
        raise ValueError("the table of layers is damaged: it has one with neither codes nor a pattern nor a threshold")
    return table


def quantize_(model: nn.Module, table: dict[str, QuantSpec]) -> None:
    """Replace each layer in `table` by its quantised form; on the meta device, by a shell to load into.

    An ordered one can only be loaded.
    """
    layers = dict(model.named_modules())
    for name, spec in table.items():
        layer = layers.get(name)
        if not can_be_rounded(layer):
            raise ValueError(f"the table of layers names {name!r}, not a linear layer of the model")
        if (spec.threshold, spec.pattern) != (None, None) and layer.weight.ndim == 3:
            what = "a threshold" if spec.pattern is None else f"the pattern {spec.pattern}"
            raise ValueError(f"{name} has {what}, which is not supported for experts")
        if not spec.has_codes:
            continue
        spec.groups(layer.weight.shape[-1], name)
        weight = layer.weight
        tensors = _meta_tensors(weight.shape, spec) if weight.is_meta else quantize_weight(weight, spec)
        replace_(model, name, spec.layer(**tensors, bias=getattr(layer, "bias", None)))


@functools.cache  # a model has few different shapes, and each costs a millisecond
def _meta_tensors(shape: torch.Size, spec: QuantSpec) -> dict[str, Tensor]:
    # widths and dtypes of a row of zeros: arithmetic on meta tensors imports the compiler, two seconds of start-up
    row = quantize_weight(torch.zeros(1, shape[-1], device="cpu"), spec)
    dtypes = {key: SCALE_DTYPES[spec.scale_dtype] if t.is_floating_point() else t.dtype for key, t in row.items()}
    tensors = {key: torch.empty(*shape[:-1], t.shape[-1], dtype=dtypes[key], device="meta") for key, t in row.items()}
    if spec.ordered:
        tensors["order"] = torch.empty(*shape[:-2], shape[-1], dtype=torch.int64, device="meta")
    return tensors


def replace_(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
