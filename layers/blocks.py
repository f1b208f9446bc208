"""All blocks of a model: each compiled once for all layers, or all of them as one operator."""

import copy
from dataclasses import fields

import torch
import torch.nn as nn
from torch import Tensor

from layers.packed import FEW, CodesLinear, FewRowsLinear, OperatorAttend
from layers.sparse import COLUMNS, SparseLinear, Thresholded
from layers.two_four import PackedTwoFour
from mixers.compiled import surely_few
from mixers.norms import RMSNorm
from model import Blocks, CacheView, Context, FeedForward, KVCache, ModelArgs, TransformerBlock

# The fields of ModelArgs that fused blocks honour, or that do not concern blocks. A model in which any other field
# differs from its default runs layer by layer.
HONOURED = {"dim", "n_layer", "n_head", "n_kv_head", "head_dim", "intermediate_size", "vocab_size", "max_seq_length"}
HONOURED |= {"norm_eps", "rope_base", "rope_scaling", "rope_dim", "sliding_window", "window_rope_base", "qk_norm"}
HONOURED |= {"qkv_bias", "wo_bias", "ffn_bias", "attention_scale", "embedding_scale", "logit_scale", "logit_softcap"}
HONOURED |= {"tie_embeddings", "learned_positions"}


def honours(args: ModelArgs, names: set[str]) -> bool:
    """Whether a form of a model that honours the fields of these names honours all that differ from their defaults."""
    return all(each.name in names or getattr(args, each.name) == each.default for each in fields(args))


@torch.compiler.nested_compile_region
def _region(block: TransformerBlock, *inputs) -> Tensor:
    return block(*inputs)


class RegionBlocks(Blocks):
    """Blocks of which the compiler compiles one for all, in a quarter of the time."""

    @staticmethod
    def fits_cuda_graph(blocks: Blocks, _: ModelArgs | None) -> bool:
        """Whether nothing here reads values on the host: inductor cannot leave a part of a region uncaptured."""
        return not any(getattr(layer, "waits_for_host", False) for layer in blocks.modules())

    def run(self, block: TransformerBlock, *inputs) -> Tensor:
        return _region(block, *inputs)


def is_joinable(layer: nn.Module) -> bool:
    """Whether `join_blocks` takes a layer, which is no rank's part."""
    if type(layer) is SparseLinear:
        return layer.out_features % COLUMNS == 0 and layer.weight.dtype != torch.float32
    if type(layer) is Thresholded:
        return type(layer.layer) is CodesLinear
    return type(layer) in (FewRowsLinear, CodesLinear, PackedTwoFour)


def linear_layers(block: TransformerBlock) -> tuple[nn.Module, ...]:
    return block.attention.wqkv, block.attention.wo, block.feed_forward.w13, block.feed_forward.w2


class FusedBlocks(RegionBlocks):
    """All blocks as one operator of `kernels/`, for as many tokens in all as its attention takes queries a row."""

    def __init__(self, blocks: Blocks):
        super().__init__(blocks)
        attention, eps = blocks[0].attention, blocks[0].ffn_norm.eps
        attended, attend = attention.n_head * attention.head_dim, attention.attend
        layers = [layer for block in blocks for layer in linear_layers(block)]
        tensors = [tensor for block in blocks for tensor in self.tensors(block)]
        thresholds = [getattr(layer, "threshold", -1.0) for layer in layers]  # -1: all inputs count
        by_input = [type(layer) is SparseLinear for layer in layers]
        self.takes_many = attend.takes_many and max(thresholds) < 0
        self.fused = torch.ops.gpt_faster.join_blocks(tensors, thresholds, by_input, attended, eps, attend.scale)

    @staticmethod
    def fits(blocks: Blocks, args: ModelArgs) -> bool:
        """Whether the operator can do the work of these blocks, whose layers are packed."""
        if not honours(args, HONOURED):
            return False
        if not all(isinstance(block.attention.attend, OperatorAttend) for block in blocks):
            return False
        if not all(type(block.feed_forward) is FeedForward for block in blocks):
            return False
        packed = all(is_joinable(layer) for block in blocks for layer in linear_layers(block))
        return packed and args.dim % CodesLinear.LANES == 0 and args.intermediate_size % CodesLinear.GROUP == 0

    @staticmethod
    def tensors(block: TransformerBlock) -> list[Tensor | None]:
        """The tensors of one block in the order of `join_blocks`."""
        a = block.attention
        layers = [each.layer if type(each) is Thresholded else each for each in linear_layers(block)]
        wqkv, wo, w13, w2 = ((each.weight, each.scales, each.bias) for each in layers)
        q_norm, k_norm = (norm.weight if isinstance(norm, RMSNorm) else None for norm in (a.q_norm, a.k_norm))
        return [block.attention_norm.weight, *wqkv, q_norm, k_norm, *wo, block.ffn_norm.weight, *w13, *w2]

    def bind(self, cache: KVCache) -> None:
        tensors = [each for layer in cache.layers for each in (layer.k, layer.k_scales, layer.v, layer.v_scales)]
        cache.handle = torch.ops.gpt_faster.join_cache(tensors)

    def forward(self, x: Tensor, pos: Tensor, contexts: list[Context], cache: CacheView | None) -> Tensor:
        if cache is None or not (self.takes_many or surely_few(x.shape[0] * x.shape[1], FEW)):
            return super().forward(x, pos, contexts, cache)
        cos, sin, mask = contexts[0]  # layers differ in none of them
        handle = cache.cache.handle
        return torch.ops.gpt_faster.run_blocks(x, self.fused, handle, cache.cache_rows, pos, cos, sin, mask)

    def __deepcopy__(self, memo: dict) -> "FusedBlocks":
        return FusedBlocks(Blocks(copy.deepcopy(block, memo) for block in self))
