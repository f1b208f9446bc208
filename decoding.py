"""Sampling and the decoding loop: prefill, one step, the endless stream of steps, the compiled step."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer
from tp import from_first, full_logits

LOGIT_BYTES = 200_000_000  # at most, for the logits of one forward that scores
SCORED_BYTES = {"cpu": 4_000_000, "cuda": 200_000_000}  # of logits in float32 at once; more leave the CPU's caches
PREFILL_CHUNK = 512  # prompt tokens a row in one forward: bounds mask and activations, and skips what none may see


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0: the likeliest; top_k 0, top_p 1, min_p 0: off. ValueError out of range."""

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def candidates(self) -> int | None:
        """How many of the likeliest tokens can be drawn; None: any."""
        return 1 if self.temperature == 0 else self.top_k or None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (the likeliest token) or above")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or above, or 0 for off")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be from 0 (off) to 1")


def logits_to_probs(logits: Tensor, sampling: Sampling) -> Tensor:  # [..., V] -> [..., V] float32
    """The distribution that is sampled from: temperature, then top-k, top-p and min-p, each on what the last left."""
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        probs = keep_top_p(probs, sampling)
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True)


def keep_top_p(probs: Tensor, sampling: Sampling) -> Tensor:  # [..., V] -> [..., V], not normalised
    """The likeliest tokens that together reach top_p (Holtzman et al. 2019); the first always stays."""
    # with top-k on, only k can be non-zero: a topk is an order cheaper than a sort of the vocabulary
    k = min(sampling.top_k or probs.shape[-1], probs.shape[-1])
    descending = probs.topk(k).values
    before = descending.cumsum(-1) - descending  # mass of those ahead of each
    least = descending.masked_fill(before >= sampling.top_p, float("inf")).amin(-1, keepdim=True)
    return probs.masked_fill(probs < least, 0)


def sample(probs: Tensor) -> Tensor:  # [..., V] -> [...]
    """Draw one token from each distribution."""
    # exponential race: the same draw as multinomial, but without a host sync per token
    noise = torch.empty_like(probs).exponential_()
    return (probs / noise).argmax(-1)


def choose(logits: Tensor, sampling: Sampling) -> Tensor:  # [B, V] -> [B, 1]
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return sample(logits_to_probs(logits, sampling))[:, None]


def next_token(model: Transformer, logits: Tensor, sampling: Sampling) -> Tensor:  # [B, V] -> [B, 1]
    """Draw from the logits that `model` returned; the same token on every rank that shares it."""
    token = choose(full_logits(model, logits, sampling.candidates), sampling)
    return token if sampling.temperature == 0 else from_first(model.ranks, token)  # the likeliest is so everywhere


def decode_one_token(
    model: Transformer, token: Tensor, pos: Tensor, slots: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:  # token, pos [B, 1]; slots [C'] -> token, pos [B, 1]
    """One step: the token that follows `token` at `pos`, and its position."""
    return next_token(model, model(token, pos, slots=slots)[:, -1], sampling), pos + 1


def forward_chunk(model: Transformer, tokens: Tensor, pos: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """Logits [B, R, V] of the places rows [B, R] in each row of tokens [B, S]."""
    return model(tokens, pos, rows=rows, slots=slots)


def used_slots(model: Transformer, count: int) -> Tensor:
    """The prefix of the cache to attend to when `count` slots are filled: one of a few sizes.

    On CUDA each size is a graph of its own, so sizes double; elsewhere one compiled step serves every length.
    """
    size = 256
    if model.device.type == "cuda":
        while size < count:
            size *= 2
    else:
        size = -(-count // 256) * 256
    # never the whole cache: a form compiled for any shorter prefix would not fit it, and its last slot is not needed,
    # because the last token of a row is drawn but not stored
    return model.slots[: min(size, len(model.slots) - 1)]


@torch.inference_mode()
def prefill(
    model: Transformer, prompts: list[list[int]], sampling: Sampling, start: int = 0, forward: Callable = forward_chunk
) -> tuple[Tensor, Tensor]:
    """Run the prompts and draw each row's next token: token and pos [B, 1], its position. As `read_prompts`."""
    logits, pos = read_prompts(model, prompts, start, forward)
    return next_token(model, logits, sampling), pos


@torch.inference_mode()
def read_prompts(
    model: Transformer, prompts: list[list[int]], start: int = 0, forward: Callable = forward_chunk
) -> tuple[Tensor, Tensor]:
    """Run the prompts, whose first tokens stand at position `start`.

    Returns the logits [B, V] that the model gave after each, and the position [B, 1] that follows it. Prompts are
    padded on the right; each row takes the logits of its own last token, and pad slots are overwritten before any row
    reaches them. The cache must hold one token more than the longest prompt.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    longest = max(len(prompt) for prompt in prompts)
    longest += longest % PREFILL_CHUNK == 1  # a chunk of one column would be compiled apart
    padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    logits = None
    for begin in range(0, longest, PREFILL_CHUNK):
        # not a slice of one tensor: the compiled form depends on strides
        chunk = torch.tensor([ids[begin : begin + PREFILL_CHUNK] for ids in padded], device=model.device)
        pos = (start + begin + torch.arange(chunk.shape[1], device=model.device)).repeat(len(prompts), 1)
        last = lengths - 1 - begin  # of each row, counted from this chunk's first
        rows = last.clamp(0, chunk.shape[1] - 1)[:, None]
        new = forward(model, chunk, pos, used_slots(model, start + begin + chunk.shape[1]), rows)[:, 0]
        logits = new if logits is None else torch.where((last >= 0)[:, None], new, logits)
    return logits, start + lengths[:, None]


@torch.inference_mode()
def token_logprobs(
    model: Transformer,
    tokens: Tensor,
    pos: Tensor,
    targets: Tensor,
    skip: int = 0,
    forward: Callable = forward_chunk,
) -> tuple[Tensor, Tensor]:
    """Read tokens [B, S] at pos [B, S]; of the targets [B, S] that follow them, from column `skip` on, log p in nats
    [B, S - skip] (float32) and whether each is the likeliest.

    The rows go through the cache in chunks, as a prompt does, which bounds logits, mask and activations.
    """
    n_rows, length = tokens.shape
    size = max(1, min(PREFILL_CHUNK, LOGIT_BYTES // (model.dtype.itemsize * n_rows * model.args.vocab_size)))
    logprobs, likeliest = [], []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        first = min(max(skip - begin, 0), end - begin)  # columns before are only context
        columns = torch.arange(end - begin, device=tokens.device)[first:].repeat(n_rows, 1)
        slots = model.slots[: int(pos[:, begin:end].max()) + 1]
        some = (each[:, begin:end].clone(memory_format=torch.contiguous_format) for each in (tokens, pos))
        logits = forward(model, *some, slots, columns)  # copies, because the compiled form depends on strides
        wanted = targets[:, begin:end][:, first:]
        found = logprobs_of(full_logits(model, logits.flatten(0, 1)), wanted.flatten())
        logprobs.append(found[0].view(wanted.shape))
        likeliest.append(found[1].view(wanted.shape))
    return torch.cat(logprobs, 1), torch.cat(likeliest, 1)


def logprobs_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # [N, V], [N] -> [N], [N]
    """log p of the targets in nats (float32), and whether each is the likeliest, of equal ones the first."""
    size = max(1, SCORED_BYTES.get(logits.device.type, SCORED_BYTES["cpu"]) // (4 * logits.shape[1]))
    logprobs, likeliest = [], []
    for some, wanted in zip(logits.split(size), targets.split(size), strict=True):
        some = some.float()
        own = some.gather(1, wanted[:, None])[:, 0]
        logprobs.append(own - some.logsumexp(1))
        is_best = own == some.amax(1)
        is_best[is_best.clone()] = some[is_best].argmax(1) == wanted[is_best]  # argmax over all costs three times more
        likeliest.append(is_best)
    return torch.cat(logprobs), torch.cat(likeliest)


@torch.inference_mode()
def decode(
    model: Transformer, token: Tensor, pos: Tensor, sampling: Sampling, step: Callable = decode_one_token
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless stream of (tokens [B, n], count [B]), the first count[b] of row b being new; here n = count = 1.

    token, pos [B, 1]: each row's last token, not yet in the cache, and its position. The caller stops in time:
    no position may reach the end of the cache.
    """
    count = torch.ones(token.shape[0], dtype=torch.long)
    filled = int(pos.max()) + 1
    while True:
        token, pos = step(model, token, pos, used_slots(model, filled), sampling)
        filled += 1
        yield token, count


def compile_step(function: Callable, device: torch.device, any_length: bool = False) -> Callable:
    """`function(model, tokens, pos, slots, ...)` compiled for `device`, with the settings found best there.

    Each shape of the arguments is compiled apart, except that one form serves any length of `slots`; with any_length,
    as for prompts, also any size above one of every other dimension. On CUDA, without any_length, every size of `slots`
    is a CUDA graph of its own.
    """
    torch._dynamo.config.specialize_float = True  # models with other eps: a float made dynamic breaks the regions
    torch._dynamo.config.recompile_limit = 64  # every form is wanted: batch sizes, samplings, cache sizes on CUDA
    graphs = device.type == "cuda" and not any_length
    options = {}
    if device.type == "cpu":
        # trust cpuinfo: the trial builds take 5 s; and sizes and strides: checking them again takes a tenth of a step
        options = {"cpp.vec_isa_ok": True, "size_asserts": False, "alignment_asserts": False, "scalar_asserts": False}
    elif graphs:  # what mode="reduce-overhead" sets; torch.compile does not take both a mode and options
        options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    compiled = torch.compile(function, fullgraph=True, dynamic=False if graphs else None, options=options)
    ready = weakref.WeakKeyDictionary()  # model -> the kinds of call it has been compiled for

    def call(model, tokens, *others):
        result = compiled(model, tokens, *others)
        return _cloned(result) if graphs else result  # a CUDA graph overwrites its outputs

    def step(model, tokens, pos, slots, *others):
        kinds = ready.setdefault(model, set())
        cache = model.layers[0].attention.kv_cache.k.shape
        kind = (len(slots), cache, *_kinds((tokens, *others), any_length))
        if kind not in kinds:
            if not graphs:
                mark_shapes(tokens, pos, slots, others, any_length, cache[0])
            result = call(model, tokens, pos, slots, *others)
            kinds.add(kind)  # only now: an interrupted compilation is no form
            return result
        # this very kind of call has passed the guards once; evaluating them all again costs 0.4 ms of a 30-layer model
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return call(model, tokens, pos, slots, *others)

    return step


def mark_shapes(tokens: Tensor, pos: Tensor, slots: Tensor, others: tuple, any_length: bool, cached_rows: int) -> None:
    """Tell the compiler what varies: the length of `slots`, and with any_length every size above one; nothing else."""
    torch._dynamo.mark_dynamic(slots, 0)
    for tensor in (tokens, pos, *others):
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static(tensor)  # left to itself, the compiler tries to serve any size, and fails
            for dim, size in enumerate(tensor.shape):
                varies = dim > 0 or cached_rows > 2  # rows that can only be two are no variable, and break the regions
                if any_length and size > 1 and varies:
                    torch._dynamo.mark_dynamic(tensor, dim)


def _kinds(arguments: tuple, any_length: bool) -> Iterator:
    """What of the arguments a compiled form depends on."""
    for argument in arguments:
        if not isinstance(argument, Tensor):
            yield argument
        else:
            yield tuple(size > 1 for size in argument.shape) if any_length else argument.shape


def _cloned(result: Tensor | tuple) -> Tensor | tuple:
    if isinstance(result, tuple):
        return tuple(_cloned(each) for each in result)
    return None if result is None else result.clone()
