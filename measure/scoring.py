"""How likely a model finds given tokens, and continuations of prompts: each prompt is read once for all of its own."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.cache import copy_prefix
from engine.decode import PREFILL_CHUNK, read_prompts
from engine.engine import Engine
from engine.sampling import require_finite
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
        hidden = engine.forward(model, *some, view)  # copies, because the compiled form depends on strides
        logits = model.logits(hidden, columns)
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


@dataclass
class Question:
    """A prompt and the continuations that are scored after it, in ids, each with the number of its request."""

    prompt: list[int]
    continuations: list[list[int]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @property
    def longest(self) -> int:
        return max(map(len, self.continuations))

    @property
    def length(self) -> int:
        """Tokens that the model reads at most: the last of a continuation is only scored."""
        return len(self.prompt) + self.longest - 1


def questions_of(requests: list[tuple[list[int], list[int]]], max_length: int) -> list[Question]:
    """Requests (prompt, continuation), those with the same prompt put together.

    The model reads at most max_length tokens: prompts are cut from the left, and a longer continuation is refused.
    """
    questions: dict[tuple[int, ...], Question] = {}
    for number, (prompt, continuation) in enumerate(requests):
        if not 1 <= len(continuation) <= max_length:
            raise ValueError(
                f"a continuation to score has {len(continuation)} tokens; from 1 to {max_length} fit the window"
            )
        kept = tuple((prompt + continuation)[-(max_length + 1) :][: -len(continuation)])
        question = questions.setdefault(kept, Question(list(kept)))
        question.continuations.append(continuation)
        question.numbers.append(number)
    return list(questions.values())


@torch.inference_mode()
def score(engine: Engine, questions: list[Question], n_rows: int) -> Iterator[tuple[int, float, bool]]:
    """(request number, log-likelihood in nats, whether greedy decoding writes it) of each continuation.

    At most n_rows prompts are read into the first rows of the engine's cache. Continuations of like length then share a
    forward, n_rows at a time, each in one of n_rows further rows that begins as a copy of its prompt's. Continuations
    of one token need no such rows.
    """
    prompts = [question.prompt for question in questions]
    prompts = prompts * 2 if len(prompts) == 1 < n_rows else prompts  # a batch of one row would be compiled apart
    logits, pos = read_prompts(engine.model, engine.cache, prompts, forward=engine.forward)
    logits = full_logits(engine.model, logits)
    asked = [
        (continuation, row, number)
        for row, question in enumerate(questions)
        for continuation, number in zip(question.continuations, question.numbers, strict=True)
    ]
    asked.sort(key=lambda each: -len(each[0]))
    for batch in evenly(asked, n_rows):
        some = batch * 2 if len(batch) == 1 < n_rows else batch
        rows = torch.tensor([row for _, row, _ in some], device=pos.device)
        targets, is_own = padded([continuation for continuation, _, _ in some], pos.device)
        logprobs, is_best = (each[:, None] for each in logprobs_of(logits[rows], targets[:, 0]))
        if targets.shape[1] > 1:
            later = score_later(engine, targets, pos, rows, n_rows)
            logprobs, is_best = torch.cat((logprobs, later[0]), 1), torch.cat((is_best, later[1]), 1)
        sums = logprobs.where(is_own, 0).sum(1).tolist()
        require_finite(engine.model, all(map(math.isfinite, sums)))
        greedy = (is_best | ~is_own).all(1).tolist()
        yield from ((number, *found) for (_, _, number), *found in zip(batch, sums, greedy, strict=False))


def score_later(engine: Engine, targets: Tensor, pos: Tensor, rows: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of the targets [B, S] from the second on, each row after a copy of cache row rows[b]."""
    cache = engine.cache
    copies = n_rows + torch.arange(len(rows), device=rows.device)
    copy_prefix(cache, rows, copies, int(pos.max()))
    places = pos[rows] + torch.arange(targets.shape[1] - 1, device=pos.device)
    places = places.clamp(max=cache.n_slots - 2)  # of padding
    return token_logprobs(engine, targets[:, :-1], places, targets[:, 1:], cache_rows=copies)


def evenly(items: list, most: int) -> Iterator[list]:
    """The items in the fewest batches of at most `most`, as equal as can be."""
    n_batch = -(-len(items) // most)
    for i in range(n_batch):
        yield items[i * len(items) // n_batch : (i + 1) * len(items) // n_batch]


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of any lengths as ids [B, S], and which of them are the row's own [B, S]."""
    longest = max(map(len, rows))
    longest += longest == 2  # one column to read would be compiled apart
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]
