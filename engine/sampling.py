"""How a token is drawn from logits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer
from ranks import from_first
from tp import full_logits

NO_TOKEN = -1  # drawn from logits that are not finite: whoever reads the ids notices it, without another transfer


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0: the likeliest; top_k 0, top_p 1, min_p 0: off. ValueError out of range."""

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
    """The distribution that is sampled from: temperature, then top-k, top-p and min-p, each on what the last left."""
    if sampling.is_greedy:
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
    if sampling.is_greedy:
        return valid(logits.argmax(-1), logits)[:, None]
    probs = logits_to_probs(logits, sampling)
    return valid(sample(probs), probs)[:, None]


def valid(token: Tensor, values: Tensor) -> Tensor:  # [...], [..., V] -> [...]
    """The token; NO_TOKEN where its logit or probability is not finite. An argmax is at a NaN if there is one."""
    return token.where(values.gather(-1, token[..., None])[..., 0].isfinite(), NO_TOKEN)


def require_finite(model: Transformer, is_finite: bool, what: str = "model") -> None:
    """Refuse to go on with logits that are NaN or infinite; what: the role of the model, for the error."""
    if not is_finite:
        dtype = str(model.dtype).removeprefix("torch.")
        larger = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(dtype)
        advice = f"use --dtype {larger}" if larger else "its weights or its config are damaged; fetch them again"
        raise ValueError(f"the {what}'s logits are NaN or infinite in {dtype}; {advice}")


def next_token(model: Transformer, logits: Tensor, sampling: Sampling) -> Tensor:  # [B, V] -> [B, 1]
    """Draw from the logits that `model` returned; the same token on every rank that shares it."""
    token = choose(full_logits(model, logits, sampling.candidates), sampling)
    return token if sampling.is_greedy else from_first(model.ranks, token)  # the likeliest is so everywhere
