"""Text to train on: the files of a person, or what a model writes; full windows, and who comes when."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cli import progress, say
from compress.calibration import calibration_text
from engine.cache import rows_that_fit
from engine.engine import Engine
from engine.request import Request, Timing
from engine.sampling import Sampling
from model import Transformer
from serving.scheduler import Scheduler, Task, run_tasks
from text.files import read_text
from text.tokenizer import Tokenizer
from weights.files import atomic_path

LENGTH = 512  # tokens of a text that a teacher writes, at most
PART = 512  # texts that are kept at a time: fewer leave rows idle at their end more often
ANSWERS = (0.0, 0.7)  # temperatures of answers, in turn: how models are asked
HELD_OUT = 10  # of so many parts of the data the last is measured on, and not trained on
MOST_HELD_OUT = 8192  # tokens: measuring takes seconds


def training_text(paths: list[str]) -> str:
    """The texts of all files, each as `calibration_text` reads it."""
    return "\n\n".join(calibration_text(path) for path in paths)


def split_off(ids: list[int], held_out: list[int] | None) -> tuple[list[int], list[int]]:
    """The ids to train on, and those that are held out: others if there are any, or some at the end."""
    if held_out is not None:
        return ids, held_out
    n = min(max(len(ids) // HELD_OUT, 1), MOST_HELD_OUT)
    return ids[:-n], ids[-n:]


def full_windows(ids: list[int], seq_length: int, needed: int) -> Tensor:
    """Windows [n, S] of a text: none has padding, and what is left over is dropped."""
    if len(ids) < needed * seq_length:
        raise ValueError(
            f"the data is too short for one step (tokens: {len(ids)}): it takes {needed} windows of {seq_length}; "
            "give more --data, or a smaller --batch_size or --seq_length"
        )
    return torch.tensor(ids[: len(ids) // seq_length * seq_length], dtype=torch.int32).view(-1, seq_length)


def batch_of(step: int, size: int, n_windows: int, seed: int) -> list[int]:
    """The windows of one step. Each time all have been read, they are shuffled anew; the step alone decides."""
    chosen = []
    for place in range(step * size, (step + 1) * size):
        epoch, at = divmod(place, n_windows)
        if at == 0 or not chosen:
            generator = torch.Generator().manual_seed((seed + epoch) % (1 << 63))
            order = torch.randperm(n_windows, generator=generator).tolist()
        chosen.append(order[at])
    return chosen


def keep_texts(path: Path, n_text: int, settings: dict, write: Callable[[range], list[str]]) -> None:
    """Fill a file of JSON Lines with n_text texts, some at a time, and go on with one that was begun.

    Its first line has no text, but the settings, JSON values, by which it was written. write: texts of some numbers.
    Raises ValueError if others wrote it, or it cannot be written.
    """
    head = json.dumps({"text": "", "settings": settings})
    lines = read_text(path).splitlines() if path.exists() else [head]
    if lines[:1] != [head] or len(lines) > n_text + 1:
        advice = "give it as --data, remove it, or choose another --output"
        raise ValueError(f"{path} has texts that were written with other flags; {advice}")
    while (done := len(lines) - 1) < n_text:
        lines += [json.dumps({"text": text}) for text in write(range(done, min(done + PART, n_text)))]
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        say(f"Texts kept in {path}: {len(lines) - 1} of {n_text}")


class Writer:
    """Writes texts of up to LENGTH tokens with a teacher; the number of each decides what is drawn for it."""

    def __init__(self, teacher: Transformer, tokenizer: Tokenizer, seed: int):
        self.teacher, self.tokenizer, self.seed = teacher, tokenizer, seed
        self.length = min(LENGTH, teacher.args.max_seq_length)

    def continued(self, beginnings: Tensor, numbers: range) -> list[str]:
        """What it writes after some of the beginnings [n, tokens], with these."""
        chosen = batch_of(0, numbers.stop, len(beginnings), self.seed)[numbers.start :]
        return self.write([beginnings[i].tolist() for i in chosen], numbers, [1.0])

    def conversations(self, numbers: range) -> list[str]:
        """Questions with their answers, both by the teacher.

        After the beginning of a question in its chat template a model writes what it was taught to answer (Xu et al.
        2024, Magpie, arXiv 2406.08464). Raises ValueError if it has no template.
        """
        before, after, end = self.around_question()
        room = (self.length - len(before) - len(after)) // 2  # an answer has as much
        if room < 1:
            used = f"the chat template writes {len(before) + len(after)} tokens around a question"
            raise ValueError(f"{used}, which leave no room for one in {self.length}; give --data as well")
        ends = frozenset(after[:1]) & self.tokenizer.special_tokens.keys()
        stop = [] if ends or not end else [end]
        asked = [Request(before, self.tokenizer, room, stop, False) for _ in numbers]
        for request in asked:
            request.eos_ids |= ends
        self.run(asked, numbers, [1.0], "Asking")
        chats = [[{"role": "user", "content": request.stream.text.strip()}] for request in asked]
        return self.write([self.tokenizer.encode_chat(chat)[: self.length - 1] for chat in chats], numbers, ANSWERS)

    def around_question(self) -> tuple[list[int], list[int], str]:
        """The ids that the chat template writes before a question, and after one; and these as text."""
        mark = "WHAT-IS-ASKED"
        before, _, after = self.tokenizer.render_chat([{"role": "user", "content": mark}]).partition(mark)
        # a space at the end belongs to the token of the next word
        return *(self.tokenizer.encode(each.strip(" "), False) for each in (before, after)), after.strip()

    def write(self, prompts: list[list[int]], numbers: range, temperatures: Sequence[float]) -> list[str]:
        """The prompts and what comes after them, with special tokens spelled out."""
        requests = [Request(prompt, self.tokenizer, self.length - len(prompt), (), False) for prompt in prompts]
        self.run(requests, numbers, temperatures, "Writing")
        texts = [request.prompt + request.token_ids for request in requests]
        return [b"".join(map(self.tokenizer.token_bytes, ids)).decode(errors="replace") for ids in texts]

    def run(self, requests: list[Request], numbers: range, temperatures: Sequence[float], what: str) -> None:
        """Run the requests, as many at a time as make it faster. temperatures: in turn."""
        chosen = [Sampling(temperature=temperatures[number % len(temperatures)]) for number in numbers]
        seeds = [(self.seed + number) % (1 << 63) for number in numbers]
        tasks = [Task(*each) for each in zip(requests, chosen, seeds, strict=True)]
        rows = min(rows_that_fit(self.teacher, self.length), len(tasks))
        scheduler = Scheduler(Engine(self.teacher), rows, self.length)
        with progress(total=len(tasks), desc=what, unit="text") as bar:
            for request, _ in run_tasks(scheduler, tasks, Timing()):
                bar.update(request.finish_reason is not None)


def fingerprint(windows: Tensor) -> str:
    """Tells one text from another."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
