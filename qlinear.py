"""Quantised linear layers, their arithmetic, and the fast paths of linear layers on each device.

A weight is w = code * scale + zero, with one scale for each group of inputs of each output row: int8 is symmetric
(codes -128..127, no zero; by default one group a row), int4 is not (codes -8..7). Layers are saved in the logical
layout described here; what a device's kernels want instead is made by `pack_`, once, after loading.
"""

import functools
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from model import (
    Attention,
    ExpertLinear,
    Gate,
    ModelArgs,
    RMSNorm,
    Transformer,
    TransformerBlock,
    by_expert,
    surely_few,
)

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


# ---------------------------------------------------------------- arithmetic


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


# ---------------------------------------------------------------- layers


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


# ---------------------------------------------------------------- whole models


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


# ---------------------------------------------------------------- fast paths


class FewRowsLinear(nn.Module):
    """A bfloat16 linear layer whose weight is read at memory speed for few rows (`kernels/cpu/`)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:  # x [..., in] -> [..., out]
        return torch.ops.gpt_faster.linear_bf16(x, self.weight, self.bias)

    def tensors(self) -> tuple[Tensor, None, Tensor | None]:
        """Weight, scales and bias, as operators of several layers take them."""
        return self.weight, None, self.bias


class CodesLinear(nn.Module):
    """An int8 or int4 linear layer whose weight lies as the instructions of a CPU want it (`kernels/cpu/`).

    Activations in half precision are rounded to int8 in groups of 32 inputs, float32 ones are not. weight uint8
    [tiles, bytes], scales and zeros [tiles, groups, 1 or 2, 16] in the file's dtype, bias float32 [tiles * 16].
    """

    LANES, GROUP = 16, 32  # output rows of a tile; inputs, whose number is padded to a multiple

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.out_features, in_features = layer.codes().shape
        pad = (0, -in_features % self.GROUP, 0, -self.out_features % self.LANES)
        offset = 8 if layer.bits == 4 else 128
        unsigned = F.pad(layer.codes().view(torch.uint8) + offset, pad, value=offset)  # bytes wrap: -1 + 8 is 7
        tiles = unsigned.unflatten(0, (-1, self.LANES))  # [tiles, 16, in]
        fours = tiles.unflatten(2, (-1, 4)).transpose(1, 2)  # [tiles, in / 4, 16, 4]
        weight = fours[:, 0::2] | fours[:, 1::2] << 4 if layer.bits == 4 else fours
        self.register_buffer("weight", weight.flatten(1).contiguous())
        parts = [layer.scales, layer.zeros] if layer.bits == 4 else [layer.scales]
        rows = F.pad(torch.stack(parts, dim=2), (0, 0, 0, 0, 0, pad[-1]))  # [out, groups, parts]
        self.register_buffer("scales", rows.unflatten(0, (-1, self.LANES)).permute(0, 2, 3, 1).contiguous())
        self.register_buffer("bias", None if layer.bias is None else F.pad(layer.bias.float(), (0, pad[-1])))

    def forward(self, x: Tensor) -> Tensor:  # x [..., in] -> [..., out]
        y = torch.ops.gpt_faster.linear_codes(x, self.weight, self.scales, self.bias)
        return y if y.shape[-1] == self.out_features else y[..., : self.out_features]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight, scales and bias, as operators of several layers take them."""
        return self.weight, self.scales, self.bias


class FewRowsExperts(nn.Module):
    """bfloat16 experts whose weights are read at memory speed, only those chosen (`kernels/cpu/`)."""

    def __init__(self, layer: ExpertLinear):
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # as ExpertLinear
        return torch.ops.gpt_faster.linear_experts(x, chosen, self.weight, None)


class CodesExperts(nn.Module):
    """A `CodesLinear` for each of E experts, whose tensors are [E, ...]; only those chosen are read."""

    def __init__(self, layer: Int8Experts | Int4Experts):
        super().__init__()
        each = [CodesLinear(layer.expert(e)) for e in range(len(layer.weight))]
        self.out_features = each[0].out_features
        self.register_buffer("weight", torch.stack([one.weight for one in each]))
        self.register_buffer("scales", torch.stack([one.scales for one in each]))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # as ExpertLinear
        y = torch.ops.gpt_faster.linear_experts(x, chosen, self.weight, self.scales)
        return y if y.shape[-1] == self.out_features else y[..., : self.out_features]


class AnyExperts(nn.Module):
    """Experts on any device, with what the compiler needs: it cannot follow which experts are chosen."""

    def __init__(self, layer: ExpertLinear | Int8Experts | Int4Experts):
        super().__init__()
        for name, tensor in layer.state_dict().items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # as ExpertLinear
        if x.is_cuda and surely_few(chosen.numel()):  # a CUDA graph cannot wait to learn which experts are chosen
            return self.by_copies(x, chosen)
        tensors = dict(self.named_buffers())
        return each_expert(x, chosen, tensors["weight"], tensors.get("scales"), tensors.get("zeros"))

    def by_copies(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The same, each row with a copy of its weight, which the compiler may fuse away."""
        copies = layer_of({name: tensor[chosen.flatten()] for name, tensor in self.named_buffers()})
        weight = copies.weight if isinstance(copies, ExpertLinear) else copies.dequantize()  # [T * K, out, in]
        rows = x.expand(-1, chosen.shape[1], -1).reshape(len(weight), -1, 1)
        return (weight.to(x.dtype) @ rows).view(*chosen.shape, -1)


@torch.library.custom_op("gpt_faster::each_expert", mutates_args=())
def each_expert(x: Tensor, chosen: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None) -> Tensor:
    """`by_expert` as an operator."""
    tensors = {"weight": weight, "scales": scales, "zeros": zeros}
    layer = layer_of({name: tensor for name, tensor in tensors.items() if tensor is not None})
    return by_expert(layer, x, chosen)


@each_expert.register_fake
def _(x, chosen, weight, scales, zeros):
    return x.new_empty(*chosen.shape, weight.shape[1])


class TinygemmLinear(Int4Linear):
    """An int4 layer on CUDA: PyTorch's tinygemm kernel for few rows, in bfloat16; for more the weight is dequantised.

    The kernel's tiles, int32 [out/8, in/(16 t), 32, t/2], stand beside the layer's own codes.
    """

    FEW_ROWS = 16

    def __init__(self, layer: Int4Linear):
        super().__init__(layer.weight, layer.scales, layer.zeros, layer.bias)
        swapped = layer.weight << 4 | layer.weight >> 4  # it wants the even input in the high nibble
        tiles = torch.ops.aten._convert_weight_to_int4pack(swapped, self.inner_k_tiles(layer))
        scales_and_zeros = torch.stack((layer.scales, layer.zeros), dim=2).transpose(0, 1).bfloat16().contiguous()
        # not saved, and weight_bytes counts the codes: a step reads the one or the other
        self.register_buffer("tiles", tiles, persistent=False)
        self.register_buffer("scales_and_zeros", scales_and_zeros, persistent=False)  # [in/g, out, 2]
        self.groupsize = layer.in_features // layer.scales.shape[1]

    @staticmethod
    def inner_k_tiles(layer: Int4Linear) -> int | None:
        """The largest tile that divides the layer; None if it does not fit the kernel at all."""
        if layer.weight.shape[0] % 8:
            return None
        return next((tiles for tiles in (8, 4, 2) if layer.in_features % (16 * tiles) == 0), None)

    def forward(self, x: Tensor) -> Tensor:  # x [..., in] -> [..., out]
        rows = x.flatten(0, -2)
        if len(rows) > self.FEW_ROWS or x.dtype != torch.bfloat16:
            return super().forward(x)
        y = torch.ops.aten._weight_int4pack_mm(rows, self.tiles, self.groupsize, self.scales_and_zeros)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def fastest(layer: nn.Module) -> type[nn.Module] | None:
    """The class that does the work of `layer` faster on its device; None where the layer itself is the fastest."""
    kind, weight = type(layer), getattr(layer, "weight", None)
    if kind is ExpertLinear:
        is_fast = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and cpu.has_bf16()
        return FewRowsExperts if is_fast else AnyExperts
    if kind in (Int8Experts, Int4Experts):
        return CodesExperts if weight.device.type == "cpu" and cpu.has_vnni() else AnyExperts
    if kind in (nn.Linear, Gate) and weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        return FewRowsLinear if cpu.has_bf16() else None
    if kind in (Int8Linear, Int4Linear) and weight.device.type == "cpu":
        return CodesLinear if cpu.has_vnni() else None
    if kind is Int4Linear and weight.device.type == "cuda":
        return TinygemmLinear if TinygemmLinear.inner_k_tiles(layer) else None
    return None


def pack_(model: nn.Module) -> None:
    """Give every layer the fastest form its device has; once, after the weights are in place."""
    for name, layer in list(model.named_modules()):
        faster = fastest(layer)
        if faster is not None:
            replace_(model, name, faster(layer))
        if isinstance(layer, TransformerBlock):
            choose_attention(layer.attention, model.tok_embeddings.weight)
    if isinstance(model, Transformer) and is_joinable(model.args):
        model.join_blocks = JoinedBlocks.of  # without it the blocks run layer by layer


def choose_attention(attention: Attention, like: Tensor) -> None:
    """Set the operator of the device and dtype of `like`, if it has one for attention of this kind."""
    if attention.cap is not None:
        return
    if like.device.type == "cpu" and attention.head_dim in cpu.HEAD_DIMS and cpu.has_vnni():
        attention.attend = torch.ops.gpt_faster.attend
        attention.attends_many = like.dtype == torch.bfloat16 and cpu.has_bf16()


# What the operator for all blocks has no code for, unless it is as by default.
UNJOINED = ("full_layers", "joint_qk_norm", "activation", "norm_offset", "pre_norm", "post_norm", "residual_scale")
UNJOINED += ("n_expert",)


def is_joinable(args: ModelArgs) -> bool:
    return all(getattr(args, each.name) == each.default for each in fields(args) if each.name in UNJOINED)


class JoinedBlocks(nn.Module):
    """All blocks of a model as one operator of `kernels/cpu/`, for at most 16 tokens in all if not `takes_many`."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.takes_many = all(block.attention.attends_many for block in model.layers)
        tensors = [tensor for block in model.layers for tensor in self.tensors(block)]
        self.joined = torch.ops.gpt_faster.join_blocks(tensors, model.args.norm_eps, model.layers[0].attention.scale)
        caches = [block.attention.kv_cache for block in model.layers]
        self.cache = torch.ops.gpt_faster.join_cache([each.k for each in caches], [each.v for each in caches])

    @staticmethod
    def of(model: Transformer) -> "JoinedBlocks | None":
        """The blocks of `model` with its caches; None if the operator does not take them."""
        blocks = [(block.attention, block.feed_forward) for block in model.layers]
        layers = {type(layer) for a, f in blocks for layer in (a.wqkv, a.wo, f.w13, f.w2)}
        packed = layers <= {FewRowsLinear, CodesLinear}  # other dtypes are not, nor what ranks share
        has_kernel = all(attention.attend is not None for attention, _ in blocks)
        sizes_fit = model.args.dim % CodesLinear.LANES == 0 and model.args.intermediate_size % CodesLinear.GROUP == 0
        return JoinedBlocks(model) if packed and has_kernel and sizes_fit else None

    @staticmethod
    def tensors(block: TransformerBlock) -> list[Tensor | None]:
        """In the order that `join_blocks` wants."""
        a, f = block.attention, block.feed_forward
        q_norm, k_norm = (norm.weight if isinstance(norm, RMSNorm) else None for norm in (a.q_norm, a.k_norm))
        first = (block.attention_norm.weight, *a.wqkv.tensors(), q_norm, k_norm, *a.wo.tensors())
        second = (block.ffn_norm.weight, *f.w13.tensors(), *f.w2.tensors())
        return [*first, *second]

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the model has caches of its own, and joins its blocks when it sets them up."""

    def forward(self, x: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        mask = mask[:, : x.shape[1]]
        return torch.ops.gpt_faster.run_blocks(x, self.joined, self.cache, None, pos, cos, sin, mask)
