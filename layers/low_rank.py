"""A layer whose weight has codes, and beside it an adapter: codes cannot take a product of small matrices in."""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class WithAdapter(nn.Module):
    """y = W x + B (A x); a: [r, in], b: [out, r], the scale in it."""

    def __init__(self, layer: nn.Module, a: Tensor, b: Tensor):
        super().__init__()
        self.layer, self.a, self.b = layer, nn.Parameter(a, False), nn.Parameter(b, False)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return self.layer(x) + F.linear(F.linear(x, self.a), self.b)
