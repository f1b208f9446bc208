"""Tool calls: how models write them, grammars that force one, calls told apart as an answer streams."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from serving.interface.fields import RequestError
from serving.processors import json_rule
from text.thinking import CONTENT, Marks, Splitter


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


class CallSplitter(Splitter):
    """A splitter that gives out tool_calls too, as (name, arguments).

    A call is held back until it is whole; what is no call after all is content.
    """

    def __init__(self, form: Form | None, tools: frozenset[str], marks: Marks | None, is_thinking: bool):
        super().__init__(marks, is_thinking)
        self.form, self.tools = form, tools
        self.strips = self.strips or form is not None

    def pass_mark(self, settled: dict, ends: bool) -> bool:
        if self.part == "tool_calls":
            return self.settle_calls(settled, ends)
        if self.part == CONTENT and self.is_empty and self.form and self.form.bare and self.held.lstrip()[:1] == "{":
            self.begin("tool_calls", "", self.held.lstrip())
            return True
        return super().pass_mark(settled, ends)

    def parts_after(self) -> dict[str, str]:
        calls = {self.form.begin: "tool_calls"} if self.form and self.part == CONTENT else {}
        return calls | super().parts_after()

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
            settled[CONTENT] = settled.get(CONTENT, "") + self.mark + inside + end
        self.begin(CONTENT, "", rest)
        return bool(rest)
