"""Layers of int4 or int8 codes in words of 32 bits: AWQ, GPTQ and what compressed-tensors packs.

A weight is (code - point) * scale with unsigned codes and points. Our codes are the same less the middle, 8 or 128.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from layers.quantized import QuantSpec
from weights.layout import Kept, Readers
from weights.shipped.scales import checked_scales, checked_shape, fetch, our_groupsize, scale_dtype, spread, zeros_of

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the codes of 8 neighbours stand


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes in words int32 [..., n], the lowest bits first: uint8 [..., n * 32 / bits]."""
    data = words.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)


@dataclass(frozen=True)
class Codes:
    """One layer of a file, whose tensors are read when they are called.

    groupsize: inputs that share a scale, in the file. codes: uint8 [out, in]. scales: [out, n]. points: uint8 [out, n];
    None: all are the middle. group_of: int [in], the group of each input; None: neighbours share one.
    """

    name: str
    bits: int
    n_in: int
    groupsize: int
    codes: Callable[[], Tensor]
    scales: Callable[[], Tensor]
    points: Callable[[], Tensor] | None
    group_of: Tensor | None = None

    def kept(self) -> Kept:
        """The layer as our formats have it."""
        whole_row = self.bits == 8 and self.groupsize == self.n_in
        groupsize = None if whole_row else our_groupsize(self.groupsize, self.n_in, self.name)
        order = self.order()
        has_zeros = self.bits == 4 or self.points is not None
        name = "int8.zeros" if self.bits == 8 and has_zeros else None
        tensors = {"weight": partial(self.weight, order), "scales": partial(self.our_scales, groupsize, has_zeros)}
        tensors |= {"zeros": partial(self.our_zeros, groupsize)} if has_zeros else {}
        tensors |= {} if order is None else {"order": lambda: order}
        dtype = scale_dtype(self.scales()) if self.points is None else "float32"  # which all zeros need
        return Kept(QuantSpec(self.bits, groupsize, name, order is not None, dtype), tensors)

    def order(self) -> Tensor | None:
        """The inputs [in], group after group; None: as they are."""
        if self.group_of is None or torch.equal(self.group_of, torch.arange(self.n_in) // self.groupsize):
            return None
        counts = self.group_of.clamp(min=0).bincount()
        if self.group_of.min() < 0 or (counts != self.groupsize).any() or len(counts) * self.groupsize != self.n_in:
            raise ValueError(f"{self.name} has groups that are not of {self.groupsize} inputs each, as g_idx says")
        return self.group_of.argsort(stable=True)

    def weight(self, order: Tensor | None) -> Tensor:
        codes = self.codes() if order is None else self.codes()[:, order]
        return (codes ^ 128).view(torch.int8) if self.bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4

    def file_scales(self) -> Tensor:
        scales, n = checked_scales(f"the scales of {self.name}", self.scales()), -(-self.n_in // self.groupsize)
        return checked_shape(f"the scales of {self.name}", scales, len(scales), n)

    def our_scales(self, groupsize: int | None, has_zeros: bool) -> Tensor:
        scales = spread(self.file_scales(), self.groupsize, groupsize, self.n_in)
        return scales.to(self.our_zeros(groupsize).dtype) if has_zeros else scales  # kernels read both in one dtype

    def our_zeros(self, groupsize: int | None) -> Tensor:
        scales, middle = self.file_scales(), 1 << (self.bits - 1)
        if self.points is None:
            return torch.zeros_like(spread(scales, self.groupsize, groupsize, self.n_in))
        points = checked_shape(f"the zeros of {self.name}", self.points(), *scales.shape)
        return spread(zeros_of(points, middle, scales), self.groupsize, groupsize, self.n_in)


def file_groupsize(groupsize: int, n_in: int) -> int:
    """The inputs that share a scale; -1 stands for all of a row."""
    return n_in if groupsize == -1 else groupsize


def read_words(raw: Readers, name: str, *shape: int | None) -> Tensor:
    """The tensor of 32-bit words `name`, of this shape; None: any size."""
    words = fetch(raw, name)
    if words.dtype != torch.int32:
        raise ValueError(f"{name} is a tensor of {words.dtype}; words of torch.int32 are needed")
    wanted = [size if want is None else want for size, want in zip(words.shape, shape, strict=False)]
    return checked_shape(name, words, *wanted, *shape[len(wanted) :])


def awq_layer(name: str, raw: Readers, n_in: int, groupsize: int) -> Kept | None:
    """qweight [in, out/8], qzeros [n, out/8], scales [n, out]: words of 8 neighbouring outputs."""
    if f"{name}.qweight" not in raw:
        return None
    groupsize = file_groupsize(groupsize, n_in)

    def read(leaf: str, n_row: int) -> Tensor:
        codes = unpacked(read_words(raw, f"{name}.{leaf}", n_row, None), 4)
        return codes.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).T.contiguous()

    codes, points = partial(read, "qweight", n_in), partial(read, "qzeros", -(-n_in // groupsize))
    return Codes(name, 4, n_in, groupsize, codes, lambda: fetch(raw, f"{name}.scales").T, points).kept()


def gptq_layer(
    name: str, raw: Readers, n_in: int, bits: int, groupsize: int, symmetric: bool, added: int
) -> Kept | None:
    """qweight [in * bits / 32, out], qzeros [n, out * bits / 32], scales [n, out]; g_idx [in] or none.

    Words of qweight hold neighbouring inputs, those of qzeros outputs. added: to the points of the file.
    """
    if f"{name}.qweight" not in raw:
        return None
    groupsize = file_groupsize(groupsize, n_in)

    def codes() -> Tensor:
        if symmetric and (points() != 1 << (bits - 1)).any():
            raise ValueError(f"{name}.qzeros are not symmetric, though the config says sym")
        return unpacked(read_words(raw, f"{name}.qweight", n_in * bits // 32, None).T, bits)

    def points() -> Tensor:
        words = read_words(raw, f"{name}.qzeros", -(-n_in // groupsize), None)
        return unpacked(words, bits).T.to(torch.int16) + added

    group_of = fetch(raw, f"{name}.g_idx").long() if f"{name}.g_idx" in raw else None
    if group_of is not None:
        checked_shape(f"{name}.g_idx", group_of, n_in)
    scales, used = lambda: fetch(raw, f"{name}.scales").T, None if symmetric else points
    return Codes(name, bits, n_in, groupsize, codes, scales, used, group_of).kept()


def packed_layer(name: str, raw: Readers, n_in: int, bits: int, groupsize: int, symmetric: bool) -> Kept:
    """weight_packed [out, in * bits / 32], weight_scale [out, n], weight_zero_point [out * bits / 32, n], words too."""

    def codes() -> Tensor:
        words = read_words(raw, f"{name}.weight_packed", None, -(-n_in * bits // 32))
        return unpacked(words, bits)[:, :n_in]

    def points() -> Tensor:
        n_out = len(fetch(raw, f"{name}.weight_scale"))
        return unpacked(read_words(raw, f"{name}.weight_zero_point", -(-n_out * bits // 32), None).T, bits).T[:n_out]

    group_of = fetch(raw, f"{name}.weight_g_idx").long() if f"{name}.weight_g_idx" in raw else None
    if group_of is not None and (group_of == -1).all():  # of groups of neighbours
        group_of = None
    groupsize, scales = file_groupsize(groupsize, n_in), partial(fetch, raw, f"{name}.weight_scale")
    return Codes(name, bits, n_in, groupsize, codes, scales, None if symmetric else points, group_of).kept()


def plain_int8_layer(name: str, raw: Readers, n_in: int, groupsize: int, symmetric: bool) -> Kept:
    """weight int8 [out, in], weight_scale [out, n], weight_zero_point int8 [out, n]."""

    def unsigned(leaf: str) -> Tensor:
        tensor = fetch(raw, f"{name}.{leaf}")
        if tensor.dtype != torch.int8:
            raise ValueError(f"{name}.{leaf} is a tensor of {tensor.dtype}; codes of torch.int8 are needed")
        return tensor.view(torch.uint8) ^ 128

    codes, points = partial(unsigned, "weight"), None if symmetric else partial(unsigned, "weight_zero_point")
    scales = partial(fetch, raw, f"{name}.weight_scale")
    return Codes(name, 8, n_in, file_groupsize(groupsize, n_in), codes, scales, points).kept()
