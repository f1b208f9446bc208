"""Tool calls: how models write them, grammars that force one; calls and thinking told apart as an answer streams."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from serving.fields import RequestError
from serving.processors import json_rule
from text.tokenizer import Tokenizer

OPEN_THINKING, CLOSE_THINKING = "<think>", "</think>"


@dataclass(frozen=True)
class Form:
    """How a family of models writes calls: the mark before them, that after each if there is one, how they are read.

    bare: an answer may be calls without a mark. call: what stands before a name, between it and the arguments, after
    them. between: two calls. around: before and after all.
    """

    begin: str
    end: str | None
    read: Callable[[str], Iterator[tuple[str, dict]]]
    call: tuple[str, str, str]
    between: str
    around: tuple[str, str] = ("", "")
    bare: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.begin, self.end, ARGUMENTS) if self.end else (self.begin, ARGUMENTS)


ARGUMENTS = "[ARGS]"
MOST_CALLS = 16  # of an answer that is forced to be one: some models write calls without end
NO_PARAMETERS = {"properties": {}, "additionalProperties": False}


def read_objects(text: str) -> Iterator[tuple[str, dict]]:
    """Calls as JSON objects, one after the other or in an array."""
    decoder, at = json.JSONDecoder(), 0
    while (at := skip(text, at, " \n\t;")) < len(text):
        value, at = decoder.raw_decode(text, at)
        for call in value if isinstance(value, list) else [value]:
            yield call["name"], call.get("arguments", call.get("parameters"))


def read_named(text: str) -> Iterator[tuple[str, dict]]:
    """Calls as names, each before its arguments; or as objects, as earlier models of the family wrote them."""
    if text.lstrip().startswith("["):
        yield from read_objects(text)
        return
    for part in text.split(FORMS["mistral"].begin):
        name, brace, arguments = part.partition("{")
        yield name.strip().removesuffix(ARGUMENTS), json.loads(brace + arguments)


def skip(text: str, at: int, what: str) -> int:
    while text[at : at + 1] and text[at] in what:
        at += 1
    return at


FORMS = {
    "hermes": Form(
        "<tool_call>",
        "</tool_call>",
        read_objects,
        call=('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
        between="\n",
    ),
    "mistral": Form("[TOOL_CALLS]", None, read_named, call=("[TOOL_CALLS]", ARGUMENTS, ""), between=""),
    "mistral array": Form(
        "[TOOL_CALLS]",
        None,
        read_named,
        call=('{"name": "', '", "arguments": ', "}"),
        between=", ",
        around=("[TOOL_CALLS][", "]"),
    ),
    "llama": Form(
        "<|python_tag|>",
        None,
        read_objects,
        call=('{"name": "', '", "parameters": ', "}"),
        between="; ",
        bare=True,
    ),
}


def tool_form(template: str, param: str) -> Form:
    """The form in which a model with this chat template writes calls; a refusal if there is none that is known."""
    if "<tool_call>" in template and "<function=" not in template:  # which is another form between the same marks
        return FORMS["hermes"]
    if "[TOOL_CALLS]" in template:
        return FORMS["mistral" if ARGUMENTS in template else "mistral array"]
    if "ipython" in template and "parameters" in template:
        return FORMS["llama"]
    raise RequestError("tools are not supported: the model's chat template has no known form of calls", param)


def calls_grammar(form: Form, tools: list[dict], is_one: bool, special: dict[int, str]) -> str:
    """An answer that is a call of one of the tools, or of several, in Lark as llguidance reads it.

    special: the tokens, by id, that a grammar names because it does not spell them.
    """
    named = {text: f"<[{token}]>" for token, text in special.items()}
    marks = re.compile(f"({'|'.join(map(re.escape, form.marks))})")

    def spelled(text: str) -> str:
        return " ".join(named.get(part, json.dumps(part, ensure_ascii=False)) for part in marks.split(text) if part)

    (first, last), (before, middle, after) = map(spelled, form.around), form.call
    more = "" if is_one else f"({spelled(form.between)} call){{0,{MOST_CALLS - 1}}}"
    rules = [f"start: {first} call {more} {last}", f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for i, function in enumerate(tool["function"] for tool in tools):
        name = json.dumps(function["name"], ensure_ascii=False)[1:-1] if before.endswith('"') else function["name"]
        rules.append(f"call_{i}: {spelled(before + name + middle)} arguments_{i} {spelled(after)}")
        rules.append(f"arguments_{i}: {json_rule(function.get('parameters', NO_PARAMETERS) | {'type': 'object'})}")
    return "\n".join(rules)


class Showing:
    """A tokenizer whose text has some special tokens too: those that mark calls."""

    def __init__(self, tokenizer: Tokenizer, shown: dict[int, str]):
        self.tokenizer, self.shown = tokenizer, shown

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)

    def skips(self, token: int) -> bool:
        return token not in self.shown and self.tokenizer.skips(token)

    def decode(self, ids: list[int]) -> str:
        parts, begin = [], 0
        for at, token in enumerate(ids):
            if token in self.shown:
                parts += [self.tokenizer.decode(ids[begin:at]), self.shown[token]]
                begin = at + 1
        return "".join([*parts, self.tokenizer.decode(ids[begin:])])


class Splitter:
    """Takes the text of an answer in pieces, and gives it out as content, reasoning_content and tool_calls.

    What may begin a mark is held back, and so is a call until it is whole; what is no call after all is content.
    White space beside marks is dropped.
    """

    def __init__(self, form: Form | None, tools: frozenset[str], thinks: bool, is_thinking: bool):
        self.form, self.tools, self.thinks = form, tools, thinks
        self.part = "reasoning_content" if is_thinking else "content"
        self.is_empty = True  # nothing but white space of this part has come
        self.mark = ""  # with which this part began
        self.held = ""

    def push(self, text: str, ends: bool = False) -> dict:
        """What is settled, by its field, calls as (name, arguments); ends: this is the last piece."""
        self.held += text
        settled: dict = {}
        while self.pass_mark(settled, ends):
            pass
        return settled

    def pass_mark(self, settled: dict, ends: bool) -> bool:
        """Settle the part that has come so far, up to a mark; whether there is one, after which another part begins."""
        if self.part == "tool_calls":
            return self.settle_calls(settled, ends)
        if self.part == "content" and self.is_empty and self.form and self.form.bare and self.held.lstrip()[:1] == "{":
            self.begin("tool_calls", "", self.held.lstrip())
            return True
        parts = self.parts_after()
        found = {self.held.find(mark): mark for mark in parts if mark in self.held}
        if not found:
            self.settle(settled, len(self.held) if ends else self.certain(parts))
            return False
        at, mark = min(found.items())
        rest, self.held = self.held[at + len(mark) :], self.held[:at].rstrip()
        self.settle(settled, at)
        self.begin(parts[mark], mark, rest)
        return True

    def parts_after(self) -> dict[str, str]:
        """What begins after each mark that can come here."""
        if self.part == "reasoning_content":
            return {CLOSE_THINKING: "content"}
        parts = {self.form.begin: "tool_calls"} if self.form else {}
        may_think = self.thinks and self.is_empty and OPEN_THINKING.startswith(self.held.lstrip()[: len(OPEN_THINKING)])
        return parts | ({OPEN_THINKING: "reasoning_content"} if may_think else {})

    def certain(self, marks: Iterable[str]) -> int:
        """How much of the held text no mark, and no white space before one, can begin in."""
        lengths = [n for mark in marks for n in range(1, len(mark)) if self.held.endswith(mark[:n])]
        rest = self.held[: len(self.held) - max(lengths, default=0)]
        return len(rest.rstrip() if marks else rest)

    def settle(self, settled: dict, length: int) -> None:
        text, self.held = self.held[:length], self.held[length:]
        if self.is_empty and (self.form or self.thinks):
            text = text.lstrip()
        if text:
            settled[self.part] = settled.get(self.part, "") + text
            self.is_empty = False

    def begin(self, part: str, mark: str, rest: str) -> None:
        self.part, self.mark, self.held, self.is_empty = part, mark, rest, True

    def settle_calls(self, settled: dict, ends: bool) -> bool:
        """Settle what stands between the marks of calls, once the second has come."""
        inside, end, rest = self.held.partition(self.form.end) if self.form.end else (self.held, "", "")
        if not (end or ends):
            return False
        try:
            calls = list(self.form.read(inside))
            is_call = all(name in self.tools and isinstance(arguments, dict) for name, arguments in calls)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the model writes what it likes
            is_call = False
        if is_call:
            settled.setdefault("tool_calls", []).extend(calls)
        else:
            settled["content"] = settled.get("content", "") + self.mark + inside + end
        self.begin("content", "", rest)
        return bool(rest)
