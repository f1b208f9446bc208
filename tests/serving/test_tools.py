"""Tool calls and thinking, however the text is cut into pieces."""

import json
from dataclasses import replace

import jsonschema
import pytest

from serving.interface.fields import RequestError
from serving.tools import FORMS, CallSplitter, tool_form
from tests.serving.test_api import CHAT, post, refusal
from text.thinking import THINK, Showing

TOOLS = frozenset({"weather", "time"})
WEATHER = ("weather", {"city": "Bern"})
CALL = '{"name": "weather", "arguments": {"city": "Bern"}}'
LLAMA = '{"name": "weather", "parameters": {"city": "Bern"}}'

CASES = [
    (None, "plain <tool_call> text ", {"content": "plain <tool_call> text "}),
    ("hermes", "plain < text", {"content": "plain < text"}),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", {"tool_calls": [WEATHER]}),
    ("hermes", f"I look. \n<tool_call>{CALL}</tool_call>", {"content": "I look.", "tool_calls": [WEATHER]}),
    ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", {"tool_calls": [WEATHER] * 2}),
    ("hermes", f"<tool_call>{CALL}", {"tool_calls": [WEATHER]}),  # cut at its end
    ("hermes", "<tool_call>{cut", {"content": "<tool_call>{cut"}),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>!', None),  # nobody offered this tool
    ("hermes", "<tool_call>[[[]]]</tool_call>", None),
    ("llama", LLAMA, {"tool_calls": [WEATHER]}),
    ("llama", f"\n {LLAMA}; {LLAMA}", {"tool_calls": [WEATHER] * 2}),
    ("llama", f"<|python_tag|>{LLAMA}", {"tool_calls": [WEATHER]}),
    ("llama", '{"answer": 1}', {"content": '{"answer": 1}'}),
    ("llama", 'It is {"answer": 1}', {"content": 'It is {"answer": 1}'}),
    ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", {"tool_calls": [WEATHER] * 2}),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Bern"}', {"tool_calls": [WEATHER]}),
    ("mistral", '[TOOL_CALLS]weather{"city": "Bern"}[TOOL_CALLS]time{}', {"tool_calls": [WEATHER, ("time", {})]}),
    ("mistral", "[TOOL_CALLS]nothing", {"content": "[TOOL_CALLS]nothing"}),
]


def joined(splitter, pieces):
    out = {}
    for i, piece in enumerate(pieces):
        for part, value in splitter.push(piece, ends=i == len(pieces) - 1).items():
            out[part] = out[part] + value if part in out else value
    return out


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("form, text, expected", CASES)
def test_calls(form, text, expected, size):
    splitter = CallSplitter(FORMS.get(form), TOOLS, None, is_thinking=False)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert joined(splitter, pieces) == (expected or {"content": text})


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "is_thinking, text, reasoning, content",
    [
        (False, "<think>\nHm.\n\n</think>\n\nYes.", "Hm.", "Yes."),
        (True, "\nHm.\n</think>\nYes.", "Hm.", "Yes."),
        (True, "Hm. And", "Hm. And", None),
        (False, "Yes, <think> is a tag", None, "Yes, <think> is a tag"),
        (False, f"<think>Hm</think><tool_call>{CALL}</tool_call>", "Hm", None),
    ],
)
def test_thinking(is_thinking, text, reasoning, content, size):
    splitter = CallSplitter(FORMS["hermes"], TOOLS, THINK, is_thinking)
    found = joined(splitter, [text[i : i + size] for i in range(0, len(text), size)])
    assert (found.get("reasoning_content"), found.get("content")) == (reasoning, content)
    assert found.get("tool_calls", []) == [WEATHER] * (CALL in text)


@pytest.mark.parametrize(
    "template, form",
    [
        ('"Return <tool_call>\\n{"name": ...}\\n</tool_call>"', "hermes"),
        ("[AVAILABLE_TOOLS]...[TOOL_CALLS]", "mistral array"),
        ("[AVAILABLE_TOOLS]...[TOOL_CALLS]name[ARGS]{}", "mistral"),
        ('Environment: ipython ... {"name": function name, "parameters": dictionary}', "llama"),
        ("<tool_call><function=name><parameter=city>", None),
        ("{{ messages }}", None),
    ],
)
def test_the_form_is_the_templates(template, form):
    if form is None:
        with pytest.raises(RequestError, match="tools"):
            tool_form(template, "tools")
    else:
        assert tool_form(template, "tools") is FORMS[form]


def test_special_tokens_that_mark_calls_are_shown(tokenizer):
    """The tiny vocabulary has <|im_start|> as one; nothing else of the text changes."""
    ids = tokenizer.encode("the cat<|im_start|> sat<|im_end|> on")
    (mark,) = tokenizer.encode("<|im_start|>")
    showing = Showing(tokenizer, {mark: "<|im_start|>"})
    assert showing.decode(ids) == "the cat<|im_start|> sat on"
    assert showing.skips(mark) is False and showing.skips(tokenizer.eos_id)


# ---------------------------------------------------------------- through the interface

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_tools_reach_the_template_and_calls_come_back_as_text(client, tokenizer):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    talk = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "no"},
    ]
    ids = client.post("/tokenize", json={"messages": talk, "tools": [TOOL]}).json()["tokens"]
    text = "".join(tokenizer.token_bytes(token).decode() for token in ids)
    assert json.dumps(TOOL) in text and "<tool_call>weather Bern</tool_call>" in text and "tool\nno" in text
    assert post(client, CHAT, messages=talk, tools=[TOOL]).status_code == 200
    none = client.post("/tokenize", json={"messages": talk}).json()["tokens"]
    used = post(client, CHAT, messages=talk, tools=[TOOL], tool_choice="none").json()["usage"]["prompt_tokens"]
    assert used == len(none)
    call["function"]["arguments"] = "{"
    refusal(post(client, CHAT, messages=talk), 400, "JSON object")


def test_an_answer_that_is_a_call(client, says):
    """The tiny model writes noise, so what it writes is replaced before it is split."""
    says("I look <tool", f"_call>{CALL}", "</tool_call>")
    choice = post(client, CHAT, tools=[TOOL], stream=True, logit_bias={"5": 100}, ignore_eos=True)
    chunks = [json.loads(line[6:])["choices"][0] for line in choice.text.split("\n\n") if line.startswith("data: {")]
    (calls,) = [chunk["delta"]["tool_calls"] for chunk in chunks if "tool_calls" in chunk["delta"]]
    assert calls[0]["index"] == 0 and len(calls[0]["id"]) == 9
    assert calls[0]["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == "I look"


def test_thinking_that_the_template_opens_is_reasoning(client):
    message = post(client, CHAT, chat_template_kwargs={"enable_thinking": True}).json()["choices"][0]["message"]
    assert message["content"] == "" and message["reasoning_content"]
    form = {"type": "json_schema", "json_schema": {"name": "two", "schema": {"enum": ["a", "b"]}}}
    answer = post(client, CHAT, chat_template_kwargs={"enable_thinking": True}, response_format=form).json()
    assert answer["choices"][0]["message"]["content"] in ('"a"', '"b"')


# ---------------------------------------------------------------- calls that are forced

CITY = {"$defs": {"city": {"enum": ["Bern", "K\u00f6ln"]}}, "properties": {"city": {"$ref": "#/$defs/city"}}}
CITY |= {"type": "object", "required": ["city"], "additionalProperties": False}
FLAGS = {"type": "object", "properties": {"on": {"type": "boolean"}, "n": {"type": "integer", "maximum": 9}}}
FLAGS |= {"required": ["on"], "additionalProperties": False}
SCHEMAS = {"weather": CITY, 'é."b"': FLAGS, "now": {"type": "object", "maxProperties": 0}}
FORCED = [{"type": "function", "function": {"name": name, "parameters": SCHEMAS[name]}} for name in SCHEMAS]
FORCED[2]["function"].pop("parameters")


HERMES = FORMS["hermes"]  # here with a mark that is a special token
MARKED = replace(HERMES, begin="<|im_start|>", call=('<|im_start|>{"name": "', *HERMES.call[1:]))


@pytest.fixture(params=[*FORMS.values(), MARKED], ids=[*FORMS, "marked"])
def forcing(request, client, monkeypatch):
    """The client, whose model writes calls in one of the forms; its short context has no place for the tools."""
    monkeypatch.setattr("serving.interface.jobs.tool_form", lambda *_: request.param)
    monkeypatch.setattr("serving.interface.jobs.render", lambda *_: "the cat")
    return client


@pytest.mark.parametrize("is_one", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": 'é."b"'}}])
def test_a_forced_call_validates(forcing, tokenizer, choice, is_one):
    """Noise at temperature 1 is held to the form and to the parameters."""
    ask = {"tools": FORCED, "tool_choice": choice, "parallel_tool_calls": not is_one, "n": 4, "temperature": 1}
    ends = [tokenizer.eos_id, *tokenizer.encode("]")]  # made likelier, or more calls come than the context holds
    ask |= {"max_tokens": None, "seed": 1, "logit_bias": {str(token): 3 for token in ends}}
    for found in post(forcing, CHAT, **ask).json()["choices"]:
        assert (found["finish_reason"], found["message"]["content"]) == ("tool_calls", None), found
        calls = [each["function"] for each in found["message"]["tool_calls"]]
        assert len(calls) == 1 or not is_one
        for call in calls:
            assert choice == "required" or call["name"] == 'é."b"'
            jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])


@pytest.mark.parametrize(
    "fields, param, word",
    [
        ({"tool_choice": "required"}, "tool_choice", "no tool"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}, "tools": FORCED}, "tool_choice", "rm"),
        ({"tool_choice": {"type": "function"}, "tools": FORCED}, "tool_choice", "function.name"),
        ({"tool_choice": "all", "tools": FORCED}, "tool_choice", "required"),
        ({"tool_choice": "required", "tools": FORCED[2:], "ignore_eos": True}, "tool_choice", "ignore_eos"),
        ({"parallel_tool_calls": False, "tools": FORCED}, "parallel_tool_calls", "tool_choice"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools[0]", "object"),
    ],
)
def test_a_choice_of_tools_that_cannot_be(client, fields, param, word):
    assert refusal(post(client, CHAT, **fields), 400, word)["param"] == param
