"""Layers of FP8 codes, e4m3, with a scale for a tensor, an output, a group of inputs or a block of both."""

import torch
from torch import Tensor

from layers.quantized import QuantSpec
from weights.layout import Kept, Readers
from weights.shipped.scales import checked_scales, checked_shape, fetch, our_groupsize, scale_dtype, spread


def float8_layer(name: str, raw: Readers, n_in: int, leaf: str, block: tuple[int, int] | None) -> Kept:
    """weight float8_e4m3fn [out, in], and scales called `leaf`: one, or one for each output, or for each block.

    A weight is code * scale, also where the scale is called an inverse.
    """
    groupsize = None if block is None or block[1] >= n_in else our_groupsize(block[1], n_in, name)

    def weight() -> Tensor:
        codes = fetch(raw, f"{name}.weight")
        if codes.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name}.weight is a tensor of {codes.dtype}; codes of float8_e4m3fn are needed")
        if codes.ndim != 2:
            raise ValueError(
                f"{name}.weight has shape {list(codes.shape)}; FP8 experts in one tensor are not supported"
            )
        codes = codes.view(torch.uint8)
        if ((codes & 127) == 127).any():
            raise ValueError(f"{name}.weight holds NaN: the file is damaged")
        return codes

    def scales() -> Tensor:
        n_out, called = len(fetch(raw, f"{name}.weight")), f"{name}.{leaf}"
        values = checked_scales(called, fetch(raw, called))
        if block is None:
            return (
                values.expand(n_out, 1) if values.numel() == 1 else checked_shape(called, values.view(-1, 1), n_out, 1)
            )
        height, width = block
        values = checked_shape(called, values, -(-n_out // height), -(-n_in // width))
        return spread(values.repeat_interleave(height, 0)[:n_out], width, groupsize, n_in)

    spec = QuantSpec(8, groupsize, "float8", scale_dtype=scale_dtype(fetch(raw, f"{name}.{leaf}")))
    return Kept(spec, {"weight": weight, "scales": scales})
