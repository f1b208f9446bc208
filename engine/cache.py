"""The rows of a KV cache: how large a cache is, how much of it a call attends to, and how a prefix gets to another row.

A row is one sequence; its first slots hold the tokens that the model has read. Nothing is ever cleared: what lies
beyond a row's last token is hidden by position. A layer with states has one for each of the last tokens instead.
"""

import torch
from torch import Tensor

from mixers.layer_kinds import layer_caches
from model import SPARE_SLOTS, KVCache, ModelArgs, Transformer
from weights.device import free_memory, require_memory
from weights.files import size_text

SMALLEST = 512  # slots of a cache
MOST_ROWS = 64  # more make a step of a CPU no faster a row, and on CUDA --batch_size asks for more
STEP = 256  # the prefixes that calls attend to grow by so many slots; on CUDA they double, from SMALLEST on
ALIGNED = 8  # prefixes are multiples of so many slots, so that each row of a mask begins where a GPU reads 16 bytes


def slots_for(args: ModelArgs, length: int) -> int:
    """Slots of a cache for sequences of `length` tokens.

    They go in powers of two, so that few forms of the step are ever compiled, and stop at the model's context; the
    last few stay empty, see `prefix_length`.
    """
    return min(max(SMALLEST, 1 << (length - 1).bit_length()), max(args.max_seq_length, length)) + SPARE_SLOTS


def row_bytes(model: Transformer, n_slots: int, rewind: int = 0) -> int:
    """What all layers keep of one row, see `layer_caches`."""
    return cache_bytes(model.args, model.cache_dtype or model.dtype, n_slots, rewind)


def cache_bytes(args: ModelArgs, dtype: torch.dtype, n_slots: int, rewind: int = 0) -> int:
    """As `row_bytes`, for a model that is not there yet."""
    layers = layer_caches(args, 1, n_slots, dtype, torch.device("meta"), rewind)
    return sum(each.nbytes for layer in set(layers) for each in layer.buffers())


def planned_bytes(args: ModelArgs, dtype: torch.dtype, n_rows: int, length: int, ahead: int = 0) -> int:
    """What the caches of n_rows sequences of `length` tokens, or of the model's context, will take. ahead: guesses."""
    return n_rows * cache_bytes(args, dtype, slots_for(args, min(length, args.max_seq_length)) + ahead, ahead)


def rows_that_fit(model: Transformer, length: int, rewind: int = 0) -> int:
    """Rows of `length` tokens that share a batch well: as many as make a step faster, in half of the free memory.

    Where a plan has left room for caches, in that.
    """
    free = free_memory(model.device) if model.cache_room is None else 2 * model.cache_room
    if free is None:
        return MOST_ROWS
    fit = free // 2 // row_bytes(model, slots_for(model.args, length) + rewind, rewind)
    return max(1, min(fit - (model.device.type == "cuda"), MOST_ROWS))  # there a scheduler has a row for padding


def allocate(model: Transformer, n_rows: int, n_slots: int, rewind: int = 0) -> KVCache:
    """A cache of that size; a ValueError, before anything is allocated, if the device has no room for it."""
    size = n_rows * row_bytes(model, n_slots, rewind)
    what, advice = "caches", "use fewer rows at a time, fewer new tokens or a shorter context"
    if model.cache_dtype is not None:
        what = "int8 caches"
    elif model.args.kv_latent is None:
        advice += "; int8 caches take about half"
    what = f"the {what} of {n_rows} x {n_slots} positions"
    if model.cache_room is not None and size > model.cache_room:
        left = f"the plan of --memory_budget leaves {size_text(model.cache_room)} for them"
        raise ValueError(f"{what} need {size_text(size)}, but {left}; give --max_seq_length and the number of rows")
    require_memory(size, model.device, what, advice)
    return model.new_cache(n_rows, n_slots, rewind)


def prefix_length(cache: KVCache, filled: int) -> int:
    """Slots that a call attends to when the longest row has `filled` tokens: one of a few sizes.

    On CUDA each size is a graph of its own, so sizes double; elsewhere one compiled step serves every length.
    """
    size = -(-filled // STEP) * STEP
    if cache.slots.is_cuda:
        size = max(SMALLEST, 1 << (filled - 1).bit_length())
    # never the whole cache: a form compiled for any shorter prefix would not fit it
    largest = cache.n_slots - 1
    return min(size, max(largest // ALIGNED * ALIGNED, min(filled, largest)))


def copy_prefix(cache: KVCache, source: Tensor, target: Tensor, length: int) -> None:
    """Give rows target [n] what rows source [n] hold in their first `length` slots."""
    for layer in set(cache.layers):  # some are those of several layers
        layer.copy_prefix(source, target, length)


def holds(cache: KVCache, row: int, length: int) -> bool:
    """Whether a row can go on after its first `length` tokens: states are kept only of the last ones."""
    return all(layer.holds(row, length) for layer in cache.layers)


def shared_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def context_length(args: ModelArgs, asked: int | None) -> int:
    """Positions a row may take: as many as asked for, or the model's context."""
    if asked is not None and asked > args.max_seq_length:
        raise ValueError(f"--max_seq_length {asked} is more than the model's context of {args.max_seq_length}")
    return asked or args.max_seq_length


def check_fit(longest: int, max_new_tokens: int, context: int) -> int:
    """The positions that the longest prompt and its new tokens take; a ValueError if the context has fewer."""
    if longest + max_new_tokens > context:
        fits = max(context - longest, 0)
        advice = f"use --max_new_tokens {fits} or less" if fits else f"shorten the prompt below {context}"
        raise ValueError(
            f"the prompt's {longest} tokens and {max_new_tokens} new ones are more than the context of {context}; "
            f"{advice}"
        )
    return longest + max_new_tokens
