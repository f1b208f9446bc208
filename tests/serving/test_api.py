"""The HTTP interface, field by field, against `generate` and what OpenAI's objects are."""

import asyncio
import json
import math
import time
from itertools import chain

import pytest
import torch

from engine.engine import Engine, generate
from engine.sampling import Sampling
from tests.tiny import GREEDY

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "the cat"}]}
CAT = {"prompt": "the cat sat"}


@pytest.fixture
def alone(model, tokenizer):
    """alone(prompt, n, sampling, seed): the ids that `generate` draws for one prompt by itself, and their text."""

    def ids_and_text(prompt, n, sampling=GREEDY, seed=0):
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        found = list(chain(*(new for [new] in generate(Engine(model), [ids], n, sampling, seeds=[seed]))))
        end = next((i for i, token in enumerate(found) if token in tokenizer.eos_ids), n)
        return found[:end], tokenizer.decode(found[:end])

    return ids_and_text


def post(client, path, **fields):
    base = {CHAT: HELLO, TEXT: CAT}.get(path, {})
    return client.post(path, json=base | {"max_tokens": 8, "temperature": 0} | fields)


def answers(client, path, **fields):
    response = post(client, path, **fields)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    return [choice["text"] if path == TEXT else choice["message"]["content"] for choice in choices]


def events(response):
    """The chunks of a stream, which must end as it should."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
    assert lines[-2:] == ["[DONE]", ""]
    return [json.loads(line) for line in lines[:-2]]


def refusal(response, status, *words):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert all(str(word) in error["message"] for word in words), error["message"]
    return error


# ---------------------------------------------------------------- answers


def test_a_text_is_continued_as_generate_continues_it(client, alone):
    response = post(client, TEXT).json()
    ids, text = alone("the cat sat", 8)
    assert response["object"] == "text_completion" and response["model"] == "owner/tiny"
    assert response["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    usage = {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    assert response["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}


def test_a_conversation_goes_through_the_template(client, alone, tokenizer):
    prompt = tokenizer.encode_chat(HELLO["messages"])
    assert answers(client, CHAT) == [alone(prompt, 8)[1]]
    parts = [{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": " cat"}]}]
    assert answers(client, CHAT, messages=parts) == answers(client, CHAT)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_joins_to_the_whole(client, path):
    fields = {"n": 2, "temperature": 1, "seed": 5, "max_tokens": 20}
    chunks = events(post(client, path, stream=True, stream_options={"include_usage": True}, **fields))
    whole = post(client, path, **fields).json()
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    texts, reasons = ["", ""], [None, None]
    for choice in (chunk["choices"][0] for chunk in chunks[:-1]):
        assert reasons[choice["index"]] is None
        texts[choice["index"]] += choice["text"] if path == TEXT else choice["delta"].get("content", "")
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == answers(client, path, **fields)
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert path == TEXT or chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_several_prompts_several_answers_and_echo(client, alone):
    prompts = ["the cat", [5, 6, 7]]
    texts = answers(client, TEXT, prompt=["the cat", "he said"], n=2, temperature=1, seed=3, echo=True)
    for i, text in enumerate(texts):
        prompt = ["the cat", "he said"][i // 2]
        assert text == prompt + alone(prompt, 8, Sampling(1, 0), seed=3 + i % 2)[1]
    assert answers(client, TEXT, prompt=prompts[1]) == [alone(prompts[1], 8)[1]]
    assert post(client, TEXT, prompt=["a", "b"], n=2).json()["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    "fields, sampling",
    [
        ({"temperature": 0.7}, Sampling(0.7, 0)),
        ({"temperature": 1, "top_k": 3}, Sampling(1, 3)),
        ({"temperature": 1, "top_k": -1, "top_p": 0.5}, Sampling(1, 0, 0.5)),
        ({"temperature": 1, "min_p": 0.5}, Sampling(1, 0, 1, 0.5)),
        ({"temperature": None}, Sampling(1, 0)),
    ],
)
def test_sampling(client, alone, fields, sampling):
    assert answers(client, TEXT, seed=9, **fields) == [alone("the cat sat", 8, sampling, 9)[1]]


def test_defaults_are_the_checkpoints_and_a_request_overrides_them(serving, alone):
    with serving(temperature=0.5, top_k=7) as client:
        drawn = [answers(client, TEXT, seed=2, temperature=each)[0] for each in (None, 1)]
    assert drawn == [alone("the cat sat", 8, Sampling(each, 7), 2)[1] for each in (0.5, 1)]


def test_without_a_seed_answers_differ(client):
    assert len(set(answers(client, TEXT, n=4, temperature=1)) | set(answers(client, TEXT, n=4, temperature=1))) > 4


def test_an_answer_ends_at_the_end_of_text_at_a_stop_or_with_the_context(client, model, tokenizer, alone):
    text = alone("the cat sat", 8)[1]
    for stop in (text[3], ["never", text[3]]):
        choice = post(client, TEXT, stop=stop).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[: text.index(text[3])], "stop")
    eos = tokenizer.eos_id
    ended = post(client, TEXT, logit_bias={str(eos): 100}).json()
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("", "stop")
    on = post(client, TEXT, logit_bias={str(eos): 100}, ignore_eos=True).json()
    assert on["usage"]["completion_tokens"] == 8 and on["choices"][0]["finish_reason"] == "length"
    for budget in (None, 10_000):
        full = post(client, TEXT, max_tokens=budget, ignore_eos=True).json()
        assert full["usage"]["total_tokens"] == model.args.max_seq_length
        assert full["choices"][0]["finish_reason"] == "length"


def test_logprobs_are_the_models(client, model, alone, tokenizer):
    ids, _ = alone("the cat sat", 8)
    prompt = tokenizer.encode("the cat sat")
    with torch.inference_mode():
        pos = torch.arange(len(prompt) + 8)[None]
        rows = model(torch.tensor([prompt + ids]), pos, None)[0, len(prompt) - 1 : -1].log_softmax(-1)
    found = post(client, TEXT, logprobs=3).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(rows.max(-1).values.tolist(), abs=1e-3)
    spelled = [tokenizer.token_bytes(token).decode(errors="replace") for token in ids]
    assert found["tokens"] == spelled
    assert all(
        math.isclose(max(top.values()), own, abs_tol=1e-5)
        for top, own in zip(found["top_logprobs"], found["token_logprobs"], strict=True)
    )
    chat = post(client, CHAT, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert len(chat) == 8 and all(len(each["top_logprobs"]) == 2 for each in chat)
    assert all(each["top_logprobs"][0]["bytes"] == each["bytes"] for each in chat)
    streamed = events(post(client, CHAT, logprobs=True, top_logprobs=2, stream=True))
    contents = [chunk["choices"][0]["logprobs"]["content"] for chunk in streamed]
    assert [each["bytes"] for each in chain(*contents)] == [each["bytes"] for each in chat]


def test_a_prompt_seen_before_is_not_read_again(client):
    prompt = {"prompt": [7] * 150, "max_tokens": 2}
    post(client, TEXT, **prompt)
    cached = post(client, TEXT, **prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 64 <= cached < 150


# ---------------------------------------------------------------- refusals

BAD_FIELDS = [
    (CHAT, {"messages": []}, "messages", "at least one"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages[0]", "king"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0]",
        "image_url",
    ),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0]", "content"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0]", "UTF-8"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "21"),
    (CHAT, {"chat_template": "{{ 7 * 7 }}"}, "chat_template", "no field"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, None, "messages"),
    (CHAT, {"tools": [{"type": "web_search"}]}, "tools[0]", "web_search"),
    (CHAT, {"modalities": ["audio"]}, "modalities", "not supported"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "xml"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "cat"}}}},
        "response_format",
        "cat",
    ),
    (CHAT, {"response_format": {"type": "json_object"}, "ignore_eos": True}, "response_format", "ignore_eos"),
    (TEXT, {"prompt": None}, "prompt", "missing"),
    (TEXT, {"prompt": ""}, None, "no tokens"),
    (TEXT, {"prompt": [100_000]}, "prompt", "ids"),
    (TEXT, {"prompt": {"text": "x"}}, "prompt", "text"),
    (TEXT, {"max_tokens": 0}, "max_tokens", "0"),
    (TEXT, {"max_tokens": "8"}, "max_tokens", "8"),
    (TEXT, {"max_tokens": True}, "max_tokens", "true"),
    (TEXT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "other name"),
    (TEXT, {"temperature": -1}, "temperature", "-1"),
    (TEXT, {"temperature": 1e400}, None, "Infinity"),
    (TEXT, {"top_p": 0}, None, "top_p"),
    (TEXT, {"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    (TEXT, {"seed": 1 << 63}, "seed", 1 << 63),
    (TEXT, {"stop": [""]}, "stop", "empty"),
    (TEXT, {"n": 0}, "n", "0"),
    (TEXT, {"n": 110}, "n", 104),
    (TEXT, {"logit_bias": {"x": 1}}, "logit_bias", "x"),
    (TEXT, {"logit_bias": {"99999": 1}}, "logit_bias", 99999),
    (TEXT, {"best_of": 2}, "best_of", "not supported"),
    (TEXT, {"echo": True, "logprobs": 1}, "echo", "logprobs"),
    (TEXT, {"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    (TEXT, {"nonsense": 1}, "nonsense", "temperature"),
    (TEXT, {"temperature": "\ud800"}, "temperature", r"\ud800"),
    (TEXT, {"\ud800": 1}, r"\ud800", r"\ud800"),
]


@pytest.mark.parametrize("path, fields, param, word", BAD_FIELDS)
def test_a_bad_field_is_refused_by_name(client, path, fields, param, word):
    body = json.dumps({CHAT: HELLO, TEXT: CAT}[path] | fields)
    error = refusal(client.post(path, content=body), 400, word)
    assert error["type"] == "invalid_request_error" and error["param"] == param


def test_values_that_ask_for_nothing_are_taken(client):
    nothing = {"user": "me", "store": False, "parallel_tool_calls": True, "tools": [], "suffix": None}
    assert post(client, CHAT, **nothing).status_code == 200


@pytest.mark.parametrize(
    "body, word",
    [
        (b"", "not JSON"),
        (b"[1]", "an object"),
        (b"\xff\xfe", "not JSON"),
        (b'{"messages": NaN}', "NaN"),
        (b'{"messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", "nested"),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "tools": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_001,
            "nested",
        ),
        (b'{"seed": ' + b"9" * 5_000 + b"}", "not JSON"),
    ],
)
def test_a_body_that_is_no_request(client, body, word):
    refusal(client.post(CHAT, content=body), 400, word)


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(client):
    error = refusal(post(client, TEXT, prompt=[5] * 256), 400, "takes 256", "has 256")
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert post(client, TEXT, prompt=[5] * 255).json()["usage"]["completion_tokens"] == 1


def test_models_health_and_what_is_not_there(client):
    (entry,) = client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["object"], entry["max_model_len"]) == ("owner/tiny", "model", 256)
    assert client.get("/v1/models/owner/tiny").json() == entry
    assert client.get("/health").json() == {"status": "ok"}
    for response in (post(client, CHAT, model="gpt-4"), client.get("/v1/models/gpt-4")):
        assert refusal(response, 404, "gpt-4")["code"] == "model_not_found"
    assert post(client, CHAT, model="owner/tiny").status_code == 200
    for path in ("/nope", "/v1/models/../../etc/passwd", "/v1/chat/completions/", "/%2e%2e/serve.py"):
        refusal(client.get(path), 404)
    refusal(client.get(CHAT), 405, "GET")


def test_tokenize(client, tokenizer):
    ids = tokenizer.encode("the cat")
    assert client.post("/tokenize", json={"prompt": "the cat"}).json()["tokens"] == ids
    found = client.post("/tokenize", json=HELLO).json()
    assert found == {
        "tokens": tokenizer.encode_chat(HELLO["messages"]),
        "count": len(found["tokens"]),
        "max_model_len": 256,
    }
    refusal(client.post("/tokenize", json={}), 400, "prompt or messages")


def test_metrics_count(serving):
    with serving(n_rows=3) as client:
        post(client, TEXT, n=2)
        post(client, TEXT, nonsense=1)
        lines = client.get("/metrics").text.splitlines()
    for line in (
        f'gpt_faster_requests_total{{path="{TEXT}",status="200"}} 1.0',
        f'gpt_faster_requests_total{{path="{TEXT}",status="400"}} 1.0',
        "gpt_faster_prompt_tokens_total 6.0",
        "gpt_faster_generation_tokens_total 16.0",
        "gpt_faster_rows 3.0",
        "gpt_faster_requests_running 0.0",
        "gpt_faster_requests_waiting 0.0",
        "gpt_faster_time_to_first_token_seconds_count 2.0",
    ):
        assert line in lines


# ---------------------------------------------------------------- who may ask


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://127.0.0.1:8000"}, 200),
        ({"Origin": "http://127.0.0.1:9000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    ],
)
def test_foreign_pages_and_names_are_turned_away(client, headers, status):
    assert client.get("/v1/models", headers=headers).status_code == status


def test_pages_that_are_named_may_use_the_server(serving):
    page = {"Origin": "https://chat.example"}
    with serving(origins=["https://chat.example"], key="secret") as client:
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        preflight = client.options(CHAT, headers=page | ask)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        assert client.get("/health", headers=page).headers["access-control-allow-origin"] == "https://chat.example"
        assert client.get("/health", headers={"Origin": "https://evil.example"}).status_code == 403
        assert client.get("/health", headers={"Host": "chat.example"}).status_code == 200
        refusal(client.get("/v1/models", headers=page), 401)


@pytest.mark.parametrize(
    "authorization, is_right",
    [
        (None, False),
        ("Bearer s\u00e9cret", True),
        ("bearer s\u00e9cret", True),
        ("Bearer s\u00e9cre", False),
        ("Bearer secret", False),
        ("Basic YW55OnPDqWNyZXQ=", True),  # any:s\u00e9cret
        ("Basic ???", False),
        ("s\u00e9cret", False),
    ],
)
def test_the_key(serving, authorization, is_right):
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    with serving(key="s\u00e9cret") as client:
        assert client.get("/health").status_code == 200
        # a name that would make another path of a URL
        tricked = client.get("/v1/models", headers={"Host": "127.0.0.1/health?"})
        assert tricked.status_code in (401, 403)
        for path in ("/", "/v1/models", "/metrics", "/nope", "/health/../v1/models"):
            status = client.get(path, headers=headers).status_code
            assert (status != 401) == is_right, path
        if not is_right:
            assert refusal(client.get("/v1/models", headers=headers), 401)["code"] == "invalid_api_key"


def test_a_body_that_is_too_long(serving):
    with serving(max_body=1000) as client:
        refusal(client.post(CHAT, content=b"x" * 1001), 413, 1000)
        refusal(client.post(CHAT, content=(b"x" * 300 for _ in range(1000))), 413, 1000)  # without a length
        refusal(client.post(CHAT, content=b"x", headers={"Content-Length": "1000000000"}), 413)
        assert post(client, CHAT).status_code == 200


def test_the_page_is_one_file_that_asks_nobody_else(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not [
        word for word in ("http://", "https://", "src=", "innerHTML", "insertAdjacentHTML") if word in page.text
    ]


# ---------------------------------------------------------------- clients that leave, and a server that is full


def scope_of(client, path, body):
    headers = [(b"host", b"127.0.0.1"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    return scope | {"headers": headers, "http_version": "1.1", "scheme": "http", "app": client.app}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])  # of 2 rows
def test_a_client_that_goes_away_frees_its_rows(serving, stream, n):
    async def leave(client):
        body = json.dumps(CAT | {"stream": stream, "ignore_eos": True, "n": n}).encode()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        gone = asyncio.Event()

        async def receive():
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        call = asyncio.create_task(client.app(scope_of(client, TEXT, body), receive, send))
        while not client.worker.scheduler.running:
            await asyncio.sleep(0.001)
        gone.set()
        await call
        until = time.monotonic() + 5
        while client.worker.scheduler.has_work:
            assert time.monotonic() < until
            await asyncio.sleep(0.001)

    with serving(n_rows=2) as client:
        asyncio.run(leave(client))
        assert not client.worker.places and not client.worker.tasks
        assert answers(client, TEXT)


def test_a_full_queue_says_so(serving):
    with serving(n_rows=1, max_queue=1) as client:
        refusal(post(client, TEXT, n=3), 400, 2)
        with client.stream("POST", TEXT, json=CAT | {"stream": True, "n": 2, "ignore_eos": True}) as running:
            assert running.status_code == 200
            client.worker.places[-1] = None  # as many as the two, whether or not they have ended
            client.worker.places[-2] = None
            full = post(client, TEXT)
            del client.worker.places[-1], client.worker.places[-2]
        error = refusal(full, 503, "full")
        assert error["type"] == "server_error" and int(full.headers["retry-after"]) >= 1
        assert post(client, TEXT).status_code == 200


def test_an_error_of_the_model_ends_requests_but_not_the_server(serving, monkeypatch, capsys):
    with serving() as client:
        with monkeypatch.context() as patch:
            patch.setattr(client.worker.scheduler, "run", lambda tasks: 1 / 0)
            refusal(post(client, TEXT), 500, "ZeroDivisionError")
            streamed = post(client, TEXT, stream=True).text.split("\n\n")
            assert json.loads(streamed[-2].removeprefix("data: "))["error"]["type"] == "server_error"
        assert "ZeroDivisionError" in capsys.readouterr().err
        assert post(client, TEXT).status_code == 200
