"""Attention on CUDA; `layers/fastest.py` says where it is used."""

import torch
import torch.nn as nn
from torch import Tensor

from layers.packed import has_triton, surely_few
from model import Attention, ModelArgs, RMSNorm


class GpuAttention(Attention):
    """Self-attention over the cache for few tokens a row as two kernels; anything else takes the plain form.

    They hold the norms of heads, rope, the write to the cache, soft cap and window.
    """

    MOST = 64  # tokens a row

    def __init__(self, attention: Attention):
        nn.Module.__init__(self)
        import kernels.gpu.attention  # noqa: F401  registers the operator; it needs Triton

        self.n_head, self.n_kv_head, self.head_dim = attention.n_head, attention.n_kv_head, attention.head_dim
        self.window = attention.window
        self.wqkv, self.wo, self.attend = attention.wqkv, attention.wo, attention.attend
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        norm = attention.q_norm
        self.norm = (norm.offset, norm.eps) if isinstance(norm, RMSNorm) else (False, 0.0)

    @staticmethod
    def fits(_: Attention, args: ModelArgs) -> bool:
        return args.head_dim in range(32, 257, 16) and not args.joint_qk_norm and has_triton()

    def forward(self, x: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, *cache: Tensor | None) -> Tensor:
        if not cache or not surely_few(x.shape[1], self.MOST):
            return super().forward(x, pos, cos, sin, mask, *cache)
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # [B, S, H + 2 Hkv, D]
        norms = (getattr(norm, "weight", None) for norm in (self.q_norm, self.k_norm))
        how = (*norms, *self.norm, self.attend.scale, self.attend.cap, self.window)
        return self.wo(torch.ops.gpt_faster.attend_cached(qkv, *cache, pos, cos, sin, *how, mask.shape[-1]))
