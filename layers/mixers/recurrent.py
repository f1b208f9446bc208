"""Layers with a state in the place of keys and values, by operators of `kernels/`."""

import torch
import torch.nn as nn
from torch import Tensor

from mixers.recurrent.delta_net import DeltaNet
from model import ModelArgs


class OperatorDeltaNet(DeltaNet):
    """Gated DeltaNet of which all but the linear layers is one operator, for any number of tokens."""

    def __init__(self, plain: DeltaNet):
        nn.Module.__init__(self)
        vars(self).update(vars(plain))  # its layers and settings
        rates = torch.stack((-plain.A_log.float().exp(), plain.dt_bias.float()))
        tensors = {"taps": plain.conv.weight[:, 0].T, "decay_rates": rates, "norm_weight": plain.norm.weight}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().float().contiguous(), persistent=False)

    @staticmethod
    def fits(layer: DeltaNet, _: ModelArgs | None) -> bool:
        return layer.sizes.key_dim % 16 == 0 and layer.sizes.value_dim % 32 == 0

    def forward(self, x: Tensor, pos: Tensor, counts: Tensor, *cache) -> Tensor:
        """As `DeltaNet.forward`, but what follows padding is zeros."""
        if not cache:
            return super().forward(x, pos, counts)
        kept, cache_rows = cache
        weights = (self.taps, self.decay_rates, self.norm_weight)
        inputs = (self.wqkvz(x), self.gates(x).float(), pos, counts)
        return self.out(torch.ops.gpt_faster.delta_net(*inputs, *weights, *kept, cache_rows, self.norm.eps))
