"""Latent attention that reads nothing of the cache but latents, for decoding and few queries."""

import torch
import torch.nn as nn
from torch import Tensor

from layers.formats import QuantizedLinear
from layers.packed import surely_few
from mixers.latent import LatentAttention
from model import Attend


class HeadLinear(nn.Module):
    """A linear layer for each head: weight [H, out, in]."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, H, in] -> [B, S, H, out]
        return torch.einsum("bshi,hoi->bsho", x, self.weight)


class OperatorHeadLinear(HeadLinear):
    """... in bfloat16 by an operator of `kernels/`, to which heads are experts that all tokens choose."""

    def __init__(self, layer: HeadLinear):
        super().__init__(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # [B * S, H, in]
        chosen = torch.arange(x.shape[2], device=x.device).expand(len(rows), -1)
        return torch.ops.gpt_faster.linear_experts(rows, chosen, self.weight, None).view(*x.shape[:3], -1)


class AbsorbedAttention(LatentAttention):
    """Latent attention in which queries are multiplied by wkv_b's rows of keys, and what they find by those of values.

    All heads then attend to the latents as to one key head. Both parts of wkv_b stand here as floats of the model's
    dtype, head by head, made before that layer is packed, which serves prompts: n_head * (unturned + value_dim) *
    latent numbers more, in bfloat16 113 MB for all of DeepSeek-V2-Lite and 2 GB for V3.
    """

    def __init__(self, plain: LatentAttention):
        nn.Module.__init__(self)
        vars(self).update(vars(plain))  # its layers and settings
        layer, dtype = self.wkv_b, self.latent_norm.weight.dtype
        weight = layer.dequantize().to(dtype) if isinstance(layer, QuantizedLinear) else layer.weight.detach()
        keys, values = weight.unflatten(0, (self.n_head, -1)).split((self.unturned, self.value_dim), 1)
        self.absorb, self.unfold = HeadLinear(keys.mT.contiguous()), HeadLinear(values.contiguous())
        self.attend = Attend(self.latent + self.turned, self.scale, None)
        # the plain form makes keys and values of all latents once, and then multiplies shorter vectors for each query
        longer = 2 * self.latent - self.unturned - self.value_dim
        self.few = self.latent * (self.unturned + self.value_dim) // longer if longer > 0 else 1 << 30

    def attended(self, q: Tensor, latents: Tensor, mask: Tensor, *cache) -> Tensor:
        if not cache or not surely_few(q.shape[1], self.few):
            return super().attended(q, latents, mask, *cache)
        stored, cache_rows = cache
        unturned, turned = q.split((self.unturned, self.turned), -1)
        q = torch.cat((self.absorb(unturned), turned), -1)  # [B, S, H, latent + turned]
        return self.unfold(self.attend(q, stored, stored, cache_rows, mask)[..., : self.latent])
