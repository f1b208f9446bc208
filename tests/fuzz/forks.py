"""A child for each case, forked by a process that has started no threads, within limits of time and memory.

    python tests/fuzz/forks.py FOLDER

reads pickled (kind, case) from standard input and answers each with a pickled (outcome, words). FOLDER holds the valid
files, see `kinds.write_valid`.
"""

import contextlib
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS, PATIENCE, GB = 5, 60, 2  # processor time of one case, time on the clock, memory
ALLOWED = ("answer", "refused")


class Forks:
    """The client's side: `outcome(kind, case)` is "answer", "refused" or what went wrong, and its words."""

    def __init__(self, folder):
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        env["HF_HOME"] = str(folder)  # for the data of tasks
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen([sys.executable, __file__, str(folder)], cwd=ROOT, env=env, **pipes)

    def outcome(self, kind: str, case) -> tuple[str, str]:
        pickle.dump((kind, case), self.server.stdin)
        self.server.stdin.flush()
        return pickle.load(self.server.stdout)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


def serve(valid: Path) -> None:
    from tests.fuzz.kinds import KINDS

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "w") as nothing:
        for stream in (1, 2):  # what the cases print
            os.dup2(nothing.fileno(), stream)
    while True:
        try:
            kind, case = pickle.load(requests)
        except EOFError:
            return
        with tempfile.TemporaryDirectory() as folder:
            pickle.dump(in_child(partial(KINDS[kind].run, valid, Path(folder), case)), answers)
        answers.flush()


def in_child(work) -> tuple[str, str]:
    """How `work` ended in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with contextlib.suppress(BaseException):
            os.write(writing, pickle.dumps(judged(work)))
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], PATIENCE)
    answer = os.read(reading, 1 << 16) if ready else b""
    os.close(reading)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    if used.ru_maxrss * 1024 - rss() > GB << 30:
        return "memory", f"{used.ru_maxrss * 1024 / 1e9:.1f} GB were resident"
    if not ready or used.ru_utime + used.ru_stime > SECONDS - 0.1:
        return "time", f"it still ran after {SECONDS} seconds of processor time, or {PATIENCE} on the clock"
    return pickle.loads(answer) if answer else ("death", f"the process ended with status {status}")


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def judged(work) -> tuple[str, str]:
    """How `work` ends in this process: allowed are an answer, or a ValueError that commands say in one line."""
    from cli import in_words

    sys.stdin = open(os.devnull)  # noqa: SIM115, until the process ends
    try:
        work()
        return "answer", ""
    except ValueError as error:
        text = in_words(error)
        is_line = text.isprintable() and 0 < len(text) < 1000 and type(error) is ValueError
        return ("refused" if is_line else "unreadable"), f"{type(error).__name__}: {text!r}"
    except BaseException:
        return "crash", traceback.format_exc()[-3000:]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve(Path(sys.argv[1]))
