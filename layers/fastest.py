"""The table of fast layers: which form of a layer is the fastest on which device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn

from cli import progress, say
from kernels import cpu
from layers.blocks import FusedBlocks, RegionBlocks
from layers.formats import Int4Linear, Int8Linear, QuantizedLinear
from layers.gpu.attention import GpuAttention
from layers.gpu.experts import GpuExperts
from layers.gpu.linear import CodesOnGpu, GpuBlock, TwoFourOnGpu, codes_on_gpu, has_head_for_gpu, join_head_
from layers.low_rank import WithAdapter
from layers.mixers.latent import AbsorbedAttention, HeadLinear, OperatorHeadLinear
from layers.mixers.recurrent import OperatorDeltaNet
from layers.packed import (
    AnyExperts,
    CodesLinear,
    FewRowsLinear,
    FloatLinear,
    ManyAttend,
    OperatorAttend,
    Permuted,
    StepAttend,
    by_torch,
    fits_torch,
    float_copy,
)
from layers.quantized import LAYERS, replace_
from layers.sparse import ReluFeedForward, SparseLinear, Thresholded
from layers.two_four import PackedTwoFour, TwoFourLinear
from mixers.experts import ExpertLinear, Gate, MixtureOfExperts
from mixers.latent import LatentAttention
from mixers.recurrent.delta_net import DeltaNet
from model import Attend, Attention, Blocks, FeedForward, ModelArgs, Transformer, TransformerBlock


class Row(NamedTuple):
    """One row of the table. None: any."""

    plain: tuple[type[nn.Module], ...]  # the plain classes; that of a quantised layer is its format
    device: str | None
    dtypes: tuple[torch.dtype, ...] | None  # of the model, or of a layer's weight where no model is given
    operators: bool  # whether it needs those of `kernels/cpu.py`
    fits: Callable[[nn.Module, ModelArgs | None], bool] | None  # whether it takes this layer of this model
    fast: Callable[[nn.Module], nn.Module | None]  # the class that is made from the plain one; a model is changed


def is_experts(layer: nn.Module, _: ModelArgs | None) -> bool:
    return layer.weight.ndim == 3


FLOAT, CODES, ALL = (nn.Linear, Gate, ExpertLinear), (Int8Linear, Int4Linear), tuple(LAYERS.values())
BF16, HALF = (torch.bfloat16,), (torch.bfloat16, torch.float16)
KEPT = (*HALF, torch.int8)  # of a 2:4 layer alone; a model in float32 gets dense layers
CUDA_REGIONS = RegionBlocks.fits_cuda_graph
TABLE = [  # the first row that fits is used; where none does, the plain form stays
    #   plain                   device  dtypes operators  fits                 fast
    Row(FLOAT,                  "cpu",  BF16,  True,      None,                FewRowsLinear),
    Row(ALL,                    "cpu",  None,  True,      None,                CodesLinear),
    Row(CODES,                  "cpu",  BF16,  False,     fits_torch,          by_torch),
    Row((nn.Linear, Gate),      "cpu",  HALF,  False,     FloatLinear.fits,    FloatLinear.of),
    Row(ALL,                    "cuda", None,  False,     CodesOnGpu.fits,     codes_on_gpu),
    Row((TwoFourLinear,),       "cpu",  None,  True,      PackedTwoFour.fits,  PackedTwoFour),
    Row((TwoFourLinear,),       "cuda", KEPT,  False,     TwoFourOnGpu.fits,   TwoFourOnGpu),
    Row((Thresholded,),         "cpu",  None,  True,      SparseLinear.fits,   SparseLinear),
    Row((FeedForward,),         "cpu",  None,  True,      ReluFeedForward.fits, ReluFeedForward),
    Row((HeadLinear,),          "cpu",  BF16,  True,      None,                OperatorHeadLinear),
    Row((ExpertLinear, *ALL),   None,   None,  False,     is_experts,          AnyExperts),
    Row((Attend,),              "cpu",  BF16,  True,      ManyAttend.fits,     ManyAttend),
    Row((Attend,),              "cpu",  None,  True,      OperatorAttend.fits, OperatorAttend),
    Row((Attend,),              None,   None,  False,     None,                StepAttend),
    Row((DeltaNet,),            "cpu",  None,  True,      OperatorDeltaNet.fits, OperatorDeltaNet),
    Row((Attention,),           "cuda", HALF,  False,     GpuAttention.fits,   GpuAttention),
    Row((MixtureOfExperts,),    "cuda", HALF,  False,     GpuExperts.fits,     GpuExperts),
    Row((TransformerBlock,),    "cuda", HALF,  False,     GpuBlock.fits,       GpuBlock),
    Row((Blocks,),              "cpu",  None,  True,      FusedBlocks.fits,    FusedBlocks),
    Row((Blocks,),              "cpu",  None,  False,     None,                RegionBlocks),
    Row((Blocks,),              "cuda", None,  False,     CUDA_REGIONS,        RegionBlocks),
    Row((Transformer,),         "cuda", HALF,  False,     has_head_for_gpu,    join_head_),
]  # fmt: skip


def fastest(layer: nn.Module, model: nn.Module | None = None) -> Callable | None:
    """What the first row that fits `layer`, a part of `model`, makes of it; None: the layer itself is the fastest."""
    where = getattr(layer, "weight", model)  # a tensor or a model: both have a device and a dtype
    dtype, args = (layer.weight if model is None else model).dtype, getattr(model, "args", None)
    for row in TABLE:
        if (
            type(layer) in row.plain
            and row.device in (None, where.device.type)
            and (row.dtypes is None or dtype in row.dtypes)
            and (not row.operators or cpu.available())
            and (row.fits is None or row.fits(layer, args))
        ):
            return row.fast
    return None


def rounds_each_row(blocks: nn.Module) -> bool:
    """Whether a CPU gives a token of a prompt the same numbers, however many are read with it, by operators of ours."""
    kinds = {type(module) for module in blocks.modules()}
    # latent attention has a form of its own for many tokens, and how many an expert gets depends on the others
    if any(issubclass(kind, LatentAttention | MixtureOfExperts) for kind in kinds):
        return False
    ours = {CodesLinear, PackedTwoFour} | ({FewRowsLinear} if widens_weights(blocks) else set())
    others = {FewRowsLinear, nn.Linear, Gate, Attend, StepAttend, OperatorAttend, DeltaNet, WithAdapter}
    others |= {*LAYERS.values(), TwoFourLinear, Thresholded, SparseLinear, ReluFeedForward}
    return ManyAttend in kinds and bool(kinds & ours) and not kinds & (others - ours)


def widens_weights(blocks: nn.Module) -> bool:
    """Whether a CPU turns weights of bfloat16 to float32 in each pass over many tokens, in panels of ours."""
    has_bf16 = any(type(module) is FewRowsLinear for module in blocks.modules())
    return has_bf16 and cpu.bf16_rows_apart()


def copy_as_float_(model: nn.Module, memory: int | None) -> None:
    """Replace each quantised layer of which no form reads the codes by a float copy, if twice the copies fit in memory.

    As much is then left for the cache. memory: bytes that are free; None: nobody knows.
    """
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in ALL}
    layers = {name: layer for name, layer in layers.items() if fastest(layer, model) in (None, AnyExperts)}
    weights = sum(layer.scales[..., 0].numel() * layer.in_features for layer in layers.values())
    size = weights * model.dtype.itemsize
    if memory is not None and 2 * size > memory:
        return say(f"Decoding is slow: {len(layers)} layers are unpacked at each step; copies take {size / 1e9:.1f} GB")
    for name in list(layers):
        replace_(model, name, float_copy(layers.pop(name), model.dtype))


def expand_(model: nn.Module) -> None:
    """Replace each 2:4 layer that nothing here reads as it is by one with all weights, and say their size."""
    layers, size = model.named_modules(), 0
    names = [name for name, layer in layers if type(layer) is TwoFourLinear and fastest(layer, model) is None]
    for name in names:
        dense = model.get_submodule(name).dense()
        size += dense.weight.nbytes
        replace_(model, name, dense)
    if names:
        say(f"Nothing here reads 2:4 layers as they are: {len(names)} with all weights take {size / 1e9:.1f} GB")


JOINED = (Attention, FeedForward, MixtureOfExperts, TransformerBlock, Blocks)  # what consists of layers


def pack_(model: nn.Module, memory: int | None = None, apart: bool = False) -> None:
    """Give every layer of a model its fastest form; once, after the weights are in place.

    memory: bytes that are free, as in `copy_as_float_`. apart: only each layer by itself, so that one can be watched,
    or another put in its place.
    """
    expand_(model)
    for name, layer in list(model.named_modules()):  # an attention before its layers, whose weights it needs
        if type(layer) is LatentAttention:
            replace_(model, name, AbsorbedAttention(layer))
        if isinstance(layer, QuantizedLinear) and layer.order is not None:
            replace_(model, name, Permuted(layer))
    for name in [name for name, layer in model.named_modules() if type(layer) in (Thresholded, FeedForward)]:
        layer = model.get_submodule(name)
        if not (apart and type(layer) in JOINED) and (fast := fastest(layer, model)):
            replace_(model, name, fast(layer))
            del layer
    if model.device.type == "cpu" and not cpu.available():
        copy_as_float_(model, memory)
    # names, not layers: a layer that is replaced is freed. Backwards: blocks are packed after what they consist of
    names = [name for name, _ in model.named_modules() if name]
    for name in progress(names[::-1], desc="Packing", unit="layer"):
        layer = model.get_submodule(name)
        fast = None if apart and type(layer) in JOINED else fastest(layer, model)
        if fast is not None:
            replace_(model, name, fast(layer))
    join = None if apart else fastest(model, model)
    if join is not None:
        join(model)
