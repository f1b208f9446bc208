"""What every command shares: Ctrl-C, broken pipes and errors in words. Imports nothing slow."""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def begin() -> None:
    """What every command does before its slow imports."""
    open_closed_streams()
    sys.excepthook = explain
    quit_on_interrupt()


def open_closed_streams() -> None:
    """Open /dev/null for each standard stream that the shell has closed, else the next file opened takes its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(number, True)
            stream = open(number, mode)  # noqa: SIM115, open until the process ends
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def quit_on_interrupt() -> None:
    """Make Ctrl-C end the process at once with code 130, while imports run and there is nothing to lose."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def explain(kind: type, error: BaseException, trace) -> None:
    """A `sys.excepthook`: one line and exit code 2 for an error that the person can mend."""
    message = in_words(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
    else:
        quit_with(2, f"error: {message}")


def send_again(ignored) -> None:
    """A `sys.unraisablehook`: Python drops every exception raised in a `__del__`, a Ctrl-C too."""
    if ignored.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(ignored)


def run(main: Callable, parser: argparse.ArgumentParser) -> None:
    """Call main with the parsed arguments and turn what goes wrong into an exit code: 2 with one line, or 130."""
    begin()
    if is_other_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, open until the process ends
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # LANG=C would refuse an emoji
    arguments = parse(parser)
    if arguments.get("output_json") == "-":
        sys.stdout = sys.stderr  # standard output is for the report alone
    sys.unraisablehook = send_again
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main(**arguments)
        print(end="", flush=True)
        quit_on_interrupt()  # while the interpreter shuts down
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # the last flush goes there
    except KeyboardInterrupt:
        quit_with(130, "")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are, without the usage before it."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; {self.prog} --help lists the flags")


def is_other_rank() -> bool:
    """Whether torchrun started this process beside a rank 0, which alone speaks."""
    return os.environ.get("RANK", "0") != "0"


def parse(parser: argparse.ArgumentParser) -> dict:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    parser.add_argument("--version", action="version", version=f"gpt-faster {version}")
    try:
        return vars(parser.parse_args())
    except ValueError:
        if is_other_rank():
            time.sleep(30)  # rank 0 says why; torchrun stops all ranks when the first ends
        raise


def in_words(error: BaseException) -> str | None:
    """The message for an error that the person can mend; None: the program is wrong."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error.name)
    if isinstance(error, MemoryError | RuntimeError) and "memory" in repr(error).lower():
        return f"out of memory: {(str(error) or 'all is taken').splitlines()[0]}; use a smaller model, batch or context"
    if isinstance(error, OSError):  # a full disk, a name that is too long
        return f"{error.strerror or error}: {error.filename or 'a temporary file, or standard output'}"
    return None


def missing_package(name: str) -> str:
    """What to do about it: to activate the environment, where there is one that is not active."""
    environment = ROOT / ".venv"
    outside = environment.is_dir() and not environment.samefile(sys.prefix)
    advice = f"source {environment}/bin/activate" if outside else f"pip install -r {ROOT}/requirements.txt"
    return f"Python at {sys.executable} has no package {name}; use: {advice}"


def listed(values: Sequence) -> str:
    """1, 2 or 3"""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def quit_with(code: int, message: str) -> None:
    """End now, without waiting for background threads and compile workers, which could print after the message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    os._exit(code)


def say(*parts) -> None:
    print(*parts, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Print a piece of an answer."""
    print(text, end="", flush=True)
