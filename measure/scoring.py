"""How likely a model finds given tokens."""

import torch
from torch import Tensor

from engine.decode import PREFILL_CHUNK
from engine.engine import Engine
from tp import full_logits

LOGIT_BYTES = 200_000_000  # at most, for the logits of one forward that scores
SCORED_BYTES = {"cpu": 4_000_000, "cuda": 200_000_000}  # of logits in float32 at once; more leave the CPU's caches


@torch.inference_mode()
def token_logprobs(
    engine: Engine, tokens: Tensor, pos: Tensor, targets: Tensor, skip: int = 0, cache_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Read tokens [B, S] at pos [B, S]; of the targets [B, S] that follow them, from column `skip` on, log p in nats
    [B, S - skip] (float32) and whether each is the likeliest.

    The rows go through the engine's cache in chunks, as a prompt does, which bounds logits, mask and activations.
    cache_rows: see `KVCache.view`.
    """
    model, (n_rows, length) = engine.model, tokens.shape
    size = max(1, min(PREFILL_CHUNK, LOGIT_BYTES // (model.dtype.itemsize * n_rows * model.args.vocab_size)))
    logprobs, likeliest = [], []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        first = min(max(skip - begin, 0), end - begin)  # columns before are only context
        columns = torch.arange(end - begin, device=tokens.device)[first:].repeat(n_rows, 1)
        view = engine.cache.view(cache_rows, int(pos[:, begin:end].max()) + 1)
        some = (each[:, begin:end].clone(memory_format=torch.contiguous_format) for each in (tokens, pos))
        logits = engine.forward(model, *some, view, columns)  # copies, because the compiled form depends on strides
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
