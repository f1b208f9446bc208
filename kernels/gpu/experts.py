"""The experts of a mixture on CUDA, in three Triton kernels and without a word to the host.

The first kernel sorts the pairs of token and expert by expert. The other two are linear layers: a program takes a block
of outputs of one expert for some of its pairs, so an expert's weight is read once for them, where and as it is stored,
and that of an expert without tokens never. The grid depends on sizes alone; programs without work end at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.dot import dot
from kernels.gpu.linear import before_hopper, of_bytes


@triton.jit
def sort_pairs(chosen, order, ends, n_pair, n_expert, ITEMS: tl.constexpr, OTHERS: tl.constexpr):
    """order [n_pair]: the pairs sorted by chosen [n_pair], stable. ends [n_expert]: where each expert's pairs end.

    The place of a pair is the number of those before it, and the end of an expert that of an imagined last pair.
    """
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    is_pair = item < n_pair
    expert = tl.where(is_pair, tl.load(chosen + item, is_pair, 0).to(tl.int32), item - n_pair)
    place = tl.zeros((ITEMS,), tl.int32)
    for first in range(0, n_pair, OTHERS):
        other = first + tl.arange(0, OTHERS)
        its = tl.load(chosen + other, other < n_pair, n_expert).to(tl.int32)
        before = (its[None] < expert[:, None]) | ((its[None] == expert[:, None]) & (other[None] < item[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(order + place, item, is_pair)
    tl.store(ends + item - n_pair, place, (item >= n_pair) & (item < n_pair + n_expert))


@triton.jit
def _block(ends, block, n_expert, PAIRS: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a block of at most PAIRS pairs, and where the block begins and the expert's pairs end."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, e < n_expert, 0)
    begin = tl.load(ends + e - 1, (e > 0) & (e < n_expert), 0)
    n_block = (end - begin + PAIRS - 1) // PAIRS
    last = tl.cumsum(n_block, 0)
    its = (last > block) & (last - n_block <= block)  # of one expert at most
    first = begin + (block - last + n_block) * PAIRS
    return tl.sum(tl.where(its, e, 0), 0), tl.sum(tl.where(its, first, 0), 0), tl.sum(tl.where(its, end, 0), 0)


@triton.jit
def _of_groups(tensor, row, inside, group, n_group: tl.constexpr, GROUPS: tl.constexpr):
    """The values of `tensor` [rows, n_group] for GROUPS groups of rows [OUT], in float32 [OUT, GROUPS, 1]."""
    if tensor.dtype.element_ty == tl.int32:  # two bfloat16 values each
        g = group // 2 + tl.arange(0, GROUPS // 2)[None]
        pair = tl.load(tensor + row[:, None] * (n_group // 2) + g, (g < n_group // 2) & inside[:, None], 0)
        values = tl.join(pair << 16, pair & -65536).to(tl.float32, bitcast=True)
    else:
        g = group + tl.arange(0, GROUPS)[None]
        values = tl.load(tensor + row[:, None] * n_group + g, (g < n_group) & inside[:, None], 0.0).to(tl.float32)
    return values.reshape(row.shape[0], GROUPS, 1)


@triton.jit
def _scaled(codes, scales, zeros, row, inside, group, n_group: tl.constexpr, GROUP: tl.constexpr):
    """Codes [OUT, n] of rows [OUT], times scales plus zeros [rows, n_group], GROUP codes for each from `group` on."""
    GROUPS: tl.constexpr = codes.shape[1] // GROUP
    w = codes.reshape(codes.shape[0], GROUPS, GROUP) * _of_groups(scales, row, inside, group, n_group, GROUPS)
    if zeros is not None:
        w += _of_groups(zeros, row, inside, group, n_group, GROUPS)
    return w.reshape(codes.shape[0], GROUPS * GROUP)


@triton.jit
def _of_nibbles(q, table):
    """int4 codes, or what stands for them in a table, in float32."""
    return q.to(tl.float32) - 8 if table is None else tl.load(table + q.to(tl.int32))


@triton.jit
def _product(weight, scales, zeros, table, row, inside, k, x, y, K: tl.constexpr, NIBBLES: tl.constexpr,
             GROUP: tl.constexpr):  # fmt: skip
    """y [OUT, PAIRS] plus the product of the weight's rows [OUT], inputs from k on, and x [PAIRS, IN]."""
    IN: tl.constexpr = x.shape[1]
    if NIBBLES:  # the even input is in the low one
        b = k // 2 + tl.arange(0, IN // 2)
        packed = tl.load(weight + row[:, None] * (K // 2) + b[None], inside[:, None] & (b < K // 2)[None], 0)
        low, high = _of_nibbles(packed & 15, table), _of_nibbles(packed >> 4, table)
        low = _scaled(low, scales, zeros, row, inside, k // GROUP, K // GROUP, GROUP // 2).to(x.dtype)
        high = _scaled(high, scales, zeros, row, inside, k // GROUP, K // GROUP, GROUP // 2).to(x.dtype)
        even, odd = x.reshape(x.shape[0], IN // 2, 2).split()
        return dot(high, odd.T, dot(low, even.T, y))
    i = k + tl.arange(0, IN)
    w = tl.load(weight + row[:, None] * K + i[None], inside[:, None] & (i < K)[None], 0)
    if scales is not None:
        w = of_bytes(w)
    if GROUP is not None:
        w = _scaled(w, scales, zeros, row, inside, k // GROUP, K // GROUP, GROUP)
    return dot(w.to(x.dtype), x.T, y)


@triton.jit
def linear_pairs(x, weight, scales, zeros, bias, table, order, ends, y, n_expert, N, K: tl.constexpr,
                 SHARED: tl.constexpr, ACTIVATION: tl.constexpr, NIBBLES: tl.constexpr, GROUP: tl.constexpr,
                 PAIRS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, EXPERTS: tl.constexpr):  # fmt: skip
    """A block of outputs of one expert for some of its pairs: see `_linear`."""
    expert, first, end = _block(ends, tl.program_id(0), n_expert, PAIRS, EXPERTS)
    if end == 0:
        return
    place = first + tl.arange(0, PAIRS)
    present = place < end
    pair = tl.load(order + place, present, 0).to(tl.int64)  # a prompt's inputs may have more than 2^31 values
    o = tl.program_id(1) * OUT + tl.arange(0, OUT)
    inside = o < N
    row = expert.to(tl.int64) * (N if ACTIVATION is None else 2 * N) + o
    made, up = tl.zeros((OUT, PAIRS), tl.float32), tl.zeros((OUT, PAIRS), tl.float32)
    for k in tl.range(0, K, IN):
        i = k + tl.arange(0, IN)
        its = tl.load(x + (pair // SHARED)[:, None] * K + i[None], present[:, None] & (i < K)[None], 0.0)
        made = _product(weight, scales, zeros, table, row, inside, k, its, made, K, NIBBLES, GROUP)
        if ACTIVATION is not None:
            up = _product(weight, scales, zeros, table, row + N, inside, k, its, up, K, NIBBLES, GROUP)
    if scales is not None and GROUP is None:
        made *= tl.load(scales + row, inside, 0.0).to(tl.float32)[:, None]
        up *= tl.load(scales + row + N, inside & (ACTIVATION is not None), 0.0).to(tl.float32)[:, None]
    if bias is not None:
        made += tl.load(bias + row, inside, 0.0).to(tl.float32)[:, None]
        up += tl.load(bias + row + N, inside & (ACTIVATION is not None), 0.0).to(tl.float32)[:, None]
    if ACTIVATION == "clamped_swiglu":
        made = tl.minimum(made, 7.0)
        made *= tl.sigmoid(1.702 * made) * (tl.minimum(tl.maximum(up, -7.0), 7.0) + 1)
    if ACTIVATION == "relu" or ACTIVATION == "relu2":
        gate = tl.maximum(made, 0.0)
        made = gate * up if ACTIVATION == "relu" else gate * gate * up
    if ACTIVATION == "silu":
        made *= tl.sigmoid(made) * up
    if ACTIVATION == "gelu_tanh":
        made *= tl.sigmoid(1.5957691216057308 * (made + 0.044715 * made * made * made)) * up
    at = pair[:, None] * N + o[None]
    tl.store(y + at, made.T.to(y.dtype.element_ty), present[:, None] & inside[None])


def _linear(x: Tensor, layer: tuple[Tensor | None, ...], order: Tensor, ends: Tensor, activation: str | None) -> Tensor:
    """x [T, in] or [n_pair, in] through weight, scales, zeros, bias and table of a layer [E, out, ...]: [n_pair, out].

    activation: the first half of the outputs goes through it and is multiplied by the second: [n_pair, out / 2].
    """
    weight, scales, zeros, bias, table = layer
    n_pair, n_expert, K = len(order), len(ends), x.shape[1]
    N = weight.shape[1] // (1 if activation is None else 2)
    has_nibbles = 2 * weight.shape[2] == K
    # one scale a row of bytes, without a zero, multiplies the sums
    of_rows = scales is None or (zeros is None and scales.shape[2] == 1 and not has_nibbles)
    group = None if of_rows else K // scales.shape[2]
    pairs = min(max(16, triton.next_power_of_2(n_pair // n_expert)), 64)  # as an expert has on average
    least = max(128, group or 0)  # inputs at a time
    old = before_hopper(x.device)  # its tensor cores take weights from registers, which do not hold the largest blocks
    if pairs == 64:  # of a prompt
        out = 32 if group and (old or group > 128) else 64
        inputs, warps = 64 if scales is None else least, 8
    else:  # small blocks of outputs, because there are few programs
        out, inputs = 32, max(least, min(2 * (group or 0), 256)) if pairs == 16 else least
        warps = 2 if pairs == 16 and inputs == 128 else 8 if old and pairs == 32 and scales is None else 4
    # the compiler prefetches nothing narrower than 4 bytes
    if group and 2 * group <= inputs and scales.dtype == torch.bfloat16 and scales.shape[2] % 2 == 0:
        scales, zeros = (each if each is None else each.view(torch.int32) for each in (scales, zeros))
    y = x.new_empty(n_pair, N)
    linear_pairs[min(n_pair, n_pair // pairs + n_expert), -(-N // out)](
        x, weight, scales, zeros, bias, table, order, ends, y, n_expert, N, K, n_pair // len(x), activation,
        has_nibbles, group, pairs, out, inputs, triton.next_power_of_2(n_expert), num_warps=warps,
    )  # fmt: skip
    return y


def experts(x: Tensor, chosen: Tensor, w13: Tensor, scales13: Tensor | None, zeros13: Tensor | None, w2: Tensor,
            scales2: Tensor | None, zeros2: Tensor | None, activation: str, bias13: Tensor | None = None,
            table13: Tensor | None = None, bias2: Tensor | None = None,
            table2: Tensor | None = None) -> Tensor:  # fmt: skip
    """x [T, dim] through the feed-forwards chosen [T, K] of E experts -> [T, K, dim].

    w13 [E, 2 * size, dim] and w2 [E, dim, size] are of x's dtype, or codes with scales and zeros as `layers.formats`
    stores them. activation: a key of `mixers.activations.ACTIVATIONS`. bias13 [E, 2 * size], bias2 [E, dim]. table13
    and table2 float32 [16]: what nibbles stand for, but those of int4.
    """
    n_pair, n_expert = chosen.numel(), len(w13)
    order, ends = (torch.empty(size, dtype=torch.int32, device=x.device) for size in (n_pair, n_expert))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        sort_pairs[(-(-(n_pair + n_expert) // 32),)](chosen.contiguous(), order, ends, n_pair, n_expert, 32, 128)
        hidden = _linear(x.contiguous(), (w13, scales13, zeros13, bias13, table13), order, ends, activation)
        return _linear(hidden, (w2, scales2, zeros2, bias2, table2), order, ends, None).view(*chosen.shape, -1)


torch.library.define("gpt_faster::experts", torch.library.infer_schema(experts, mutates_args=()))
torch.library.impl("gpt_faster::experts", "CompositeExplicitAutograd", experts)
torch.library.register_fake("gpt_faster::experts")(lambda x, chosen, *_: x.new_empty(*chosen.shape, x.shape[1]))
