"""Experts on CUDA; `layers/fastest.py` says where they are used."""

import torch
import torch.nn as nn
from torch import Tensor

from layers.formats import Table4Linear
from layers.packed import KINDS, has_triton
from layers.quantized import LAYERS
from mixers.activations import ACTIVATIONS
from mixers.experts import ExpertLinear, MixtureOfExperts
from model import ModelArgs

READ = {kind.__name__ for kind in (ExpertLinear, *LAYERS.values())}  # that the kernels read


def kind_of(layer: nn.Module) -> str:
    return getattr(layer, "kind", type(layer).__name__)  # of `AnyExperts`


class GpuExperts(MixtureOfExperts):
    """A mixture of experts as three kernels: nothing waits for the choice of experts, so CUDA graphs stay whole."""

    waits_for_host = False

    def __init__(self, mixture: MixtureOfExperts):
        nn.Module.__init__(self)
        import kernels.gpu.experts  # noqa: F401  registers the operator; it needs Triton

        vars(self).update(vars(mixture))  # its layers and settings
        for name in ("w13", "w2"):
            layer, kind = getattr(mixture, name), KINDS[kind_of(getattr(mixture, name))]
            table = kind.table().to(layer.weight.device, torch.float32) if issubclass(kind, Table4Linear) else None
            self.register_buffer(f"{name}_table", table, persistent=False)
        self.activation_name = next(name for name, each in ACTIVATIONS.items() if each is mixture.activation)

    @staticmethod
    def fits(mixture: MixtureOfExperts, args: ModelArgs) -> bool:
        return has_triton() and {kind_of(mixture.w13), kind_of(mixture.w2)} <= READ

    def run(self, x: Tensor, chosen: Tensor) -> Tensor:
        tensors = [
            getattr(layer, name, None) for layer in (self.w13, self.w2) for name in ("weight", "scales", "zeros")
        ]
        others = self.w13.bias, self.w13_table, self.w2.bias, self.w2_table
        return torch.ops.gpt_faster.experts(x, chosen, *tensors, self.activation_name, *others)
