"""Children that run cases within limits of time and memory, forked by a process that has started no threads."""

import multiprocessing
import os
import re
import signal
import tempfile
import time
import traceback
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from cli import in_words
from tests.fuzz.kinds import KINDS, run

ROOT = Path(__file__).resolve().parents[2]
SECONDS, PATIENCE, LIMIT = 5, 60, 2 << 30  # processor time of one case, time on the clock, bytes above the start
ALLOWED = ("answer", "refused")


class Finding(NamedTuple):
    outcome: str  # "crash", "death", "time", "memory", "unreadable" or "not reproduced"
    words: str
    cases: list  # what makes it happen again: the case, or all that the child had run


class Forks:
    """Runs cases, each child many, one after another.

    kinds: of the cases, whose modules the server imports that forks the children. It is Python's own, of which a
    process has one at a time.
    """

    def __init__(self, valid: Path, kinds: list[str]):
        self.valid, self.context = valid, multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(sorted({KINDS[kind] for kind in kinds}))
        env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        env |= {"HF_HOME": str(valid), "PYTHONPATH": str(ROOT)}  # HF_HOME is for the data of tasks
        with patch.dict(os.environ, env):
            forkserver.ensure_running()

    def close(self) -> None:
        forkserver._forkserver._stop()  # it has no public name, and would stay until this process ends

    def findings(self, kind: str, cases: list) -> list[Finding]:
        """What goes wrong; it must do so again in a child that runs nothing else."""
        found = []
        while cases:
            answers = self.answers(kind, cases)
            ran, cases = cases[: len(answers)], cases[len(answers) :]
            outcome, words = answers[-1]
            if outcome not in ALLOWED:
                [(again, words_again)] = self.answers(kind, ran[-1:])
                if again in ALLOWED:
                    found.append(Finding("not reproduced", f"{outcome}: {words}", ran))
                else:
                    found.append(Finding(again, words_again, ran[-1:]))
        return found

    def answers(self, kind: str, cases: list) -> list[tuple[str, str]]:
        """How the cases end that a new child runs, up to the first that is not allowed."""
        pipe, end = multiprocessing.Pipe(duplex=False)
        child = self.context.Process(target=work, args=(end, kind, self.valid, cases), daemon=True)
        child.start()
        end.close()
        answers, start = [], peak(child.pid)
        for _ in cases:
            answers.append(next_answer(pipe, child, start))
            if answers[-1][0] not in ALLOWED:
                break
        child.kill()
        child.join()
        return answers


def next_answer(pipe, child, start: int) -> tuple[str, str]:
    """(outcome, words); start: the bytes that were resident before the first case."""
    end = time.monotonic() + PATIENCE
    while not pipe.poll(0.1):
        if peak(child.pid) > start + LIMIT:
            return "memory", f"it used more than {LIMIT / 1e9:.1f} GB"
        if time.monotonic() > end:
            return "time", f"it still ran after {PATIENCE} seconds on the clock"
    try:
        return pipe.recv()
    except EOFError:
        child.join()
    if child.exitcode == -signal.SIGPROF:
        return "time", f"it still ran after {SECONDS} seconds of processor time"
    return "death", f"the process ended with exit code {child.exitcode}"


def peak(pid: int) -> int:
    """The most bytes of a process that were resident; 0 of one that has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def work(pipe, kind: str, valid: Path, cases: list) -> None:
    """What a child does: it runs the cases and sends how each ended."""
    for stream in (1, 2):  # what the cases print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    start = peak(os.getpid())
    for case in cases:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        with tempfile.TemporaryDirectory(dir=valid) as folder:
            answer = judged(partial(run, kind, valid, Path(folder), case))
        signal.setitimer(signal.ITIMER_PROF, 0)
        if (used := peak(os.getpid()) - start) > LIMIT:
            answer = "memory", f"it used {used / 1e9:.1f} GB"
        pipe.send(answer)


def judged(work) -> tuple[str, str]:
    """How `work` ends in this process: allowed are an answer, or a ValueError that commands say in one line."""
    try:
        work()
        return "answer", ""
    except ValueError as error:
        text = in_words(error)
        is_line = text.isprintable() and 0 < len(text) < 1000 and type(error) is ValueError
        return ("refused" if is_line else "unreadable"), f"{type(error).__name__}: {text!r}"
    except BaseException:
        return "crash", "\n".join(line[:300] for line in traceback.format_exc().splitlines())[-3000:]
