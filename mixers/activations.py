"""Activations of feed-forwards: what becomes of gate and up projection before the down projection."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

SWIGLU_SLOPE, CLAMP = 1.702, 7.0  # of `clamped_swiglu`


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU of bounded values, whose gate is nearly a GELU, and whose up projection is around 1 (gpt-oss)."""
    gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    return gate * (SWIGLU_SLOPE * gate).sigmoid() * (up + 1)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "relu": lambda gate, up: F.relu(gate) * up,
    "relu2": lambda gate, up: F.relu(gate).square() * up,  # So et al. 2021
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "clamped_swiglu": clamped_swiglu,
}


def activated(x: Tensor, activation: Callable[[Tensor, Tensor | int], Tensor], gated: bool = True) -> Tensor:
    """What the down projection takes [..., size]; x: gate and up projection [..., 2 * size] or, without a gate, one."""
    return activation(*x.chunk(2, dim=-1)) if gated else activation(x, 1)
