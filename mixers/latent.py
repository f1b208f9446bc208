"""Multi-head latent attention: keys and values of all heads come from one short vector a token (DeepSeek-AI 2024)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mixers.norms import RMSNorm
from mixers.rope import rotate

NORM_EPS = 1e-6  # of the norms of latents, whatever the model's other norms have


def check_latent(args) -> None:
    """Raise ValueError if the fields of a `model.ModelArgs` that concern latent attention contradict each other."""
    if args.kv_latent is None:
        for name in ("q_latent", "value_dim"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name} {getattr(args, name)} is for a model with kv_latent, latent attention")
        return
    if args.rope_dim is None or args.value_dim is None or not args.rope_dim < args.head_dim:
        sizes = f"rope_dim {args.rope_dim} and value_dim {args.value_dim}"
        raise ValueError(f"kv_latent needs value_dim, and rope_dim below head_dim, {args.head_dim}; it has {sizes}")
    if args.n_kv_head != args.n_head:
        raise ValueError(f"latent attention has as many key heads as heads, {args.n_head}, not {args.n_kv_head}")
    others = ("sliding_window", "late_query_scale", "qk_norm", "joint_qk_norm", "attention_softcap", "attention_sinks")
    for name in others:
        if getattr(args, name):
            raise ValueError(f"{name} {getattr(args, name)} is not supported in latent attention")


class LatentAttention(nn.Module):
    """Attention of which the cache holds, for each token, one latent and one key that rope has turned.

    A head's key is what wkv_b makes of the latent, and then the turned key, which all heads share; its value is made
    of the latent too. A head's query has the turned numbers last, and may come from a latent of the queries. args: a
    `model.ModelArgs`.
    """

    def __init__(self, args):
        super().__init__()
        self.n_head, self.scale = args.n_head, args.attention_scale or args.head_dim**-0.5
        self.turned, self.latent, self.value_dim = args.rope_dim, args.kv_latent, args.value_dim
        self.unturned, self.q_latent = args.head_dim - args.rope_dim, args.q_latent
        queries = args.n_head * args.head_dim
        if args.q_latent is None:
            self.wq = nn.Linear(args.dim, queries, bias=False)
        else:
            self.wq_a = nn.Linear(args.dim, args.q_latent, bias=args.qkv_bias)
            self.query_norm = RMSNorm(args.q_latent, args)
            self.query_norm.eps = NORM_EPS
            self.wq_b = nn.Linear(args.q_latent, queries, bias=False)
        self.wkv_a = nn.Linear(args.dim, args.kv_latent + args.rope_dim, bias=args.qkv_bias)
        self.latent_norm = RMSNorm(args.kv_latent, args)
        self.latent_norm.eps = NORM_EPS
        self.wkv_b = nn.Linear(args.kv_latent, args.n_head * (self.unturned + args.value_dim), bias=False)
        self.wo = nn.Linear(args.n_head * args.value_dim, args.dim, bias=args.wo_bias)

    def forward(self, x: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, *cache) -> Tensor:
        """As `model.Attention.forward`; cache: latents and turned keys [N, 1, C, latent + turned], and cache_rows."""
        cos, sin = (table[..., : self.turned // 2] for table in (cos, sin))  # the other pairs stand still
        q, latents = self.queries(x, cos, sin), self.latents(x, cos, sin)
        if cache:
            stored, cache_rows = cache
            rows = torch.arange(len(x), device=pos.device) if cache_rows is None else cache_rows
            stored.write(rows, pos, latents)
        return self.wo(self.attended(q, latents, mask, *cache).flatten(2))

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, S, H, unturned + turned]
        q = self.wq(x) if self.q_latent is None else self.wq_b(self.query_norm(self.wq_a(x)))
        q, turned = q.unflatten(-1, (self.n_head, -1)).split((self.unturned, self.turned), -1)
        return torch.cat((q, rotate(turned, cos, sin)), -1)

    def latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, S, 1, latent + turned]
        latent, key = self.wkv_a(x)[:, :, None].split((self.latent, self.turned), -1)
        return torch.cat((self.latent_norm(latent), rotate(key, cos, sin)), -1)

    def attended(self, q: Tensor, latents: Tensor, mask: Tensor, *cache) -> Tensor:
        """What q [B, S, H, D] finds [B, S, H, value_dim], by keys and values of each head.

        latents [B, S, 1, latent + turned]: of the new tokens; the cache holds them already.
        """
        latents = cache[0].read(cache[1], mask) if cache else latents.transpose(1, 2)
        latent, key = latents.split((self.latent, self.turned), -1)  # [B, 1, C', ...]
        kv = self.wkv_b(latent[:, 0]).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # [B, H, C', ...]
        k, v = kv.split((self.unturned, self.value_dim), -1)
        k = torch.cat((k, key.expand(-1, self.n_head, -1, -1)), -1)
        # PyTorch's fused kernels take values as long as keys only
        v = F.pad(v, (0, max(0, k.shape[-1] - self.value_dim)))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None], scale=self.scale)
        return y[..., : self.value_dim].transpose(1, 2)
