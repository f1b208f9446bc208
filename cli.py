"""What every command shares: Ctrl-C, broken pipes, errors in words, progress, temporary files. Imports nothing slow."""

import argparse
import contextlib
import errno
import functools
import glob
import os
import platform
import shutil
import signal
import stat
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LONGEST_MESSAGE = 800  # characters of one
SILENCE = 10  # seconds without a word, at most, where progress is not drawn


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


class Terminated(BaseException):
    """SIGTERM came: it ends the command as Ctrl-C does, and in interactive mode too."""


def terminate(*_) -> None:
    raise Terminated


ENDINGS = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM in the block: torchrun sends its ranks again what the terminal has sent them."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in ENDINGS.values()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM take effect after the block, which must not be left half done, or once it fails."""
    came = []
    handlers = {each: signal.signal(each, lambda number, _: came.append(number)) for each in ENDINGS.values()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def send_again(ignored) -> None:
    """A `sys.unraisablehook`: Python drops every exception raised in a `__del__`, a Ctrl-C too."""
    if ignored.exc_type in ENDINGS:
        threading.Timer(0.1, os.kill, (os.getpid(), ENDINGS[ignored.exc_type])).start()
    else:
        sys.__unraisablehook__(ignored)


def run(main: Callable, parser: argparse.ArgumentParser) -> None:
    """Call main with the parsed arguments and turn what goes wrong into an exit code: 2 with one line, 130 or 143."""
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
        if "RANK" not in os.environ:  # torchrun ends ranks by it, which may wait for each other outside of Python
            signal.signal(signal.SIGTERM, terminate)
        main(**arguments)
        print(end="", flush=True)
        quit_on_interrupt()  # while the interpreter shuts down
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # the last flush goes there
    except tuple(ENDINGS) as ending:
        quit_with(128 + ENDINGS[type(ending)], "")


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
        return one_line(str(error))
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error.name)
    if isinstance(error, MemoryError | RuntimeError) and "memory" in repr(error).lower():
        return f"out of memory: {(str(error) or 'all is taken').splitlines()[0]}; use a smaller model, batch or context"
    if isinstance(error, OSError):  # a full disk behind standard output, a name that is too long
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        place = error.filename or ("standard output" if is_full and prints_to_a_disk() else None)
        return one_line(f"{error.strerror or error}{f': {place}' if place else ''}")
    return None


def missing_package(name: str) -> str:
    """What to do about it: to activate the environment, where there is one that is not active."""
    environment = ROOT / ".venv"
    outside = environment.is_dir() and not environment.samefile(sys.prefix)
    advice = (
        f"source {environment}/bin/activate"
        if outside
        else f"pip install -r {ROOT}/requirements.txt, or a requirements-*.txt beside it"
    )
    return f"Python at {sys.executable} has no package {name}; use: {advice}"


def one_line(text: str) -> str:
    """A message as a printable line: files and libraries bring line ends, control characters and whole pages."""
    line = " ".join(part.strip() for part in text.splitlines())
    line = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 200]} ... {line[-195:]}"


def prints_to_a_disk() -> bool:
    """Whether standard output is a file or a device such as /dev/full: no terminal, pipe or socket."""
    try:
        mode = os.fstat(1).st_mode
    except OSError:  # closed
        return False
    return stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(1))


def listed(values: Sequence) -> str:
    """1, 2 or 3"""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def quit_with(code: int, message: str) -> None:
    """End now, without waiting for background threads and compile workers, which could print after the message."""
    for number in ENDINGS.values():
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    os._exit(code)


def cache_folder() -> Path:
    """Where is kept what was built once and would take long to build again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-faster"


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A path beside `target` for a file or folder in the making, which is gone after the block.

    What killed processes of this machine left there goes first.
    """
    stem, pid = f".{target.name}.{platform.node()}.", os.getpid()
    for left in target.parent.glob(f"{glob.escape(stem)}*.tmp"):
        owner = left.name.removeprefix(stem).partition(".")[0]
        if owner.isdecimal() and not is_running(int(owner)):
            remove(left)
    path = target.with_name(f"{stem}{pid}.tmp")
    remove(path)  # in a container that is started again, processes have the same numbers
    try:
        yield path
    finally:
        remove(path)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there, and what a library made beside it by adding to its name."""
    for each in path.parent.glob(f"{glob.escape(path.name)}*"):
        if each.is_dir():
            shutil.rmtree(each, ignore_errors=True)
        else:
            each.unlink(missing_ok=True)


def say(*parts) -> None:
    print(*parts, file=sys.stderr, flush=True)


say_once = functools.cache(say)  # a command may pick a device, or open a folder, several times


def write(text: str) -> None:
    """Print a piece of an answer."""
    print(text, end="", flush=True)


class Lines:
    """A file for tqdm, whose bars become lines on standard error."""

    def write(self, text: str) -> None:
        if text.strip():
            say(text.strip())

    def flush(self) -> None:
        pass


def progress(items: Iterable | None = None, **options):
    """A tqdm bar on a terminal, removed at the end; elsewhere a line every 10 seconds, none if the work takes less."""
    from tqdm import tqdm

    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(items, leave=False, delay=1, **options)
    pace = {"miniters": 1, "mininterval": SILENCE, "delay": SILENCE}
    return tqdm(items, leave=False, file=Lines(), bar_format="{desc}: {n_fmt} of {total_fmt}", **pace, **options)
