"""Attention on CUDA in Triton's interpreter, against `Attention` in float64; run by `test_gpu_kernels.py`."""

import pytest
import torch

from kernels.gpu.attention import attend, new_counters
from model import Attention, ModelArgs, additive_mask, rope_table
from tests.tiny import pairwise

KV, N_SLOTS = 2, 80


def case(head_dim, group, tokens, window, softcap, norm, n_row, dtype):
    """The arguments of `attend` for rows at positions of their own, and what `Attention` computes and writes."""
    torch.manual_seed(head_dim + tokens)
    args = ModelArgs(
        dim=8, n_layer=1, n_head=group * KV, n_kv_head=KV, head_dim=head_dim, intermediate_size=8, vocab_size=8,
        max_seq_length=N_SLOTS, qk_norm=norm is not None, norm_offset=norm == "offset", attention_softcap=softcap,
    )  # fmt: skip
    exact = Attention(args, window).double()
    exact.wqkv, exact.wo = torch.nn.Identity(), torch.nn.Identity()
    weights = (None, None)
    if norm:
        for each in (exact.q_norm, exact.k_norm):
            each.weight.data = torch.randn(head_dim).to(dtype).double()
        weights = (exact.q_norm.weight.to(dtype), exact.k_norm.weight.to(dtype))
    length = 66  # two parts of 64 slots
    pos = torch.tensor([[65 - tokens], [0]])[:n_row] + torch.arange(tokens)
    qkv = torch.randn(n_row, tokens, (group + 2) * KV, head_dim).to(dtype)
    k, v = (torch.randn(4, KV, N_SLOTS, head_dim).to(dtype) for _ in "kv")
    cache_rows = torch.tensor([3, 0]) if n_row == 2 else None
    cos, sin = (table[:, :, None] for table in rope_table(args, pos))
    seen = torch.arange(length) <= pos[..., None]
    if window:
        seen &= torch.arange(length) > pos[..., None] - window
    mask, caches = additive_mask(seen, torch.float64), (k.double(), v.double())
    y = exact(qkv.double().flatten(2), pos, cos.double(), sin.double(), mask, *caches, cache_rows)
    counters = new_counters(args.n_head, pos.device)
    how = (*weights, counters, args.norm_offset, args.norm_eps, exact.attend.scale, softcap, window, length)
    return (qkv, k, v, cache_rows, pos, cos, sin, *how), (y, *caches)


FEATURES = {
    "head_dim": [64, 80, 256],
    "group": [1, 3, 8],
    "tokens": [1, 9],
    "window": [None, 20],
    "softcap": [None, 2.0],
    "norm": [None, "weight", "offset"],
    "n_row": [1, 2],
    "dtype": [torch.float16, torch.bfloat16],
}


NAMES, CASES = pairwise(**FEATURES)
CASES = [*CASES, (64, 1, 64, None, None, None, 1, torch.bfloat16)]  # tokens of the longest verification


@torch.no_grad()
@pytest.mark.parametrize(NAMES, CASES)
def test_attention_equals_float64(head_dim, group, tokens, window, softcap, norm, n_row, dtype):
    inputs, wanted = case(head_dim, group, tokens, window, softcap, norm, n_row, dtype)
    y = attend(*inputs)
    assert not inputs[9].any(), "the counters serve the next call"
    for found, exact in zip((y, *inputs[1:3]), wanted, strict=True):
        # q, k and the probabilities are rounded to the dtype
        off = (found.double() - exact).abs().max() / exact.abs().max()
        assert off < 4 * torch.finfo(dtype).eps, off


@torch.no_grad()
def test_a_row_does_not_depend_on_the_rows_beside_it():
    (qkv, k, v, cache_rows, *tables), _ = case(64, 3, 2, None, None, None, 2, torch.float16)
    together = attend(qkv, k.clone(), v.clone(), cache_rows, *tables)
    pos, cos, sin, *how = tables
    alone = attend(qkv[1:], k, v, cache_rows[1:], pos[1:], cos[1:], sin[1:], *how)
    assert torch.equal(alone[0], together[1])
