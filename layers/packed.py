"""Forms of layers that are faster on one device than the plain form; `layers/fastest.py` says where each is used."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from layers.formats import PART, Float8Linear, Int8Linear, QuantizedLinear, Table4Linear
from layers.quantized import LAYERS
from mixers.compiled import surely_few
from mixers.experts import ExpertLinear, by_expert
from mixers.layer_kinds import Vectors
from model import Attend, ModelArgs, softcap

HAS_HALF = {  # whether a CPU has instructions for products in a dtype
    torch.bfloat16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


def has_half(dtype: torch.dtype) -> bool | None:
    """As `HAS_HALF`; None of a dtype that is no half precision."""
    return HAS_HALF.get(dtype)


# A guard on the table stops the compiler where layers of a model differ. This is all that
# torch.compiler.assume_constant_result does, but for importing the compiler, which takes a second.
has_half._dynamo_marked_constant = True

FEW = 16  # queries a row, or tokens in all, that an operator for few takes at most


def has_triton() -> bool:
    """Whether the kernels for NVIDIA GPUs can be compiled; those of AMD take PyTorch's path."""
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None


class StepAttend(Attend):
    """Attention of one query a row in elementary operators, which the compiler fuses into the rest of the step.

    A call of scaled_dot_product_attention costs more than the work.
    """

    def __init__(self, attend: Attend):
        super().__init__(attend.head_dim, attend.scale, attend.cap, attend.sinks)

    def forward(self, q: Tensor, k: Vectors, v: Vectors, cache_rows: Tensor | None, mask: Tensor) -> Tensor:
        if q.shape[1] != 1 or not torch.compiler.is_compiling():
            return super().forward(q, k, v, cache_rows, mask)
        B, _, H, D = q.shape
        k, v = (each.read(cache_rows, mask) for each in (k, v))
        q = q.view(B, k.shape[1], -1, 1, D).float() * self.scale
        scores = softcap((q * k[:, :, None].float()).sum(-1), self.cap) + mask[:, None].float()  # [B, Hkv, G, C']
        return (self.shares(scores)[..., None] * v[:, :, None].float()).sum(-2).view(B, 1, H, D).to(v.dtype)


class OperatorAttend(StepAttend):
    """Attention of few queries a row by an operator of `kernels/`, which takes sinks in float32."""

    takes_many = False

    def __init__(self, attend: Attend):
        super().__init__(attend)
        if attend.sinks is not None:
            self.sinks = nn.Parameter(attend.sinks.float(), requires_grad=False)

    def forward(self, q: Tensor, k: Vectors, v: Vectors, cache_rows: Tensor | None, mask: Tensor) -> Tensor:
        of_cache = k.data.is_contiguous() and v.data.is_contiguous()  # those of a call without a cache need not be
        if not (self.takes_many or surely_few(q.shape[1], FEW)) or not of_cache:
            return super().forward(q, k, v, cache_rows, mask)
        return torch.ops.gpt_faster.attend(q, *k, *v, cache_rows, mask, self.scale, self.sinks)

    @staticmethod
    def fits(attend: Attend, args: ModelArgs) -> bool:
        is_latent = args.kv_latent is not None
        fits = attend.head_dim in cpu.HEAD_DIMS or (is_latent and attend.head_dim % cpu.HEAD_UNIT == 0)
        return attend.cap is None and fits


class ManyAttend(OperatorAttend):
    """Attention of any number of queries by the same operator."""

    takes_many = True

    @staticmethod
    def fits(attend: Attend, args: ModelArgs) -> bool:
        return OperatorAttend.fits(attend, args) and attend.head_dim in cpu.HEAD_DIMS


class FewRowsLinear(nn.Module):
    """A bfloat16 linear layer, or one for each of E experts, that reads its weight at memory speed for few rows."""

    scales = None

    def __init__(self, layer: nn.Linear | ExpertLinear):
        super().__init__()
        self.weight, self.bias = layer.weight, getattr(layer, "bias", None)

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]; of experts as `ExpertLinear`, and only those chosen are read."""
        if chosen is None:
            return torch.ops.gpt_faster.linear_bf16(x, self.weight, self.bias)
        return plus_bias(torch.ops.gpt_faster.linear_experts(x, chosen, self.weight, None), self.bias, chosen)


def plus_bias(y: Tensor, bias: Tensor | None, chosen: Tensor) -> Tensor:
    """y [T, K, out] and, if there is a bias [E, out or more], that of the experts chosen [T, K]."""
    return y if bias is None else y + bias[chosen][..., : y.shape[-1]].to(y.dtype)


def by_layer(packed: Callable[[QuantizedLinear], tuple[Tensor, ...]], layer: QuantizedLinear) -> tuple[Tensor, ...]:
    """What `packed` makes of a layer or, stacked, of each of E experts: one by one, which bounds the temporaries."""
    if layer.weight.ndim == 2:
        return packed(layer)
    each = [packed(layer.expert(e)) for e in range(len(layer.weight))]
    return tuple(torch.stack(tensors) for tensors in zip(*each, strict=True))


class CodesLinear(nn.Module):
    """A linear layer of codes, or one for each of E experts, in the order in which a CPU's instructions read it.

    Activations in half precision are rounded to int8 in groups of 32 inputs, those in float32 or of codes that are no
    integers are not. weight [tiles, bytes], uint8 or, which tells the operators that it is, float8_e4m3fn; after the
    nibbles of a tile come the numbers that they stand for, if these are no integers. scales and zeros [tiles, groups, 1
    or 2, 16] in the file's dtype; bias float32 [tiles * 16]; those of experts are [E, ...].
    """

    LANES, GROUP = cpu.TILE, 32  # output rows of a tile; inputs, whose number is padded to a multiple

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        self.out_features = layer.scales.shape[-2]
        weight, scales = by_layer(self.packed, layer)
        self.register_buffer("weight", weight.view(torch.float8_e4m3fn) if type(layer) is Float8Linear else weight)
        self.register_buffer("scales", scales)
        pad = (0, -self.out_features % self.LANES)
        self.register_buffer("bias", None if layer.bias is None else F.pad(layer.bias.float(), pad))

    @classmethod
    def packed(cls, layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
        """weight and scales of one layer."""
        codes, nothing = layer.unsigned()
        n_in, n_group = codes.shape[1], layer.scales.shape[-1]
        pad = (0, -n_in % cls.GROUP, 0, -codes.shape[0] % cls.LANES)
        tiles = F.pad(codes, pad, value=nothing).unflatten(0, (-1, cls.LANES))  # [tiles, 16, in]
        fours = tiles.unflatten(2, (-1, 4)).transpose(1, 2)  # [tiles, in / 4, 16, 4]
        weight = fours[:, 0::2] | fours[:, 1::2] << 4 if layer.bits == 4 else fours
        parts = [layer.scales] if layer.zeros is None else [layer.scales, layer.zeros]
        no_groups = pad[1] * n_group // n_in if n_group > 1 else 0  # for the inputs that are padding
        rows = F.pad(torch.stack(parts, dim=2), (0, 0, 0, no_groups, 0, pad[-1]))  # [out, groups, parts]
        scales = rows.unflatten(0, (-1, cls.LANES)).permute(0, 2, 3, 1)
        weight = weight.flatten(1)
        if isinstance(layer, Table4Linear) and layer.table().is_floating_point():
            weight = torch.cat((weight, layer.table().view(torch.uint8).expand(len(weight), -1)), dim=1)
        return weight.contiguous(), scales.contiguous()

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]; of experts as `ExpertLinear`, and only those chosen are read."""
        if chosen is None:
            y = torch.ops.gpt_faster.linear_codes(x, self.weight, self.scales, self.bias)
        else:
            y = torch.ops.gpt_faster.linear_experts(x, chosen, self.weight, self.scales)
            y = plus_bias(y, self.bias, chosen)
        return y if y.shape[-1] == self.out_features else y[..., : self.out_features]


class Permuted(nn.Module):
    """A layer, or one for each of E experts, whose inputs are put in its order first."""

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        tensors = dict(layer.named_buffers())
        self.register_buffer("order", tensors.pop("order"))
        self.layer = type(layer)(**tensors)

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]; of experts as `ExpertLinear`."""
        if chosen is None:
            return self.layer(x.index_select(-1, self.order))
        return self.layer(x.expand(-1, chosen.shape[1], -1).gather(-1, self.order[chosen]), chosen)


class FloatLinear(nn.Module):
    """A float linear layer of any number of rows, on a CPU.

    PyTorch multiplies matrices in half precision eight times slower than in float32, if there are no instructions.
    """

    FEW = 4  # rows for which a float32 copy of the weight costs more than it saves

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    @classmethod
    def of(cls, layer: nn.Linear) -> "FloatLinear":
        return cls(layer.weight, layer.bias)

    @staticmethod
    def fits(layer: nn.Linear, _: ModelArgs | None) -> bool:
        return not HAS_HALF.get(layer.weight.dtype, True)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        few = surely_few(x[..., 0].numel(), self.FEW)
        return (F.linear if few else product)(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for many rows in the dtype that is fastest here; weight may have any."""
    dtype = x.dtype if has_half(x.dtype) else torch.float32
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


class TorchInt8(Int8Linear):
    """An int8 layer, as it is stored, that PyTorch's own kernel reads for few bfloat16 rows."""

    FEW = 64  # rows for which the kernel is faster than a product of matrices

    def linear(self, x: Tensor) -> Tensor:
        if surely_few(x[..., 0].numel(), self.FEW):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales[:, 0])
            y = y.view(*x.shape[:-1], len(self.weight))
        else:
            y = product(x, self.weight) * self.scales[:, 0]
        return y if self.bias is None else y + self.bias


class TorchInt4(QuantizedLinear):
    """An int4 layer in the order in which PyTorch's own kernel reads it on this processor.

    weight: uint8 [out, in/2]. scales: bfloat16 [groups, out, 2], with the zeros. Of experts, [E, ...].
    """

    bits = 4

    @staticmethod
    def packed(layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
        """weight and scales of one layer."""
        n_rows = max(64, PART // layer.in_features // 64 * 64)  # whole tiles, whose int32 codes are not large
        parts = (layer.codes() + 8).split(n_rows)
        weight = torch.cat([torch.ops.aten._convert_weight_to_int4pack_for_cpu(part.int(), 1) for part in parts])
        return weight, torch.stack((layer.scales.T, layer.zeros.T), -1).contiguous()

    def linear(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        groupsize = x.shape[-1] // len(self.scales)
        run = int4_product_operator if torch.compiler.is_compiling() else int4_product
        y = run(rows, self.weight, groupsize, self.scales)
        y = y.view(*x.shape[:-1], len(self.weight))
        return y if self.bias is None else y + self.bias


def int4_product(x: Tensor, weight: Tensor, groupsize: int, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, groupsize, scales)


# in a compiled region, inductor loses the groupsize of PyTorch's own operator
int4_product_operator = torch.library.custom_op("gpt_faster::int4_product", int4_product, mutates_args=())


@int4_product_operator.register_fake
def _(x, weight, groupsize, scales):
    return x.new_empty(len(x), len(weight))


class AnyExperts(nn.Module):
    """Experts on any device, compiled or not: the choice of experts hides in an operator."""

    def __init__(self, layer: ExpertLinear | QuantizedLinear):
        super().__init__()
        self.kind = type(layer).__name__
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias, requires_grad=False)
        for name, tensor in layer.state_dict().items():
            if name != "bias":
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # as ExpertLinear
        # outside of a compiled function a call of an operator in Python would import the compiler: seconds of start-up
        each = each_expert_operator if torch.compiler.is_compiling() else each_expert
        return plus_bias(each(x, chosen, list(self.buffers()), self.kind), self.bias, chosen)


KINDS = {kind.__name__: kind for kind in (ExpertLinear, *LAYERS.values(), TorchInt8, TorchInt4)}


def each_expert(x: Tensor, chosen: Tensor, tensors: list[Tensor], kind: str) -> Tensor:
    """`by_expert` of the layer of this kind that has these tensors."""
    return by_expert(KINDS[kind](*tensors), x, chosen)


# the choice of experts is read on the host, so no CUDA graph can hold this operator
each_expert_operator = torch.library.custom_op(
    "gpt_faster::each_expert", each_expert, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@each_expert_operator.register_fake
def _(x, chosen, tensors, kind):
    return x.new_empty(*chosen.shape, tensors[0].shape[1])


def fits_torch(layer: QuantizedLinear, _: ModelArgs | None) -> bool:
    """Whether PyTorch has a kernel for a layer of a bfloat16 model: of int8 only with one scale a row."""
    if layer.scales.dtype != torch.bfloat16:
        return False
    if layer.bits == 8:
        return layer.scales.shape[-1] == 1 and layer.in_features % 16 == 0  # what its loads are aligned to
    return layer.weight.shape[-2] % 16 == 0 and layer.in_features >= 32 * layer.scales.shape[-1]


def by_torch(layer: QuantizedLinear) -> nn.Module:
    """The form of a layer, or of one for each of E experts, that PyTorch's kernels read."""
    if layer.bits == 8:
        fast = TorchInt8(**dict(layer.named_buffers()))
    else:
        fast = TorchInt4(*by_layer(TorchInt4.packed, layer), bias=layer.bias)
    return AnyExperts(fast) if layer.weight.ndim == 3 else fast


def float_copy(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Module:
    """A layer, or one for each of E experts, with float weights."""
    weight = layer.dequantize().to(dtype)
    if weight.ndim == 3:
        return AnyExperts(ExpertLinear(weight, layer.bias))
    # parameters, which are counted among the bytes that a step reads
    bias = None if layer.bias is None else nn.Parameter(layer.bias, requires_grad=False)
    return FloatLinear(nn.Parameter(weight, requires_grad=False), bias)
