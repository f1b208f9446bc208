"""/v1/responses: the same answers as /v1/chat/completions, as items; its stream; bad fields; OpenAI's client."""

import json

import openai
import pytest

from serving.tools import FORMS
from tests.serving.test_api import CHAT, post, refusal

PATH = "/v1/responses"
GREEDY = {"temperature": 0, "max_output_tokens": 12}
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
CHAT_TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'


def ask(client, **fields):
    response = client.post(PATH, json={"input": "the cat"} | GREEDY | fields)
    assert response.status_code == 200, response.text
    return response.json()


def events(client, **fields):
    """The events of a stream, numbered, each under its own name."""
    response = client.post(PATH, json={"input": "the cat", "stream": True} | GREEDY | fields)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    *lines, last = response.text.split("\n\n")
    assert last == ""
    parts = [line.split("\n") for line in lines]
    found = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [f"event: {event['type']}" for event in found] == [name for name, _ in parts]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(response):
    items = [
        {name: each for name, each in item.items() if name not in ("id", "call_id")} for item in response["output"]
    ]
    return {name: each for name, each in response.items() if name not in ("id", "created_at")} | {"output": items}


def chat(client, **fields):
    return post(client, CHAT, max_tokens=12, **fields).json()


def test_an_answer_is_that_of_a_chat(client):
    response, theirs = ask(client), chat(client)
    [item] = response["output"]
    assert item["content"][0]["text"] == theirs["choices"][0]["message"]["content"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", response["status"])
    usage = response["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == tuple(
        theirs["usage"][name] for name in ("prompt_tokens", "completion_tokens")
    )
    is_cut = theirs["choices"][0]["finish_reason"] == "length"
    assert response["status"] == ("incomplete" if is_cut else "completed")
    assert response["incomplete_details"] == ({"reason": "max_output_tokens"} if is_cut else None)


def test_instructions_and_items_are_messages(client):
    talk = [
        {"role": "user", "content": [{"type": "input_text", "text": "the "}, {"type": "input_text", "text": "cat"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": "sat"},
        {"type": "message", "role": "user", "content": "on"},
    ]
    same = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    same = [{"role": "system", "content": "be a cat"}, *same, {"role": "user", "content": "on"}]
    [item] = ask(client, input=talk, instructions="be a cat")["output"]
    assert item["content"][0]["text"] == chat(client, messages=same)["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "fields", [{}, {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"enum": [7]}}}}]
)
def test_a_stream_ends_with_the_whole(client, fields):
    found, whole = events(client, **fields), ask(client, **fields)
    assert found[-1]["type"] == f"response.{whole['status']}"
    usage = {
        "input_tokens_details": {
            "cached_tokens": found[-1]["response"]["usage"]["input_tokens_details"]["cached_tokens"]
        }
    }
    assert without_ids(found[-1]["response"]) == without_ids(whole | {"usage": whole["usage"] | usage})
    text = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]
    assert not fields or text == "7"


def test_thoughts_a_text_and_calls_are_items_of_their_own(client, says):
    says("Hm. ", "So.</think>I look", CALL)
    settings = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}, "ignore_eos": True}
    found = events(client, **settings, logit_bias={"5": 100})
    kinds = [event["type"].removeprefix("response.") for event in found]
    text = [["content_part.added"], ["output_text.delta"], ["output_text.done", "content_part.done"]]
    thought = [[name.replace("output_text", "reasoning_text") for name in part] for part in text]
    item = ["output_item.added"], ["output_item.done"]
    call = ["function_call_arguments.delta", "function_call_arguments.done"]
    expected = ["created", "in_progress", *item[0], *sum(thought, []), *item[1], *item[0], *sum(text, []), *item[1]]
    expected += [*item[0], *call, *item[1], "incomplete"]
    assert [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before] == expected
    reasoning, message, call = found[-1]["response"]["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm. So."}]
    assert message["content"][0]["text"] == "I look"
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Bern"})
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert done == [reasoning, message, call] and {each["status"] for each in done} == {"completed"}
    assert found[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_what_came_back_goes_in_again(client, says, monkeypatch):
    """The output of a turn is the input of the next, as agents send it."""
    assert FORMS["hermes"].begin in CALL
    says("I look", CALL)
    output = ask(client, tools=[TOOL], ignore_eos=True, logit_bias={"5": 100})["output"]
    monkeypatch.undo()
    call = {"type": "function", "id": output[-1]["call_id"]}
    call["function"] = {"name": "weather", "arguments": '{"city": "Bern"}'}
    talk = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "I look", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "rain"},
    ]
    answer = {"type": "function_call_output", "call_id": call["id"], "output": "rain"}
    items = [{"role": "user", "content": "the cat"}, *output, answer]
    [item] = ask(client, input=items, tools=[TOOL])["output"]
    assert (
        item["content"][0]["text"] == chat(client, messages=talk, tools=[CHAT_TOOL])["choices"][0]["message"]["content"]
    )


def test_a_call_that_is_asked_for(client, monkeypatch):
    monkeypatch.setattr(
        "serving.interface.jobs.render", lambda *_: "the cat"
    )  # a short context has no place for the tools
    closed = {"type": "object", "properties": {"x": {"enum": [1]}}, "required": ["x"], "additionalProperties": False}
    response = ask(
        client,
        tools=[TOOL | {"parameters": closed}],
        tool_choice={"type": "function", "name": "weather"},
        parallel_tool_calls=False,
        max_output_tokens=None,
    )
    [call] = response["output"]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "weather", {"x": 1})
    assert response["status"] == "completed" and response["tool_choice"]["name"] == "weather"


@pytest.mark.parametrize(
    "fields, param, word",
    [
        ({"input": None}, "input", "missing"),
        ({"input": []}, "input", "at least one"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "item_reference"),
        ({"input": [{"type": ["message"], "role": "user"}]}, "input[0]", "a text"),
        ({"input": [{"role": "user"}]}, "input[0]", "content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0]",
            "input_image",
        ),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input[0]", "call_id"),
        ({"input": [{"type": "function_call", "name": "x", "call_id": "1", "arguments": "{"}]}, None, "JSON object"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "web_search"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"n": 2}, "n", "no field"),
        ({"model": "gpt-4"}, "model", "gpt-4"),
    ],
)
def test_a_bad_field_is_refused_by_name(client, fields, param, word):
    status = 404 if "model" in fields else 400
    error = refusal(client.post(PATH, json={"input": "the cat"} | fields), status, word)
    assert param is None or error["param"] == param


def test_openais_client_reads_both_forms(client):
    theirs = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=client, max_retries=0)
    fields = {"model": "owner/tiny", "input": "the cat", **GREEDY}
    whole = theirs.responses.create(**fields)
    assert whole.output_text and whole.usage.output_tokens == 12
    with theirs.responses.stream(**fields) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == whole.output_text
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        theirs.responses.create(**fields, previous_response_id="resp_1")
