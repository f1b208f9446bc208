"""A program that is measured in turn with others on one machine; nothing here needs a package."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Self

from cli import ROOT


class MeasuredProcess(contextlib.AbstractContextManager):
    """A program in a process of its own, stopped but while it loads and is measured; its log is a temporary file."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, **pipes):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        pipes = {"stdout": self.log, "stderr": self.log} | pipes
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | (environment or {}), text=True, **pipes)

    def load(self) -> None:
        """Wait until it has loaded. Raises ValueError if it ends instead."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            with self.running():
                self.load()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def last_words(self) -> str:
        self.log.seek(0)
        return (self.log.read().strip().splitlines() or ["none"])[-1]
