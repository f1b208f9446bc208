"""Attention on CUDA in Triton's interpreter, against `Attention` in float64; run by `test_gpu_kernels.py`."""

import pytest
import torch

from kernels.gpu.attention import attend, new_counters
from mixers.layer_kinds import Vectors, quantize_vectors
from mixers.rope import rope_table
from model import Attention, ModelArgs, additive_mask
from tests.tiny import pairwise

KV, N_SLOTS = 2, 80


def case(head_dim, group, tokens, window, softcap, norm, n_row, dtype, cache_dtype=None):
    """The arguments of `attend` for rows at positions of their own, and what `Attention` computes and writes."""
    torch.manual_seed(head_dim + tokens)
    args = ModelArgs(
        dim=8, n_layer=1, n_head=group * KV, n_kv_head=KV, head_dim=head_dim, intermediate_size=8, vocab_size=8,
        max_seq_length=N_SLOTS, qk_norm=norm is not None, norm_offset=norm == "offset", attention_softcap=softcap,
        sliding_window=window,
    )  # fmt: skip
    exact = Attention(args, 0).double()
    exact.wqkv, exact.wo = torch.nn.Identity(), torch.nn.Identity()
    weights = (None, None)
    if norm:
        for each in (exact.q_norm, exact.k_norm):
            each.weight.data = torch.randn(head_dim).to(dtype).double()
        weights = (exact.q_norm.weight.to(dtype), exact.k_norm.weight.to(dtype))
    length = 66  # two parts of 64 slots
    pos = torch.tensor([[65 - tokens], [0]])[:n_row] + torch.arange(tokens)
    qkv = torch.randn(n_row, tokens, (group + 2) * KV, head_dim).to(dtype)
    k, v = (Vectors(torch.randn(4, KV, N_SLOTS, head_dim).to(dtype)) for _ in "kv")
    if cache_dtype == torch.int8:
        k, v = (Vectors(*quantize_vectors(each.data)) for each in (k, v))
    cache_rows = torch.tensor([3, 0]) if n_row == 2 else None
    cos, sin = (table[:, :, None] for table in rope_table(args, pos))
    seen = torch.arange(length) <= pos[..., None]
    if window:
        seen &= torch.arange(length) > pos[..., None] - window
    mask, caches = additive_mask(seen, torch.float64), [Vectors(each.data.double()) for each in (k, v)]
    if cache_dtype == torch.int8:
        caches = [Vectors(*(tensor.clone() for tensor in each)) for each in (k, v)]
    y = exact(qkv.double().flatten(2), pos, cos.double(), sin.double(), mask, *caches, cache_rows)
    counters = new_counters(args.n_head, pos.device)
    how = (*weights, counters, args.norm_offset, args.norm_eps, exact.attend.scale, softcap, window, length)
    return (qkv, *k, *v, cache_rows, pos, cos, sin, *how), (y, *(numbers(*each) for each in caches))


def numbers(data, scales):
    return data.double() if scales is None else data.double() * scales.double()[..., None]


FEATURES = {
    "head_dim": [64, 80, 256],
    "group": [1, 3, 8],
    "tokens": [1, 9],
    "window": [None, 20],
    "softcap": [None, 2.0],
    "norm": [None, "weight", "offset"],
    "n_row": [1, 2],
    "dtype": [torch.float16, torch.bfloat16],
    "cache_dtype": [None, torch.int8],
}


NAMES, CASES = pairwise(**FEATURES)
CASES = [*CASES, (64, 1, 64, None, None, None, 1, torch.bfloat16, None)]  # tokens of the longest verification


@torch.no_grad()
@pytest.mark.parametrize(NAMES, CASES)
def test_attention_equals_float64(head_dim, group, tokens, window, softcap, norm, n_row, dtype, cache_dtype):
    inputs, wanted = case(head_dim, group, tokens, window, softcap, norm, n_row, dtype, cache_dtype)
    y = attend(*inputs)
    assert not inputs[11].any(), "the counters serve the next call"
    # q, k and the probabilities are rounded to the dtype; a new key may be rounded to the neighbour of its code
    allowed = 4 * torch.finfo(dtype).eps + (0 if cache_dtype is None else 1 / 127)
    for found, exact in zip((y, numbers(*inputs[1:3]), numbers(*inputs[3:5])), wanted, strict=True):
        off = (found.double() - exact).abs().max() / exact.abs().max()
        assert off < allowed, off


@torch.no_grad()
def test_a_row_does_not_depend_on_the_rows_beside_it():
    (qkv, k, _, v, _, cache_rows, *tables), _ = case(64, 3, 2, None, None, None, 2, torch.float16)
    together = attend(qkv, k.clone(), None, v.clone(), None, cache_rows, *tables)
    pos, cos, sin, *how = tables
    alone = attend(qkv[1:], k, None, v, None, cache_rows[1:], pos[1:], cos[1:], sin[1:], *how)
    assert torch.equal(alone[0], together[1])
