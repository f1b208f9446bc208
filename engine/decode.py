"""The decoding loop: prefill, one step, the stream of steps."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine.sampling import Sampling, next_token
from model import Transformer

PREFILL_CHUNK = 512  # prompt tokens a row in one forward: bounds mask and activations, and skips what none may see


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
