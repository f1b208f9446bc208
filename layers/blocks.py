"""All blocks of a model as one operator."""

from dataclasses import fields

import torch
import torch.nn as nn
from torch import Tensor

from layers.packed import CodesLinear, FewRowsLinear
from model import ModelArgs, RMSNorm, Transformer, TransformerBlock

# What the operator for all blocks has no code for, unless it is as by default.
UNJOINED = ("full_layers", "joint_qk_norm", "activation", "norm_offset", "pre_norm", "post_norm", "residual_scale")


UNJOINED += ("n_expert",)


def is_joinable(args: ModelArgs) -> bool:
    return all(getattr(args, each.name) == each.default for each in fields(args) if each.name in UNJOINED)


class JoinedBlocks(nn.Module):
    """All blocks of a model as one operator of `kernels/cpu.cpp`, for at most 16 tokens in all if not `takes_many`."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.takes_many = all(block.attention.attends_many for block in model.layers)
        tensors = [tensor for block in model.layers for tensor in self.tensors(block)]
        self.joined = torch.ops.gpt_faster.join_blocks(tensors, model.args.norm_eps, model.layers[0].attention.scale)

    @staticmethod
    def of(model: Transformer) -> "JoinedBlocks | None":
        """The blocks of `model` with its caches; None if the operator does not take them."""
        blocks = [(block.attention, block.feed_forward) for block in model.layers]
        layers = {type(layer) for a, f in blocks for layer in (a.wqkv, a.wo, f.w13, f.w2)}
        packed = layers <= {FewRowsLinear, CodesLinear}  # other dtypes are not, nor what ranks share
        has_kernel = all(attention.attend is not None for attention, _ in blocks)
        sizes_fit = model.args.dim % CodesLinear.LANES == 0 and model.args.intermediate_size % CodesLinear.GROUP == 0
        return JoinedBlocks(model) if packed and has_kernel and sizes_fit else None

    @staticmethod
    def tensors(block: TransformerBlock) -> list[Tensor | None]:
        """In the order that `join_blocks` wants."""
        a, f = block.attention, block.feed_forward
        q_norm, k_norm = (norm.weight if isinstance(norm, RMSNorm) else None for norm in (a.q_norm, a.k_norm))
        first = (block.attention_norm.weight, *a.wqkv.tensors(), q_norm, k_norm, *a.wo.tensors())
        second = (block.ffn_norm.weight, *f.w13.tensors(), *f.w2.tensors())
        return [*first, *second, a.kv_cache.k, a.kv_cache.v]

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the model has caches of its own, and joins its blocks when it sets them up."""

    def forward(self, x: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        return torch.ops.gpt_faster.run_blocks(x, self.joined, pos, cos, sin, mask[:, : x.shape[1]])
