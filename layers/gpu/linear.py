"""Linear layers on CUDA, and blocks made of them; `layers/fastest.py` says where they are used."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from layers.blocks import HONOURED, honours
from layers.formats import QuantizedLinear, Table4Linear
from layers.packed import has_triton
from layers.quantized import LAYERS
from layers.two_four import TwoFourLinear
from mixers.activations import ACTIVATIONS
from mixers.compiled import surely_few
from mixers.norms import RMSNorm
from model import FeedForward, ModelArgs, Transformer, TransformerBlock


class OnGpu(nn.Module):
    """A linear layer as one Triton kernel, which reads the weight where and as it is stored.

    float32 activations, and prompts of a float layer, take the plain form.
    """

    MOST = 64  # rows for which a kernel reads a float weight as fast as the memory gives it

    def __init__(self, layer: nn.Linear | QuantizedLinear):
        nn.Module.__init__(self)
        from kernels.gpu.linear import FEW, new_counters  # registers the operator; it needs Triton

        for name in ("weight", "scales", "zeros", "bias", "order", "positions"):
            tensor = getattr(layer, name, None)
            self.register_buffer(name, None if tensor is None else tensor.detach().contiguous())
        self.register_buffer("counters", new_counters(self.weight), persistent=False)
        numbers = layer.table().to(self.weight.device, torch.float32) if isinstance(layer, Table4Linear) else None
        self.register_buffer("numbers", numbers, persistent=False)
        self.few = FEW[min(16, 8 * self.weight.itemsize * self.weight.shape[1] // layer.in_features)]

    @staticmethod
    def fits(layer: nn.Linear | QuantizedLinear, _: ModelArgs | None) -> bool:
        """Whether each row of the weight consists of blocks of 16 bytes, and Triton is installed."""
        whole = layer.weight.ndim == 2 and layer.weight.shape[1] * layer.weight.itemsize % 16 == 0
        return whole and has_triton()

    def forward(
        self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        """x [..., in] -> [..., out]: the layer of norm(x), or of it activation(gate) * up, plus residual."""
        rows, is_half = x[..., 0].numel(), x.dtype in (torch.bfloat16, torch.float16)
        is_float = self.scales is None and self.positions is None
        if is_half and (not is_float or surely_few(rows, self.MOST)):
            if norm is not None and x.dtype == torch.float16 and not surely_few(rows, self.few):
                x, norm = norm(x), None  # x times the norm's weight alone may be more than the tensor cores' float16
            how = (None, 0.0, False) if norm is None else (norm.weight, norm.eps, norm.offset)
            tensors = (self.weight, self.scales, self.zeros, self.bias, self.counters)
            lasts = (residual, activation, self.numbers, self.positions)
            return torch.ops.gpt_faster.linear_on_gpu(x, *tensors, *how, *lasts)
        y = self.linear(x if norm is None else norm(x))
        if activation is not None:
            gate, up = y.chunk(2, dim=-1)
            y = ACTIVATIONS[activation](gate, up)
        return y if residual is None else residual + y


class FloatOnGpu(OnGpu):
    """Only with what stands beside it, in a block or with the last norm: the compiler's own form takes in that too."""

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class CodesOnGpu(OnGpu):
    @staticmethod
    def fits(layer: QuantizedLinear, args: ModelArgs | None) -> bool:
        """Whether the codes in 16 bytes, which are read at once, share a scale, too."""
        return OnGpu.fits(layer, args) and layer.in_features >= 128 // layer.bits * layer.scales.shape[-1]


class TwoFourOnGpu(OnGpu, TwoFourLinear):
    @staticmethod
    def fits(layer: TwoFourLinear, args: ModelArgs | None) -> bool:
        """Whether the codes of 32 inputs, which are read at once, share a scale, too."""
        return OnGpu.fits(layer, args) and (layer.scales is None or layer.in_features >= 32 * layer.scales.shape[1])


def form_on_gpu(kind: type[QuantizedLinear]) -> type[CodesOnGpu]:
    """The class of such layers on a GPU."""
    return type(f"{kind.__name__.removesuffix('Linear')}OnGpu", (CodesOnGpu, kind), {})


ON_GPU = {kind: form_on_gpu(kind) for kind in LAYERS.values()}


def codes_on_gpu(layer: QuantizedLinear) -> CodesOnGpu:
    return ON_GPU[type(layer)](layer)


KERNEL_ACTIVATIONS = ("silu", "gelu_tanh")
# The fields of ModelArgs that `GpuBlock` honours, or that do not concern it, as those of attention
BLOCK_FIELDS = HONOURED | {"full_layers", "unrotated_layers", "late_query_scale", "joint_qk_norm", "qk_norm_last"}
BLOCK_FIELDS |= {"attention_softcap", "attention_sinks", "activation", "norm_offset"}


class NormedLinear(nn.Module):
    """A layer and the norm before it."""

    def __init__(self, norm: RMSNorm, layer: OnGpu):
        super().__init__()
        self.norm, self.layer = norm, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.norm)


class GpuBlock(nn.Module):
    """A block in which norms, residual sums and the activation are parts of the four linear layers."""

    def __init__(self, block: TransformerBlock):
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        self.wo, self.w13, self.w2 = (on_gpu(each) for each in (attention.wo, feed_forward.w13, feed_forward.w2))
        attention.wqkv, attention.wo = NormedLinear(block.attention_norm, on_gpu(attention.wqkv)), nn.Identity()
        self.attention, self.ffn_norm = attention, block.ffn_norm
        self.activation = next(name for name, each in ACTIVATIONS.items() if each is feed_forward.activation)

    @staticmethod
    def fits(block: TransformerBlock, args: ModelArgs) -> bool:
        """Whether the kernels can do the work of this block, whose layers are packed."""
        if not honours(args, BLOCK_FIELDS) or args.activation not in KERNEL_ACTIVATIONS:
            return False
        if type(block.feed_forward) is not FeedForward:
            return False
        layers = (block.attention.wqkv, block.attention.wo, block.feed_forward.w13, block.feed_forward.w2)
        return all(can_be_on_gpu(layer) for layer in layers)

    def forward(self, x: Tensor, pos: Tensor, *context_and_cache) -> Tensor:  # as TransformerBlock
        x = self.wo(self.attention(x, pos, *context_and_cache), residual=x)
        return self.w2(self.w13(x, self.ffn_norm, activation=self.activation), residual=x)


def can_be_on_gpu(layer: nn.Module) -> bool:
    """Whether `on_gpu` takes this layer; of a rank, one that is summed is no linear layer."""
    return isinstance(layer, OnGpu) or (type(layer) is nn.Linear and OnGpu.fits(layer, None))


def on_gpu(layer: nn.Linear | OnGpu) -> OnGpu:
    return layer if isinstance(layer, OnGpu) else FloatOnGpu(layer)


def has_head_for_gpu(model: Transformer, _: ModelArgs) -> bool:
    return can_be_on_gpu(model.output) and type(model.norm) is RMSNorm


def join_head_(model: Transformer) -> None:
    """Make the last norm a part of the head's kernel."""
    norm = model.norm
    model.norm, model.output = nn.Identity(), NormedLinear(norm, on_gpu(model.output))
    model.norm.weight = norm.weight  # which tells the model's dtype and device
