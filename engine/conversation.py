"""A conversation: the turns so far, and which ids the cache already holds, so that a turn reads only what is new."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.cache import shared_prefix
from engine.engine import Engine
from engine.request import Request, Timing, run_batch
from engine.sampling import Sampling
from text.prompts import checked_ids
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Limits:
    """What ends an answer."""

    context: int  # tokens of the whole conversation
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class Conversation:
    """Messages in, answers out, streamed. Without a chat template the model continues the text."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, limits: Limits, sampling: Sampling, system: str | None):
        self.engine, self.tokenizer, self.limits = engine, tokenizer, limits
        self.sampling, self.system = sampling, system
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.history: list[int] = []  # the text so far as ids, where there is no template
        self.cached: list[int] = []

    def prompt_ids(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is not None:
            ids = self.tokenizer.encode_chat([*self.messages, {"role": "user", "content": text}])
        else:
            ids = self.history + self.tokenizer.encode(text, add_special_tokens=not self.history)
        return checked_ids(ids, self.tokenizer)

    def turn(self, text: str) -> Iterator[str]:
        """Answer one message, a piece at a time; an answer that is not read to its end counts as far as it came.

        `request` and `timing` then tell of it. A ValueError if the context is full: the conversation stays as it was.
        """
        ids, limits = self.prompt_ids(text), self.limits
        room = limits.context - len(ids)
        if room < 1:
            raise ValueError(
                f"the context of {limits.context} tokens is full (this turn needs {len(ids)}); /reset clears it"
            )
        start = min(shared_prefix(ids, self.cached), len(ids) - 1)
        budget = min(limits.max_new_tokens, room)
        self.request, self.timing = Request(ids, self.tokenizer, budget, limits.stop, limits.ignore_eos), Timing()
        self.cached = self.cached[:start]
        try:
            for _, piece in run_batch(self.engine, [self.request], self.sampling, self.timing, start):
                yield piece
        finally:
            self.remember(text)

    def remember(self, text: str) -> None:
        """Add the message and its answer to the conversation, if the answer has begun."""
        request = self.request
        if request.token_ids:
            self.cached = request.prompt + request.token_ids[:-1]  # the last one drawn has not been through the model
            self.history = request.prompt + request.token_ids
            answer = {"role": "assistant", "content": request.stream.text}
            self.messages += [{"role": "user", "content": text}, answer]

    @property
    def is_full(self) -> bool:
        """Whether the last answer ended because the context holds no more."""
        request = self.request
        return request.finish_reason == "length" and request.length == self.limits.context
