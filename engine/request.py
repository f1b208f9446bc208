"""One request: from prompt ids to text."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from engine.decode import decode, decode_one_token, forward_chunk, prefill
from engine.sampling import Sampling
from engine.speculative import Speculation, speculate
from model import Transformer
from text.stream import TextStream
from text.tokenizer import Tokenizer


def generate(model: Transformer, prompts: list[list[int]], *args, **options) -> Iterator[list[list[int]]]:
    """Yield, for each row of a batch, the ids that are new since the last time. The arguments are those of `chunks`."""
    for tokens, counts in chunks(model, prompts, *args, **options):
        yield [ids[:n] for ids, n in zip(tokens, counts, strict=True)]


def chunks(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    start: int = 0,
    step: Callable = decode_one_token,
    forward: Callable = forward_chunk,
    speculation: Speculation | None = None,
) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Yield tokens [B][n] and counts [B], the first counts[b] of row b being new; max_new_tokens of each row in all.

    prompts: the ids of each row, of any lengths, of which the first `start` are in the cache. The model's caches must
    hold the longest prompt and max_new_tokens, with speculation also its look-ahead. Every round of speculation yields
    its k tokens proposed and one more. End-of-text is the caller's business: stop reading.
    """
    token, pos = prefill(model, [ids[start:] for ids in prompts], sampling, start, forward)
    if speculation is not None:  # a draft model's prefill belongs to ours
        speculation.source.begin(model, prompts, start)
    yield token.tolist(), [1] * len(prompts)
    if speculation is None:
        stream = islice(decode(model, token, pos, sampling, step), max_new_tokens - 1)
        for tokens, counts in read_behind(stream, 1 if model.device.type == "cuda" else 0):
            yield tokens.tolist(), counts.tolist()
    else:
        yield from speculate(model, prompts, token, pos, max_new_tokens - 1, sampling, speculation)


def read_behind(chunks: Iterator, distance: int) -> Iterator:
    """The same chunks, each after `distance` more have been launched, so that reading one never stalls the device."""
    launched = []
    for chunk in chunks:
        launched.append(chunk)
        if len(launched) > distance:
            yield launched.pop(0)
    yield from launched


class Row:
    """One sequence in the making: its new ids, its text so far, and why it ended."""

    def __init__(self, prompt: list[int], tokenizer: Tokenizer, max_new_tokens: int, stop: list[str], ignore_eos: bool):
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.eos_ids = frozenset() if ignore_eos else tokenizer.eos_ids
        self.stream = TextStream(tokenizer, stop)
        self.token_ids: list[int] = []
        self.rounds: list[tuple[int, int]] = []  # of speculation: tokens proposed and accepted in each
        self.finish_reason: str | None = None

    @property
    def length(self) -> int:
        """Positions it takes at most."""
        return len(self.prompt) + self.max_new_tokens

    def push(self, ids: list[int]) -> str:
        """Take new ids up to the one that ends the row; return the text that can be printed now."""
        text = ""
        for token in ids:
            if self.finish_reason:
                break
            self.token_ids.append(token)
            if token in self.eos_ids:
                self.finish_reason = "eos"
            else:
                text += self.stream.push([token])
                if self.stream.stopped:
                    self.finish_reason = "stop"
                elif len(self.token_ids) == self.max_new_tokens:
                    self.finish_reason = "length"
            if self.finish_reason:
                text += self.stream.finish()
        return text

    def to_json(self) -> dict:
        return {
            "prompt_tokens": len(self.prompt),
            "new_tokens": len(self.token_ids),
            "token_ids": self.token_ids,
            "accept_lengths": [accepted for _, accepted in self.rounds],
            "text": self.stream.text,
            "finish_reason": self.finish_reason,
        }


@dataclass
class Timing:
    """Seconds and counts of one sample; a sample of several batches adds them up."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    time_to_first_token_s: float | None = None
    prompt_tokens: int = 0
    decoded_tokens: int = 0  # without each row's first, which prefill draws
    steps: int = 0
    step_tokens: int = 0  # that the steps read, guesses too
    draft_steps: int = 0
    rows: list[Row] = field(default_factory=list)

    @property
    def decode_tok_s(self) -> float | None:
        return self.decoded_tokens / self.decode_s if self.decoded_tokens else None

    @property
    def prefill_tok_s(self) -> float:
        return self.prompt_tokens / self.prefill_s

    def to_json(self) -> dict:
        return {
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "time_to_first_token_s": self.time_to_first_token_s,
            "prefill_tok_s": self.prefill_tok_s,
            "decode_tok_s": self.decode_tok_s,
            "sequences": [row.to_json() for row in self.rows],
        }


def run_batch(
    model: Transformer, rows: list[Row], sampling: Sampling, timing: Timing, began: float, show: Callable, **options
) -> None:
    """Generate until every row has ended; show(row, text) gets each piece of text as it is made."""
    budget = max(row.max_new_tokens for row in rows)
    before = time.perf_counter()
    first = None
    for tokens, counts in chunks(model, [row.prompt for row in rows], budget, sampling, **options):
        now, proposed = time.perf_counter(), len(tokens[0]) - 1
        if first is None:
            first = now
            timing.prefill_s += now - before
            if timing.time_to_first_token_s is None:
                timing.time_to_first_token_s = now - began
        else:
            timing.steps += 1
            timing.step_tokens += len(rows) * (1 + proposed)
            timing.draft_steps += proposed
            for row, count in zip(rows, counts, strict=True):
                if options.get("speculation") and not row.finish_reason:
                    row.rounds.append((proposed, count - 1))
        for row, ids, count in zip(rows, tokens, counts, strict=True):
            text = row.push(ids[:count])
            if text:
                show(row, text)
        if all(row.finish_reason for row in rows):
            break
    timing.decode_s += now - first
    timing.prompt_tokens += sum(len(row.prompt) - options.get("start", 0) for row in rows)
    timing.decoded_tokens += sum(len(row.token_ids) - 1 for row in rows)
    timing.rows += rows
