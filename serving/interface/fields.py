"""What the JSON of a request may hold. Every field is checked; what is not supported is refused by name.

The names are OpenAI's; what they lack has the names of llama.cpp and vLLM.
"""

import json
import math
from collections.abc import Callable
from typing import Any

from cli import listed, one_line
from text.files import require_utf8

Check = Callable[[str, Any], Any]  # from a field's name and value to its checked value


class RequestError(ValueError):
    """What a client is told: the message, the field it is about, a code that programs know, the HTTP status."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400, **headers: str
    ):
        super().__init__(one_line(message))  # it may quote what came
        self.param, self.code, self.status = param and one_line(param), code, status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def to_json(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def read_body(body: bytes) -> dict:
    """The object in a body of JSON."""
    try:
        value = json.loads(body, parse_constant=refuse_constant)
    except RecursionError:
        raise RequestError("the body is JSON that is nested too deeply") from None
    except ValueError as error:  # of UTF-8 too
        raise RequestError(f"the body is not JSON: {error}") from None
    return mapping("the body", value)


def refuse_constant(name: str) -> None:
    raise ValueError(f"it has no {name}")


def read_fields(body: dict, checks: dict[str, Check], neutral: dict[str, tuple] | None = None) -> dict:
    """The checked fields that are given, null being none; neutral: for unsupported fields, values that ask nothing."""
    found = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in checks:
            own = ALIASES.get(name, name)
            checked = checks[name](name, value)
            if found.setdefault(own, checked) != checked:
                raise RequestError(f"{name} and its other name say different things; give one of them", name)
        elif neutral is None or name not in neutral:
            raise RequestError(f"there is no field {name!r} here; the fields are {listed(sorted(checks))}", name)
        elif not any(value == each and type(value) is type(each) for each in neutral[name]):
            only = f" but for {json.dumps(neutral[name][0])}" if neutral[name] else ""
            raise RequestError(f"{name} is not supported{only}; leave it out", name)
    return found


# ---------------------------------------------------------------- values


def wrong(name: str, value: Any, fits: str) -> RequestError:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return RequestError(f"{name} is {shown}; it must be {fits}", name)


def mapping(name: str, value: Any) -> dict:
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    return value


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    try:
        require_utf8(value, name)
    except ValueError as error:
        raise RequestError(str(error), name) from None
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        if not is_number(value) or not low <= value <= high:
            raise wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return check


def positive(name: str, value: Any) -> float:
    if not is_number(value) or not 0 < value < 1e30:
        raise wrong(name, value, "a number above 0")
    return float(value)


def integer(low: int, high: float = math.inf) -> Check:
    fits = f"a whole number from {low} {f'to {high}' if high < math.inf else 'on'}"

    def check(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise wrong(name, value, fits)
        return value

    return check


def one_of(*values: str) -> Check:
    def check(name: str, value: Any) -> str:
        if value not in values:
            raise wrong(name, value, listed([json.dumps(each) for each in values]))
        return value

    return check


def stops(name: str, value: Any) -> list[str]:
    """One text or a list of them, none empty."""
    found = [text(name, each) for each in (value if isinstance(value, list) else [value])]
    if "" in found or len(found) > 16:
        raise wrong(name, value, "a text or up to 16 of them, none empty")
    return found


def biases(name: str, value: Any) -> dict[int, float]:
    """{"token id": bias}"""
    check = number(-100, 100)
    found = {}
    for token, bias in mapping(name, value).items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise RequestError(f"{name} has the key {token[:60]!r}; its keys must be ids of tokens", name)
        found[int(token)] = check(f"{name}[{token}]", bias)
    return found


def stream_options(name: str, value: Any) -> dict:
    return read_fields(mapping(name, value), {"include_usage": boolean}, {"include_obfuscation": (False,)})


def response_format(name: str, value: Any) -> dict | None:
    """The JSON schema of the answer; None: it is plain text."""
    fields = read_fields(mapping(name, value), {"type": text, "json_schema": mapping})
    kind = one_of("text", "json_object", "json_schema")(f"{name}.type", fields.get("type"))
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    described = {"name": text, "description": text, "strict": boolean, "schema": mapping}
    return read_fields(fields.get("json_schema", {}), described).get("schema", {})


# ---------------------------------------------------------------- conversations


def messages(name: str, value: Any) -> list[dict]:
    """A conversation as chat templates expect it."""
    if not isinstance(value, list) or not value:
        raise wrong(name, value, "a list of at least one message")
    return [message(f"{name}[{i}]", each) for i, each in enumerate(value)]


def message(name: str, value: Any) -> dict:
    """A message whose content is a text, and whose tool calls have their arguments as objects."""
    checks = {
        "role": one_of("system", "developer", "user", "assistant", "tool"),
        "content": texts("text", default="text"),
        "name": text,
        "reasoning_content": text,
        "tool_calls": tool_calls,
        "tool_call_id": text,
    }
    neutral = {"refusal": (), "annotations": ([],), "audio": (), "function_call": ()}
    found = nested(name, read_fields, mapping(name, value), checks, neutral)
    if "role" not in found:
        raise RequestError(f"{name} has no role", name)
    if "content" not in found and not found.get("tool_calls"):
        raise RequestError(f"{name} has no content", name)
    if found["role"] == "developer":
        found["role"] = "system"
    return {"content": "", **found}


def nested(name: str, check: Callable, *arguments) -> Any:
    """What the check returns; its errors name the place of the field too."""
    try:
        return check(*arguments)
    except RequestError as error:
        raise RequestError(f"{name}: {error}", name) from None


def texts(*kinds: str, default: str | None = None, neutral: dict[str, tuple] | None = None) -> Check:
    """A text, or parts of one, each of these types. default: of a part that names none; neutral: see `read_fields`."""

    def check(name: str, value: Any) -> str:
        if isinstance(value, str):
            return text(name, value)
        if not isinstance(value, list):
            raise wrong(name, value, "a text or a list of parts")
        found = []
        for part in value:
            kind = default if mapping(name, part).get("type") is None else part["type"]
            if kind not in kinds:
                raise RequestError(f"a part of type {kind} is not supported; this model reads {listed(kinds)}", name)
            found.append(read_fields(part, {"type": text, "text": text}, neutral).get("text", ""))
        return "".join(found)

    return check


def tool_calls(name: str, value: Any) -> list[dict]:
    if not isinstance(value, list):
        raise wrong(name, value, "a list of calls")
    return [nested(f"{name}[{i}]", tool_call, each) for i, each in enumerate(value)]


def tool_call(value: Any) -> dict:
    checks = {"id": text, "type": one_of("function"), "function": mapping, "index": integer(0)}
    call = read_fields(mapping("the call", value), checks)
    function = read_fields(call.get("function", {}), {"name": text, "arguments": text})
    if "name" not in function:
        raise RequestError("the call has no function.name")
    try:
        arguments = mapping("arguments", json.loads(function.get("arguments") or "{}"))
    except (ValueError, RecursionError):
        raise RequestError("function.arguments must be the text of a JSON object") from None
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def tool_choice(name: str, value: Any) -> str | dict:
    """A word, or the function that is to be called, by its name."""
    if not isinstance(value, dict):
        return one_of("auto", "none", "required")(name, value)
    found = read_fields(value, {"type": one_of("function"), "function": mapping})
    function = read_fields(found.get("function", {}), {"name": text})
    if "name" not in function:
        raise RequestError(f"{name} has no function.name", name)
    return function


def tools(name: str, value: Any) -> list[dict]:
    if not isinstance(value, list):
        raise wrong(name, value, "a list of tools")
    return [nested(f"{name}[{i}]", tool, each) for i, each in enumerate(value)]


def tool(value: Any) -> dict:
    found = read_fields(mapping("the tool", value), {"type": one_of("function"), "function": mapping})
    checks = {"name": text, "description": text, "parameters": mapping}
    function = read_fields(found.get("function", {}), checks, {"strict": (False,)})
    if "name" not in function:
        raise RequestError("the tool has no function.name")
    if function.get("parameters", {}).get("type", "object") != "object":
        raise wrong("function.parameters.type", function["parameters"]["type"], '"object"')
    return {"type": "function", "function": function}


# ---------------------------------------------------------------- prompts


def prompts(name: str, value: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or its token ids."""
    if isinstance(value, str) or is_ids(value):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(each, str) or is_ids(each) for each in value):
        raise wrong(name, value, "a text, a list of token ids, or a list of several of either")
    return [text(name, each) if isinstance(each, str) else each for each in value]


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


# ---------------------------------------------------------------- tables

ALIASES = {"max_completion_tokens": "max_tokens", "repeat_penalty": "repetition_penalty"}

GENERATION: dict[str, Check] = {
    "model": text,
    "n": integer(1, 128),
    "max_tokens": integer(1),
    "max_completion_tokens": integer(1),
    "stop": stops,
    "ignore_eos": boolean,
    "seed": integer(-1, (1 << 63) - 1),
    "temperature": number(0, 2),
    "top_k": integer(-1),
    "top_p": number(0, 1),
    "min_p": number(0, 1),
    "logit_bias": biases,
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": positive,
    "repeat_penalty": positive,
    "response_format": response_format,
    "stream": boolean,
    "stream_options": stream_options,
    "user": text,  # whose request it is, which changes nothing
    "safety_identifier": text,  # as clients name it now
}
CHAT: dict[str, Check] = GENERATION | {
    "messages": messages,
    "tools": tools,
    "tool_choice": tool_choice,
    "parallel_tool_calls": boolean,
    "chat_template_kwargs": mapping,
    "logprobs": boolean,
    "top_logprobs": integer(0, 20),
}
COMPLETIONS: dict[str, Check] = GENERATION | {"prompt": prompts, "echo": boolean, "logprobs": integer(0, 20)}
TOKENIZE: dict[str, Check] = {"model": text, "prompt": text, "add_special_tokens": boolean}
TOKENIZE |= {name: CHAT[name] for name in ("messages", "tools", "chat_template_kwargs")}

CHAT_NEUTRAL = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "functions": (),
    "function_call": (),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "metadata": ({},),
    "web_search_options": (),
    "verbosity": (),
}
COMPLETIONS_NEUTRAL = {"best_of": (1,), "suffix": ("",)}
