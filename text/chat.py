"""Chat templates: programs that come with a model, so `sandbox.py` renders them in a process with limits of its own."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

TEMPLATE_SECONDS = 2.0
BYTES_A_SECOND = 5_000_000  # of a long conversation, which has so much more time
START_SECONDS = 60.0  # on a busy machine
SANDBOX = Path(__file__).with_name("sandbox.py")


def render(template: str, variables: dict) -> str:
    """What a template writes; variables: of JSON's types. Raises ValueError, in one line, on whatever goes wrong."""
    reply = renderer(os.getpid()).ask({"template": template, "variables": variables})
    if "text" not in reply:
        raise ValueError(f"chat template: {reply['error']}")
    return reply["text"]


def start_rendering() -> None:
    """Start the process that renders, which takes 0.1 s, beside what else comes before the first template."""
    renderer(os.getpid()).start()


@functools.cache
def renderer(pid: int) -> "Renderer":
    """The renderer of a process: after a fork the pipes are still the parent's, so the child has its own."""
    return Renderer()


class Renderer:
    """The process that renders: started once, kept, and killed at the deadline, because nothing less stops C code."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.is_ready = False

    def start(self) -> None:
        """Start the process, unless it runs; it is ready once it has written its first line."""
        if self.process is not None and self.process.poll() is None:
            return
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:  # in a session of its own, because a Ctrl-C at the terminal is not for it
            self.process = subprocess.Popen([sys.executable, "-P", SANDBOX], **pipes, start_new_session=True)
        except OSError as error:
            raise ValueError(f"chat templates need a process of their own, and none starts: {error.strerror}") from None
        self.is_ready = False

    def ask(self, request: dict) -> dict:
        with self.lock:
            self.start()
            self.is_ready = self.is_ready or bool(self.exchange(b"", START_SECONDS))
            if not self.is_ready:
                code = self.process.returncode
                raise ValueError(f"chat templates need a process of their own, and it ends at once (exit code {code})")
            line, began = json.dumps(request).encode() + b"\n", time.monotonic()
            seconds = TEMPLATE_SECONDS + len(line) / BYTES_A_SECOND
            reply = self.exchange(line, seconds)
        if reply:
            return json.loads(reply)
        if time.monotonic() - began < seconds:
            return {"error": f"it ends the process that renders it (exit code {self.process.returncode})"}
        return {"error": f"still running after {seconds:.3g} seconds"}

    def exchange(self, line: bytes, seconds: float) -> bytes:
        """The line that the process answers; empty if it has died, or is killed because the time is over."""
        reply, killer = b"", threading.Timer(seconds, self.process.kill)
        killer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(line)
                self.process.stdin.flush()
            reply = self.process.stdout.readline()
        finally:  # after a Ctrl-C too
            in_time = killer.is_alive()
            killer.cancel()
            if not (in_time and reply.endswith(b"\n")):
                reply = b""
                self.process.kill()
                self.process.communicate()
        return reply
