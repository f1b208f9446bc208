"""Guesses by a layer that the model itself brings, see `layers.guess_layer`.

Shapes: B rows, S tokens a row, k tokens proposed a row, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.cache import allocate, prefix_length
from engine.sampling import NO_TOKEN, Sampling, require_finite
from engine.speculation.drafters import Drafter, draw
from layers.guess_layer import GuessLayer
from layers.quantized import QuantSpec
from model import CacheView, KVCache, Transformer
from weights.checkpoint import fetch, new_table, open_model
from weights.layout import ModelFile, dequantized


class OwnLayer(Drafter):
    """Proposes what the layer of guesses says; after the first token of a round, of what it made itself.

    Its cache holds pairs: at a token's position, what the model made of it, and the token that follows. Pairs are
    read when the next round begins.
    """

    def __init__(self, layer: GuessLayer):
        self.layer = layer
        self.cache: KVCache | None = None
        self.ends: Tensor | None = None  # [B, 1, dim], what the model made of the last token of each prompt
        self.unread: tuple[Tensor, Tensor | None, Tensor] | None = None  # as `GuessLayer.read` takes them
        self.made: tuple[Tensor, Tensor] | None = None  # what the layer made of the last pairs, and their positions
        self.n_row, self.filled = 0, 0  # rows of the text, and tokens of the longest
        self.drawn: Tensor | None = None  # the last draft [B, k]

    def reserve(self, n_rows: int, n_slots: int) -> None:
        if self.cache is None or self.cache.n_rows < n_rows or self.cache.n_slots < n_slots:
            self.cache = None  # the old one is freed before the new one is allocated
            self.cache = allocate(self.layer, n_rows, n_slots)

    def following(self, forward: Callable) -> Callable:
        before = None  # the last token of the chunk before, and its position

        def read_too(model: Transformer, tokens: Tensor, pos: Tensor, cache: CacheView) -> Tensor:
            nonlocal before
            hidden = forward(model, tokens, pos, cache)
            made, places = self.layer.of_model(hidden), pos
            if before is None:
                self.ends = made[:, :1]
            else:
                made, places = (torch.cat(pair, 1) for pair in zip(before, (made, pos), strict=True))
            before, n_new = (made[:, -1:], pos[:, -1:]), made.shape[1] - 1
            view = self.cache.view(length=prefix_length(self.cache, len(cache.slots)))
            self.layer.read(made[:, :-1], tokens[:, -n_new:], places[:, :-1], view)
            last = (cache.counts - 1).clamp(min=0) + made.shape[1] - tokens.shape[1]
            ends = made.gather(1, last[:, None, None].expand(-1, 1, made.shape[-1]))
            self.ends = torch.where((cache.counts > 0)[:, None, None], ends, self.ends)
            return hidden

        return read_too

    @torch.inference_mode()
    def begin(self, model: Transformer, prompts: list[list[int]], start: int = 0) -> None:
        """Its cache holds what `following` has read. The pair before `start` keeps the token that followed it then."""
        self.n_row, self.drawn, self.made = len(prompts), None, None
        if self.ends is None or len(self.ends) != self.n_row:  # nothing was read: to measure what a round costs
            self.ends = torch.zeros(self.n_row, 1, model.args.dim, dtype=model.dtype, device=model.device)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)
        self.unread, self.filled = (self.ends, None, lengths - 1), max(map(len, prompts)) + 1

    def extend(self, rows: list[list[int]]) -> None:
        require_finite(self.layer, self.drawn is None or NO_TOKEN not in self.drawn, "layer of guesses")

    def grades(self) -> list[int]:
        return [1] * self.n_row

    def verified(self, hidden: Tensor, tokens: Tensor, pos: Tensor, filled: int) -> None:
        places = pos + torch.arange(tokens.shape[1], device=pos.device)
        self.unread, self.filled = (self.layer.of_model(hidden), tokens, places), filled

    def skip(self, recent: Tensor) -> None:
        """Nothing is proposed, but the pairs must not stay behind."""
        self.read_pairs(recent)

    def read_pairs(self, recent: Tensor) -> None:
        """Read what is unread, in which the first token after a prompt is not known yet: the last of recent [B, 2]."""
        if self.unread is not None:
            hidden, tokens, places = self.unread
            tokens = recent[:, 1:] if tokens is None else tokens
            view = self.cache.view(length=prefix_length(self.cache, self.filled))
            self.made, self.unread = (self.layer.read(hidden, tokens.clamp(min=0), places, view), places), None

    def propose(
        self, recent: Tensor, pos: Tensor, filled: int, k: int, sampling: Sampling
    ) -> tuple[Tensor, Tensor | None]:
        self.read_pairs(recent)
        made, places = self.made
        last = (pos - 1 - places[:, :1]).clamp(0, made.shape[1] - 1)  # of the pairs, that of the text's last token
        made = made.gather(1, last[..., None].expand(-1, -1, made.shape[-1]))
        view = self.cache.view(length=prefix_length(self.cache, filled + k))
        draft, probs = [], []
        for i in range(k):
            if i > 0:
                made = self.layer.read(self.layer.norm(made), draft[-1].clamp(min=0), pos + i - 1, view)
            token, distribution = draw(self.layer.logits(made)[:, 0], sampling)
            draft.append(token)
            probs.append(distribution)
        self.drawn = torch.cat(draft, 1)
        return self.drawn.clamp(min=0), None if probs[0] is None else torch.stack(probs, 1)


def require_guesses(path: str | Path, dequantize: bool = False) -> Callable[[], ModelFile]:
    """What opens the layer of guesses in a file or folder; a ValueError if it has none."""
    open_guesses = open_model(path, dequantize=dequantize).guesses
    if open_guesses is None:
        raise ValueError(
            f"{path} has no layer of guesses, which --speculate mtp needs (tensors mtp.*, or those of "
            "num_nextn_predict_layers more layers): folders as downloaded and GGUF files may have one, converted files "
            "do not; or use --speculate ngram"
        )
    return open_guesses


def load_guesses(
    path: str | Path, model: Transformer, quantize: QuantSpec | None = None, dequantize: bool = False
) -> GuessLayer:
    """The layer of guesses in the file, or folder, that `model` is from; quantize, dequantize: as in `load_model`."""
    open_guesses = require_guesses(path, dequantize)
    opened = dequantized(open_guesses()) if dequantize else open_guesses()
    table, name = new_table(opened, quantize, path, head="float"), f"the layer of guesses of {path}"
    layer = fetch(opened, name, model.device, model.dtype, table, "Loading guesses", None)
    layer.share(model)
    return layer
