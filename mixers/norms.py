"""Norms of the numbers of a token, or of those of one head. args: a `model.ModelArgs`."""

import torch
import torch.nn as nn
from torch import Tensor


class RMSNorm(nn.Module):
    """Root mean square normalisation, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, args):
        super().__init__()
        self.eps, self.offset = args.norm_eps, args.norm_offset
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(self.mean_square(h) + self.eps)
        if self.offset:  # the sum is not rounded to the dtype of the weight, which is small
            return (h * (1 + self.weight.float())).to(x.dtype)
        return h.to(x.dtype) * self.weight

    def mean_square(self, h: Tensor) -> Tensor:  # [..., dim] -> [..., 1]
        return h.square().mean(-1, keepdim=True)


class MeanNorm(RMSNorm):
    """Layer normalisation, with or without a bias (Ba et al. 2016)."""

    def __init__(self, dim: int, args):
        super().__init__(dim, args)
        self.bias = nn.Parameter(torch.zeros(dim)) if args.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = super().forward(h - h.mean(-1, keepdim=True))
        return (h if self.bias is None else h + self.bias).to(x.dtype)


class HeadsNorm(RMSNorm):
    """All heads normalised as one vector."""

    def forward(self, x: Tensor) -> Tensor:  # [B, S, H, D]
        return super().forward(x.flatten(2)).view(x.shape)


def head_norm(n_head: int, head_dim: int, args) -> nn.Module:
    """What q or k, of `n_head` heads, goes through before rope."""
    if args.joint_qk_norm:
        return HeadsNorm(n_head * head_dim, args)
    return RMSNorm(head_dim, args) if args.qk_norm and n_head else nn.Identity()


def block_norm(args) -> RMSNorm:
    """A norm of all numbers of a token."""
    return (MeanNorm if args.mean_norm else RMSNorm)(args.dim, args)
