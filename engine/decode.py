"""The decoding loop: prefill, one step, and the stream of steps.

Shapes: B rows, S tokens of a row, V vocabulary. A cache has a row for each of them, or more.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from engine.cache import holds, prefix_length
from engine.sampling import Sampling, next_token
from kernels import cpu
from layers.packed import FEW
from model import CacheView, KVCache, Transformer

PREFILL_CHUNK = 512  # prompt tokens a row in one forward: bounds mask and activations, and skips what none may see


def least_chunk(device: torch.device) -> int:
    """Tokens of a prompt from which on the operators for prompts compute them, which round in another way."""
    return 64 if device.type == "cpu" and cpu.isa() == "amx" else FEW + 1


def chunk_end(begin: int, length: int, size: int, device: torch.device) -> int:
    """Where the chunk of a prompt ends that begins there: the last one takes in what would be too few for a chunk."""
    end = begin + size
    return length if length - end < least_chunk(device) else end


class Chunk(NamedTuple):
    """New tokens of every row: the first counts[b] of tokens[b]."""

    tokens: Tensor  # [B, n]
    counts: Tensor  # [B]


def decode_one_token(
    model: Transformer, token: Tensor, pos: Tensor, cache: CacheView, sampling: Sampling
) -> tuple[Tensor, Tensor]:  # token, pos [B, 1] -> token, pos [B, 1]
    """One step: the token that follows `token` at `pos`, and its position."""
    token = token.clamp(min=0)  # the step after NO_TOKEN may run before anyone has read that
    return next_token(model, model(token, pos, cache), pos, cache, sampling), pos + 1


def forward_chunk(model: Transformer, tokens: Tensor, pos: Tensor, cache: CacheView) -> Tensor:
    """What the blocks make of a chunk of prompts [B, S]. The head is no part of it: few chunks, and places, need it."""
    return model.hidden(tokens, pos, cache)


@torch.inference_mode()
def prefill(
    model: Transformer,
    cache: KVCache,
    prompts: list[list[int]],
    sampling: Sampling,
    start: int = 0,
    forward: Callable = forward_chunk,
) -> tuple[Tensor, Tensor]:
    """Read the prompts and draw each row's next token: token and pos [B, 1], its position. See `read_prompts`."""
    logits, pos = read_prompts(model, cache, prompts, start, forward)
    return next_token(model, logits[:, None], pos - 1, cache.view(), sampling), pos


@torch.inference_mode()
def read_prompts(
    model: Transformer,
    cache: KVCache,
    prompts: list[list[int]],
    start: int = 0,
    forward: Callable = forward_chunk,
    cache_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the prompts, whose first tokens stand at position `start`, into the rows of the cache (None: the first B).

    Returns the logits [B, V] after each prompt and the position [B, 1] that follows it. Prompts are padded on the
    right: each row takes the logits of its own last token, and pad slots are overwritten before any row reaches them.
    The cache must hold one token more than the longest prompt.
    """
    if start:
        rows = range(len(prompts)) if cache_rows is None else cache_rows.tolist()
        if not all(holds(cache, row, start) for row in rows):
            raise ValueError(f"no state of the first {start} tokens is kept; read the prompts from their beginning")
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    longest = max(2, *map(len, prompts))  # a chunk of one column would be compiled apart
    padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    logits, end = None, 0
    while end < longest:
        begin, end = end, chunk_end(end, longest, PREFILL_CHUNK, model.device)
        # not a slice of one tensor: the compiled form depends on strides
        chunk = torch.tensor([ids[begin:end] for ids in padded], device=model.device)
        pos = (start + begin + torch.arange(chunk.shape[1], device=model.device)).repeat(len(prompts), 1)
        counts = (lengths - begin).clamp(0, chunk.shape[1])
        view = cache.view(cache_rows, prefix_length(cache, start + end), counts)
        hidden = forward(model, chunk, pos, view)
        if any(begin < len(prompt) <= end for prompt in prompts):
            last = lengths - 1 - begin  # of each row, counted from this chunk's first
            new = model.logits(hidden, last.clamp(0, chunk.shape[1] - 1)[:, None])[:, 0]
            logits = new if logits is None else torch.where((last >= 0)[:, None], new, logits)
    return logits, start + lengths[:, None]


@torch.inference_mode()
def decode(
    model: Transformer,
    cache: KVCache,
    token: Tensor,
    pos: Tensor,
    n_new: int,
    sampling: Sampling,
    step: Callable = decode_one_token,
) -> Iterator[Chunk]:
    """Stream of n_new chunks, each one token a row.

    token, pos [B, 1]: each row's last token, which the cache does not hold yet, and its position.
    """
    counts = torch.ones(token.shape[0], dtype=torch.long)
    filled = int(pos.max()) + 1
    for n in range(n_new):
        token, pos = step(model, token, pos, cache.view(length=prefix_length(cache, filled + n)), sampling)
        yield Chunk(token, counts)
