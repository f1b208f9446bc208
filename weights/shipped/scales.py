"""Scales, zeros and groups of inputs of a quantised file, as our layers have them: the same numbers."""

import math

import torch
from torch import Tensor

from layers.quantized import GROUPSIZES
from weights.device import DTYPES
from weights.layout import Readers


def our_groupsize(groupsize: int, n_in: int, name: str) -> int:
    """Our groups of a layer whose scales each serve `groupsize` of its inputs: the largest that parts those evenly."""
    fits = [size for size in GROUPSIZES if math.gcd(groupsize, n_in) % size == 0]
    if not fits:
        raise ValueError(
            f"{name} has groups of {groupsize} of its {n_in} inputs; a multiple of {GROUPSIZES[0]} is needed in both"
        )
    return fits[-1]


def fetch(raw: Readers, name: str) -> Tensor:
    """A tensor of the file."""
    if name not in raw:
        raise ValueError(f"the file lacks the tensor {name} of a quantised layer")
    return raw[name]()


def scale_dtype(scales: Tensor) -> str:
    """The name of the dtype that `checked_scales` gives these."""
    return str(scales.dtype if scales.dtype in DTYPES.values() else torch.float32).removeprefix("torch.")


def checked_shape(name: str, tensor: Tensor, *shape: int) -> Tensor:
    """A tensor of the file, which must have the shape that its config and the model's sizes need."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {list(shape)} is needed")
    return tensor


def checked_scales(name: str, scales: Tensor) -> Tensor:
    """Scales of the file in one of our dtypes; none may be zero, NaN or infinite."""
    if not scales.is_floating_point():
        raise ValueError(f"{name} is a tensor of {scales.dtype}; floats are needed")
    scales = scales if scales.dtype in DTYPES.values() else scales.float()
    if not (scales.isfinite() & (scales != 0)).all():
        raise ValueError(f"{name} holds scales that are zero, NaN or infinite: the file is damaged")
    return scales


def spread(values: Tensor, groupsize: int, ours: int | None, n_in: int) -> Tensor:
    """Scales or zeros [out, n], each for `groupsize` inputs, as one for each of our groups [out, in/ours]."""
    return values if ours is None else values.repeat_interleave(groupsize // ours, 1)[:, : n_in // ours].contiguous()


def zeros_of(points: Tensor, middle: int, scales: Tensor) -> Tensor:
    """What our signed codes need as zeros for w = (unsigned code - point) * scale: (middle - point) * scale.

    float32 holds that exactly for scales in half precision.
    """
    return (middle - points.float()) * scales.float()
