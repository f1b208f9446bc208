"""Pipeline stages: the blocks of a model dealt out to ranks that hand hidden rows on to each other.

The first stage has the embedding and the last the head, so a token costs one message of `dim` numbers between two
stages and one with its logits to all. A batch is cut into micro-batches, so that stages work at once (GPipe, Huang et
al. 2019). Each stage may be shared by several ranks, as `tp.py` says.
"""

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mixers.compiled import is_fixed
from mixers.layer_kinds import args_of_layers
from model import Blocks, CacheView, KVCache, ModelArgs, Transformer
from ranks import Ranks

LEAST_TOKENS = 16  # of a micro-batch: with fewer a stage's weights are read again for too little


@dataclass(frozen=True)
class Stage:
    """What one stage has of a model with these args: which blocks, and under which names."""

    args: ModelArgs
    number: int
    count: int

    def __post_init__(self):
        if self.count > self.args.n_layer:
            raise ValueError(
                f"{self.count} pipeline stages are more than the model's {self.args.n_layer} layers; use fewer"
            )
        delta = self.args.delta and set(self.args.delta.layers)
        if delta and not all(delta.intersection(self.layers_of(i)) for i in range(self.count)):
            raise ValueError(f"{self.count} pipeline stages leave one without gated DeltaNet, which is not supported")
        if self.count > 1 and (self.args.n_reusing_layer or self.args.layer_input_size):
            raise ValueError(
                "pipeline stages are not supported for a model whose layers use keys of earlier ones or have inputs of "
                "their own; use ranks alone, without --pipeline_stages"
            )

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    @property
    def layers(self) -> range:
        """The numbers of its layers in the whole model."""
        return self.layers_of(self.number)

    def layers_of(self, number: int) -> range:
        """Those of one of the stages; the first ones have a layer more where they do not divide."""
        size, more = divmod(self.args.n_layer, self.count)
        first = number * size + min(number, more)
        return range(first, first + size + (number < more))

    def own_args(self) -> ModelArgs:
        """The args of a model of this stage's layers alone."""
        if self.count == 1:
            return self.args
        return replace(args_of_layers(self.args, list(self.layers)), tie_embeddings=False)

    def own_name(self, name: str) -> str | None:
        """The name that a tensor or layer of the whole model has here; None: it is not here."""
        if self.count == 1:
            return name
        layer = re.match(r"layers\.(\d+)", name)
        if layer:
            here = int(layer[1]) in self.layers
            return f"layers.{int(layer[1]) - self.layers[0]}{name[layer.end() :]}" if here else None
        absent = {"tok_embeddings": not self.is_first, "output": not self.is_last}
        return None if absent.get(name.partition(".")[0]) else name

    def own(self, by_module: dict[str, Any]) -> dict[str, Any]:
        """What a dictionary by layers of the whole model says of this stage's."""
        return {name: value for module, value in by_module.items() if (name := self.own_name(module))}

    def meta_model(self, args: ModelArgs) -> Transformer:
        """This stage's model without values. args: `own_args`, or the part of one of the stage's ranks."""
        with torch.device("meta"):
            model = Transformer(args)
        if not self.is_first:
            model.tok_embeddings = NoEmbedding(args.dim)
        if not self.is_last:
            model.output = NoHead(args.vocab_size)
        return model


class NoEmbedding(nn.Module):
    """In the place of the embedding, in a stage that takes hidden rows."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, tokens: Tensor) -> Tensor:  # [B, S] -> [B, S, dim] that nothing reads
        return tokens.new_zeros(1, dtype=torch.float32).expand(*tokens.shape, self.dim)


class NoHead(nn.Module):
    """In the place of the head, in a stage that hands hidden rows on."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:  # [..., dim] -> [..., V'] that nothing reads
        return x[..., :1].expand(*x.shape[:-1], self.vocab_size)


class StageBlocks(nn.Module):
    """The blocks of one stage, between what it takes from the one before and what it hands on to the next."""

    def __init__(self, blocks: Blocks, ranks: Ranks, dtype: torch.dtype):
        super().__init__()
        self.blocks, self.ranks, self.dtype, self.least_tokens = blocks, ranks, dtype, LEAST_TOKENS

    def bind(self, cache: KVCache) -> None:
        self.blocks.bind(cache)

    def forward(self, x: Tensor, pos: Tensor, contexts: list[tuple], cache: CacheView | None) -> Tensor:
        """As `Blocks.forward`; of all stages but the last the result is of no use."""
        n_part = n_micro_batch(*pos.shape, self.ranks.n_stage, self.least_tokens)
        if n_part == 1:
            return self.run(x, pos, contexts, cache)
        bounds = [len(pos) * i // n_part for i in range(n_part + 1)]
        parts = []
        for first, end in pairwise(bounds):
            rows = slice(first, end)
            some = [tuple(each[rows] for each in context) for context in contexts]
            parts.append(self.run(x[rows], pos[rows], some, None if cache is None else part_of(cache, first, end)))
        return torch.cat(parts)

    def run(self, x: Tensor, pos: Tensor, contexts: list[tuple], cache: CacheView | None) -> Tensor:
        """One micro-batch."""
        if self.ranks.stage > 0:
            x = self.ranks.receive(x.to(self.dtype))
        x = self.blocks(x, pos, contexts, cache)
        return x if self.ranks.stage == self.ranks.n_stage - 1 else self.ranks.hand_on(x)


def n_micro_batch(n_row: int, length: int, n_stage: int, least_tokens: int) -> int:
    """Into how many parts a batch is cut: enough that all stages work most of the time, none with few tokens.

    With m parts, s stages work for m of m + s - 1 turns.
    """
    if not (is_fixed(n_row) and is_fixed(length)):
        return 1
    return max(1, min(n_row, 2 * n_stage, n_row * length // least_tokens))


def part_of(cache: CacheView, first: int, end: int) -> CacheView:
    """What rows first to end of a batch use of the cache."""
    rows, counts = cache.cache_rows, cache.counts
    rows = torch.arange(first, end, device=cache.slots.device) if rows is None else rows[first:end]
    return cache._replace(cache_rows=rows, counts=None if counts is None else counts[first:end])
