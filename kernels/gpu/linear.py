"""Linear layers on a GPU in Triton, from the weights as files store them: float, int8, e4m3, int4 or other nibbles.

A thread reads a weight 16 bytes, a chunk, at a time: 8 inputs of bfloat16, 16 of a byte, 32 of nibbles, which lie in
one group; of a 2:4 weight the kept values of 16 inputs in bfloat16, or of 32 in int8. BITS is what an input takes.
`gemv` serves few rows of x by sums in registers, `product` more by the tensor cores. Both may normalise x first, and
add a bias, add a residual or apply a gated activation last, so that nothing else need be launched for it.
"""

import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.dot import dot


@triton.jit
def rows_of(r, N, PAIRS: tl.constexpr):
    """The rows of the weight, of which there are N, that are numbered r; of pairs, gate and up in turn."""
    return r // 2 + (r % 2) * (N // 2) if PAIRS else r


@triton.jit
def chunks_of(w, row, chunk, N, K: tl.constexpr, BITS: tl.constexpr):
    """Chunks of rows of the weight as they are stored, [rows, chunks, elements of a chunk]."""
    WIDTH: tl.constexpr = 128 // w.dtype.element_ty.primitive_bitwidth  # elements of a chunk
    at = chunk[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    start = row.to(tl.int64) * (K * BITS // 128 * WIDTH)  # a head may have more than 2^31 bytes
    mask = (row < N)[:, None, None] & (chunk < K * BITS // 128)[None, :, None]
    return tl.load(w + start[:, None, None] + at[None], mask=mask, other=0)


@triton.jit
def codes_of(q, table, BITS: tl.constexpr):
    """Chunks in float32 [rows, chunks, inputs of a chunk]; codes of four bits are 0 to 15, or stand in a table."""
    if BITS == 4:  # the even input in the low nibble
        q = tl.reshape(tl.join(q & 15, q >> 4), (q.shape[0], q.shape[1], 32))
        return q.to(tl.float32) if table is None else tl.load(table + q.to(tl.int32))
    else:
        return of_bytes(q)


@triton.jit
def spread(q, positions, row, chunk, N, K: tl.constexpr, BITS: tl.constexpr):
    """Chunks of kept values, of each four inputs two, in float32 [rows, chunks, inputs of a chunk]; the others are 0.

    positions: uint8 [N, K / 8], see `layers.two_four`.
    """
    ROWS: tl.constexpr = q.shape[0]
    CHUNKS: tl.constexpr = q.shape[1]
    FOURS: tl.constexpr = q.shape[2] // 2
    at = chunk[:, None] * (FOURS // 2) + tl.arange(0, FOURS // 2)[None, :]
    mask = (row < N)[:, None, None] & (chunk < K * BITS // 128)[None, :, None]
    places = tl.load(positions + row.to(tl.int64)[:, None, None] * (K // 8) + at[None], mask=mask, other=0)
    places = tl.reshape(tl.join(places & 15, places >> 4), (ROWS, CHUNKS, FOURS))[:, :, :, None]
    first, second = tl.split(tl.reshape(of_bytes(q), (ROWS, CHUNKS, FOURS, 2)))
    place = tl.arange(0, 4)[None, None, None, :]
    four = tl.where((places & 3) == place, first[:, :, :, None], 0.0)
    four += tl.where((places >> 2) == place, second[:, :, :, None], 0.0)
    return tl.reshape(four, (ROWS, CHUNKS, 4 * FOURS))


@triton.jit
def weights_of(q, table, positions, row, chunk, N, K: tl.constexpr, BITS: tl.constexpr):
    """Chunks of a weight as `codes_of` or `spread` has them."""
    if positions is None:
        return codes_of(q, table, BITS)
    else:
        return spread(q, positions, row, chunk, N, K, BITS)


@triton.jit
def of_bytes(q):
    """Codes of int8, or floats, or the bits of e4m3 numbers, in float32."""
    if q.dtype == tl.uint8:  # the places of float32, whose exponent has another bias
        bits = q.to(tl.int32)
        return ((bits & 127) << 20 | (bits & 128) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    else:
        return q.to(tl.float32)


@triton.jit
def zeros_of(zeros, scale, row, chunk, N, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """The zero of each chunk for codes as `codes_of` has them, float32 [rows, chunks]."""
    zero = of_groups(zeros, row, chunk, N, K, BITS, GROUP)
    return zero - 8 * scale if BITS == 4 else zero  # files have int4 codes from -8


@triton.jit
def of_groups(values, row, chunk, N, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """The scale or zero of each chunk, float32 [rows, chunks]."""
    at = row[:, None] * (K // GROUP) + (chunk * (128 // BITS) // GROUP)[None, :]
    mask = (row < N)[:, None] & (chunk < K * BITS // 128)[None, :]
    return tl.load(values + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def inputs_of(x, m, chunk, M, K: tl.constexpr, BITS: tl.constexpr):
    """x in float32 [rows of x, chunks, inputs of a chunk]."""
    k = chunk[:, None] * (128 // BITS) + tl.arange(0, 128 // BITS)[None, :]
    mask = (m < M)[:, None, None] & (chunk < K * BITS // 128)[None, :, None]
    return tl.load(x + m.to(tl.int64)[:, None, None] * K + k[None], mask=mask, other=0).to(tl.float32)


@triton.jit
def norm_of(norm, chunk, K: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """What a norm multiplies by, float32 [1, chunks, inputs of a chunk]."""
    k = chunk[:, None] * (128 // BITS) + tl.arange(0, 128 // BITS)[None, :]
    g = tl.load(norm + k, mask=(chunk < K * BITS // 128)[:, None], other=0).to(tl.float32)
    return (g + 1 if OFFSET else g)[None]


@triton.jit
def finish(total, r, m, M, N, scales, bias, residual, y, GROUP: tl.constexpr, ACTIVATION: tl.constexpr):
    """Write y from the sums total [rows of x, rows of the weight]."""
    row = rows_of(r, N, ACTIVATION is not None)
    if scales is not None and GROUP is None:  # one scale a row
        total *= tl.load(scales + row, mask=row < N, other=0).to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        gate, up = tl.split(tl.reshape(total, (total.shape[0], total.shape[1] // 2, 2)))
        # the tanh form of GELU is a sigmoid too: (1 + tanh(u)) / 2 = sigmoid(2 u)
        z = gate if ACTIVATION == "silu" else 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        total = gate * tl.sigmoid(z) * up
        r, N = tl.max(tl.reshape(r // 2, (r.shape[0] // 2, 2)), 1), N // 2  # two rows make one output
    at = m.to(tl.int64)[:, None] * N + r[None, :]
    mask = (m < M)[:, None] & (r < N)[None, :]
    if residual is not None:
        total += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "eps"])
def gemv(
    x, w, scales, zeros, table, positions, bias, norm, residual, y, M, N, eps, K: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: at most BM rows of x by BN rows of the weight. Sums are kept a chunk, and added up last.

    PDL: it may begin before the kernel before it has ended, and so may the one after it: see `overlaps`.
    """
    r, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BM)
    row = rows_of(r, N, ACTIVATION is not None)
    sums = tl.zeros((BM, BN, CHUNKS), tl.float32)
    squares = tl.zeros((BM, CHUNKS), tl.float32)
    for first in range(0, K * BITS // 128, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        stored = chunks_of(w, row, chunk, N, K, BITS)
        if PDL and first == 0:  # weights are on their way; all else may be what the kernel before this one writes
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        codes = weights_of(stored, table, positions, row, chunk, N, K, BITS)
        xs = inputs_of(x, m, chunk, M, K, BITS)
        if norm is not None:
            squares += tl.sum(xs * xs, 2)
            xs *= norm_of(norm, chunk, K, BITS, OFFSET)
        dots = tl.sum(tl.reshape(codes, (1, BN, CHUNKS, 128 // BITS)) * xs[:, None], 3)
        if GROUP is not None:
            scale = of_groups(scales, row, chunk, N, K, BITS, GROUP)
            dots *= scale[None]
            if zeros is not None:
                zero = zeros_of(zeros, scale, row, chunk, N, K, BITS, GROUP)
                dots += zero[None] * tl.sum(xs, 2)[:, None]
        sums += dots
    total = tl.sum(sums, 2)
    if norm is not None:  # the root mean square divides the sum, so the norm costs no second reading of x
        total *= tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
    finish(total, r, m, M, N, scales, bias, residual, y, GROUP, ACTIVATION)


@triton.jit
def as_operand(t, WARPS: tl.constexpr):
    """t [rows, 4 chunks, inputs] as [rows, all inputs], in an order of the inputs that suits the tensor cores.

    Four threads hold the chunks of a row, and the tensor cores take two inputs from each of four threads in turn. The
    order of a sum is free, so a thread's own inputs become those that it gives: no weight goes through shared memory.
    """
    ROWS: tl.constexpr = t.shape[0]
    V: tl.constexpr = t.shape[2]
    t = tl.permute(tl.reshape(t, (ROWS, 4, V // 2, 2)), (0, 2, 1, 3))
    if WARPS is not None:  # the weight: a warp has two blocks of eight rows, which are neighbours to the tensor cores
        t = tl.permute(tl.reshape(t, (2, WARPS, 8, V // 2, 4, 2)), (1, 0, 2, 3, 4, 5))
    return tl.reshape(t, (ROWS, 4 * V))


@triton.jit
def summed(acc, squares, partials, counters, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Whether this program is the last of its tile, and then the sums of all, in a fixed order."""
    tile, n_tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.num_programs(0) * tl.num_programs(1)
    m = tl.arange(0, BM)
    at = tl.arange(0, BN)[:, None] * BM + m[None, :]
    own = partials + (tl.program_id(2) * n_tile + tile) * ((BN + 1) * BM)
    tl.store(own + at, acc)
    tl.store(own + BN * BM + m, squares)
    tl.debug_barrier()  # every thread has written before one says so
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        acc, squares = tl.zeros((BN, BM), tl.float32), tl.zeros((BM,), tl.float32)
        for part in range(SPLIT):
            each = partials + (part * n_tile + tile) * ((BN + 1) * BM)
            acc += tl.load(each + at, cache_modifier=".cg")
            squares += tl.load(each + BN * BM + m, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return last, acc, squares


@triton.jit(do_not_specialize=["M", "eps"])
def product(
    x, w, scales, zeros, table, positions, bias, norm, residual, y, M, N, eps, K: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, partials, counters,
):  # fmt: skip
    """A program: BM rows of x by BN rows of the weight, and each SPLIT-th tile of the inputs."""
    WARPS: tl.constexpr = BN // 16
    t = tl.arange(0, BN)
    r = tl.program_id(1) * BN + t  # in the order of `as_operand`, and, below, in that of memory
    row = rows_of(tl.program_id(1) * BN + t // 8 % WARPS * 16 + t // (8 * WARPS) * 8 + t % 8, N, ACTIVATION is not None)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    acc, squares = tl.zeros((BN, BM), tl.float32), tl.zeros((BM,), tl.float32)
    for first in tl.range(tl.program_id(2) * 4, K * BITS // 128, SPLIT * 4, num_stages=STAGES):
        chunk = first + tl.arange(0, 4)
        stored = chunks_of(w, row, chunk, N, K, BITS)
        weight = weights_of(stored, table, positions, row, chunk, N, K, BITS)
        if GROUP is not None:
            scale = of_groups(scales, row, chunk, N, K, BITS, GROUP)
            weight *= scale[:, :, None]
            if zeros is not None:
                weight += zeros_of(zeros, scale, row, chunk, N, K, BITS, GROUP)[:, :, None]
        xs = inputs_of(x, m, chunk, M, K, BITS)
        if norm is not None:
            squares += tl.sum(tl.sum(xs * xs, 2), 1)
            xs *= norm_of(norm, chunk, K, BITS, OFFSET)
        left, right = as_operand(weight.to(x.dtype.element_ty), WARPS), as_operand(xs.to(x.dtype.element_ty), None)
        acc = dot(left, tl.trans(right), acc)
    last = True
    if SPLIT > 1:
        last, acc, squares = summed(acc, squares, partials, counters, SPLIT, BM, BN)
    if last:
        total = tl.trans(acc)
        if norm is not None:
            total *= tl.rsqrt(squares / K + eps)[:, None]
        finish(total, r, m, M, N, scales, bias, residual, y, GROUP, ACTIVATION)


class Launch(NamedTuple):
    """A kernel with all that it is started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]  # of the compiler

    def run(self) -> None:
        with torch.cuda.device_of(self.arguments["x"]):  # Triton launches on the current device
            self.kernel[self.grid](**self.arguments, **self.options)


FEW = {16: 4, 8: 4, 4: 2}  # bits -> rows up to which sums in registers keep up with the memory
PROGRAMS = 528  # four for each of 132 multiprocessors: enough reads in flight


def before_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it has ended (programmatic dependent launch).

    GPT_FASTER_PDL=1 asks for it. What another kernel writes is read after `gdc_wait` alone.
    """
    asked = os.environ.get("GPT_FASTER_PDL") or "0"
    if asked not in ("0", "1"):
        raise ValueError(f"GPT_FASTER_PDL is {asked!r}; use 1, or 0 for none")
    if asked == "1" and before_hopper(device):
        raise ValueError("GPT_FASTER_PDL=1 needs a GPU of compute capability 9.0 or more; leave it out")
    return asked == "1"


def shape_of(bits: int, rows: int, out: int, inputs: int, old: bool = False) -> dict[str, int]:
    """The sizes of the programs for a layer of this format: of `gemv` or, where they name SPLIT, of `product`.

    old: the tensor cores take x from registers, which do not hold the largest tiles.
    """
    chunks = inputs * bits // 128
    if rows <= FEW[bits]:
        few_programs = out < 8 * PROGRAMS
        return {"BM": triton.next_power_of_2(rows), "BN": 4 if few_programs else 8, "CHUNKS": 64 if chunks > 32 else 32}
    if rows > 64:
        return {"BM": 32 if old else 128, "BN": 128, "SPLIT": 1, "STAGES": 3 if old or bits == 8 else 2}
    BM = max(16, triton.next_power_of_2(rows))
    BN = 128 if BM == 64 else 64
    wanted = PROGRAMS // triton.cdiv(out, BN)
    affordable = chunks // BM  # the sums, written and read, then are half the bytes of the weight
    split = 1 << max(1, min(wanted, affordable, chunks // 4)).bit_length() - 1
    return {"BM": BM, "BN": BN, "SPLIT": split, "STAGES": 4 if BM == 16 else 3}


def new_counters(weight: Tensor) -> Tensor:
    """What programs that split a sum count in; zero between launches."""
    return torch.zeros(triton.cdiv(weight.shape[0], 64), dtype=torch.int32, device=weight.device)


def launch(
    x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, counters: Tensor,
    norm: Tensor | None, eps: float, norm_offset: bool, residual: Tensor | None, activation: str | None,
    table: Tensor | None = None, positions: Tensor | None = None,
) -> Launch:  # fmt: skip
    """How x [rows, in] makes the argument y [rows, out], see `linear`."""
    (rows, K), N = x.shape, weight.shape[0]
    bits = 8 * weight.itemsize * weight.shape[1] // K
    # one scale a row, without a zero, multiplies the sums
    group = None if scales is None or (zeros is None and scales.shape[1] == 1) else K // scales.shape[1]
    sizes = shape_of(bits, max(1, rows), N, K, before_hopper(x.device))
    if table is not None and sizes["BM"] > 16:  # look-ups would be prefetched too: more memory than small GPUs have
        sizes |= {"STAGES": 1}
    if positions is not None:  # zeros that are put back take registers and shared memory: smaller programs
        sizes |= {"BN": 4} if "CHUNKS" in sizes else {"BM": min(sizes["BM"], 64), "STAGES": 2}
    y = x.new_empty(rows, N if activation is None else N // 2)
    tensors = {"x": x, "w": weight, "scales": scales, "zeros": zeros, "table": table, "positions": positions}
    tensors |= {"bias": bias, "norm": norm, "residual": None if residual is None else residual.contiguous()}
    numbers = {"M": rows, "N": N, "eps": eps, "K": K, "BITS": bits, "GROUP": group, "OFFSET": norm_offset}
    arguments = {**tensors, "y": y, **numbers, "ACTIVATION": activation, **sizes}
    BM, BN, split = sizes["BM"], sizes["BN"], sizes.get("SPLIT")
    if split is None:
        pdl = overlaps(x.device)
        options = {"num_warps": 4, "num_stages": 1} | ({"launch_pdl": True} if pdl else {})
        return Launch(gemv, (triton.cdiv(N, BN),), arguments | {"PDL": pdl}, options)
    grid = (triton.cdiv(rows, BM), triton.cdiv(N, BN), split)
    partials = x.new_empty(split * grid[1] * (BN + 1) * BM, dtype=torch.float32) if split > 1 else None
    arguments |= {"partials": partials, "counters": counters if split > 1 else None}
    return Launch(product, grid, arguments, {"num_warps": BN // 16, "num_stages": sizes["STAGES"]})


# Opaque to the compiler, which would freeze the launch that a prompt got into decoding, and would have to prove that no
# weight is written. The counters are, but they are zero again afterwards.
torch.library.define(
    "gpt_faster::linear_on_gpu",
    "(Tensor x, Tensor weight, Tensor? scales, Tensor? zeros, Tensor? bias, Tensor counters, Tensor? norm, float eps, "
    "bool norm_offset, Tensor? residual, str? activation, Tensor? table=None, Tensor? positions=None) -> Tensor",
)


def linear(x: Tensor, weight: Tensor, *others: Tensor | float | str | None) -> Tensor:
    """activation(norm(x) weight^T + bias) + residual.

    x [..., in] in half precision; weight, scales, zeros and bias of a linear layer, a float one in the dtype of x;
    counters of `new_counters`; norm [in] and eps: of an RMSNorm before; residual [..., out]: added last. activation
    "silu" or "gelu_tanh": the weight holds the rows of a gate and of as many values, y is activation(gate) * values.
    table float32 [16]: what nibbles stand for, but those of int4. positions: of the kept values of a 2:4 weight.
    """
    made = launch(x.reshape(-1, x.shape[-1]).contiguous(), weight, *others)
    made.run()
    return made.arguments["y"].view(*x.shape[:-1], made.arguments["y"].shape[1])


torch.library.impl("gpt_faster::linear_on_gpu", "default", linear)


@torch.library.register_fake("gpt_faster::linear_on_gpu")
def _(x, weight, scales, zeros, bias, counters, norm, eps, norm_offset, residual, activation, *_):
    return x.new_empty(*x.shape[:-1], weight.shape[0] // (1 if activation is None else 2))
