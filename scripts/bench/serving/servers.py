"""Servers that are compared: how each is started, and what of it is measured from outside."""

import contextlib
import shutil
import socket
import sys
import time

import httpx

from measure.memory import peak_main_memory
from scripts.bench.peers.process import MeasuredProcess

READY_SECONDS = 600
OUR_FLAGS = {"bf16": [], "int8": ["--quantize", "int8"], "int4": ["--quantize", "int4", "--groupsize", "32"]}


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def our_command(model: str, precision: str, rows: int, context: int, threads: int, port: int) -> list[str]:
    limits = ["--max_batch", rows, "--max_seq_length", context, "--threads", threads, "--port", port]
    return [sys.executable, "serve.py", "--checkpoint_path", model, *OUR_FLAGS[precision], *map(str, limits)]


def llama_command(file: str, rows: int, context: int, threads: int, port: int) -> list[str]:
    """llama-server: its context is that of all rows together. Raises ValueError if it is not installed."""
    program = shutil.which("llama-server")
    if program is None:
        raise ValueError("llama-server is not on the path")
    limits = ["--parallel", rows, "-c", rows * context, "-t", threads, "-tb", threads, "--port", port]
    return [program, "-m", file, "--no-webui", "-fa", "on", *map(str, limits)]


class Server(MeasuredProcess):
    """A server, and what of it is measured from outside."""

    def __init__(self, name: str, command: list[str], port: int):
        super().__init__(name, command)
        self.url = f"http://127.0.0.1:{port}"

    def load(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.1)
        raise ValueError(f"{self.name} does not answer; its last words: {self.last_words()}")

    def peak_memory_gb(self) -> float:
        return peak_main_memory(self.process.pid) / 1e9
