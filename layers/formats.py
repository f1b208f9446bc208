"""Formats of quantised linear layers and their arithmetic.

A weight is w = code * scale + zero, with one scale for each group of inputs of each output row: int8 is symmetric
(codes -128..127, no zero; by default one group a row), int4 is not (codes -8..7). Formats with a name are not made
here: a file that another program has quantised keeps them. Files hold the logical layout of the classes below;
`layers.fastest.pack_` makes what a device's kernels read, once, after loading. A new format is a class here, a row of
`layers.quantized.LAYERS` and, where it has a fast form, a row of `layers.fastest.TABLE`."""

import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mixers.experts import by_expert

PART = 1 << 20  # weights made at a time: bounds the temporaries


def scales_and_zeros(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:  # [..., g] -> two of [..., 1]
    """Scale and zero of each group, chosen before the codes as float32 values that bfloat16 holds exactly."""
    if bits == 8:
        scales = groups.abs().amax(-1, keepdim=True) / 127
        return scales.bfloat16().float(), torch.zeros_like(scales)
    return asymmetric_scales(groups, bits)


def asymmetric_scales(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `scales_and_zeros`, where the codes reach from the least weight of each group to its largest."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales = ((high - low) / ((1 << bits) - 1)).bfloat16().float()
    return scales, (low + (1 << (bits - 1)) * scales).bfloat16().float()


def to_codes(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest code of each weight, in float32. A group of equal weights has scale 0, and every code is right."""
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


class QuantizedLinear(nn.Module):
    """A linear layer of codes, or one for each of E experts: every tensor is then [E, ...].

    weight: codes as the format stores them. scales, and zeros or None: [out, groups]. bias: [out] or None. order: int64
    [in] or None: column i of the codes, scales and zeros is for input order[i].
    """

    bits: int
    has_zeros = False

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        bias: Tensor | None = None,
        order: Tensor | None = None,
    ):
        super().__init__()
        tensors = {"weight": weight, "scales": scales, "zeros": zeros, "bias": bias, "order": order}
        for name, tensor in tensors.items():  # detached, because loading turns a buffer that is a parameter into one
            self.register_buffer(name, None if tensor is None else tensor.detach())

    @classmethod
    def rounded(cls, groups: Tensor) -> dict[str, Tensor]:
        """The tensors of float32 groups [out, groups, g], rounded to nearest."""
        scales, zeros = scales_and_zeros(groups, cls.bits)
        codes = to_codes(groups, scales, zeros, cls.bits)
        return stored(codes.flatten(1), scales[..., 0], zeros[..., 0], cls.bits)

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1] * self.weight.itemsize * 8 // self.bits

    def codes(self) -> Tensor:
        """Numbers that float32 holds exactly, int8 where they are whole: [out, in]"""
        raise NotImplementedError

    @classmethod
    def packed(cls, codes: Tensor) -> Tensor:
        """The weight whose codes, int8, these are."""
        return codes

    def unsigned(self) -> tuple[Tensor, int]:
        """The codes as uint8 [out, in], and the one that stands for 0."""
        middle = 1 << (self.bits - 1)
        return self.codes().view(torch.uint8) + middle, middle  # bytes wrap: -1 + 8 is 7

    def dequantize(self) -> Tensor:
        """The weight in float32 [out, in]."""
        groups = self.codes().unflatten(-1, (self.scales.shape[-1], -1)).float() * self.scales.float()[..., None]
        weight = (groups if self.zeros is None else groups + self.zeros.float()[..., None]).flatten(-2)
        if self.order is None:
            return weight
        return weight.gather(-1, self.order.argsort()[..., None, :].expand_as(weight))

    def expert(self, e: int) -> "QuantizedLinear":
        return type(self)(**{name: tensor[e] for name, tensor in self.named_buffers()})

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]; of experts as `ExpertLinear`."""
        return self.linear(x) if chosen is None else by_expert(self, x, chosen)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


class Int8Linear(QuantizedLinear):
    """weight int8 [out, in], scales [out, 1] or [out, in/g], no zeros."""

    bits = 8

    def codes(self) -> Tensor:
        return self.weight

    def linear(self, x: Tensor) -> Tensor:
        if self.scales.shape[1] > 1 or x.dtype == torch.float16:  # float16 sums of unscaled codes overflow
            return super().linear(x)
        # the sums are scaled, not the weight: inductor then reads int8 codes in the fused product of one row
        # float32 scales: with bfloat16 scales inductor uses a naive kernel for several rows on CUDA
        y = F.linear(x, self.weight.to(x.dtype)) * self.scales.float().T
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int4Linear(QuantizedLinear):
    """weight uint8 [out, in/2] (`pack_nibbles`), scales and zeros [out, in/g]."""

    bits, has_zeros = 4, True

    def codes(self) -> Tensor:
        return unpack_nibbles(self.weight)

    @classmethod
    def packed(cls, codes: Tensor) -> Tensor:
        return pack_nibbles(codes)


class Int8ZerosLinear(Int8Linear):
    """weight int8 [out, in], scales and zeros [out, 1] or [out, in/g]."""

    has_zeros = True

    @classmethod
    def rounded(cls, groups: Tensor) -> dict[str, Tensor]:
        scales, zeros = asymmetric_scales(groups, cls.bits)
        codes = to_codes(groups, scales, zeros, cls.bits).to(torch.int8)
        return {"weight": codes.flatten(1), "scales": scales[..., 0].bfloat16(), "zeros": zeros[..., 0].bfloat16()}

    def linear(self, x: Tensor) -> Tensor:
        return QuantizedLinear.linear(self, x)


class Float8Linear(QuantizedLinear):
    """weight uint8 [out, in], the bits of float8_e4m3fn; scales [out, 1] or [out, in/g], no zeros."""

    bits = 8

    @classmethod
    def rounded(cls, groups: Tensor) -> dict[str, Tensor]:
        largest = torch.finfo(torch.float8_e4m3fn).max
        scales = (groups.abs().amax(-1, keepdim=True) / largest).bfloat16().float()
        codes = (groups / scales.where(scales > 0, 1)).clamp(-largest, largest).to(torch.float8_e4m3fn)
        return {"weight": codes.view(torch.uint8).flatten(1), "scales": scales[..., 0].bfloat16()}

    def codes(self) -> Tensor:
        # by their bits, because MPS and older GPUs lack the dtype: a float32 with these bits is 2^-120 of the number
        bits = self.weight.int()
        return ((bits & 127) << 20 | (bits & 128) << 24).view(torch.float32) * 2.0**120

    def unsigned(self) -> tuple[Tensor, int]:
        return self.weight, 0


class Table4Linear(QuantizedLinear):
    """weight uint8 [out, in/2], the even input in the low nibble; scales [out, in/g], no zeros. CODES: of nibbles."""

    bits = 4
    CODES: tuple[float, ...]

    @classmethod
    def rounded(cls, groups: Tensor) -> dict[str, Tensor]:
        scales = (groups.abs().amax(-1, keepdim=True) / max(cls.CODES)).bfloat16().float()
        numbers = groups / scales.where(scales > 0, 1)
        return {"weight": cls.packed(numbers.flatten(1)), "scales": scales[..., 0].bfloat16()}

    @classmethod
    def packed(cls, codes: Tensor) -> Tensor:  # the nearest code of each number, if they are none
        known = sorted(set(cls.CODES))
        between = torch.tensor([sum(pair) / 2 for pair in itertools.pairwise(known)], device=codes.device)
        nibbles = torch.tensor([cls.CODES.index(code) for code in known], device=codes.device)
        return pack_nibbles(nibbles[torch.bucketize(codes.float(), between)] - 8)

    @classmethod
    def table(cls) -> Tensor:
        """What the nibbles stand for: int8 or float32 [16]."""
        return torch.tensor(cls.CODES, dtype=torch.int8 if isinstance(cls.CODES[-1], int) else torch.float32)

    def codes(self) -> Tensor:
        return self.table().to(self.weight.device)[self.unsigned()[0].int()]

    def unsigned(self) -> tuple[Tensor, int]:
        return (unpack_nibbles(self.weight) + 8).view(torch.uint8), 0


class Float4Linear(Table4Linear):
    """e2m1 numbers. Doubled, they are integers, which are the codes: a scale is half of that for the numbers."""

    MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)
    CODES = (*MAGNITUDES, *(-each for each in MAGNITUDES))


class NormalFloat4Linear(Table4Linear):
    """nf4: quantiles of the normal distribution (Dettmers et al. 2023, appendix E)."""

    CODES = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)
    CODES += (-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725)
    CODES += (0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941)
    CODES += (0.7229568362236023, 1.0)


class OtherFloat4Linear(Table4Linear):
    """fp4 of bitsandbytes: a sign, and numbers of two bits of exponent and one of mantissa in an order of their own."""

    MAGNITUDES = tuple(each / 12 for each in (0, 0.0625, 8, 12, 4, 6, 2, 3))
    CODES = (*MAGNITUDES, *(-each for each in MAGNITUDES))


def float_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these tensors, which takes no gradients."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    layer.out_features, layer.in_features = weight.shape
    return layer
