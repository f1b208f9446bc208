"""Attention of few queries a row on CUDA: one Triton kernel between the output of wqkv and the input of wo.

A program takes a part of the cache's slots. It normalises and rotates q and k, writes k and v to the cache and attends;
the query heads of a key head share one reading of its keys and values. The program that ends last merges the parts by
their log-sum-exp (split-KV: Dao et al. 2023). Parts depend on the sizes of the model and on the prefix alone: a row's
result depends neither on the other rows nor on their number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.dot import dot

PROGRAMS = 256  # of one row: two for each multiprocessor of a large GPU
MOST_ROWS, MOST_TOKENS = 256, 64  # of a call, and of each row
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _halves(at, present, D: tl.constexpr, HALF: tl.constexpr):
    """The vectors [D] that begin at `at` [R, 1], in the halves that rope pairs, [R, HALF]: 0 beyond D / 2."""
    d = tl.arange(0, HALF)[None]
    mask = present[:, None] & (d < D // 2)
    return tl.load(at + d, mask, 0.0), tl.load(at + D // 2 + d, mask, 0.0)


@triton.jit
def _store(at, x1, x2, present, D: tl.constexpr, HALF: tl.constexpr):
    """The inverse of `_halves`."""
    d = tl.arange(0, HALF)[None]
    mask = present[:, None] & (d < D // 2)
    tl.store(at + d, x1, mask)
    tl.store(at + D // 2 + d, x2, mask)


@triton.jit
def _rotated(x, at, token, present, cos, sin, norm,
             D: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """The heads at x + at [R] of the tokens [R], normalised and rotated: two halves [R, HALF], 0 beyond D / 2.

    They are rounded to the dtype of x wherever the modules of model.py round.
    """
    dtype = x.dtype.element_ty
    x1, x2 = _halves(x + at[:, None], present, D, HALF)
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    if norm is not None:
        factor = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + EPS)[:, None]
        w1, w2 = _halves(norm + tl.zeros((1, 1), tl.int32), tl.full((1,), True, tl.int1), D, HALF)  # for all rows
        w1, w2 = w1.to(tl.float32), w2.to(tl.float32)
        if OFFSET:
            x1, x2 = x1 * factor * (1 + w1), x2 * factor * (1 + w2)
        else:
            x1, x2 = (x1 * factor).to(dtype).to(tl.float32) * w1, (x2 * factor).to(dtype).to(tl.float32) * w2
        x1, x2 = x1.to(dtype).to(tl.float32), x2.to(dtype).to(tl.float32)
    d = tl.arange(0, HALF)[None]
    mask = present[:, None] & (d < D // 2)
    c = tl.load(cos + token[:, None] * (D // 2) + d, mask, 0.0)
    s = tl.load(sin + token[:, None] * (D // 2) + d, mask, 0.0)
    return (x1 * c - x2 * s).to(dtype), (x2 * c + x1 * s).to(dtype)


@triton.jit
def _put(cache, scales, slot, x1, x2, present, D: tl.constexpr, HALF: tl.constexpr):
    """Write vectors to the slots [R] of one head; if there are scales as codes, see `model.quantize_vectors`."""
    if scales is not None:
        x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
        scale = tl.maximum(tl.maximum(tl.max(tl.abs(x1), 1), tl.max(tl.abs(x2), 1)) / 127, 1e-30)
        tl.store(scales + slot, scale, present)
        x1, x2 = _rounded(x1 / scale[:, None]).to(tl.int8), _rounded(x2 / scale[:, None]).to(tl.int8)
    _store(cache + slot[:, None] * D, x1, x2, present, D, HALF)


@triton.jit
def _rounded(x):
    """To the nearest whole number, ties to even, of float32 below 2^22: the sum has no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23


@triton.jit
def _write(qkv, k_cache, k_scales, v_cache, v_scales, pos, cos, sin, k_norm, row, head, first, end, S,
           H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
           EPS: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """Write the row's new keys and values of one head whose slots are from first to end; others stay."""
    for begin in range(0, S, TOKENS):
        s = begin + tl.arange(0, TOKENS)
        token = row * S + s
        slot = tl.load(pos + token, s < S, -1)
        mine = (slot >= first) & (slot < end)
        if tl.max(mine.to(tl.int32), 0) > 0:
            at = (token * (H + 2 * KV) + H + head) * D
            k1, k2 = _rotated(qkv, at, token, mine, cos, sin, k_norm, D, HALF, EPS, OFFSET)
            _put(k_cache, k_scales, slot, k1, k2, mine, D, HALF)
            v1, v2 = _halves(qkv + (at + KV * D)[:, None], mine, D, HALF)
            _put(v_cache, v_scales, slot, v1, v2, mine, D, HALF)


@triton.jit
def _cached(cache, scales, slot, end, dtype: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """The keys or values of one head, of codes in dtype. No other place reads a cache."""
    x1, x2 = _halves(cache + slot[:, None] * D, slot < end, D, HALF)
    if scales is not None:  # not after the products, because probabilities times scales would leave float16
        scale = tl.load(scales + slot, slot < end, 0.0)[:, None]
        x1, x2 = (x1 * scale).to(dtype), (x2 * scale).to(dtype)
    return x1, x2


@triton.jit
def _attended(q1, q2, k1, k2, v1, v2, seen, top, total, y1, y2, SCALE: tl.constexpr, CAP: tl.constexpr):
    """One more block of slots in a running softmax (Milakov and Gimelshein 2018): top, total, and two halves of y."""
    nothing = tl.zeros((q1.shape[0], k1.shape[0]), tl.float32)
    scores = dot(q2, k2.T, dot(q1, k1.T, nothing)) * SCALE
    if CAP is not None:
        scores = CAP * (2 * tl.sigmoid(2 * scores / CAP) - 1)  # tanh
    scores = tl.where(seen, scores * LOG2_E, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing is seen so far
    kept, p = tl.exp2(top - anchor), tl.exp2(scores - anchor[:, None])
    total = total * kept + tl.sum(p, 1)
    p = p.to(v1.dtype)
    return higher, total, dot(p, v1, y1 * kept[:, None]), dot(p, v2, y2 * kept[:, None])


@triton.jit
def _merged(made, weights, at, present, n_part, n_row, D: tl.constexpr, WIDTH: tl.constexpr):
    """Sums [R, WIDTH] of the rows `at` [R] of made [n_part, n_row, D], weighted by softmax(weights [n_part, n_row]).

    Other programs have written both, so they are read past the cache of this multiprocessor.
    """
    d = tl.arange(0, WIDTH)[None]
    mask = present[:, None] & (d < D)
    top = tl.full(at.shape, float("-inf"), tl.float32)
    for part in tl.range(n_part, loop_unroll_factor=4):
        top = tl.maximum(top, tl.load(weights + part * n_row + at, present, 0.0, cache_modifier=".cg"))
    total, sums = tl.zeros(at.shape, tl.float32), tl.zeros((at.shape[0], WIDTH), tl.float32)
    for part in tl.range(n_part, loop_unroll_factor=64 // at.shape[0]):  # registers hold no more
        p = tl.exp2(tl.load(weights + part * n_row + at, present, 0.0, cache_modifier=".cg") - top)
        its = tl.load(made + (part * n_row + at)[:, None].to(tl.int64) * D + d, mask, 0.0, cache_modifier=".cg")
        total, sums = total + p, sums + p[:, None] * its
    return sums / total[:, None]


@triton.jit
def _hand_over(y1, y2, weight, made, weights, counters, y, at, present, n_row, D: tl.constexpr, HALF: tl.constexpr):
    """Write what a part makes of the rows `at` [R]; the last part to do so merges all of them into y [n_row, D]."""
    n_part, own = tl.num_programs(0), tl.program_id(0) * n_row + at
    tl.store(weights + own, weight, present)
    _store(made + own[:, None].to(tl.int64) * D, y1, y2, present, D, HALF)
    counter = counters + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.debug_barrier()  # every thread has written before one says so
    if tl.atomic_add(counter, 1, sem="acq_rel") == n_part - 1:
        d = tl.arange(0, 2 * HALF)[None]
        merged = _merged(made, weights, at, present, n_part, n_row, D, 2 * HALF)
        tl.store(y + at[:, None] * D + d, merged, present[:, None] & (d < D))
        tl.store(counter, 0)


@triton.jit
def attend_part(qkv, k_cache, k_scales, v_cache, v_scales, cache_rows, pos, cos, sin, q_norm, k_norm, made, weights,
                counters, y, S, n_slots, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                QUERIES: tl.constexpr, TOKENS: tl.constexpr, PART: tl.constexpr, SLOTS: tl.constexpr,
                SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, EPS: tl.constexpr,
                OFFSET: tl.constexpr):  # fmt: skip
    """A part of the slots for up to QUERIES queries of one key head of one row: see `attend`."""
    part, head, row = tl.program_id(0), tl.program_id(1) % KV, tl.program_id(2)
    at_cache = ((row if cache_rows is None else tl.load(cache_rows + row)).to(tl.int64) * KV + head) * n_slots
    k_cache, v_cache = k_cache + at_cache * D, v_cache + at_cache * D
    if k_scales is not None:
        k_scales, v_scales = k_scales + at_cache, v_scales + at_cache
    begin = part * PART
    end = n_slots if part == tl.num_programs(0) - 1 else begin + PART
    _write(qkv, k_cache, k_scales, v_cache, v_scales, pos, cos, sin, k_norm, row, head, begin, end, S,
           H, KV, D, HALF, TOKENS, EPS, OFFSET)  # fmt: skip
    tl.debug_barrier()  # other threads of this program read what was written

    query = tl.program_id(1) // KV * QUERIES + tl.arange(0, QUERIES)  # [tokens, heads]
    present = query < S * (H // KV)
    token, q_head = row * S + query // (H // KV), head * (H // KV) + query % (H // KV)
    own = tl.load(pos + token, present, -1).to(tl.int32)
    at = (token * (H + 2 * KV) + q_head) * D
    q1, q2 = _rotated(qkv, at, token, present, cos, sin, q_norm, D, HALF, EPS, OFFSET)
    top, total = tl.full((QUERIES,), float("-inf"), tl.float32), tl.zeros((QUERIES,), tl.float32)
    y1, y2 = tl.zeros((QUERIES, HALF), tl.float32), tl.zeros((QUERIES, HALF), tl.float32)
    end = tl.minimum(end, tl.max(own, 0) + 1)
    if WINDOW is not None:
        oldest = tl.min(tl.where(present, own, n_slots), 0) - WINDOW + 1
        begin = tl.maximum(begin, tl.maximum(oldest, 0) // SLOTS * SLOTS)
    for first in tl.range(begin, end, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        seen = slot[None] <= own[:, None]
        if WINDOW is not None:
            seen &= slot[None] > own[:, None] - WINDOW
        k1, k2 = _cached(k_cache, k_scales, slot, end, q1.dtype, D, HALF)
        v1, v2 = _cached(v_cache, v_scales, slot, end, q1.dtype, D, HALF)
        top, total, y1, y2 = _attended(q1, q2, k1, k2, v1, v2, seen, top, total, y1, y2, SCALE, CAP)
    kept = tl.where(total > 0, 1 / total, 0.0)[:, None]  # nothing may be seen of a part
    at, n_row = token * H + q_head, tl.num_programs(2) * S * H
    _hand_over(y1 * kept, y2 * kept, top + tl.log2(total), made, weights, counters, y, at, present, n_row, D, HALF)


def new_counters(n_head: int, device: torch.device) -> Tensor:
    """What the parts are counted in: of a row one for each block of 32 queries or more. They are zero between calls."""
    return torch.zeros(MOST_ROWS * n_head * MOST_TOKENS // 32, dtype=torch.int32, device=device)


def attend(qkv: Tensor, k_cache: Tensor, k_scales: Tensor | None, v_cache: Tensor, v_scales: Tensor | None,
           cache_rows: Tensor | None, pos: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None,
           k_norm: Tensor | None, counters: Tensor, norm_offset: bool, eps: float, scale: float, cap: float | None,
           window: int | None, length: int) -> Tensor:  # fmt: skip
    """Write the keys and values of qkv [B, S, H + 2 Hkv, D] at pos [B, S] to the caches [N, Hkv, C, D], then attend.

    k_scales, v_scales: float32 [N, Hkv, C] of caches of int8 codes, None of others.
    cache_rows [B] int64: the row of the cache of each row; None: row b. cos, sin [B, S, 1, D/2] float32; q_norm, k_norm
    [D]: weights of RMSNorm. counters of `new_counters`. window: a query at p sees the slots from p - window + 1 to p;
    None: from 0. length: of the prefix that holds every slot seen; it decides the parts. Returns [B, S, H * D].
    """
    B, S, rows, D = qkv.shape
    KV, n_slots = k_cache.shape[1:3]
    H = rows - 2 * KV
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and D % 16 == 0
    assert B <= MOST_ROWS and S <= MOST_TOKENS
    size = max(64, triton.next_power_of_2(-(-length * KV // PROGRAMS)))
    n_part = -(-length // size)
    half = triton.next_power_of_2(D // 2)
    # the keys and values on their way, and the queries, fit the 99 KB of shared memory that every processor has
    slots, most = 64 if half <= 32 else 32, 64 if half <= 64 else 32
    queries = min(max(16, triton.next_power_of_2(S * H // KV)), most)
    made = qkv.new_empty(n_part, B, S, H, D, dtype=torch.float32)
    weights = made.new_empty(n_part, B, S, H)
    y = qkv.new_empty(B, S, H * D)
    tensors = [each.contiguous() for each in (pos, cos, sin)]
    grid = (n_part, KV * -(-S * H // KV // queries), B)
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        attend_part[grid](
            qkv.contiguous(), k_cache, k_scales, v_cache, v_scales, cache_rows, *tensors, q_norm, k_norm, made, weights,
            counters, y, S, n_slots, H, KV, D, half, queries, min(16, triton.next_power_of_2(S)), size, slots,
            scale, cap, window, eps, norm_offset, num_warps=4 if half <= 64 else 8,
        )  # fmt: skip
    return y


# The schema does not say that the caches are written, because inductor cannot functionalise such an operator inside a
# region. Nothing else in a graph reads a cache whose attention is this operator, and it writes before it reads. Nor
# does the schema name the counters, which are zero again afterwards.
torch.library.define("gpt_faster::attend_cached", torch.library.infer_schema(attend, mutates_args=()))
torch.library.impl("gpt_faster::attend_cached", "CompositeExplicitAutograd", attend)


@torch.library.register_fake("gpt_faster::attend_cached")
def _(qkv, k_cache, *_):
    B, S, rows, D = qkv.shape
    return qkv.new_empty(B, S, (rows - 2 * k_cache.shape[1]) * D)
