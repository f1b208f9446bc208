"""The engine: a model with its cache and its functions, and `generate`, the library's front door."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from engine.cache import allocate, prefix_length, rows_that_fit, slots_for
from engine.compile import compile_step, require_compiler
from engine.decode import Chunk, decode, decode_one_token, forward_chunk, prefill
from engine.sampling import NO_TOKEN, Sampling, new_seeds, require_finite, seed_row
from engine.speculation.speculative import Speculation, Text, speculate
from layers.quantized import quant_spec
from model import KVCache, Transformer
from text.tokenizer import Tokenizer, load_tokenizer
from weights.checkpoint import DEFAULT_CHECKPOINT, find_checkpoint, load_model
from weights.device import parse_cache_dtype, parse_dtype, pick_device


@dataclass
class Engine:
    """A model ready to generate: its functions, compiled or not, who guesses ahead, and the cache it holds."""

    model: Transformer
    step: Callable = decode_one_token
    forward: Callable = forward_chunk
    speculation: Speculation | None = None
    cache: KVCache | None = None

    @property
    def is_compiled(self) -> bool:
        return self.step is not decode_one_token

    @property
    def look_ahead(self) -> int:
        """Tokens of guesses that a row of the cache may hold beyond its text, and that are taken back."""
        return 0 if self.speculation is None else self.speculation.look_ahead

    def rows_that_fit(self, length: int) -> int:
        """See `engine.cache.rows_that_fit`."""
        return rows_that_fit(self.model, length, self.look_ahead)

    def reserve(self, n_rows: int, length: int) -> None:
        """Hold a cache for n_rows sequences of `length` tokens; one that is large enough stays as it is."""
        ahead, drafter = self.look_ahead, None
        if self.speculation is not None:
            drafter = self.speculation.drafter
            drafter.require_context(length)
        n_slots, old = slots_for(self.model.args, length) + ahead, self.cache
        if old is None or old.n_rows < n_rows or old.n_slots < n_slots or old.rewind < ahead:
            self.cache = old = None  # the old one is freed before the new one is allocated
            self.cache = allocate(self.model, n_rows, n_slots, rewind=ahead)
        if drafter is not None:
            drafter.reserve(n_rows, n_slots)

    @torch.inference_mode()  # as decode does: a tensor made outside would be another form
    def warm_up(self, batches: list[list[int]], n_new: int, sampling: Sampling) -> None:
        """Call the functions in every form that a run will need, so that nothing compiles once text flows.

        batches: the lengths of the prompts in each. The cache slots written here are written again before anything
        looks at them.
        """
        times = 3 if self.model.device.type == "cuda" else 1  # a CUDA graph warms up, is captured, then replayed
        longest = [max(lengths) for lengths in batches]
        ahead = max(self.speculation.lengths) + 1 if self.speculation else 0
        counts = range(min(longest) + 1, max(longest) + n_new + ahead + 1)
        counts = {prefix_length(self.cache, count): count for count in counts}.values()  # one for each form
        for n_rows in {len(lengths) for lengths in batches}:
            prompts = [[0] * max(longest)] * n_rows
            if self.forward is not forward_chunk:
                prefill(self.model, self.cache, prompts, sampling, 0, self.forward)
            token = torch.zeros(n_rows, 1, dtype=torch.long, device=self.model.device)
            if self.speculation:
                self.speculation.drafter.begin(self.model, prompts)
            for count in counts:
                if self.speculation:
                    filled = min(count, self.cache.n_slots - self.speculation.look_ahead - 1)
                    pos = token + filled - 1
                    text = Text(token.repeat(1, 2), pos, pos + n_new, filled)
                    self.speculation.measure(self.model, self.cache, text, sampling)
                elif self.is_compiled:
                    view = self.cache.view(length=prefix_length(self.cache, count))
                    for _ in range(times):
                        self.step(self.model, token, token + count - 1, view, sampling)


def build_engine(
    model: Transformer, compile: bool = False, compile_prefill: bool = False, speculation: Speculation | None = None
) -> Engine:
    """The engine of a model, its step and its prefill compiled as asked."""
    device = model.device
    if compile or compile_prefill:
        require_compiler(device)
    if compile_prefill and model.args.short_conv:  # the compiler takes the sizes of the first prompt for fixed
        raise ValueError("--compile_prefill does not go with short convolutions (LFM2) yet; leave it out")
    return Engine(
        model,
        compile_step(decode_one_token, device) if compile else decode_one_token,
        compile_step(forward_chunk, device, any_length=True) if compile_prefill else forward_chunk,
        speculation,
    )


def load(
    checkpoint_path: str | Path = DEFAULT_CHECKPOINT,
    *,
    device: str | None = None,
    dtype: str = "bfloat16",
    quantize: str | None = None,
    groupsize: int | None = None,
    dequantize: bool = False,
    adapter: str | Path | None = None,
    cache_dtype: str | None = None,
    compile: bool = False,
) -> tuple[Engine, Tokenizer]:
    """The engine and the tokenizer of a checkpoint; the arguments are those of generate.py's flags."""
    path, spec = find_checkpoint(checkpoint_path), quant_spec(quantize, groupsize)
    how = {"dequantize": dequantize, "adapter": adapter}
    model = load_model(path, pick_device(device), parse_dtype(dtype), quantize=spec, **how)
    model.cache_dtype = parse_cache_dtype(cache_dtype)
    return build_engine(model, compile), load_tokenizer(path, model.args.vocab_size)


def generate(
    engine: Engine,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    start: int = 0,
    seeds: list[int] | None = None,
) -> Iterator[list[list[int]]]:
    """Yield, for each row of a batch, the ids that are new since the last time; max_new_tokens of each row in all.

    prompts: the ids of each row, of any lengths, of which the first `start` stand in the engine's cache already.
    sampling: `Sampling()` if None. seeds: one a row; None: from PyTorch's generator. End of text is the caller's
    business: stop reading.

        engine, tokenizer = load()
        stream = TextStream(tokenizer)
        for [ids] in generate(engine, [tokenizer.encode("The capital of France is")], 8, Sampling(temperature=0)):
            print(stream.push(ids), end="", flush=True)
    """
    for tokens, counts in chunks(engine, prompts, max_new_tokens, sampling or Sampling(), start, seeds):
        yield [ids[:n] for ids, n in zip(tokens, counts, strict=True)]


def chunks(
    engine: Engine,
    prompts: list[list[int]],
    n_new: int,
    sampling: Sampling,
    start: int = 0,
    seeds: list[int] | None = None,
) -> Iterator[tuple[list[list[int]], list[int]]]:
    """As `generate`, with every proposal: tokens [B][n] and counts [B], the first counts[b] of row b being new."""
    model, speculation = engine.model, engine.speculation
    engine.reserve(len(prompts), max(map(len, prompts)) + n_new)
    if not sampling.is_greedy:
        for row, seed in enumerate(seeds or new_seeds(len(prompts))):
            seed_row(engine.cache, row, seed)
    forward = engine.forward if speculation is None else speculation.drafter.following(engine.forward)
    token, pos = prefill(model, engine.cache, [ids[start:] for ids in prompts], sampling, start, forward)
    if speculation is None:
        stream = decode(model, engine.cache, token, pos, n_new - 1, sampling, engine.step)
    else:
        speculation.drafter.begin(model, prompts, start)  # before the first token, because it is a prefill too
        before = [ids[-1] for ids in prompts]
        stream = speculate(model, engine.cache, token, pos, n_new - 1, sampling, speculation, before)
    first = Chunk(token, torch.ones(len(prompts), dtype=torch.long))
    later = read_behind(stream, 1 if model.device.type == "cuda" and speculation is None else 0)
    for chunk in chain([first], later):
        tokens, counts = (each.tolist() for each in chunk)
        require_finite(model, all(NO_TOKEN not in ids[:n] for ids, n in zip(tokens, counts, strict=True)))
        yield tokens, counts


def read_behind(chunks: Iterator[Chunk], distance: int) -> Iterator[Chunk]:
    """The same chunks on the host, each after `distance` more have been launched: reading one never stalls the device.

    Each is copied before the next step is launched, because a stream runs what it is given in order.
    """
    copies = []
    for chunk in chunks:
        copies.append(begin_copy(chunk))
        if len(copies) > distance:
            yield finish_copy(*copies.pop(0))
    yield from (finish_copy(*copy) for copy in copies)


def begin_copy(chunk: Chunk) -> tuple[Chunk, torch.cuda.Event | None]:
    """Queue a copy of the chunk to pinned memory, and an event that tells when it is there."""
    tokens = chunk.tokens
    if not tokens.is_cuda:
        return chunk, None
    copied = torch.cuda.Event()
    chunk = chunk._replace(tokens=tokens.to("cpu", non_blocking=True))  # to the host this takes pinned memory
    copied.record(torch.cuda.current_stream(tokens.device))
    return chunk, copied


def finish_copy(chunk: Chunk, copied: torch.cuda.Event | None) -> Chunk:
    if copied is not None:
        copied.synchronize()  # waits for this copy alone, not for the steps after it
    return chunk
