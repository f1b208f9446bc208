"""The interface over a tiny model, in this process."""

from contextlib import contextmanager

import pytest
import torch
from starlette.testclient import TestClient

from engine.engine import Engine
from serving.interface.api import Api
from serving.interface.jobs import Served
from serving.scheduler import Scheduler
from serving.server import build_app
from serving.worker import Worker
from tests.tiny import make_tiny_checkpoint
from text.thinking import Splitter
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model

HERE = "http://127.0.0.1:8000"
# the form of a Hermes template: tools, thinking, calls that come back
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>"
    "<tool_call></tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ call.function.name }} {{ call.function.arguments.city }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}"
    "{% endif %}{# </think> #}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("serving"), context=256, template=TEMPLATE)


@pytest.fixture(scope="session")
def model(tiny):
    return load_model(tiny, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def serving(model, tokenizer):
    """serving(n_rows=..., max_queue=..., ...) is a context with a client of a server of its own."""

    @contextmanager
    def start(n_rows=4, max_queue=100, max_body=100_000, origins=(), key=None, host="127.0.0.1", **defaults):
        context = model.args.max_seq_length
        served = Served("owner/tiny", tokenizer, context, model.args.vocab_size, defaults)
        worker = Worker(lambda: (Scheduler(Engine(model), n_rows, context), served), max_queue)
        worker.start()
        worker.ready.result()
        app = build_app(Api(served, worker, max_body), host, list(origins), key)
        with TestClient(app, base_url=HERE, raise_server_exceptions=False) as client:
            client.worker = worker
            yield client
        worker.stop()

    return start


@pytest.fixture(scope="module")
def client(serving):
    with serving() as client:
        yield client


@pytest.fixture
def says(monkeypatch):
    """says(text, ...): what the tiny model writes, piece by piece, in the place of its noise.

    Tokens that come while a server is busy are one piece, so that all that is left comes with the last.
    """
    push = Splitter.push

    def replace(*pieces):
        said = iter(pieces)

        def say(self, _: str, ends: bool = False) -> dict:
            return push(self, "".join(said) if ends else next(said, ""), ends)

        monkeypatch.setattr(Splitter, "push", say)

    return replace
