"""The fastest form of each layer on each device."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from layers.quantized import Int4Experts, Int4Linear, Int8Experts, layer_of
from model import Attend, ExpertLinear, by_expert, softcap

FEW = 16  # queries a row, or tokens in all, up to which a device's own operators serve


def surely_few(size: int) -> bool:
    """Whether a size is at most 16, in every call that a compiled form with this size serves."""
    if torch.compiler.is_compiling():  # comparing the length of a prompt would compile short ones apart
        return torch.fx.experimental.symbolic_shapes.statically_known_true(size <= FEW)
    return size <= FEW


class StepAttend(Attend):
    """Attention of one query a row in elementary operators, where the compiler can fuse them.

    A call of scaled_dot_product_attention costs more than the work.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache_rows: Tensor | None, mask: Tensor) -> Tensor:
        if q.shape[1] != 1 or not torch.compiler.is_compiling():
            return super().forward(q, k, v, cache_rows, mask)
        B, _, H, D = q.shape
        k, v = (self.attended(each, cache_rows, mask) for each in (k, v))
        q = q.view(B, k.shape[1], -1, 1, D).float() * self.scale
        scores = softcap((q * k[:, :, None].float()).sum(-1), self.cap) + mask[:, None].float()  # [B, Hkv, G, C']
        return (scores.softmax(-1)[..., None] * v[:, :, None].float()).sum(-2).view(B, 1, H, D).to(v.dtype)


class OperatorAttend(StepAttend):
    """Attention by the operator of `kernels/cpu`: of few queries a row, in bfloat16 of any number."""

    def __init__(self, attend: Attend, takes_many: bool):
        super().__init__(attend.scale, attend.cap)
        self.takes_many = takes_many

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache_rows: Tensor | None, mask: Tensor) -> Tensor:
        if not (self.takes_many or surely_few(q.shape[1])) or not k.is_contiguous():  # keys of no cache are not
            return super().forward(q, k, v, cache_rows, mask)
        return torch.ops.gpt_faster.attend(q, k, v, cache_rows, mask, self.scale)


class FewRowsLinear(nn.Module):
    """A bfloat16 linear layer whose weight is read at memory speed for few rows (`kernels/cpu.cpp`)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:  # x [..., in] -> [..., out]
        return torch.ops.gpt_faster.linear_bf16(x, self.weight, self.bias)

    def tensors(self) -> tuple[Tensor, None, Tensor | None]:
        """Weight, scales and bias, as operators of several layers take them."""
        return self.weight, None, self.bias


class CodesLinear(nn.Module):
    """An int8 or int4 linear layer whose weight lies as the instructions of a CPU want it (`kernels/cpu.cpp`).

    Activations in half precision are rounded to int8 in groups of 32 inputs, float32 ones are not. weight uint8
    [tiles, bytes], scales and zeros [tiles, groups, 1 or 2, 16] in the file's dtype, bias float32 [tiles * 16].
    """

    LANES, GROUP = 16, 32  # output rows of a tile; inputs, whose number is padded to a multiple

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.out_features, in_features = layer.codes().shape
        pad = (0, -in_features % self.GROUP, 0, -self.out_features % self.LANES)
        offset = 8 if layer.bits == 4 else 128
        unsigned = F.pad(layer.codes().view(torch.uint8) + offset, pad, value=offset)  # bytes wrap: -1 + 8 is 7
        tiles = unsigned.unflatten(0, (-1, self.LANES))  # [tiles, 16, in]
        fours = tiles.unflatten(2, (-1, 4)).transpose(1, 2)  # [tiles, in / 4, 16, 4]
        weight = fours[:, 0::2] | fours[:, 1::2] << 4 if layer.bits == 4 else fours
        self.register_buffer("weight", weight.flatten(1).contiguous())
        parts = [layer.scales, layer.zeros] if layer.bits == 4 else [layer.scales]
        rows = F.pad(torch.stack(parts, dim=2), (0, 0, 0, 0, 0, pad[-1]))  # [out, groups, parts]
        self.register_buffer("scales", rows.unflatten(0, (-1, self.LANES)).permute(0, 2, 3, 1).contiguous())
        self.register_buffer("bias", None if layer.bias is None else F.pad(layer.bias.float(), (0, pad[-1])))

    def forward(self, x: Tensor) -> Tensor:  # x [..., in] -> [..., out]
        y = torch.ops.gpt_faster.linear_codes(x, self.weight, self.scales, self.bias)
        return y if y.shape[-1] == self.out_features else y[..., : self.out_features]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight, scales and bias, as operators of several layers take them."""
        return self.weight, self.scales, self.bias


class FewRowsExperts(nn.Module):
    """bfloat16 experts whose weights are read at memory speed, only those chosen (`kernels/cpu.cpp`)."""

    def __init__(self, layer: ExpertLinear):
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # as ExpertLinear
        return torch.ops.gpt_faster.linear_experts(x, chosen, self.weight, None)


class CodesExperts(nn.Module):
    """A `CodesLinear` for each of E experts, whose tensors are [E, ...]; only those chosen are read."""

    def __init__(self, layer: Int8Experts | Int4Experts):
        super().__init__()
        each = [CodesLinear(layer.expert(e)) for e in range(len(layer.weight))]
        self.out_features = each[0].out_features
        self.register_buffer("weight", torch.stack([one.weight for one in each]))
        self.register_buffer("scales", torch.stack([one.scales for one in each]))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # as ExpertLinear
        y = torch.ops.gpt_faster.linear_experts(x, chosen, self.weight, self.scales)
        return y if y.shape[-1] == self.out_features else y[..., : self.out_features]


class AnyExperts(nn.Module):
    """Experts on any device, with what the compiler needs: it cannot follow which experts are chosen."""

    def __init__(self, layer: ExpertLinear | Int8Experts | Int4Experts):
        super().__init__()
        for name, tensor in layer.state_dict().items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # as ExpertLinear
        if x.is_cuda and surely_few(chosen.numel()):  # a CUDA graph cannot wait to learn which experts are chosen
            return self.by_copies(x, chosen)
        tensors = dict(self.named_buffers())
        return each_expert(x, chosen, tensors["weight"], tensors.get("scales"), tensors.get("zeros"))

    def by_copies(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The same, each row with a copy of its weight, which the compiler may fuse away."""
        copies = layer_of({name: tensor[chosen.flatten()] for name, tensor in self.named_buffers()})
        weight = copies.weight if isinstance(copies, ExpertLinear) else copies.dequantize()  # [T * K, out, in]
        rows = x.expand(-1, chosen.shape[1], -1).reshape(len(weight), -1, 1)
        return (weight.to(x.dtype) @ rows).view(*chosen.shape, -1)


@torch.library.custom_op("gpt_faster::each_expert", mutates_args=())
def each_expert(x: Tensor, chosen: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None) -> Tensor:
    """`by_expert` as an operator."""
    tensors = {"weight": weight, "scales": scales, "zeros": zeros}
    layer = layer_of({name: tensor for name, tensor in tensors.items() if tensor is not None})
    return by_expert(layer, x, chosen)


@each_expert.register_fake
def _(x, chosen, weight, scales, zeros):
    return x.new_empty(*chosen.shape, weight.shape[1])


class TinygemmLinear(Int4Linear):
    """An int4 layer on CUDA: PyTorch's tinygemm kernel for few rows, in bfloat16; for more the weight is dequantised.

    The kernel's tiles, int32 [out/8, in/(16 t), 32, t/2], stand beside the layer's own codes.
    """

    FEW_ROWS = 16

    def __init__(self, layer: Int4Linear):
        super().__init__(layer.weight, layer.scales, layer.zeros, layer.bias)
        swapped = layer.weight << 4 | layer.weight >> 4  # it wants the even input in the high nibble
        tiles = torch.ops.aten._convert_weight_to_int4pack(swapped, self.inner_k_tiles(layer))
        scales_and_zeros = torch.stack((layer.scales, layer.zeros), dim=2).transpose(0, 1).bfloat16().contiguous()
        # not saved, and weight_bytes counts the codes: a step reads the one or the other
        self.register_buffer("tiles", tiles, persistent=False)
        self.register_buffer("scales_and_zeros", scales_and_zeros, persistent=False)  # [in/g, out, 2]
        self.groupsize = layer.in_features // layer.scales.shape[1]

    @staticmethod
    def inner_k_tiles(layer: Int4Linear) -> int | None:
        """The largest tile that divides the layer; None if it does not fit the kernel at all."""
        if layer.weight.shape[0] % 8:
            return None
        return next((tiles for tiles in (8, 4, 2) if layer.in_features % (16 * tiles) == 0), None)

    def forward(self, x: Tensor) -> Tensor:  # x [..., in] -> [..., out]
        rows = x.flatten(0, -2)
        if len(rows) > self.FEW_ROWS or x.dtype != torch.bfloat16:
            return super().forward(x)
        y = torch.ops.aten._weight_int4pack_mm(rows, self.tiles, self.groupsize, self.scales_and_zeros)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)
