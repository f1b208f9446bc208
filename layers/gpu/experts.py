"""Experts on CUDA; `layers/fastest.py` says where they are used."""

import torch
import torch.nn as nn
from torch import Tensor

from layers.gpu.linear import KERNEL_ACTIVATIONS
from layers.packed import has_triton
from layers.quantized import Int4Linear, Int8Linear
from mixers.activations import ACTIVATIONS
from mixers.experts import ExpertLinear, MixtureOfExperts
from model import ModelArgs

KINDS = {kind.__name__ for kind in (ExpertLinear, Int8Linear, Int4Linear)}  # that the kernels read


class GpuExperts(MixtureOfExperts):
    """A mixture of experts as three kernels: nothing waits for the choice of experts, so CUDA graphs stay whole."""

    def __init__(self, mixture: MixtureOfExperts):
        nn.Module.__init__(self)
        import kernels.gpu.experts  # noqa: F401  registers the operator; it needs Triton

        vars(self).update(vars(mixture))  # its layers and settings
        self.activation_name = next(name for name, each in ACTIVATIONS.items() if each is mixture.activation)

    @staticmethod
    def fits(mixture: MixtureOfExperts, args: ModelArgs) -> bool:
        kinds = {getattr(each, "kind", type(each).__name__) for each in (mixture.w13, mixture.w2)}  # of `AnyExperts`
        return has_triton() and kinds <= KINDS and not args.ffn_bias and args.activation in KERNEL_ACTIVATIONS

    def run(self, x: Tensor, chosen: Tensor) -> Tensor:
        tensors = [
            getattr(layer, name, None) for layer in (self.w13, self.w2) for name in ("weight", "scales", "zeros")
        ]
        return torch.ops.gpt_faster.experts(x, chosen, *tensors, self.activation_name)
