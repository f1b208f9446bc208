"""How a token is drawn from logits.

What is drawn at a position is decided by a number that depends on the seed of the row and the position alone: a seed
gives the same text whatever else is generated, and however far ahead is guessed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import CacheView, KVCache, Transformer
from ranks import from_first
from tp import full_logits

PART = 1024  # values of a row that one block of a GPU compares
NO_TOKEN = -1  # drawn from logits that are not finite: whoever reads the ids notices it, without another transfer


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0: the likeliest; top_k 0, top_p 1, min_p 0: off. ValueError out of range.

    Of tokens that are as likely as the last of top_k, as many are left out as are too many.
    """

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken; logits divided by less than this bound would overflow."""
        return self.temperature < 1e-30

    @property
    def candidates(self) -> int | None:
        """How many of the likeliest tokens can be drawn; None: any."""
        return 1 if self.is_greedy else self.top_k or None

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
    """The distribution that is sampled from."""
    if sampling.is_greedy:
        return F.one_hot(argmax(logits), logits.shape[-1]).float()
    probs, ids = candidates(logits, sampling)
    return probs if ids is None else torch.zeros_like(logits, dtype=torch.float32).scatter(-1, ids, probs)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities [..., k] in float32 of the tokens that can be drawn, likeliest first, and their ids.

    None: they are all V, in order. Temperature, then top-k, top-p (Holtzman et al. 2019; the likeliest tokens that
    together reach it) and min-p, each on what the last left.
    """
    logits, ids = logits.float() / sampling.temperature, None
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if k < logits.shape[-1] or sampling.top_p < 1:
        logits, ids = logits.topk(k)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs  # mass of those ahead of each
        probs = probs.masked_fill(before >= sampling.top_p, 0)
        probs = probs / probs.sum(-1, keepdim=True)
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True), ids


def argmax(values: Tensor) -> Tensor:  # [..., V] -> [...]
    """The place of the largest value, of equal ones the first, and of a NaN if there is one.

    In two stages: the compiler gives a row of V values to one block of a GPU, and its other processors idle.
    """
    parts = F.pad(values, (0, -values.shape[-1] % PART), value=float("-inf")).unflatten(-1, (-1, PART))
    largest, places = parts.max(-1)
    part = largest.argmax(-1, keepdim=True)
    return (part * PART + places.gather(-1, part))[..., 0]


def sample(probs: Tensor) -> Tensor:  # [..., V] -> [...]
    """Draw one token from each distribution."""
    # exponential race: the same draw as multinomial, but without a host sync per token
    noise = torch.empty_like(probs).exponential_()
    return argmax(probs / noise)


def seed_row(cache: KVCache, row: int, seed: int) -> None:
    """Decide by this seed, of which the low 32 bits count, what will be drawn in a row of the cache."""
    uniforms = torch.rand(cache.n_slots, generator=torch.Generator().manual_seed(seed))
    # so far below 1 that a product with a sum of probabilities is never rounded up to the sum
    cache.uniforms[row] = uniforms * (1 - 2**-20)


def new_seeds(n: int) -> list[int]:
    """Seeds for rows that were given none, by PyTorch's own generator."""
    first = int(torch.randint(1 << 31, (), device="cpu"))
    return list(range(first, first + n))


def uniforms_at(cache: CacheView, pos: Tensor) -> Tensor:
    """Numbers [B, S] of [0, 1) that decide what follows pos [B, S]."""
    rows = torch.arange(len(pos), device=pos.device) if cache.cache_rows is None else cache.cache_rows
    return cache.cache.uniforms[rows[:, None], pos]


def place_of(uniforms: Tensor, probs: Tensor) -> Tensor:  # [...], [..., V] -> [...]
    """The place in whose share each number falls, when the shares of all places lie end to end."""
    ends = probs.cumsum(-1)
    return (ends <= uniforms[..., None] * ends[..., -1:]).sum(-1)


def choose(logits: Tensor, sampling: Sampling, uniforms: Tensor | None) -> Tensor:  # [..., V], [...] -> [...]
    """The likeliest token, for which no uniforms are needed, or the one that they decide on."""
    if sampling.is_greedy:
        return valid(argmax(logits), logits)
    probs, ids = candidates(logits, sampling)
    place = place_of(uniforms, probs)
    token = place if ids is None else ids.gather(-1, place[..., None])[..., 0]
    return valid(token, probs, place)


def valid(token: Tensor, values: Tensor, place: Tensor | None = None) -> Tensor:  # [...], [..., V], [...] -> [...]
    """The token; NO_TOKEN where the value at its place (None: its id) is not finite. An argmax is at a NaN, if any."""
    place = token if place is None else place
    return token.where(values.gather(-1, place[..., None])[..., 0].isfinite(), NO_TOKEN)


def require_finite(model: Transformer, is_finite: bool, what: str = "model") -> None:
    """Refuse to go on with logits that are NaN or infinite; what: the role of the model, for the error."""
    if not is_finite:
        dtype = str(model.dtype).removeprefix("torch.")
        larger = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(dtype)
        advice = f"use --dtype {larger}" if larger else "its weights or its config are damaged; fetch them again"
        raise ValueError(f"the {what}'s logits are NaN or infinite in {dtype}; {advice}")


def next_token(model: Transformer, logits: Tensor, pos: Tensor, cache: CacheView, sampling: Sampling) -> Tensor:
    """The token [B, S] that follows each pos [B, S], by the logits [B, S, V] that `model` returned there."""
    return draw(model, full_logits(model, logits, sampling.candidates), pos, cache, sampling)


def draw(model: Transformer, logits: Tensor, pos: Tensor, cache: CacheView, sampling: Sampling) -> Tensor:
    """As `next_token`, by logits of the whole vocabulary. It is the same on every rank that shares the model."""
    token = choose(logits, sampling, None if sampling.is_greedy else uniforms_at(cache, pos))
    return token if sampling.is_greedy else from_first(model.ranks, token)  # the likeliest is so everywhere
