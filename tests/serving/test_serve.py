"""serve.py as a process, through the client that people use, and through sockets that no client would open so."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import chain

import httpx
import openai
import pytest

import serve
from tests.tiny import ENV, ROOT, greedy_text, make_tiny_checkpoint, torchrun

HELLO = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A checkpoint whose answers take longer than the server's patience at its end."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("endless"), context=50_000)


@pytest.fixture(scope="module")
def server(endless):
    """(process, URL) of a server with a key."""
    command = [sys.executable, "serve.py", "--checkpoint_path", str(endless), "--dtype", "float32", "--port", "0"]
    command += [
        "--speculate",
        "ngram",
        "--speculate_k",
        "4",
        "--max_batch",
        "2",
        "--max_body",
        "50000",
        "--api_key",
        "secret",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=ENV, **pipes) as process:
        yield process, re.fullmatch(r"Listening on (http://127.0.0.1:\d+)\n", process.stdout.readline())[1]
        process.kill()


def test_the_openai_client(server, endless):
    """Chat, stream, logprobs, JSON schema, errors, a stream that is left; then the signal, which ends it all."""
    process, url = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    (model,) = client.models.list().data
    ask = {"model": model.id, "messages": HELLO, "temperature": 0}
    text = client.chat.completions.create(**ask, max_tokens=12).choices[0].message.content
    assert text == greedy_text(endless, HELLO)
    chunks = list(client.chat.completions.create(**ask, max_tokens=12, stream=True, logprobs=True, top_logprobs=1))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    entries = list(chain(*(chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs)))
    assert len(entries) == 12 and all(entry.bytes == entry.top_logprobs[0].bytes for entry in entries)
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}
    form = {"type": "json_schema", "json_schema": {"name": "two", "schema": schema}}
    answer = client.chat.completions.create(**ask, response_format=form).choices[0].message.content
    assert len(json.loads(answer)) == 2
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(**ask | {"model": "gpt-4"})
    with pytest.raises(openai.BadRequestError, match="top_k"):
        client.chat.completions.create(**ask, extra_body={"top_k": "many"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError, match="50000"):
        client.completions.create(model=model.id, prompt="x" * 60_000)
    for _ in range(3):  # of 2 rows
        with client.completions.create(
            model=model.id, prompt="he", stream=True, extra_body={"ignore_eos": True}
        ) as left:
            next(iter(left))
    assert client.chat.completions.create(**ask, max_tokens=12).choices[0].message.content == text


def test_many_requests_of_which_some_are_cut_off_or_malformed(server):
    """60, 16 at a time, of 2 rows: every good one is answered as it is alone, and no row is lost."""
    _, url = server
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    prompts, turns = ["he", "the cat", "the dog sat on the mat and he said " * 5], asyncio.Semaphore(16)

    def ask(prompt, **fields):
        return client.completions.create(model="model", prompt=prompt, **{"temperature": 0, "max_tokens": 8} | fields)

    async def one(i, alone):
        async with turns:
            if i % 10 == 0:
                with pytest.raises(openai.BadRequestError):
                    await ask("he", n=0)
            elif i % 10 == 1:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(ask("he", max_tokens=40_000, extra_body={"ignore_eos": True}), 0.02 * i)
            else:
                assert (await ask(prompts[i % 3])).choices[0].text == alone[i % 3]

    async def run():
        alone = [(await ask(prompt)).choices[0].text for prompt in prompts]
        await asyncio.gather(*(one(i, alone) for i in range(60)))

    asyncio.run(run())
    until, idle = time.monotonic() + 5, {"gpt_faster_requests_running 0.0", "gpt_faster_requests_waiting 0.0"}
    while not idle <= {*httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer secret"}).text.splitlines()}:
        assert time.monotonic() < until
        time.sleep(0.05)


def connect(url, data=b""):
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=10)
    sock.sendall(data)
    return sock


def test_hostile_connections(server):
    """Requests that never end, and bytes that are none: others are answered meanwhile."""
    _, url = server
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret\r\n"
    half_open = [
        connect(url, data) for data in (b"", b"GET", head, head + b"Content-Length: 100\r\n\r\n{") for _ in range(5)
    ]
    for data, status in (
        (b"\x00\xff garbage\r\n\r\n", b"400"),
        (head + b"X: " + b"y" * 100_000 + b"\r\n\r\n", b"400"),
        (head + b"Content-Length: 1000000000\r\n\r\n", b"413"),  # before a byte of it
        (head + b"Content-Length: -5\r\n\r\n", b"400"),
        (head + b"Host: evil.example\r\n\r\n", b"400"),
        (head.replace(b"/v1/completions", b"http://evil.example/v1/completions") + b"Content-Length: 0\r\n\r\n", b"4"),
        (head.replace(b"/v1/completions", b"/../../etc/passwd") + b"Content-Length: 0\r\n\r\n", b"404"),
    ):
        with connect(url, data) as sock:
            assert sock.recv(1000).startswith(b"HTTP/1.1 " + status), data[:100]
    with connect(url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as sock:
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    for sock in half_open:
        sock.close()


def test_a_signal_ends_the_server(server):
    """The last test of this server: answers that run are cut, and the exit code is 0."""
    process, url = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    ask = {"model": "model", "prompt": "he", "stream": True, "extra_body": {"ignore_eos": True}}
    running = [iter(client.completions.create(**ask)) for _ in range(4)]
    next(running[0])
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0
    assert time.monotonic() - began > 1.9  # they were given time
    with pytest.raises(openai.APIError, match="the server ends"):
        list(running[0])
    assert "Traceback" not in process.stderr.read()


def test_ranks_obey_the_first(endless):
    """Two share the model: drawn text and text by a grammar are those of one, and both end at Ctrl-C."""
    flags = ["--checkpoint_path", endless, "--dtype", "float32", "--device", "cpu", "--port", 0, "--max_batch", 2]
    with torchrun(2, "serve.py", *flags) as ranks:
        url = next(line for line in ranks.stdout if line.startswith("Listening")).split()[-1]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        ask = {"model": "model", "messages": HELLO, "temperature": 0}
        answer = client.chat.completions.create(**ask, max_tokens=12)
        assert answer.choices[0].message.content == greedy_text(endless, HELLO)
        form = {"type": "json_schema", "json_schema": {"name": "two", "schema": {"enum": ["a", "b"]}}}
        answer = client.chat.completions.create(**ask | {"temperature": 1}, n=3, response_format=form)
        assert {choice.message.content for choice in answer.choices} <= {'"a"', '"b"'}
        ranks.send_signal(signal.SIGINT)
        _, errors = ranks.communicate(timeout=30)
        assert "sign of life" not in errors


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--port", "70000"], "70000"),
        (["--host", ""], "0.0.0.0"),
        (["--max_batch", "0"], "max_batch"),
        (["--max_queue", "-1"], "max_queue"),
        (["--speculate_k", "4"], "--speculate ngram"),
        (["--cors_origin", "chat.example"], "https://chat.example"),
        (["--api_key", ""], "api_key"),
        (["--host", "no.such.host.example"], "cannot listen"),
        (["--max_seq_length", "100000"], "context of 256"),
    ],
)
def test_bad_flags(tiny, flags, message):
    with pytest.raises(ValueError, match=message):
        serve.main(**vars(serve.build_parser().parse_args(["--checkpoint_path", str(tiny), "--port", "0", *flags])))


def test_a_port_that_is_taken(tiny):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ValueError, match=f"port {port}: Address already in use"):
            serve.main(**vars(serve.build_parser().parse_args(["--checkpoint_path", str(tiny), "--port", port])))


def test_the_id_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "CHECKPOINTS", tmp_path / "checkpoints")
    file = tmp_path / "checkpoints" / "Owner" / "Name-1.5B" / "model.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    other = tmp_path / "tiny-2.5.gguf"
    other.touch()
    assert [serve.model_id(path) for path in (file, file.parent, other)] == ["Owner/Name-1.5B"] * 2 + ["tiny-2.5"]


def test_packages_that_are_missing_are_named_with_what_installs_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match="serve.py needs uvicorn.*requirements-serve.txt"):
        serve.main()


def test_the_checkpoints_own_sampling(tmp_path):
    from text.settings import read_sampling

    settings = {"temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": 2, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert read_sampling(tmp_path / "model.pth") == read_sampling(tmp_path) == {"temperature": 0.6, "top_k": 20}


def test_sampling_of_a_checkpoint_that_cannot_be(tmp_path):
    path = make_tiny_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_k": "many"}')
    with pytest.raises(ValueError, match='top_k is "many"'):
        serve.main(**vars(serve.build_parser().parse_args(["--checkpoint_path", str(path), "--port", "0"])))
