"""OpenAI's newer interface, `/v1/responses`: a request as fields of a chat, and an answer as items that grow.

Nothing is stored here: a client sends the whole conversation each time.
"""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from serving.interface.answers import ChatChoice, Usage, counted, event
from serving.interface.fields import (
    GENERATION,
    Check,
    RequestError,
    boolean,
    integer,
    mapping,
    messages,
    nested,
    one_of,
    read_fields,
    response_format,
    text,
    texts,
    tool_choice,
    tools,
    wrong,
)
from serving.interface.jobs import Asked, Served, asked_in_chat
from serving.worker import Answers, Piece
from text.thinking import REASONING

# ---------------------------------------------------------------- requests


PART_NEUTRAL = {"annotations": ([],), "logprobs": ([],)}
FACTS = {"type": text, "id": text, "status": text}  # of every item
ITEMS: dict[str, dict[str, Check]] = {
    "message": FACTS
    | {
        "role": one_of("system", "developer", "user", "assistant"),
        "content": texts("input_text", "output_text", "text", neutral=PART_NEUTRAL),
    },
    "function_call": FACTS | {"call_id": text, "name": text, "arguments": text},
    "function_call_output": FACTS | {"call_id": text, "output": texts("input_text", neutral=PART_NEUTRAL)},
    "reasoning": FACTS | {"content": texts("reasoning_text", neutral=PART_NEUTRAL)},
}
NEEDED = {"message": ("role", "content"), "function_call": ("call_id", "name"), "function_call_output": ("output",)}


def read_input(name: str, value: Any) -> list[dict]:
    """The messages of a conversation, as those of /v1/chat/completions."""
    if isinstance(value, str):
        return [{"role": "user", "content": text(name, value)}]
    if not isinstance(value, list) or not value:
        raise wrong(name, value, "a text or a list of at least one item")
    found: list[dict] = []
    for i, each in enumerate(value):
        nested(f"{name}[{i}]", add_item, found, mapping(f"{name}[{i}]", each))
    return messages(name, found)


def add_item(found: list[dict], item: dict) -> None:
    """Add what an item says: thoughts, a text and calls that follow each other are one message of the model."""
    kind = text("type", item.get("type", "message"))
    if kind not in ITEMS:
        raise RequestError(f"items of type {kind!r} are not supported; those of type {', '.join(ITEMS)} are")
    given = read_fields(item, ITEMS[kind], {"encrypted_content": (), "summary": ([],)})
    for field in NEEDED.get(kind, ()):
        if field not in given:
            raise RequestError(f"the item has no {field}")
    if kind == "function_call_output":
        found.append({"role": "tool", "content": given["output"], "tool_call_id": given.get("call_id", "")})
        return
    if kind == "message" and given["role"] != "assistant":
        found.append({"role": given["role"], "content": given["content"]})
        return
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    last = found[-1]
    if kind == "reasoning":
        last["reasoning_content"] = last.get("reasoning_content", "") + given.get("content", "")
    elif kind == "message":
        last["content"] += given["content"]
    else:
        call = {"name": given["name"], "arguments": given.get("arguments", "{}")}
        last.setdefault("tool_calls", []).append({"id": given["call_id"], "type": "function", "function": call})


def read_tools(name: str, value: Any) -> list[dict]:
    """Tools, whose functions stand in no object of their own here."""
    return tools(name, [in_function(each) for each in value] if isinstance(value, list) else value)


def in_function(described: Any) -> Any:
    """A function as /v1/chat/completions describes one; what is none stays as it is, to be refused."""
    if not isinstance(described, dict) or described.get("type") != "function":
        return described
    return {"type": "function", "function": {name: each for name, each in described.items() if name != "type"}}


def read_choice(name: str, value: Any) -> str | dict:
    return tool_choice(name, in_function(value))


def read_format(name: str, value: Any) -> dict | None:
    """The JSON schema of the answer; None: it is plain text."""
    found = read_fields(mapping(name, value), {"format": mapping}, {"verbosity": ("medium",)}).get("format")
    if found is None or found.get("type") != "json_schema":
        return response_format(f"{name}.format", found or {"type": "text"})
    schema = {key: each for key, each in found.items() if key != "type"}
    return response_format(f"{name}.format", {"type": "json_schema", "json_schema": schema})


OTHERS = ("n", "max_tokens", "max_completion_tokens", "response_format", "stream_options")
RESPONSES: dict[str, Check] = {name: check for name, check in GENERATION.items() if name not in OTHERS} | {
    "input": read_input,
    "instructions": text,
    "max_output_tokens": integer(1),
    "text": read_format,
    "tools": read_tools,
    "tool_choice": read_choice,
    "parallel_tool_calls": boolean,
    "chat_template_kwargs": mapping,
    "prompt_cache_key": text,  # prefixes are found without it
}
NEUTRAL = {
    "store": (False,),
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "include": ([],),
    "metadata": ({},),
    "reasoning": ({},),
    "service_tier": ("auto", "default"),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "max_tool_calls": (),
    "prompt": (),
    "stream_options": ({"include_obfuscation": False},),
}
CHAT_NAMES = {"input": "messages", "max_output_tokens": "max_tokens", "text": "response_format"}
REPEATED = {  # in the response, with what holds where a request is silent
    "instructions": None,
    "max_output_tokens": None,
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
}


def read_responses(body: dict, served: Served) -> Asked:
    """The answer that a body of /v1/responses asks for."""
    fields = read_fields(body, RESPONSES, NEUTRAL)
    if "input" not in fields:
        raise RequestError("input is missing", "input")
    chat = {CHAT_NAMES.get(name, name): value for name, value in fields.items()}
    if "instructions" in chat:
        chat["messages"] = [{"role": "system", "content": chat.pop("instructions")}, *chat["messages"]]
    given = served.defaults | {name: each for name, each in body.items() if each is not None}
    said = {name: given.get(name, neutral) for name, neutral in REPEATED.items()}
    return replace(asked_in_chat(chat, served), said=said)


# ---------------------------------------------------------------- answers


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


@dataclass(frozen=True)
class Kind:
    """How a part of an answer is written: an item with one part of content. prefix: of its id."""

    prefix: str
    item: dict
    content: dict
    events: dict  # what those of the text have beside it


KINDS = {
    "reasoning_content": Kind("rs", {"type": "reasoning", "summary": []}, {"type": "reasoning_text"}, {}),
    "content": Kind(
        "msg",
        {"type": "message", "role": "assistant"},
        {"type": "output_text", "annotations": []},
        {"logprobs": []},
    ),
}


class Items:
    """The items of an answer, and the events that tell of them as they grow."""

    def __init__(self, asked: Asked, served: Served):
        self.choice = ChatChoice(0, asked, served)
        self.all: list[dict] = []
        self.growing: str | None = None  # the part of the answer that the last item has, until it ends
        self.thought = 0  # tokens

    def push(self, piece: Piece) -> Iterator[dict]:
        """The events of what a piece of the answer adds."""
        delta = self.choice.delta(piece)
        if self.choice.splitter.part == REASONING:  # still, after this piece
            self.thought += len(piece.ids)
        for part in KINDS:
            if part in delta:
                yield from self.grow(part, delta[part])
        for call in delta.get("tool_calls", ()):
            yield from self.call(call)
        if piece.ends:
            if not self.all:
                yield from self.grow("content", "")
            yield from self.end("incomplete" if piece.finish_reason == "length" else "completed")

    def grow(self, part: str, more: str) -> Iterator[dict]:
        """Add to the item that has this part of the answer, or begin one."""
        kind = KINDS[part]
        if self.growing != part:
            yield from self.end()
            yield self.begin(kind.prefix, **kind.item, content=[])
            self.growing = part
            self.all[-1]["content"] = [kind.content | {"text": ""}]
            yield self.event("content_part.added", part=self.all[-1]["content"][0], content_index=0)
        if more:
            self.all[-1]["content"][0]["text"] += more
            yield self.event(f"{kind.content['type']}.delta", delta=more, content_index=0, **kind.events)

    def end(self, status: str = "completed") -> Iterator[dict]:
        """The events after which the last item grows no more."""
        if self.growing is None:
            return
        kind, [content] = KINDS[self.growing], self.all[-1]["content"]
        yield self.event(f"{kind.content['type']}.done", text=content["text"], content_index=0, **kind.events)
        yield self.event("content_part.done", part=content, content_index=0)
        yield self.finish(status)
        self.growing = None

    def call(self, call: dict) -> Iterator[dict]:
        yield from self.end()
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        yield self.begin("fc", type="function_call", call_id=call["id"], name=name, arguments="")
        yield self.event("function_call_arguments.delta", delta=arguments)
        yield self.event("function_call_arguments.done", name=name, arguments=arguments)
        yield self.finish("completed", arguments=arguments)

    def begin(self, prefix: str, **item) -> dict:
        self.all.append({"id": new_id(prefix), **item, "status": "in_progress"})
        return self.event("output_item.added", item=self.all[-1])

    def finish(self, status: str, **fields) -> dict:
        self.all[-1] |= {**fields, "status": status}
        return self.event("output_item.done", item=self.all[-1])

    def event(self, kind: str, **fields) -> dict:
        """An event about the last item, to be written before anything else changes."""
        own = {} if "item" in fields else {"item_id": self.all[-1]["id"]}
        return {"type": f"response.{kind}", "output_index": len(self.all) - 1, **own, **fields}


class ResponseWriter:
    """Writes the answer to one request, whole or as a stream of events."""

    def __init__(self, asked: Asked, served: Served, answers: Answers):
        self.asked, self.answers, self.usage, self.items = asked, answers, Usage(asked), Items(asked, served)
        self.reason: str | None = None
        self.envelope = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": served.name,
        }
        self.envelope |= {**asked.said, "store": False, "metadata": {}, "error": None}

    def response(self, status: str) -> dict:
        is_cut = status == "incomplete"
        usage = None if status == "in_progress" else self.usage_json()
        why = {"reason": "max_output_tokens"} if is_cut else None
        return {**self.envelope, "status": status, "incomplete_details": why, "output": self.items.all, "usage": usage}

    def usage_json(self) -> dict:
        chat = self.usage.to_json()
        return {
            "input_tokens": chat["prompt_tokens"],
            "input_tokens_details": chat["prompt_tokens_details"],
            "output_tokens": chat["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.items.thought},
            "total_tokens": chat["total_tokens"],
        }

    async def whole(self) -> dict:
        async for _ in self.events():
            pass
        return self.response(self.status())

    async def stream(self) -> AsyncIterator[str]:
        """The events, numbered; an error in the midst of them is the last."""
        numbers = count()

        def line(facts: dict) -> str:
            return event(facts | {"sequence_number": next(numbers)}, facts["type"])

        for kind in ("created", "in_progress"):
            yield line({"type": f"response.{kind}", "response": self.response("in_progress")})
        try:
            async for facts in self.events():
                yield line(facts)
        except RequestError as error:
            yield line({"type": "error", "code": error.code, "message": str(error), "param": error.param})
            return
        yield line({"type": f"response.{self.status()}", "response": self.response(self.status())})

    def status(self) -> str:
        return "incomplete" if self.reason == "length" else "completed"

    async def events(self) -> AsyncIterator[dict]:
        async for _, piece in counted(self.answers, self.usage):
            self.reason = piece.finish_reason or self.reason
            for facts in self.items.push(piece):
                yield facts
