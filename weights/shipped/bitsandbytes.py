"""Layers that bitsandbytes has quantised: int8, and the 4-bit codes nf4 and fp4, which stand for 16 numbers."""

import json
from functools import partial

import torch
from torch import Tensor

from layers.quantized import QuantSpec
from weights.layout import Kept, Readers
from weights.shipped.scales import checked_scales, checked_shape, fetch, our_groupsize


def int8_layer(name: str, raw: Readers, n_in: int) -> Kept | None:
    """weight int8 [out, in]; SCB [out], the largest weights of its rows, of which a code is so many 127ths."""
    if f"{name}.SCB" not in raw:
        return None
    if f"{name}.weight_format" in raw and raw[f"{name}.weight_format"]().item() != 0:
        raise ValueError(f"{name} has codes in tiles; rows (weight_format 0) are needed")

    def scales() -> Tensor:
        return checked_scales(f"{name}.SCB", fetch(raw, f"{name}.SCB")).float().view(-1, 1) / 127

    spec = QuantSpec(8, scale_dtype="float32")
    return Kept(spec, {"weight": partial(fetch, raw, f"{name}.weight"), "scales": scales})


def float4_layer(name: str, raw: Readers, n_in: int, kind: str) -> Kept | None:
    """weight [out * in / 2, 1] bytes, the even number of the flat weight in the high nibble; and in what is called
    weight.absmax the largest weight of each block of that, float32, or rounded too: see `largest_weights`.

    kind: "nf4" or "fp4".
    """
    if f"{name}.weight.absmax" not in raw:
        return None
    state = state_of(name, raw, kind)
    n_out, block = state["shape"][0], state["blocksize"]
    checked_shape(f"{name}.weight, unpacked,", torch.empty(state["shape"], device="meta"), n_out, n_in)
    groupsize = our_groupsize(block, n_in, name)  # where blocks run over the ends of rows, parts of them do not
    spec = QuantSpec(4, groupsize, kind, scale_dtype="float32")
    if not torch.allclose(fetch(raw, f"{name}.weight.quant_map"), spec.layer.table(), rtol=1e-6, atol=0):
        raise ValueError(f"{name}.weight.quant_map holds other numbers than those of {kind}")

    def weight() -> Tensor:
        data = fetch(raw, f"{name}.weight").contiguous().view(torch.uint8).flatten()
        data = checked_shape(f"{name}.weight, in bytes,", data, n_out * n_in // 2)
        return (data << 4 | data >> 4).view(n_out, -1)

    def scales() -> Tensor:
        values = checked_shape(f"{name}.weight.absmax", largest_weights(name, raw, state), -(-n_out * n_in // block))
        if not values.isfinite().all():  # zero is what a block of zeros has
            raise ValueError(f"{name}.weight.absmax holds scales that are NaN or infinite: the file is damaged")
        return values.repeat_interleave(block // groupsize)[: n_out * n_in // groupsize].view(n_out, -1)

    return Kept(spec, {"weight": weight, "scales": scales})


def state_of(name: str, raw: Readers, kind: str) -> dict:
    """What a layer's file says of it beside numbers."""
    called = f"{name}.weight.quant_state.bitsandbytes__{kind}"
    try:
        state = json.loads(bytes(fetch(raw, called).tolist()))
        nested = [state["nested_blocksize"]] if f"{name}.weight.nested_absmax" in raw else []
        sizes = [*state["shape"], state["blocksize"], *nested]
        whole = all(type(size) is int and size > 0 for size in sizes) and len(state["shape"]) == 2
        whole = whole and (not nested or isinstance(state["nested_offset"], float | int))
    except (TypeError, KeyError, json.JSONDecodeError, UnicodeDecodeError):
        whole = False
    if not whole:
        raise ValueError(f"{called} does not tell the layer's shape and blocksize: the file is damaged")
    return state


def largest_weights(name: str, raw: Readers, state: dict) -> Tensor:
    """float32 [blocks]. Rounded ones are codes of a table, times a scale for each so many, and an offset."""
    values = fetch(raw, f"{name}.weight.absmax")
    if f"{name}.weight.nested_absmax" not in raw:
        return values.float()
    table, scales = (fetch(raw, f"{name}.weight.nested_{leaf}").float() for leaf in ("quant_map", "absmax"))
    checked_shape(f"{name}.weight.nested_quant_map", table, 256)
    n, block = values.numel(), state["nested_blocksize"]
    checked_shape(f"{name}.weight.nested_absmax", scales, -(-n // block))
    return table[values.int()] * scales.repeat_interleave(block)[:n] + state["nested_offset"]
