"""The perplexity of a text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

import torch

from cli import progress
from engine.cache import context_length
from engine.engine import Engine
from engine.sampling import require_finite
from measure.scoring import token_logprobs

WINDOW = 512  # tokens of a text at once


@dataclass(frozen=True)
class Perplexity:
    """The result for a text: perplexity is exp(nll)."""

    perplexity: float
    nll: float  # mean negative log-likelihood of the scored tokens, in nats
    tokens: int  # scored
    windows: int


class Window(NamedTuple):
    """Tokens `begin` to `end` of a text, of which those from `first` on are scored."""

    begin: int
    first: int
    end: int


def perplexity(
    engine: Engine, ids: list[int], *, window: int, stride: int | None = None, batch_size: int = 1
) -> Perplexity:
    """Perplexity per token of a text, read in windows of `window` tokens that begin `stride` (None: window) apart.

    Each token is scored at most once, in the first window that holds a token before it.
    """
    model = engine.model
    windows = split(len(ids), context_length(model.args, window), stride or window)
    if not windows:
        raise ValueError(f"the text is too short (tokens: {len(ids)}); the first is not scored, so 2 are needed")
    n_tokens = sum(end - first for _, first, end in windows)
    text = torch.tensor(ids, device=model.device)
    engine.reserve(min(batch_size, len(windows)), min(window, len(ids)))
    total = 0.0
    with progress(total=n_tokens, desc="Scoring", unit="token") as bar:
        for batch in batches(windows, batch_size):
            tokens = torch.stack([text[begin:end] for begin, _, end in batch])
            pos = torch.arange(tokens.shape[1] - 1, device=text.device).repeat(len(batch), 1)
            skip = batch[0].first - batch[0].begin - 1
            logprobs, _ = token_logprobs(engine, tokens[:, :-1], pos, tokens[:, 1:], skip)
            total -= logprobs.sum().item()
            bar.update(logprobs.numel())
    mean = total / n_tokens
    require_finite(model, math.isfinite(mean))
    value = torch.tensor(mean, dtype=torch.float64).exp().item()  # math.exp would overflow
    return Perplexity(value, mean, n_tokens, len(windows))


def split(n_tokens: int, size: int, stride: int) -> list[Window]:
    """The windows of a text that score at least one token: of those no earlier one scored, and never their first."""
    windows, done = [], 0
    for begin in range(0, n_tokens, stride):
        first, end = max(done, begin + 1), min(begin + size, n_tokens)
        if first < end:
            windows.append(Window(begin, first, end))
        done = end
    return windows


def batches(windows: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Neighbouring windows of one length that score as many tokens, at most batch_size together."""
    for _, alike in groupby(windows, lambda window: (window.end - window.begin, window.first - window.begin)):
        while batch := list(islice(alike, batch_size)):
            yield batch
