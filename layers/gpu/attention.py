"""Attention on CUDA; `layers/fastest.py` says where it is used."""

from itertools import chain

import torch
import torch.nn as nn
from torch import Tensor

from layers.packed import has_triton
from mixers.compiled import surely_few
from mixers.norms import RMSNorm
from model import Attention, ModelArgs


class GpuAttention(Attention):
    """Self-attention over the cache for few tokens a row as one kernel; anything else takes the plain form.

    It holds the norms of heads, rope, the write to the cache, soft cap and window.
    """

    def __init__(self, attention: Attention):
        nn.Module.__init__(self)
        vars(self).update(vars(attention))  # its layers and settings
        from kernels.gpu.attention import MOST_ROWS, MOST_TOKENS, new_counters  # it needs Triton

        self.most_rows, self.most_tokens = MOST_ROWS, MOST_TOKENS
        device = next(chain(attention.parameters(), attention.buffers())).device
        counters = new_counters(attention.n_head, device)
        self.register_buffer("counters", counters, persistent=False)
        norm = attention.q_norm
        self.norm = (norm.offset, norm.eps) if isinstance(norm, RMSNorm) else (False, 0.0)

    @staticmethod
    def fits(attention: Attention, args: ModelArgs) -> bool:
        other = args.joint_qk_norm or args.qk_norm_last or args.attention_sinks or args.late_query_scale
        other = other or args.value_norm or attention.heads[2] == 0  # values that are keys, or those of another layer
        other = other or args.attention_gate
        return attention.head_dim in range(32, 257, 16) and not other and has_triton()

    def forward(self, x: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, *cache) -> Tensor:
        few = surely_few(x.shape[0], self.most_rows) and surely_few(x.shape[1], self.most_tokens)
        if not cache or not few:
            return super().forward(x, pos, cos, sin, mask, *cache)
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # [B, S, H + 2 Hkv, D]
        norms = (getattr(norm, "weight", None) for norm in (self.q_norm, self.k_norm))
        how = (*norms, self.counters, *self.norm, self.attend.scale, self.attend.cap, self.window)
        keys, values, rows = cache
        y = torch.ops.gpt_faster.attend_cached(qkv, *keys, *values, rows, pos, cos, sin, *how, mask.shape[-1])
        return self.wo(y)
