"""Answers as OpenAI's interface writes them: whole, or as a stream of chunks."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from serving.interface.fields import RequestError
from serving.interface.jobs import Asked, Served
from serving.tools import CallSplitter
from serving.worker import Answers, Piece, joined

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Choice:
    """One answer: what a piece of it adds, as the interface in question writes it."""

    def __init__(self, index: int, asked: Asked, served: Served):
        self.index, self.tokenizer = index, served.tokenizer
        self.has_logprobs = asked.jobs[index].n_logprobs is not None

    def to_json(self, piece: Piece, **fields) -> dict:
        reason = REASONS.get(piece.finish_reason)
        logprobs = self.logprobs(piece) if self.has_logprobs else None
        return {"index": self.index, **fields, "logprobs": logprobs, "finish_reason": reason}

    def tokens(self, piece: Piece) -> Iterable[tuple[bytes, float, list[tuple[bytes, float]]]]:
        """The text of each token, its log-probability and the likeliest tokens; the end of text is no token of it."""
        ids = piece.ids[:-1] if piece.finish_reason == "eos" else piece.ids
        for token, (logprob, top) in zip(ids, piece.logprobs, strict=False):
            yield self.spelled(token, logprob), [self.spelled(*each) for each in top]

    def spelled(self, token: int, logprob: float) -> tuple[bytes, float]:
        return self.tokenizer.token_bytes(token), max(logprob, LEAST_LOGPROB)


class ChatChoice(Choice):
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, index: int, asked: Asked, served: Served):
        super().__init__(index, asked, served)
        self.splitter = CallSplitter(asked.form, asked.tools, asked.marks, asked.is_thinking)
        self.n_calls = 0

    def first(self) -> dict:
        """The choice of the first chunk."""
        return self.to_json(Piece(), delta={"role": "assistant", "content": ""})

    def chunk(self, piece: Piece) -> dict | None:
        """The choice of a later chunk; None while all of the text is held back."""
        delta = self.delta(piece)
        says = delta or piece.ends or self.has_logprobs
        return self.finished(self.to_json(piece, delta=delta)) if says else None

    def whole(self, piece: Piece) -> dict:
        delta = self.delta(piece)
        for call in delta.get("tool_calls", ()):
            del call["index"]
        content = None if "tool_calls" in delta else ""
        message = {"role": "assistant", "content": content, "refusal": None, **delta}
        return self.finished(self.to_json(piece, message=message))

    def delta(self, piece: Piece) -> dict:
        """The fields of the message to which the piece adds."""
        delta = self.splitter.push(piece.text, piece.ends)
        if calls := delta.pop("tool_calls", None):
            delta["tool_calls"] = [self.call(*each) for each in calls]
        return delta

    def call(self, name: str, arguments: dict) -> dict:
        self.n_calls += 1
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        # templates of Mistral take no other form of ids than nine letters and digits
        return {"index": self.n_calls - 1, "id": secrets.token_hex(5)[:9], "type": "function", "function": function}

    def finished(self, choice: dict) -> dict:
        is_call = self.n_calls and choice["finish_reason"] == "stop"
        return choice | {"finish_reason": "tool_calls"} if is_call else choice

    def logprobs(self, piece: Piece) -> dict:
        def entry(token: bytes, logprob: float) -> dict:
            return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}

        content = [entry(*each) | {"top_logprobs": [entry(*t) for t in top]} for each, top in self.tokens(piece)]
        return {"content": content}


class TextChoice(Choice):
    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, index: int, asked: Asked, served: Served):
        super().__init__(index, asked, served)
        self.echo = asked.echo[index // asked.n] if asked.echo else ""
        self.offset = 0  # characters that stand before the next token

    def first(self) -> dict | None:
        return self.to_json(Piece(), text=self.echo) if self.echo else None

    def chunk(self, piece: Piece) -> dict | None:
        says = piece.text or piece.ends or self.has_logprobs
        return self.to_json(piece, text=piece.text) if says else None

    def whole(self, piece: Piece) -> dict:
        return self.to_json(piece, text=self.echo + piece.text)

    def logprobs(self, piece: Piece) -> dict:
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for (token, logprob), top in self.tokens(piece):
            text = token.decode(errors="replace")
            found["tokens"].append(text)
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append({each.decode(errors="replace"): value for each, value in top})
            found["text_offset"].append(self.offset)
            self.offset += len(text)
        return found


@dataclass
class Usage:
    """Tokens of a request: each prompt counts once, however many answers it has."""

    asked: Asked
    cached: int = 0
    new: int = 0

    def count(self, index: int, piece: Piece) -> None:
        self.new += len(piece.ids)
        if piece.ends and index % self.asked.n == 0:
            self.cached += piece.cached_tokens

    def to_json(self) -> dict:
        prompt = sum(len(job.prompt) for job in self.asked.jobs[:: self.asked.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.new,
            "total_tokens": prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Writer:
    """Writes the answers to one request, as choices of one kind."""

    def __init__(self, kind: type[Choice], asked: Asked, served: Served, answers: Answers):
        self.asked, self.answers, self.usage = asked, answers, Usage(asked)
        self.choices = [kind(index, asked, served) for index in range(len(asked.jobs))]
        self.kind = kind
        self.envelope = {
            "id": f"{kind.prefix}-{secrets.token_hex(12)}",
            "object": kind.object,
            "created": int(time.time()),
            "model": served.name,
        }

    async def whole(self) -> dict:
        """The body of an answer that is not streamed."""
        pieces = [[] for _ in self.choices]
        async for index, piece in counted(self.answers, self.usage):
            pieces[index].append(piece)
        choices = [choice.whole(joined(own)) for choice, own in zip(self.choices, pieces, strict=True)]
        return {**self.envelope, "choices": choices, "usage": self.usage.to_json()}

    async def stream(self) -> AsyncIterator[str]:
        """The events of one that is; an error in the midst of it is the last event."""
        envelope = self.envelope | {"object": self.kind.chunk_object}
        if self.asked.include_usage:
            envelope["usage"] = None
        for choice in self.choices:
            if first := choice.first():
                yield event(envelope | {"choices": [first]})
        try:
            async for index, piece in counted(self.answers, self.usage):
                if choice := self.choices[index].chunk(piece):
                    yield event(envelope | {"choices": [choice]})
        except RequestError as error:
            yield event(error.to_json())
            return
        if self.asked.include_usage:
            yield event(envelope | {"choices": [], "usage": self.usage.to_json()})
        yield "data: [DONE]\n\n"


async def counted(answers: Answers, usage: Usage) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of answers, each after it is counted. Raises the RequestError that ends them."""
    async for index, piece in answers:
        if piece.ids or piece.error is None:
            usage.count(index, piece)
            yield index, piece
        if piece.error is not None:
            raise piece.error


def event(value: dict, name: str | None = None) -> str:
    """A server-sent event; some interfaces name theirs."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"
