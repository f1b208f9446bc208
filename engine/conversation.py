"""A conversation: the turns so far, and which ids the cache already holds, so that a turn reads only what is new."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.cache import holds, shared_prefix
from engine.engine import Engine
from engine.request import Request, Timing, run_batch
from engine.sampling import Sampling
from ranks import shared
from text.files import require_utf8
from text.prompts import checked_ids
from text.thinking import Thoughts
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Limits:
    """What ends an answer."""

    context: int  # tokens of the whole conversation
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    thoughts: Thoughts | None = None  # how answers have them


@dataclass(frozen=True)
class Turn:
    """A message and its answer."""

    text: str
    answer: str  # without thoughts, which no later turn sees
    ids: list[int]  # of the answer, as they were drawn


class Conversation:
    """Messages in, answers out, streamed. Without a chat template the model continues the text.

    system: the system message, which may be changed between turns.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, limits: Limits, sampling: Sampling, system: str | None):
        self.engine, self.tokenizer, self.limits = engine, tokenizer, limits
        self.sampling, self.system = sampling, system
        self.turns: list[Turn] = []
        self.cached: list[int] = []

    def reset(self) -> None:
        self.turns, self.cached = [], []

    @property
    def messages(self) -> list[dict]:
        return self.messages_of(self.turns)

    def messages_of(self, turns: list[Turn]) -> list[dict]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in turns:
            messages.append({"role": "user", "content": turn.text})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def restore(self, messages: list[dict]) -> None:
        """Go on from these messages: maybe one of the system, then the user's and the assistant's in turn."""
        try:
            roles, texts = [each["role"] for each in messages], [each["content"] for each in messages]
        except (TypeError, KeyError):
            roles, texts = [None], []
        first = int(roles[:1] == ["system"])
        if roles[first:] != ["user", "assistant"] * (len(roles) // 2) or not all(isinstance(x, str) for x in texts):
            raise ValueError("the messages must be texts of user and assistant in turn, after one of system or none")
        for each in texts:
            require_utf8(each, "a message")
        if first:
            self.tokenizer.require_template()
        pairs = zip(texts[first::2], texts[first + 1 :: 2], strict=True)
        turns = [Turn(text, answer, self.tokenizer.encode(answer, add_special_tokens=False)) for text, answer in pairs]
        self.reset()
        self.turns, self.system = turns, texts[0] if first else None

    def prompt_ids(self, text: str, first: int = 0) -> list[int]:
        """Ids of the conversation from its turn `first` on, and of the next message."""
        turns = self.turns[first:]
        if self.tokenizer.chat_template is not None:
            return self.tokenizer.encode_chat([*self.messages_of(turns), {"role": "user", "content": text}])
        ids = []
        for turn in [*turns, Turn(text, "", [])]:
            ids += self.tokenizer.encode(turn.text, add_special_tokens=not ids) + turn.ids
        return ids

    def fit(self, text: str) -> tuple[list[int], int]:
        """Ids of the next prompt, and the first turn that is in it.

        A quarter of the context is kept for the answer. What does not fit drops the oldest turns, until half is free:
        each time this happens the model reads the whole rest again. A ValueError if the message alone does not fit.
        """
        context, first = self.limits.context, 0
        ids = self.prompt_ids(text)
        if len(ids) + min(self.limits.max_new_tokens, context // 4) > context:
            while first < len(self.turns) and len(ids) > context // 2:
                first += 1
                ids = self.prompt_ids(text, first)
        if len(ids) >= context:
            with_system = "" if self.system is None else ", with the system message,"
            raise ValueError(f"the message{with_system} takes {len(ids)} tokens; the context has {context}; shorten it")
        return checked_ids(ids, self.tokenizer), first

    def turn(self, text: str) -> Iterator[str]:
        """Answer one message, a piece at a time; an answer that is not read to its end counts as far as it came.

        `request`, `timing` and `dropped`, the number of turns for which there was no more room, then tell of it. A
        ValueError if the message does not fit: the conversation stays as it was.
        """
        limits = self.limits
        ids, self.dropped = shared(self.engine.model.ranks, lambda: self.fit(text))  # a template has a deadline
        self.turns = self.turns[self.dropped :]
        start = min(shared_prefix(ids, self.cached), len(ids) - 1)
        start = start if start and holds(self.engine.cache, 0, start) else 0
        budget = min(limits.max_new_tokens, limits.context - len(ids))
        how = (limits.stop, limits.ignore_eos, limits.thoughts)
        self.request, self.timing = Request(ids, self.tokenizer, budget, *how), Timing()
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
            self.turns.append(Turn(text, request.stream.content, request.token_ids))

    @property
    def is_full(self) -> bool:
        """Whether the last answer ended because the context holds no more."""
        request = self.request
        return request.finish_reason == "length" and request.length == self.limits.context
