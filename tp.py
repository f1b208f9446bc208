"""Tensor parallelism: the ranks that torchrun started, how weights are split over them, and how the ranks talk.

Each block is split as in Megatron-LM (Shoeybi et al. 2019): heads and the inner width of the FFN are dealt out, so a
block needs two all-reduces. The embedding and the output head are split over the vocabulary.
"""

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from layers.quantized import GROUPSIZES, QuantSpec, replace_
from model import HeadsNorm, MixtureOfExperts, ModelArgs, Transformer
from ranks import Ranks, _listed


@dataclass(frozen=True)
class Split:
    """How a layer's weight [out, in] is dealt out: which dimension, and the sizes of a model that divide it.

    dim -2, column-wise: each rank computes a share of the outputs. dim -1, row-wise: each takes a share of the inputs,
    and the results are summed. Several sizes: the weight is that many blocks of rows, in proportion, each dealt apart.
    """

    dim: int
    sizes: tuple[str, ...]


PLAN = {
    "tok_embeddings": Split(-2, ("vocab_size",)),
    "layers.#.attention.wqkv": Split(-2, ("n_head", "n_kv_head", "n_kv_head")),
    "layers.#.attention.wo": Split(-1, ("n_head",)),
    "layers.#.feed_forward.w13": Split(-2, ("intermediate_size", "intermediate_size")),
    "layers.#.feed_forward.w2": Split(-1, ("intermediate_size",)),
    "layers.#.feed_forward.shared.w13": Split(-2, ("shared_size", "shared_size")),
    "layers.#.feed_forward.shared.w2": Split(-1, ("shared_size",)),
    "output": Split(-2, ("vocab_size",)),
}


JOINT_NORMS = {  # of models whose norms of q and k are of all heads
    "layers.#.attention.q_norm": Split(-1, ("n_head",)),
    "layers.#.attention.k_norm": Split(-1, ("n_kv_head",)),
}


def split_of(module: str, args: ModelArgs) -> Split | None:
    """The plan's entry for a module; None: every rank has all of it."""
    plan = PLAN | JOINT_NORMS if args.joint_qk_norm else PLAN
    return plan.get(re.sub(r"(?<=layers\.)\d+", "#", module))


def share_of(args: ModelArgs, n_rank: int) -> ModelArgs:
    """The sizes of one rank's part: its heads, FFN width and rows of the vocabulary, the last rank's padded.

    Where there are fewer key heads than ranks, neighbouring ranks have the same one.
    """
    return replace(
        args,
        n_head=args.n_head // n_rank,
        n_kv_head=max(1, args.n_kv_head // n_rank),
        intermediate_size=args.intermediate_size // n_rank,
        shared_size=args.shared_size and args.shared_size // n_rank,
        vocab_size=math.ceil(args.vocab_size / n_rank),
    )


def shard(name: str, tensor: Tensor, args: ModelArgs, rank: int, n_rank: int) -> Tensor:
    """One rank's part of a tensor of the whole model, whose sizes are `args`; a view where that is possible.

    One rule for floats, codes, scales and zeros, because all are [..., out, in] up to a factor, or 1 where they say the
    same of a whole row.
    """
    module, _, leaf = name.rpartition(".")
    split = split_of(module, args)
    if split is None:
        return tensor
    dim = split.dim
    if leaf == "bias":  # [out]
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
    counts = [getattr(args, size) for size in split.sizes]
    unit = Fraction(tensor.shape[dim], sum(counts))
    parts, begin = [], 0
    for count in counts:
        n_unit = max(1, count // n_rank)
        first = rank * count // n_rank
        parts.append(tensor.narrow(dim, int((begin + first) * unit), int(n_unit * unit)))
        begin += count
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def require_split(args: ModelArgs, table: dict[str, QuantSpec], n_rank: int) -> None:
    """Raise ValueError, with what would work, if `n_rank` ranks cannot share such a model.

    table: its quantised layers, of which a row-wise split must not cut a group.
    """
    if not divides(args, n_rank):
        fits = [n for n in range(1, args.n_head + 1) if divides(args, n)]
        raise ValueError(
            f"{n_rank} ranks cannot share this model's {args.n_head} heads ({args.n_kv_head} key heads) and FFN of "
            f"{args.intermediate_size}{f' and {args.shared_size}' if args.shared_size else ''}; use {_listed(fits)}"
        )
    widths = {"attention.wo": args.n_head * args.head_dim, "feed_forward.w2": args.intermediate_size}
    widths["shared.w2"] = args.shared_size
    for module, spec in table.items():
        width = next((width for name, width in widths.items() if module.endswith(name)), None)
        if width is not None and spec.groupsize and width // n_rank % spec.groupsize:
            fits = [size for size in GROUPSIZES if width // n_rank % size == 0]
            advice = f"quantise with --groupsize {_listed(fits)}" if fits else "use int8 without groups, or fewer ranks"
            raise ValueError(
                f"{n_rank} ranks split the {width} inputs of {module} into parts of {width // n_rank}, which would cut "
                f"groups of {spec.groupsize}; {advice}"
            )


def divides(args: ModelArgs, n_rank: int) -> bool:
    shared = args.n_kv_head % n_rank == 0 or n_rank % args.n_kv_head == 0
    widths = (args.n_head, args.intermediate_size, args.shared_size or n_rank)
    return shared and all(width % n_rank == 0 for width in widths)


def full_logits(model: Transformer, logits: Tensor, best: int | None = None) -> Tensor:
    """Logits of the whole vocabulary [..., V] from those that `model` returned, on each rank its part [..., V'].

    best: only so many of the largest are needed, others may be -inf; no more of each rank's are sent. None: all.
    """
    ranks, vocab_size = model.ranks, model.args.vocab_size
    if ranks is None:
        return logits
    n_row = logits.shape[-1]
    if ranks.size * n_row > vocab_size:  # padding
        ids = ranks.rank * n_row + torch.arange(n_row, device=logits.device)
        logits = logits.masked_fill(ids >= vocab_size, float("-inf"))
    if best is None or 2 * best >= n_row:
        return ranks.gather(logits).movedim(0, -2).flatten(-2)[..., :vocab_size]
    values, ids = logits.max(-1, keepdim=True) if best == 1 else logits.topk(best)  # topk: any of equal ones
    ids = ids + ranks.rank * n_row
    pairs = ranks.gather(torch.stack((values.float(), ids.float())))  # exact: no vocabulary has more than 2^24
    values, ids = (part.movedim(0, -2).flatten(-2) for part in pairs.unbind(1))  # [..., ranks * best]
    whole = logits.new_full((*logits.shape[:-1], ranks.size * n_row), float("-inf"))
    return whole.scatter(-1, ids.long(), values.to(logits.dtype))[..., :vocab_size]


class SplitEmbedding(nn.Module):
    """An embedding of which this rank has some rows, weight [V', dim]."""

    def __init__(self, embedding: nn.Embedding, ranks: Ranks):
        super().__init__()
        self.weight, self.ranks = embedding.weight, ranks

    def forward(self, tokens: Tensor) -> Tensor:  # [...] -> [..., dim]
        rows = tokens - self.ranks.rank * len(self.weight)
        mine = (rows >= 0) & (rows < len(self.weight))
        x = F.embedding(rows.where(mine, 0), self.weight)
        return self.ranks.sum(x * mine[..., None])


class Summed(nn.Module):
    """A layer whose results on all ranks add up: a row-wise split linear one, or a mixture of experts."""

    def __init__(self, layer: nn.Module, ranks: Ranks):
        super().__init__()
        self.layer, self.ranks = layer, ranks

    def forward(self, x: Tensor) -> Tensor:  # [..., in'] -> [..., out]
        return self.ranks.sum(self.layer(x))


class SplitNorm(HeadsNorm):
    """The norm of all heads as one vector, of which each rank has some."""

    def __init__(self, norm: HeadsNorm, ranks: Ranks):
        nn.Module.__init__(self)
        self.weight, self.eps, self.offset, self.ranks = norm.weight, norm.eps, norm.offset, ranks

    def mean_square(self, h: Tensor) -> Tensor:  # [..., dim'] -> [..., 1]
        return self.ranks.sum(super().mean_square(h)) / self.ranks.size


def apply_tp(model: Transformer, args: ModelArgs, ranks: Ranks) -> None:
    """Join a model built around one rank's share of the weights with the others. args: of the whole model.

    Afterwards `model.args` has the heads and FFN width of this rank, and the vocabulary of the whole; the logits that
    the model returns are this rank's, see `full_logits`.
    """
    model.args = replace(share_of(args, ranks.size), vocab_size=args.vocab_size)
    model.ranks = ranks
    model.tok_embeddings = SplitEmbedding(model.tok_embeddings, ranks)
    for name, layer in list(model.named_modules()):
        split = split_of(name, args)
        of_experts = args.n_expert and ".feed_forward." in name  # which are summed together, once they are weighted
        if isinstance(layer, MixtureOfExperts) or (split is not None and split.dim == -1 and not of_experts):
            joined = SplitNorm if isinstance(layer, HeadsNorm) else Summed
            replace_(model, name, joined(layer, ranks))
