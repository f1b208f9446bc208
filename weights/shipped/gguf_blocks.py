"""Blocks of GGUF's quantised types as layers of ours: the same codes, and nothing is rounded anew.

A block is as ggml-common.h has it, and as the package `gguf` reads it: scales, then codes, of 32 or 256 inputs.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from layers.formats import Float4Linear
from layers.quantized import SCALE_DTYPES, QuantSpec
from weights.gguf_file import GGUFTensor
from weights.shipped.float4 import half_power

PART = 1 << 19  # weights read at a time: bounds the temporaries


class Codes(NamedTuple):
    """Some blocks: w = code * scale + zero.

    codes: int8 [blocks, inputs]; of types with zeros from 0 on, of others around 0. scales, and zeros or None: [blocks,
    groups].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None


class Type(NamedTuple):
    """How a type of GGUF is kept, and what reads its blocks [blocks, bytes], uint8."""

    spec: QuantSpec
    has_zeros: bool
    read: Callable[[Tensor], Codes]


def halves(data: Tensor) -> Tensor:
    """The float16 numbers in the bytes [blocks, 2 n]: [blocks, n]."""
    return data.contiguous().view(torch.float16)


def nibbles(data: Tensor, size: int) -> Tensor:
    """Of each `size` bytes of [blocks, n] the low nibbles, then the high ones: [blocks, 2 n]."""
    runs = data.unflatten(1, (-1, size))
    return torch.stack((runs & 15, runs >> 4), dim=2).flatten(1)


def high_bits(data: Tensor, size: int, bits: int) -> Tensor:
    """Of each `size` bytes of [blocks, n] the lowest bits, then the next: [blocks, n * 8 / bits]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return (data.unflatten(1, (-1, 1, size)) >> shifts & (1 << bits) - 1).flatten(1)


def bits_in_order(data: Tensor) -> Tensor:
    """The bits of [blocks, n] bytes, the lowest of each first: [blocks, 8 n]."""
    return (data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)


def q4_0(data: Tensor) -> Codes:
    return Codes(nibbles(data[:, 2:], 16).view(torch.int8) - 8, halves(data[:, :2]))


def q4_1(data: Tensor) -> Codes:
    return Codes(nibbles(data[:, 4:], 16).view(torch.int8), halves(data[:, :2]), halves(data[:, 2:4]))


def q5_0(data: Tensor) -> Codes:
    codes = nibbles(data[:, 6:], 16) | bits_in_order(data[:, 2:6]) << 4
    return Codes(codes.view(torch.int8) - 16, halves(data[:, :2]))


def q5_1(data: Tensor) -> Codes:
    codes = nibbles(data[:, 8:], 16) | bits_in_order(data[:, 4:8]) << 4
    return Codes(codes.view(torch.int8), halves(data[:, :2]), halves(data[:, 2:4]))


def q8_0(data: Tensor) -> Codes:
    return Codes(data[:, 2:].contiguous().view(torch.int8), halves(data[:, :2]))


def k_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros of 8 groups, float32, which holds them exactly: float16 d and dmin times numbers of 6 bits."""
    d, least = halves(data[:, :4]).float().split(1, dim=1)
    scales, minima, rest = data[:, 4:16].split(4, dim=1)
    scales = torch.cat((scales & 63, rest & 15 | scales >> 2 & 48), dim=1)
    minima = torch.cat((minima & 63, rest >> 4 | minima >> 2 & 48), dim=1)
    return d * scales, -least * minima


def q4_k(data: Tensor) -> Codes:
    return Codes(nibbles(data[:, 16:], 32).view(torch.int8), *k_scales(data))


def q5_k(data: Tensor) -> Codes:
    codes = nibbles(data[:, 48:], 32) | high_bits(data[:, 16:48], 32, 1) << 4
    return Codes(codes.view(torch.int8), *k_scales(data))


def q6_k(data: Tensor) -> Codes:
    codes = nibbles(data[:, :128], 64) | high_bits(data[:, 128:192], 32, 2) << 4
    scales = data[:, 192:208].contiguous().view(torch.int8)
    return Codes(codes.view(torch.int8) - 32, scales * halves(data[:, 208:]).float())


def mxfp4(data: Tensor) -> Codes:
    return Codes(Float4Linear.table()[nibbles(data[:, 1:], 16).int()], half_power(data[:, :1]))


KEPT = {
    "Q4_0": Type(QuantSpec(4, 32, scale_dtype="float16"), False, q4_0),
    "Q4_1": Type(QuantSpec(4, 32, scale_dtype="float32"), True, q4_1),
    "Q5_0": Type(QuantSpec(8, 32, scale_dtype="float16"), False, q5_0),
    "Q5_1": Type(QuantSpec(8, 32, "int8.zeros", scale_dtype="float16"), True, q5_1),
    "Q8_0": Type(QuantSpec(8, 32, scale_dtype="float16"), False, q8_0),
    "Q4_K": Type(QuantSpec(4, 32, scale_dtype="float32"), True, q4_k),
    "Q5_K": Type(QuantSpec(8, 32, "int8.zeros", scale_dtype="float32"), True, q5_k),
    "Q6_K": Type(QuantSpec(8, 16, scale_dtype="float32"), False, q6_k),
    "MXFP4": Type(QuantSpec(4, 32, "float4"), False, mxfp4),
}


def common_spec(names: set[str]) -> QuantSpec | None:
    """How a layer of parts of these types is kept: the narrowest format that holds all; None: one type is not kept."""
    if not names <= KEPT.keys():
        return None
    types = [KEPT[name] for name in sorted(names)]
    dtypes = {each.spec.scale_dtype for each in types}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    specs = {replace(each.spec, scale_dtype=dtype) for each in types}
    if len(specs) == 1:
        return specs.pop()
    groupsize = min(each.spec.groupsize for each in types)
    name = "int8.zeros" if any(each.has_zeros for each in types) else None
    return QuantSpec(8, groupsize, name, scale_dtype=dtype)


def read_codes(tensor: GGUFTensor, spec: QuantSpec, leaf: str) -> Tensor:
    """The weight (codes), scales or zeros of a matrix, or a stack, as a layer of `spec` has them."""
    from gguf import GGML_QUANT_SIZES

    n_in, kind = tensor.shape[-1], KEPT[tensor.kind.name]
    inputs, size = GGML_QUANT_SIZES[tensor.kind]

    def part(rows) -> Tensor:
        blocks = kind.read(torch.tensor(rows).view(-1, size))
        return of_layer(blocks, spec, leaf).view(len(rows), -1)

    step = max(1, PART // n_in)
    parts = [part(tensor.rows[row : row + step]) for row in range(0, len(tensor.rows), step)]
    return torch.cat(parts).view(*tensor.shape[:-1], -1)


def of_layer(blocks: Codes, spec: QuantSpec, leaf: str) -> Tensor:
    """The leaf of a layer for these blocks: [blocks, n]."""
    codes, scales, zeros = blocks
    middle = 8 if spec.bits == 4 and zeros is not None else 0  # codes from 0 on become signed
    if leaf == "weight":
        return spec.layer.packed(codes - middle)
    dtype = SCALE_DTYPES[spec.scale_dtype]  # of int4 with zeros float32, which holds the new ones to an ulp
    scales, zeros = scales.to(dtype), None if zeros is None else zeros.to(dtype)
    if middle:
        zeros = zeros + middle * scales
    values = scales if leaf == "scales" else torch.zeros_like(scales) if zeros is None else zeros
    return values.repeat_interleave(codes.shape[1] // scales.shape[1] // spec.groupsize, 1)
