"""The fast paths of linear layers on each device."""

import torch
import torch.nn as nn
from torch import Tensor

from kernels import cpu


class FewRowsLinear(nn.Module):
    """A bfloat16 linear layer whose weight is read at memory speed for few rows (`kernels/cpu.cpp`)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:  # x [..., in] -> [..., out]
        return torch.ops.gpt_faster.linear_bf16(x, self.weight, self.bias)


def pack_(model: nn.Module) -> None:
    """Give every linear layer the fastest form its device has; once, after the weights are in place.

    Where there is none, the plain layer stays.
    """
    plain = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    eligible = {n: m for n, m in plain.items() if m.weight.device.type == "cpu" and m.weight.dtype == torch.bfloat16}
    if not eligible or not cpu.has_bf16():
        return
    for name, layer in eligible.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FewRowsLinear(layer))
