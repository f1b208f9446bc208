"""Linear layers of which decoding does not read all weights.

Inputs that are small, by a threshold of the layer's own, are skipped (TEAL: Liu et al. 2024, arXiv 2408.14690); of a
gated linear unit with a ReLU, the neurons whose gate is 0, which changes nothing.
"""

import contextlib
import mmap

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from layers.formats import Int4Linear, Int8Linear, QuantizedLinear, float_linear
from layers.packed import FEW, product
from mixers.compiled import surely_few
from model import FeedForward, ModelArgs

COLUMNS = 32  # to a multiple of which rows of a weight are padded
LARGE_PAGE = 1 << 21  # bytes


class Thresholded(nn.Module):
    """A linear layer for which inputs of at most `threshold` in magnitude count as 0 where a request has few tokens.

    Those are tokens that are decoded, and checked of a guess; a prompt of more than FEW takes all inputs.
    """

    def __init__(self, layer: nn.Module, threshold: float):
        super().__init__()
        self.layer, self.threshold, self.most = layer, threshold, FEW

    def forward(self, x: Tensor) -> Tensor:  # [B, S, in] -> [B, S, out]
        return self.layer(sparse(x, self.threshold) if surely_few(x.shape[-2], self.most) else x)


def sparse(x: Tensor, threshold: float) -> Tensor:
    return x.masked_fill(x.abs().float() <= threshold, 0)  # as the operator compares


class RowsLinear(nn.Module):
    """The weight of a linear layer in rows that operators of `kernels/` read or leave out one by one.

    weight: floats or int8 codes [n, m], or uint8 [n, m/2] of int4 codes, of each 32 the first 16 in the low nibbles.
    scales: bfloat16, of int4 with the zeros; None: floats. bias: float32.
    """

    def __init__(self, layer: nn.Module, by_input: bool):
        super().__init__()
        coded = isinstance(layer, QuantizedLinear)
        codes = layer.codes() if coded else layer.weight.detach()
        self.by_input, self.out_features, self.is_int4 = by_input, len(codes), coded and layer.bits == 4
        pad = (0, -self.out_features % COLUMNS if by_input else 0)
        weight = F.pad(codes.T, pad) if by_input else codes
        if self.is_int4:
            low, high = (weight.contiguous().view(torch.uint8) + 8 & 15).unflatten(1, (-1, 2, 16)).unbind(2)
            weight = (low | high << 4).flatten(1)
        parts = [each for each in (getattr(layer, "scales", None), getattr(layer, "zeros", None)) if each is not None]
        scales = torch.stack(parts, 1) if parts else None  # [out, 1 or 2, groups]
        if parts and by_input:
            scales = F.pad(scales.permute(2, 1, 0), pad)  # [groups, 1 or 2, out]
        self.register_buffer("weight", in_large_pages(weight))
        self.register_buffer("scales", None if scales is None else in_large_pages(scales))
        self.register_buffer("bias", None if layer.bias is None else F.pad(layer.bias.detach().float(), pad))

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        if type(layer) in (Int8Linear, Int4Linear):
            return layer.weight.ndim == 2 and layer.scales.dtype == torch.bfloat16 and layer.order is None
        return type(layer) is nn.Linear and layer.weight.dtype in (torch.float32, torch.bfloat16)

    def many_rows(self, x: Tensor) -> Tensor:
        """The whole layer: [..., in] -> [..., out]."""
        bias = None if self.bias is None else self.bias[: self.out_features].to(x.dtype)
        return product(x, self.by_output(), bias)

    def by_output(self) -> Tensor:
        """The weight [out, in], of codes in float32."""
        weight = self.weight
        if self.is_int4:
            weight = torch.stack((weight & 15, weight >> 4), 1).unflatten(2, (-1, 16)).transpose(1, 2).flatten(1)
            weight = weight.float() - 8
        weight = weight.T if self.by_input else weight
        if self.scales is not None:
            scales, *zeros = (
                (self.scales.permute(2, 1, 0) if self.by_input else self.scales).float().unbind(1)
            )  # [out, groups]
            groups = weight.unflatten(1, (scales.shape[1], -1)) * scales[..., None]
            weight = (groups + zeros[0][..., None] if zeros else groups).flatten(1)
        return weight[: self.out_features]


def in_large_pages(tensor: Tensor) -> Tensor:
    """The tensor, contiguous; a large one is copied to pages of 2 MB, where the system has them.

    Active rows lie in pages here and there, and a processor keeps the addresses of few pages.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or tensor.nbytes < LARGE_PAGE or tensor.device.type != "cpu":
        return tensor.contiguous()
    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


class SparseLinear(RowsLinear):
    """`Thresholded` by an operator; outputs are padded to 32."""

    def __init__(self, plain: Thresholded):
        super().__init__(plain.layer, by_input=True)
        self.threshold = plain.threshold

    @staticmethod
    def fits(plain: Thresholded, _: ModelArgs | None) -> bool:
        """Whether leaving out rows gains anything. Of int4 it does not: a dense product works with whole numbers."""
        return RowsLinear.takes(plain.layer) and type(plain.layer) is not Int4Linear

    def forward(self, x: Tensor) -> Tensor:  # as Thresholded
        if surely_few(x[..., 0].numel(), FEW):
            how = (self.weight, self.scales, self.bias, self.out_features, self.threshold)
            return torch.ops.gpt_faster.linear_sparse(x, *how)
        return self.many_rows(sparse(x, self.threshold) if surely_few(x.shape[-2], FEW) else x)


class WantedLinear(RowsLinear):
    """A linear layer of which only the outputs are made that are wanted, where there are few rows."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer, by_input=False)

    def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; where wanted [..., out] is 0, any number."""
        if not surely_few(x[..., 0].numel(), FEW):
            return self.many_rows(x)
        return torch.ops.gpt_faster.linear_wanted(x, self.weight, self.scales, self.bias, wanted)


class ReluFeedForward(nn.Module):
    """A feed-forward whose gate, a ReLU, is 0 for most neurons: few tokens read the weights of the others only.

    Without a gate the up projection is in its place, and only the down projection has weights that are not read.
    """

    def __init__(self, plain: FeedForward):
        super().__init__()
        self.activation, half = plain.activation, len(plain.w13.weight) // 2
        self.gate = some_rows(plain.w13, slice(0, half)) if plain.gated else plain.w13
        self.up = WantedLinear(some_rows(plain.w13, slice(half, None))) if plain.gated else None
        self.down = SparseLinear(Thresholded(plain.w2, 0.0))

    @staticmethod
    def fits(plain: FeedForward, args: ModelArgs) -> bool:
        if not args.activation.startswith("relu") or not RowsLinear.takes(plain.w2):
            return False
        w13 = plain.w13
        groups = 1 if not isinstance(w13, QuantizedLinear) else w13.scales.shape[1]
        return not plain.gated or (RowsLinear.takes(w13) and w13.in_features % (COLUMNS * groups) == 0)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, dim] -> [B, S, dim]
        gate = self.gate(x)
        return self.down(self.activation(gate, 1 if self.up is None else self.up(x, F.relu(gate))))


def some_rows(layer: nn.Module, rows: slice) -> nn.Module:
    """A layer with some of the outputs of a linear one, in memory of its own: compilers take no two views of one."""
    if isinstance(layer, QuantizedLinear):
        return type(layer)(**{name: tensor[rows].clone() for name, tensor in layer.named_buffers()})
    return float_linear(layer.weight[rows].clone(), None if layer.bias is None else layer.bias[rows].clone())
