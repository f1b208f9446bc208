"""Experts on CUDA; `layers/fastest.py` says where they are used."""

import torch
import torch.nn as nn
from torch import Tensor

from layers.gpu_linear import KERNEL_ACTIVATIONS
from layers.packed import has_triton
from mixers.activations import ACTIVATIONS
from mixers.experts import MixtureOfExperts
from model import ModelArgs


class GpuExperts(MixtureOfExperts):
    """A mixture of experts as three kernels: nothing waits for the choice of experts, so CUDA graphs stay whole."""

    def __init__(self, mixture: MixtureOfExperts):
        nn.Module.__init__(self)
        import kernels.gpu.experts  # noqa: F401  registers the operator; it needs Triton

        vars(self).update(vars(mixture))  # its layers and settings
        self.activation_name = next(name for name, each in ACTIVATIONS.items() if each is mixture.activation)

    @staticmethod
    def fits(_: MixtureOfExperts, args: ModelArgs) -> bool:
        return has_triton() and not args.ffn_bias and args.activation in KERNEL_ACTIVATIONS

    def run(self, x: Tensor, chosen: Tensor) -> Tensor:
        tensors = [
            getattr(layer, name, None) for layer in (self.w13, self.w2) for name in ("weight", "scales", "zeros")
        ]
        return torch.ops.gpt_faster.experts(x, chosen, *tensors, self.activation_name)
