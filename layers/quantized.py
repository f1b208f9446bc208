"""Formats of quantised linear layers and their arithmetic.

A weight is w = code * scale + zero, with one scale for each group of inputs of each output row: int8 is symmetric
(codes -128..127, no zero; by default one group a row), int4 is not (codes -8..7). Layers are saved in the logical
layout described here; what a device's kernels want instead is made by `layers.packed.pack_`, once, after loading."""

import functools
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import ExpertLinear, Gate, by_expert

GROUPSIZES = (32, 64, 128, 256)


MODES = ("int8", "int4")


GROUPSIZE_HELP = "inputs that share a scale: 32, 64, 128 or 256 (default: int4 32; int8 one scale a row)"


PART = 1 << 20  # weights rounded at a time: bounds the float32 temporaries


@dataclass(frozen=True)
class QuantSpec:
    """How one layer is quantised. Raises ValueError on what does not exist."""

    bits: int
    groupsize: int | None = None  # inputs that share a scale; None: all of a row

    def __post_init__(self):
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits!r}; it must be 4 or 8")
        if self.groupsize is None and self.bits == 4:
            raise ValueError(f"int4 needs a groupsize; use one of {_listed(GROUPSIZES)}")
        if self.groupsize is not None and (type(self.groupsize) is not int or self.groupsize not in GROUPSIZES):
            raise ValueError(f"groupsize {self.groupsize!r} is not supported; use one of {_listed(GROUPSIZES)}")

    def groups(self, in_features: int, name: str) -> int:
        """Groups in a row of layer `name`. Raises ValueError, naming sizes that fit, if they do not divide it."""
        if self.groupsize is None:
            return 1
        if in_features % self.groupsize:
            fits = [size for size in GROUPSIZES if in_features % size == 0]
            advice = f"use {_listed(fits)}" if fits else "use --mode int8, which needs none"
            raise ValueError(f"groupsize {self.groupsize} does not divide the {in_features} inputs of {name}; {advice}")
        return in_features // self.groupsize

    def __str__(self) -> str:
        return f"int{self.bits}" + (f".g{self.groupsize}" if self.groupsize else "")


def quant_spec(mode: str | None, groupsize: int | None) -> QuantSpec | None:
    """What the flags ask for: int4 has groups of 32 unless told, int8 none. Raises ValueError on a bad groupsize."""
    if mode is None:
        if groupsize is not None:
            raise ValueError("--groupsize needs --quantize int8 or int4")
        return None
    return QuantSpec(8, groupsize) if mode == "int8" else QuantSpec(4, 32 if groupsize is None else groupsize)


def _listed(values) -> str:
    return ", ".join(map(str, values))


def scales_and_zeros(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:  # [..., g] -> two of [..., 1]
    """Scale and zero of each group, chosen before the codes as float32 values that bfloat16 holds exactly."""
    if bits == 8:
        scales = groups.abs().amax(-1, keepdim=True) / 127
        return scales.bfloat16().float(), torch.zeros_like(scales)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales = ((high - low) / 15).bfloat16().float()
    return scales, (low + 8 * scales).bfloat16().float()


def to_codes(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest code of each weight, in float32. A group of equal weights has scale 0, and any code will do."""
    limit = 1 << (bits - 1)
    codes = ((weight - zeros) / scales.where(scales > 0, 1)).round()
    return codes.clamp(-limit, limit - 1)


def pack_nibbles(codes: Tensor) -> Tensor:  # -8..7 [..., n] -> uint8 [..., n/2]
    """Two codes a byte, plus 8 each: the even input in the low nibble."""
    unsigned = (codes + 8).to(torch.uint8)
    return unsigned[..., 0::2] | unsigned[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:  # uint8 [..., n/2] -> int8 -8..7 [..., n]
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int8) - 8


def stored(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> dict[str, Tensor]:
    """The tensors of a layer, from codes [out, in] and scales and zeros [out, groups]."""
    if bits == 8:
        return {"weight": codes.to(torch.int8), "scales": scales.bfloat16()}
    return {"weight": pack_nibbles(codes), "scales": scales.bfloat16(), "zeros": zeros.bfloat16()}


def quantize_weight(weight: Tensor, spec: QuantSpec, name: str = "the layer") -> dict[str, Tensor]:
    """Round weight [out, in] or, of experts, [E, out, in] to nearest: the tensors of its class in `quantized_class`.

    A meta tensor gives meta ones.
    """
    if weight.ndim == 3:
        tensors = quantize_weight(weight.flatten(0, 1), spec, name)
        return {key: tensor.unflatten(0, weight.shape[:2]) for key, tensor in tensors.items()}
    n_group = spec.groups(weight.shape[1], name)
    parts = []
    for rows in weight.split(len(weight) if weight.is_meta else max(1, PART // weight.shape[1])):
        groups = rows.float().unflatten(1, (n_group, -1))
        scales, zeros = scales_and_zeros(groups, spec.bits)
        codes = to_codes(groups, scales, zeros, spec.bits)
        parts.append(stored(codes.flatten(1), scales[..., 0], zeros[..., 0], spec.bits))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


class Int8Linear(nn.Module):
    """weight int8 [out, in], scales [out, 1] or [out, in/g], bias [out] or None."""

    bits = 8

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    def codes(self) -> Tensor:
        """int8 [out, in]"""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight in float32 [out, in]."""
        groups = self.weight.unflatten(-1, (self.scales.shape[-1], -1)).float()
        return (groups * self.scales.float()[..., None]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:  # x [..., in] -> [..., out]
        if self.scales.shape[1] > 1 or x.dtype == torch.float16:  # in which sums of unscaled codes would overflow
            return F.linear(x, self.dequantize().to(x.dtype), self.bias)
        # the scale of a row comes out of the sum, so that inductor reads int8 where it fuses a one-row product. It
        # stays float32: with bfloat16 scales inductor takes a naive kernel for more rows on CUDA
        y = F.linear(x, self.weight.to(x.dtype)) * self.scales.float().T
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int4Linear(nn.Module):
    """weight uint8 [out, in/2] (`pack_nibbles`), scales and zeros [out, in/g], bias [out] or None."""

    bits = 4

    def __init__(self, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("bias", bias)

    @property
    def in_features(self) -> int:
        return 2 * self.weight.shape[-1]

    def codes(self) -> Tensor:
        """int8 [out, in], -8..7"""
        return unpack_nibbles(self.weight)

    def dequantize(self) -> Tensor:
        """The weight in float32 [out, in]."""
        groups = self.codes().unflatten(-1, (self.scales.shape[-1], -1)).float()
        return (groups * self.scales.float()[..., None] + self.zeros.float()[..., None]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:  # x [..., in] -> [..., out]
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


class Int8Experts(Int8Linear):
    """An `Int8Linear` for each of E experts, whose tensors are [E, ...]."""

    def expert(self, e: int) -> Int8Linear:
        return Int8Linear(self.weight[e], self.scales[e])

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # as ExpertLinear
        return by_expert(self, x, chosen)


class Int4Experts(Int4Linear):
    """An `Int4Linear` for each of E experts, whose tensors are [E, ...]."""

    def expert(self, e: int) -> Int4Linear:
        return Int4Linear(self.weight[e], self.scales[e], self.zeros[e])

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # as ExpertLinear
        return by_expert(self, x, chosen)


LAYERS = {8: Int8Linear, 4: Int4Linear}


EXPERT_LAYERS = {None: ExpertLinear, 8: Int8Experts, 4: Int4Experts}


def layer_of(tensors: dict[str, Tensor], bias: Tensor | None = None) -> nn.Module:
    """The quantised layer that has these tensors; or the experts, quantised or not."""
    bits = 4 if "zeros" in tensors else 8 if "scales" in tensors else None
    return EXPERT_LAYERS[bits](**tensors) if tensors["weight"].ndim == 3 else LAYERS[bits](**tensors, bias=bias)


def linear_table(model: nn.Module, spec: QuantSpec, head: QuantSpec | None) -> dict[str, QuantSpec]:
    """Every linear layer of `model` with its spec; head is that of `output`, None leaves it float.

    Raises ValueError if a groupsize does not divide the inputs of a layer.
    """
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
    """The inverse of `table_to_json`; None is an empty table. Raises ValueError on anything else."""
    try:
        return {name: QuantSpec(**spec) for name, spec in (value or {}).items()}
    except (TypeError, AttributeError):
        raise ValueError("the table of quantised layers is damaged") from None


def quantize_(model: nn.Module, table: dict[str, QuantSpec]) -> None:
    """Replace each layer in `table` by its quantised form; on the meta device, by a shell to load into.

    Raises ValueError on a name that is no linear layer, or a groupsize that does not divide its inputs.
    """
    layers = dict(model.named_modules())
    for name, spec in table.items():
        layer = layers.get(name)
        if not can_be_rounded(layer):
            raise ValueError(f"the table of quantised layers names {name!r}, which is no linear layer of this model")
        spec.groups(layer.weight.shape[-1], name)
        tensors = (
            _meta_tensors(layer.weight.shape, spec) if layer.weight.is_meta else quantize_weight(layer.weight, spec)
        )
        replace_(model, name, layer_of(tensors, getattr(layer, "bias", None)))


@functools.cache  # a model has few different shapes, and each costs a millisecond
def _meta_tensors(shape: torch.Size, spec: QuantSpec) -> dict[str, Tensor]:
    return quantize_weight(torch.empty(shape, device="meta"), spec)


def replace_(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
