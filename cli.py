"""What every command shares: Ctrl-C, broken pipes and errors in words. Imports nothing slow."""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

LONGEST_MESSAGE = 800  # characters


def quit_on_interrupt() -> None:
    """Make Ctrl-C end the process at once with code 130, while imports run and there is nothing to lose."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def send_again(ignored) -> None:
    """A `sys.unraisablehook`: Python drops every exception raised in a `__del__`, a Ctrl-C too."""
    if ignored.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(ignored)


def run(main: Callable, parser: argparse.ArgumentParser) -> None:
    """Call main with the parsed arguments and turn what goes wrong into an exit code: 2 with one line, or 130."""
    if is_other_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, open until the process ends
    arguments = parse(parser)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None:  # None: closed
            stream.reconfigure(encoding="utf-8", errors="replace")  # LANG=C would refuse an emoji
    sys.unraisablehook = send_again
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main(**arguments)
        print(end="", flush=True)
        quit_on_interrupt()  # while the interpreter shuts down
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the last flush goes there
    except Exception as error:
        message = in_words(error)
        if message is None:
            raise
        quit_with(2, f"error: {message}")
    except KeyboardInterrupt:
        quit_with(130, "")


def is_other_rank() -> bool:
    """Whether torchrun started this process beside a rank 0, which alone speaks."""
    return os.environ.get("RANK", "0") != "0"


def parse(parser: argparse.ArgumentParser) -> dict:
    try:
        return vars(parser.parse_args())
    except SystemExit as end:
        if is_other_rank() and end.code:
            time.sleep(30)  # rank 0 says why; torchrun stops all ranks when the first ends
        raise


def in_words(error: Exception) -> str | None:
    """The message for an error that the person can mend; None: the program is wrong."""
    if isinstance(error, ValueError):
        return one_line(str(error))
    if isinstance(error, MemoryError | RuntimeError) and "memory" in repr(error).lower():
        return f"out of memory: {(str(error) or 'all is taken').splitlines()[0]}; use a smaller model, batch or context"
    if isinstance(error, OSError):  # a full disk behind standard output, a name that is too long
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return None


def one_line(text: str) -> str:
    """A message as a printable line: files and libraries bring line ends, control characters and whole pages."""
    line = " ".join(part.strip() for part in text.splitlines())
    line = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 200]} ... {line[-195:]}"


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
