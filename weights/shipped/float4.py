"""Layers of FP4 numbers, e2m1: MXFP4, with a power of two for each 32 inputs, and NVFP4, with an FP8 scale for each 16.

Scales of ours are half of the file's, because our codes are the numbers doubled.
"""

from functools import partial

import torch
from torch import Tensor

from layers.quantized import QuantSpec
from weights.layout import Kept, Readers
from weights.shipped.scales import checked_scales, checked_shape, fetch


def float4_spec(groupsize: int, n_in: int, name: str) -> QuantSpec:
    """Of a layer whose inputs are whole groups, of 32 with powers of two as scales, or of 16."""
    spec = QuantSpec(4, groupsize, "float4", scale_dtype="bfloat16" if groupsize == 32 else "float32")
    spec.groups(n_in, name)
    return spec


def fetch_bytes(raw: Readers, name: str, *shape: int) -> Tensor:
    """A tensor of uint8 that ends in this shape."""
    data = fetch(raw, name)
    if data.dtype != torch.uint8:
        raise ValueError(f"{name} is a tensor of {data.dtype}; bytes of torch.uint8 are needed")
    return checked_shape(name, data, *data.shape[: -len(shape)], *shape)


def half_power(exponents: Tensor) -> Tensor:
    """2^(exponent - 128), which bfloat16 holds exactly."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 128).bfloat16()


def half_powers(raw: Readers, name: str, n_group: int) -> Tensor:
    """The scales [..., groups] whose exponents a file has."""
    exponents = fetch_bytes(raw, name, n_group)
    if (exponents == 255).any():
        raise ValueError(f"{name} holds scales that are NaN: the file is damaged")
    return half_power(exponents)


def mxfp4_layer(name: str, raw: Readers, n_in: int) -> Kept | None:
    """Experts of gpt-oss: blocks uint8 [E, out, groups, 16], even inputs in low nibbles; scales [E, out, groups]."""
    if f"{name}.blocks" not in raw:
        return None
    spec = float4_spec(32, n_in, name)
    tensors = {
        "weight": lambda: fetch_bytes(raw, f"{name}.blocks", n_in // 32, 16).flatten(-2),
        "scales": partial(half_powers, raw, f"{name}.scales", n_in // 32),
    }
    return Kept(spec, tensors)


def packed_mxfp4_layer(name: str, raw: Readers, n_in: int) -> Kept:
    """weight_packed uint8 [out, in / 2], the even input in the low nibble; weight_scale uint8 [out, groups]."""
    return packed_layer(name, raw, n_in, 32, partial(half_powers, raw, f"{name}.weight_scale", n_in // 32))


def nvfp4_layer(name: str, raw: Readers, n_in: int) -> Kept:
    """As `packed_mxfp4_layer`, but weight_scale float8_e4m3fn, which is divided by weight_global_scale."""

    def scales() -> Tensor:
        called = f"{name}.weight_scale"
        values = fetch(raw, called)
        values = checked_shape(called, values, len(values), n_in // 16).float()
        if not values.isfinite().all():  # zero is what very small groups have
            raise ValueError(f"{called} holds scales that are NaN or infinite: the file is damaged")
        divisor = checked_scales(f"{name}.weight_global_scale", fetch(raw, f"{name}.weight_global_scale")).float()
        return values / checked_shape(f"{name}.weight_global_scale", divisor.flatten(), 1) / 2

    return packed_layer(name, raw, n_in, 16, scales)


def packed_layer(name: str, raw: Readers, n_in: int, groupsize: int, scales) -> Kept:
    weight = partial(fetch_bytes, raw, f"{name}.weight_packed", n_in // 2)
    return Kept(float4_spec(groupsize, n_in, name), {"weight": weight, "scales": scales})
