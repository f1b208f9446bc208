"""Requests: what is asked for, the text so far, why it ended; and a batch of them, run and timed."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.engine import Engine, chunks
from engine.sampling import Sampling
from text.stream import TextStream
from text.thinking import ThinkingStream, Thoughts
from text.tokenizer import Tokenizer


class Request:
    """One sequence in the making: its new ids, its text so far, and why it ended.

    thoughts: how its text has them; None: the text is as the model writes it.
    """

    def __init__(
        self,
        prompt: list[int],
        tokenizer: Tokenizer,
        max_new_tokens: int,
        stop: Sequence[str],
        ignore_eos: bool,
        thoughts: Thoughts | None = None,
    ):
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.eos_ids = frozenset() if ignore_eos else tokenizer.eos_ids
        plain = thoughts is None
        self.stream = TextStream(tokenizer, stop) if plain else ThinkingStream(tokenizer, stop, thoughts, prompt)
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

    def push_round(self, ids: list[int], proposed: int) -> str:
        """`push` what a round of speculation brought, and note it; guesses after the end of the row do not count."""
        before = len(self.token_ids)
        text = self.push(ids)
        taken = len(self.token_ids) - before
        self.rounds.append((min(proposed, taken) if self.finish_reason else proposed, min(len(ids) - 1, taken)))
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
    requests: list[Request] = field(default_factory=list)

    @property
    def decode_tok_s(self) -> float | None:
        return self.decoded_tokens / self.decode_s if self.decoded_tokens else None

    @property
    def prefill_tok_s(self) -> float | None:
        return self.prompt_tokens / self.prefill_s if self.prompt_tokens else None

    def begin(self, prefill_s: float) -> None:
        """The first token of a batch is there; of several batches the first one's wait is what a person sees."""
        if self.time_to_first_token_s is None:
            self.time_to_first_token_s = prefill_s
        self.prefill_s += prefill_s

    def count(self, n_rows: int, proposed: int) -> None:
        """One step of n_rows, which also read `proposed` guesses of each."""
        self.steps += 1
        self.step_tokens += n_rows * (1 + proposed)
        self.draft_steps += proposed

    def to_json(self) -> dict:
        return {
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "time_to_first_token_s": self.time_to_first_token_s,
            "prefill_tok_s": self.prefill_tok_s,
            "decode_tok_s": self.decode_tok_s,
        }


def run_batch(
    engine: Engine,
    requests: list[Request],
    sampling: Sampling,
    timing: Timing,
    start: int = 0,
    seeds: list[int] | None = None,
) -> Iterator[tuple[Request, str]]:
    """Generate until every request has ended; yield each piece of text with its request as it is made, and each end.

    start: tokens of the prompts that the engine's cache holds. seeds: as `generate` takes them.
    """
    budget = max(request.max_new_tokens for request in requests)
    prompts, began, first = [request.prompt for request in requests], time.perf_counter(), None
    try:
        for tokens, counts in chunks(engine, prompts, budget, sampling, start, seeds):
            now, proposed = time.perf_counter(), len(tokens[0]) - 1
            is_round = engine.speculation is not None and first is not None
            if first is None:
                first = now
                timing.begin(first - began)
            else:
                timing.count(len(requests), proposed)
            for request, ids, count in zip(requests, tokens, counts, strict=True):
                if not request.finish_reason:
                    text = request.push_round(ids[:count], proposed) if is_round else request.push(ids[:count])
                    if text or request.finish_reason:
                        yield request, text
            if all(request.finish_reason for request in requests):
                break
    finally:  # a batch that is interrupted counts as far as it came
        if first is not None:
            timing.decode_s += now - first
            timing.prompt_tokens += sum(len(request.prompt) - start for request in requests)
            timing.decoded_tokens += sum(max(len(request.token_ids) - 1, 0) for request in requests)
            timing.requests += requests
