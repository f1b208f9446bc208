"""Tensor parallelism: how the weights of a model are dealt out to ranks.

Each block is split as in Megatron-LM (Shoeybi et al. 2019), by heads and by the width of the FFN, so a block needs two
all-reduces. The embedding and the output head are split by the vocabulary.
"""

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from operator import attrgetter

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cli import listed
from layers.gpu.linear import GpuBlock
from layers.quantized import GROUPSIZES, QuantSpec, replace_
from layers.two_four import UNIT
from mixers.experts import MixtureOfExperts
from mixers.layer_kinds import key_heads, projected_heads
from mixers.norms import HeadsNorm
from model import ModelArgs, Transformer
from ranks import Ranks


@dataclass(frozen=True)
class Split:
    """How a layer's weight [out, in] is dealt out: along which dimension, and in units of which sizes of the model.

    dim -2, column-wise: each rank computes some of the outputs. dim -1, row-wise: each rank takes some of the inputs,
    and the results are summed. Several sizes: so many blocks of rows, as large in proportion, each dealt out by itself.
    """

    dim: int
    sizes: tuple[str, ...]


PLAN = {
    "tok_embeddings": Split(-2, ("vocab_size",)),
    "layers.#.attention.wqkv": Split(-2, ("n_head", "n_kv_head", "n_kv_head")),
    "layers.#.attention.wo": Split(-1, ("n_head",)),
    "layers.#.attention.wq": Split(-2, ("n_head",)),
    "layers.#.attention.wq_b": Split(-2, ("n_head",)),
    "layers.#.attention.wkv_b": Split(-2, ("n_head",)),
    "layers.#.attention.attend": Split(-2, ("n_head",)),  # its sinks
    "layers.#.attention": Split(-2, ("delta.n_value_head",)),  # its decay
    "layers.#.attention.wqkvz": Split(-2, 2 * ("delta.key_width",) + 2 * ("delta.value_width",)),
    "layers.#.attention.gates": Split(-2, 2 * ("delta.n_value_head",)),
    "layers.#.attention.conv": Split(-3, 2 * ("delta.key_width",) + ("delta.value_width",)),
    "layers.#.attention.out": Split(-1, ("delta.value_width",)),
    "layers.#.feed_forward.w13": Split(-2, ("intermediate_size", "intermediate_size")),
    "layers.#.feed_forward.w2": Split(-1, ("intermediate_size",)),
    "layers.#.feed_forward.experts.w13": Split(-2, ("intermediate_size", "intermediate_size")),
    "layers.#.feed_forward.experts.w2": Split(-1, ("intermediate_size",)),
    "layers.#.feed_forward.shared.w13": Split(-2, ("shared_size", "shared_size")),
    "layers.#.feed_forward.shared.w2": Split(-1, ("shared_size",)),
    "layer_inputs.embeddings": Split(-2, ("vocab_size",)),
    "output": Split(-2, ("vocab_size",)),
}
JOINT_NORMS = {  # where one norm of q, and one of k, spans all heads
    "layers.#.attention.q_norm": Split(-1, ("n_head",)),
    "layers.#.attention.k_norm": Split(-1, ("n_kv_head",)),
}

SHORT_CONVS = {  # in the place of the layers of gated DeltaNet
    "layers.#.attention.wbcx": Split(-2, 3 * ("short_conv.width",)),
    "layers.#.attention.conv": Split(-3, ("short_conv.width",)),
    "layers.#.attention.out": Split(-1, ("short_conv.width",)),
}
UNGATED = {"layers.#.feed_forward.w13": Split(-2, ("intermediate_size",))}


def split_of(module: str, args: ModelArgs) -> Split | None:
    """The plan's entry for a module; None: every rank has all of it."""
    plan = PLAN | (JOINT_NORMS if args.joint_qk_norm else {}) | (SHORT_CONVS if args.short_conv else {})
    plan |= {} if args.gated else UNGATED
    return plan.get(re.sub(r"(?<=layers\.)\d+", "#", module))


def rank_args(args: ModelArgs, n_rank: int) -> ModelArgs:
    """The sizes of one rank's part of a model; the vocabulary is rounded up, and the last ranks' parts are padded.

    With fewer key heads than ranks, neighbouring ranks have the same one.
    """
    return replace(
        args,
        n_head=args.n_head // n_rank,
        n_kv_head=max(1, args.n_kv_head // n_rank),
        full_kv_head=args.full_kv_head and max(1, args.full_kv_head // n_rank),
        reusing_size=args.reusing_size and args.reusing_size // n_rank,
        delta=args.delta and args.delta.of_rank(n_rank),
        short_conv=args.short_conv and args.short_conv.of_rank(n_rank),
        intermediate_size=args.intermediate_size // n_rank,
        dense_size=args.dense_size and args.dense_size // n_rank,
        shared_size=args.shared_size and args.shared_size // n_rank,
        vocab_size=math.ceil(args.vocab_size / n_rank),
    )


def shard(name: str, tensor: Tensor, args: ModelArgs, rank: int, n_rank: int) -> Tensor:
    """One rank's part of a tensor of the whole model, whose sizes are `args`; a view where that is possible.

    One rule serves floats, codes, scales and zeros: each is [..., out, in], with `in` divided by a constant, or 1 for
    one scale a row.
    """
    module, _, leaf = name.rpartition(".")
    split = split_of(module, args)
    if split is None:
        return tensor
    dim = split.dim
    if leaf in ("bias", "sinks", "A_log", "dt_bias"):  # [out], of experts [E, out]
        if dim == -1:
            return tensor if rank == 0 else torch.zeros_like(tensor)
        dim = -1
    if tensor.shape[dim] == 1:
        return tensor
    if split.sizes == ("vocab_size",):
        n_row = math.ceil(args.vocab_size / n_rank)
        part = tensor[rank * n_row : (rank + 1) * n_row]
        pad = n_row - len(part)
        return F.pad(part, (0, 0, 0, pad)) if pad else part
    counts = [attrgetter(size)(args) for size in split.sizes]
    if module.endswith("attention.wqkv"):  # layers differ in the heads that they make
        counts = [n_head for n_head in projected_heads(args, int(module.split(".")[1])) if n_head]
    unit = Fraction(tensor.shape[dim], sum(counts))
    parts, begin = [], 0
    for count in counts:
        n_unit = max(1, count // n_rank)
        first = rank * count // n_rank
        parts.append(tensor.narrow(dim, int((begin + first) * unit), int(n_unit * unit)))
        begin += count
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def require_split(args: ModelArgs, table: dict[str, QuantSpec], n_rank: int) -> None:
    """Refuse a number of ranks that does not divide the model, with the numbers that do.

    table: its quantised layers; a row-wise split must not cut their groups, nor bytes of positions.
    """
    if n_rank == 1:
        return
    if not divides(args, n_rank):
        fits = [n for n in range(1, args.n_head + 1) if divides(args, n)]
        sizes = " and ".join(str(each) for each in widths(args) if each)
        raise ValueError(
            f"{n_rank} ranks cannot share this model's {args.n_head} heads ({args.n_kv_head} key heads) and FFN of "
            f"{sizes}; use {listed(fits)}"
        )
    inputs = inputs_split(args)
    for module, spec in table.items():
        if spec.ordered:
            raise ValueError(
                f"{module} takes its inputs in an order of its own (GPTQ's desc_act), which ranks cannot share; "
                "give --dequantize, or use one process"
            )
        width = next((width for name, width in inputs.items() if module.endswith(name)), None)
        if width is not None and spec.pattern and width // n_rank % UNIT:
            raise ValueError(
                f"{n_rank} ranks split the {width} inputs of {module} into parts of {width // n_rank}, which would cut "
                f"the positions of {UNIT} inputs of the pattern {spec.pattern}; use fewer ranks, or give --dequantize"
            )
        if width is not None and spec.groupsize and width // n_rank % spec.groupsize:
            fits = [size for size in GROUPSIZES if width // n_rank % size == 0]
            advice = f"quantise with --groupsize {listed(fits)}" if fits else "use int8 without groups, or fewer ranks"
            advice += "; --dequantize makes floats, which can be cut"
            raise ValueError(
                f"{n_rank} ranks split the {width} inputs of {module} into parts of {width // n_rank}, which would cut "
                f"groups of {spec.groupsize}; {advice}"
            )


def inputs_split(args: ModelArgs) -> dict[str, int | None]:
    """Of the layers that are split row-wise, by the ends of their names, the first that fits: how many inputs."""
    inputs = {f"layers.{layer}.feed_forward.w2": args.dense_size for layer in args.dense_layers}
    for layer, window in enumerate(args.windows()):
        value_dim = args.value_dim or key_heads(args, window is not None)[1]
        inputs[f"layers.{layer}.attention.wo"] = args.n_head * value_dim
    if args.reusing_size:
        reusing = range(args.n_layer - args.n_reusing_layer, args.n_layer)
        inputs |= {f"layers.{layer}.feed_forward.w2": args.reusing_size for layer in reusing}
    of_all = {"feed_forward.w2": args.intermediate_size, "experts.w2": args.intermediate_size}
    state = args.short_conv.width if args.short_conv else args.delta and args.delta.value_width
    return inputs | of_all | {"shared.w2": args.shared_size, "attention.out": state}


def widths(args: ModelArgs) -> tuple[int | None, ...]:
    """The widths of the feed-forwards that ranks share."""
    return args.intermediate_size, args.shared_size, args.dense_size, args.reusing_size


def divides(args: ModelArgs, n_rank: int) -> bool:
    counts = [args.n_kv_head, args.full_kv_head or args.n_kv_head]
    shared = all(n_kv_head % n_rank == 0 or n_rank % n_kv_head == 0 for n_kv_head in counts)
    of_states = (args.delta and args.delta.n_key_head, args.short_conv and args.short_conv.width)
    sizes = (args.n_head, *widths(args), *of_states)
    return shared and all((size or 0) % n_rank == 0 for size in sizes)


def full_logits(model: Transformer, logits: Tensor, best: int | None = None) -> Tensor:
    """Logits of the whole vocabulary [..., V], on every rank, from the part [..., V'] that `model` returned there.

    best: how many of the largest are needed; only these are sent, and the others may be -inf. None: all.
    """
    if model.ranks is None:
        return logits
    ranks, vocab_size, n_row = model.ranks.of_stage, model.args.vocab_size, logits.shape[-1]
    if ranks.size * n_row > vocab_size:  # padding
        ids = ranks.rank * n_row + torch.arange(n_row, device=logits.device)
        logits = logits.masked_fill(ids >= vocab_size, float("-inf"))
    if best is None or 2 * best >= n_row:
        whole = ranks.gather(logits).movedim(0, -2).flatten(-2)[..., :vocab_size]
        return model.ranks.from_last_stage(whole)
    # max: the first of equal ones, as argmax
    values, ids = logits.max(-1, keepdim=True) if best == 1 else logits.topk(best)
    ids = ids + ranks.rank * n_row
    pairs = ranks.gather(torch.stack((values.float(), ids.float())))  # exact: no vocabulary has more than 2^24
    pairs = model.ranks.from_last_stage(pairs)
    values, ids = (part.movedim(0, -2).flatten(-2) for part in pairs.unbind(1))  # [..., ranks * best]
    whole = logits.new_full((*logits.shape[:-1], ranks.size * n_row), float("-inf"))
    return whole.scatter(-1, ids.long(), values.to(logits.dtype))[..., :vocab_size]


class SplitEmbedding(nn.Module):
    """This rank's rows of an embedding, weight [V', dim]."""

    def __init__(self, embedding: nn.Embedding, ranks: Ranks):
        super().__init__()
        self.weight, self.ranks = embedding.weight, ranks

    def forward(self, tokens: Tensor) -> Tensor:  # [...] -> [..., dim]
        rows = tokens - self.ranks.rank * len(self.weight)
        mine = (rows >= 0) & (rows < len(self.weight))
        x = F.embedding(rows.where(mine, 0), self.weight)
        return self.ranks.sum(x * mine[..., None])


class Summed(nn.Module):
    """A layer whose outputs are summed over the ranks: a linear layer split row-wise, or a mixture of experts."""

    def __init__(self, layer: nn.Module, ranks: Ranks):
        super().__init__()
        self.layer, self.ranks = layer, ranks

    def forward(self, *inputs: Tensor) -> Tensor:  # [..., in'] -> [..., out]
        return self.ranks.sum(self.layer(*inputs))


class SplitNorm(HeadsNorm):
    """This rank's part of a norm that spans all heads."""

    def __init__(self, norm: HeadsNorm, ranks: Ranks):
        nn.Module.__init__(self)
        self.weight, self.eps, self.offset, self.ranks = norm.weight, norm.eps, norm.offset, ranks

    def mean_square(self, h: Tensor) -> Tensor:  # [..., dim'] -> [..., 1]
        return self.ranks.sum(super().mean_square(h)) / self.ranks.size


def apply_tp(model: Transformer, args: ModelArgs, ranks: Ranks) -> None:
    """Connect a model that holds one rank's part of the weights to the other ranks; on CUDA before `pack_`.

    args: of the whole model. Afterwards `model.args` has the heads and the FFN width of this rank and the vocabulary of
    the whole; the logits that the model returns are this rank's part, see `full_logits`.
    """
    assert not any(isinstance(layer, GpuBlock) for layer in model.layers), "these blocks do not sum over ranks"
    model.args = replace(rank_args(args, ranks.size), vocab_size=args.vocab_size)
    model.ranks = ranks
    if ranks.size == 1:  # of a pipeline stage
        return
    mixtures = tuple(f"{name}." for name, layer in model.named_modules() if isinstance(layer, MixtureOfExperts))
    for name, layer in list(model.named_modules()):
        split = split_of(name, args)
        is_row_wise = split is not None and split.dim == -1
        of_experts = name.startswith(mixtures)  # summed once, in their mixture
        if isinstance(layer, nn.Embedding):
            replace_(model, name, SplitEmbedding(layer, ranks))
        elif isinstance(layer, HeadsNorm):
            replace_(model, name, SplitNorm(layer, ranks))
        elif isinstance(layer, MixtureOfExperts) or (is_row_wise and not of_experts):
            replace_(model, name, Summed(layer, ranks))
