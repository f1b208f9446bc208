"""Servers that are compared: how each is started and asked, and what of it is measured from outside."""

import contextlib
import json
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import httpx

from measure.memory import peak_main_memory
from scripts.bench.peers import openvino, transformers
from scripts.bench.peers.environment import python_of
from scripts.bench.peers.llama import gguf_of, llama_file
from scripts.bench.peers.load import Load
from scripts.bench.peers.process import MeasuredProcess
from scripts.bench.peers.protocol import SideProcess
from scripts.bench.serving.clients import measure
from text.tokenizer import load_tokenizer
from weights.checkpoint import open_model

CONTEXT, ROWS = 2048, 16
READY_SECONDS = 600
OUR_FLAGS = {"bf16": [], "int8": ["--quantize", "int8"], "int4": ["--quantize", "int4", "--groupsize", "32"]}
COMPILED = ["--compile"]  # as whoever wants speed starts our server; a test leaves it out
PAGE, CHUNK = 256, 64  # tokens of a page of transformers' cache, and of a step; unset, they would fill the memory


def by_ids(prompt: list[int], tokens: int) -> dict:
    """What is posted, as our server and llama.cpp's take it."""
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}


class Server(MeasuredProcess):
    """A server at a port of its own. body: of (prompt, tokens of the answer), what is posted."""

    def __init__(
        self,
        command: list,
        vocab_size: int,
        body: Callable[[list[int], int], dict] = by_ids,
        environment: dict[str, str] | None = None,
    ):
        port = free_port()
        super().__init__([*map(str, command), "--port", str(port)], environment)
        self.url, self.vocab_size, self.body = f"http://127.0.0.1:{port}", vocab_size, body

    def load(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.1)
        raise ValueError(f"it does not answer; its last words: {self.last_words()}")

    def measure(self, load: Load, seed: str) -> dict[str, float]:
        """Raises ValueError if a request is not answered."""
        with self.running():
            found = measure(self.url, self.body, load, self.vocab_size, seed)
        return found | {"peak_memory_gb": peak_main_memory(self.process.pid) / 1e9}


class Pipeline(SideProcess):
    """A side that has no server."""

    def measure(self, load: Load, seed: str) -> dict[str, float]:
        return self.ask({"load": asdict(load), "seed": seed})


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def our_server(model: str, precision: str, threads: int) -> Server:
    limits = ["--max_batch", ROWS, "--max_seq_length", CONTEXT, "--threads", threads]
    command = [sys.executable, "serve.py", "--checkpoint_path", model, *COMPILED, *OUR_FLAGS[precision], *limits]
    return Server(command, open_model(model).args.vocab_size)


def llama_server(model: str, precision: str, threads: int) -> Server:
    """Its context is that of all rows together. Raises ValueError if it is not installed."""
    program = shutil.which("llama-server")
    if program is None:
        raise ValueError("llama-server is not on the path")
    file, limits = llama_file(gguf_of(model), precision), ["--parallel", ROWS, "-c", ROWS * CONTEXT]
    command = [program, "-m", file, "--no-webui", "-fa", "on", *limits, "-t", threads, "-tb", threads]
    return Server(command, open_model(model).args.vocab_size)


def transformers_server(model: str, precision: str, threads: int) -> Server:
    """With continuous batching. It takes prompts as text, which may have some tokens more or less."""
    vocab_size = open_model(model).args.vocab_size
    tokenizer = load_tokenizer(model, vocab_size)

    def by_text(prompt: list[int], tokens: int) -> dict:
        how = json.dumps({"do_sample": False})  # and no end of text
        return {"prompt": tokenizer.decode(prompt), "max_tokens": tokens, "generation_config": how, "stream": True}

    program = python_of(transformers.NAME).with_name("transformers")
    limits = ["--cb-num-blocks", ROWS * CONTEXT // PAGE, "--cb-max-batch-tokens", CHUNK]
    command = [program, "serve", transformers.transformers_folder(gguf_of(model)), "--continuous-batching", *limits]
    command += ["--device", "cpu", "--dtype", "bfloat16", "--host", "127.0.0.1"]
    return Server(command, vocab_size, by_text, {"OMP_NUM_THREADS": str(threads)})


def openvino_pipeline(model: str, precision: str, threads: int) -> Pipeline:
    folder = openvino.openvino_folder(gguf_of(model), precision)
    words = [python_of(openvino.NAME), "-m", "scripts.bench.serving.openvino", folder, threads, ROWS]
    return Pipeline("openvino", [str(word) for word in words])
