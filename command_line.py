"""What every command shares: Ctrl-C, broken pipes and errors in words. Imports nothing slow."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable


def quit_on_interrupt() -> None:
    """Make Ctrl-C end the process at once with code 130, while imports run and there is nothing to lose."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def run(main: Callable, parser: argparse.ArgumentParser) -> None:
    """Call main with the parsed arguments and turn what goes wrong into an exit code: 2 with one line, or 130."""
    arguments = vars(parser.parse_args())
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None:  # it was closed
            stream.reconfigure(encoding="utf-8", errors="replace")  # LANG=C would refuse an emoji
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main(**arguments)
        print(end="", flush=True)
        quit_on_interrupt()  # while the interpreter shuts down
    except ValueError as error:
        quit_with(2, f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if "memory" not in repr(error).lower():
            raise
        quit_with(2, f"error: out of memory: {str(error).splitlines()[0]}; use a smaller model, batch or context")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would complain
    except OSError as error:  # a full disk behind standard output, a name that is too long
        quit_with(2, f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        quit_with(130, "")


def quit_with(code: int, message: str) -> None:
    """End now: background threads and compile workers must not hold the process, nor print after us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    os._exit(code)
