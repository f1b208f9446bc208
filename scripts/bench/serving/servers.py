"""Servers that are compared: how each is started, and what of it is measured from outside."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from cli import ROOT

READY_SECONDS = 600
MODES = {"bf16": [], "int8": ["--quantize", "int8"], "int4": ["--quantize", "int4", "--groupsize", "32"]}


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def our_command(model: str, precision: str, rows: int, context: int, threads: int, port: int) -> list[str]:
    limits = ["--max_batch", rows, "--max_seq_length", context, "--threads", threads, "--port", port]
    return [sys.executable, "serve.py", "--checkpoint_path", model, *MODES[precision], *map(str, limits)]


def llama_command(file: str, rows: int, context: int, threads: int, port: int) -> list[str]:
    """llama-server: its context is that of all rows together. Raises ValueError if it is not installed."""
    program = shutil.which("llama-server")
    if program is None:
        raise ValueError("llama-server is not on the path")
    limits = ["--parallel", rows, "-c", rows * context, "-t", threads, "-tb", threads, "--port", port]
    return [program, "-m", file, "--no-webui", "-fa", "on", *map(str, limits)]


class Server(contextlib.AbstractContextManager):
    """A server in a process of its own, stopped but for the time in which it is measured."""

    def __init__(self, name: str, command: list[str], port: int):
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=self.log, env=os.environ)

    def __enter__(self) -> "Server":
        """Wait until it answers."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    self.process.send_signal(signal.SIGSTOP)
                    return self
            time.sleep(0.1)
        self.log.seek(0)
        words = self.log.read().strip().splitlines() or ["none"]
        self.__exit__()
        raise ValueError(f"{self.name} does not answer; its last words: {words[-1]}")

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    @contextlib.contextmanager
    def running(self):
        self.process.send_signal(signal.SIGCONT)
        try:
            yield self.url
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def peak_memory_gb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e6
