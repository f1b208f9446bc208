"""Forms of layers that are faster on one device than the plain form; `layers/fastest.py` says where each is used."""

import importlib.util

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from layers.quantized import LAYERS, QuantizedLinear
from model import Attend, ExpertLinear, ModelArgs, by_expert, softcap

FEW = 16  # queries a row, or tokens in all, that an operator for few takes at most


def surely_few(size: int, most: int = FEW) -> bool:
    """Whether a size is at most `most`, in every call that a compiled form with this size serves."""
    if torch.compiler.is_compiling():  # a comparison would compile another form for short prompts
        return torch.fx.experimental.symbolic_shapes.statically_known_true(size <= most)
    return size <= most


def has_triton() -> bool:
    """Whether the kernels for GPUs can be compiled."""
    return importlib.util.find_spec("triton") is not None


class StepAttend(Attend):
    """Attention of one query a row in elementary operators, which the compiler fuses into the rest of the step.

    A call of scaled_dot_product_attention costs more than the work.
    """

    def __init__(self, attend: Attend):
        super().__init__(attend.scale, attend.cap)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache_rows: Tensor | None, mask: Tensor) -> Tensor:
        if q.shape[1] != 1 or not torch.compiler.is_compiling():
            return super().forward(q, k, v, cache_rows, mask)
        B, _, H, D = q.shape
        k, v = (self.attended(each, cache_rows, mask) for each in (k, v))
        q = q.view(B, k.shape[1], -1, 1, D).float() * self.scale
        scores = softcap((q * k[:, :, None].float()).sum(-1), self.cap) + mask[:, None].float()  # [B, Hkv, G, C']
        return (scores.softmax(-1)[..., None] * v[:, :, None].float()).sum(-2).view(B, 1, H, D).to(v.dtype)


class OperatorAttend(StepAttend):
    """Attention of few queries a row by an operator of `kernels/`."""

    takes_many = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache_rows: Tensor | None, mask: Tensor) -> Tensor:
        if not (self.takes_many or surely_few(q.shape[1])) or not k.is_contiguous():  # keys of no cache are not
            return super().forward(q, k, v, cache_rows, mask)
        return torch.ops.gpt_faster.attend(q, k, v, cache_rows, mask, self.scale)

    @staticmethod
    def fits(attend: Attend, args: ModelArgs) -> bool:
        return attend.cap is None and args.head_dim in cpu.HEAD_DIMS


class ManyAttend(OperatorAttend):
    """Attention of any number of queries by the same operator."""

    takes_many = True


class FewRowsLinear(nn.Module):
    """A bfloat16 linear layer, or one for each of E experts, that reads its weight at memory speed for few rows."""

    scales = None

    def __init__(self, layer: nn.Linear | ExpertLinear):
        super().__init__()
        self.weight, self.bias = layer.weight, getattr(layer, "bias", None)

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]; of experts as `ExpertLinear`, and only those chosen are read."""
        if chosen is None:
            return torch.ops.gpt_faster.linear_bf16(x, self.weight, self.bias)
        return torch.ops.gpt_faster.linear_experts(x, chosen, self.weight, None)


class CodesLinear(nn.Module):
    """An int8 or int4 linear layer, or one for each of E experts, in the order in which a CPU's instructions read it.

    Activations in half precision are rounded to int8 in groups of 32 inputs, float32 ones are not. weight uint8
    [tiles, bytes], scales and zeros [tiles, groups, 1 or 2, 16] in the file's dtype, bias float32 [tiles * 16]; those
    of experts are [E, ...].
    """

    LANES, GROUP = 16, 32  # output rows of a tile; inputs, whose number is padded to a multiple

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        self.out_features = layer.scales.shape[-2]
        if layer.weight.ndim == 3:  # one by one, which bounds the temporaries
            each = [self.packed(layer.expert(e)) for e in range(len(layer.weight))]
            weight, scales = (torch.stack(tensors) for tensors in zip(*each, strict=True))
        else:
            weight, scales = self.packed(layer)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        pad = (0, -self.out_features % self.LANES)
        self.register_buffer("bias", None if layer.bias is None else F.pad(layer.bias.float(), pad))

    @classmethod
    def packed(cls, layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
        """weight and scales of one layer."""
        codes, offset = layer.codes().view(torch.uint8), 1 << (layer.bits - 1)
        pad = (0, -codes.shape[1] % cls.GROUP, 0, -codes.shape[0] % cls.LANES)
        unsigned = F.pad(codes + offset, pad, value=offset)  # bytes wrap: -1 + 8 is 7
        tiles = unsigned.unflatten(0, (-1, cls.LANES))  # [tiles, 16, in]
        fours = tiles.unflatten(2, (-1, 4)).transpose(1, 2)  # [tiles, in / 4, 16, 4]
        weight = fours[:, 0::2] | fours[:, 1::2] << 4 if layer.bits == 4 else fours
        parts = [layer.scales] if layer.zeros is None else [layer.scales, layer.zeros]
        rows = F.pad(torch.stack(parts, dim=2), (0, 0, 0, 0, 0, pad[-1]))  # [out, groups, parts]
        scales = rows.unflatten(0, (-1, cls.LANES)).permute(0, 2, 3, 1)
        return weight.flatten(1).contiguous(), scales.contiguous()

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]; of experts as `ExpertLinear`, and only those chosen are read."""
        if chosen is None:
            y = torch.ops.gpt_faster.linear_codes(x, self.weight, self.scales, self.bias)
        else:
            y = torch.ops.gpt_faster.linear_experts(x, chosen, self.weight, self.scales)
        return y if y.shape[-1] == self.out_features else y[..., : self.out_features]


class AnyExperts(nn.Module):
    """Experts on any device, compiled or not: the choice of experts hides in an operator."""

    def __init__(self, layer: ExpertLinear | QuantizedLinear):
        super().__init__()
        self.bits = getattr(layer, "bits", None)  # None: float
        for name, tensor in layer.state_dict().items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:  # as ExpertLinear
        # outside of a compiled function a call of an operator in Python would import the compiler: seconds of start-up
        each = each_expert_operator if torch.compiler.is_compiling() else each_expert
        return each(x, chosen, list(self.buffers()), self.bits)


def each_expert(x: Tensor, chosen: Tensor, tensors: list[Tensor], bits: int | None) -> Tensor:
    """`by_expert` of the layer that has these tensors."""
    return by_expert(ExpertLinear(*tensors) if bits is None else LAYERS[bits](*tensors), x, chosen)


# the choice of experts is read on the host, so no CUDA graph can hold this operator
each_expert_operator = torch.library.custom_op(
    "gpt_faster::each_expert", each_expert, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@each_expert_operator.register_fake
def _(x, chosen, tensors, bits):
    return x.new_empty(*chosen.shape, tensors[0].shape[1])
