"""Text to train on: the files of a person, or what a model writes; full windows, and who comes when."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from cli import progress
from compress.calibration import calibration_text
from engine.cache import rows_that_fit
from engine.engine import Engine
from engine.request import Request, Timing
from engine.sampling import Sampling
from model import Transformer
from serving.scheduler import Scheduler, Task, run_tasks
from text.tokenizer import Tokenizer

HELD_OUT = 10  # of so many parts of the data the last is measured on, and not trained on
MOST_HELD_OUT = 8192  # tokens: measuring takes seconds


def training_text(paths: list[str]) -> str:
    """The texts of all files, each as `calibration_text` reads it."""
    return "\n\n".join(calibration_text(path) for path in paths)


def split_off(ids: list[int]) -> tuple[list[int], list[int]]:
    """The ids to train on, and those at the end that are held out."""
    n = min(max(len(ids) // HELD_OUT, 1), MOST_HELD_OUT)
    return ids[:-n], ids[-n:]


def full_windows(texts: Iterable[list[int]], seq_length: int, needed: int) -> Tensor:
    """Windows [n, S] of the texts one behind the other: none has padding, and what is left over is dropped."""
    ids = [token for text in texts for token in text]
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


def continued(
    teacher: Transformer, tokenizer: Tokenizer, windows: Tensor, n_text: int, n_prompt: int, seed: int
) -> list[list[int]]:
    """n_text times the first n_prompt tokens of one of the windows [n, S], and what the teacher writes after them."""
    chosen, length = batch_of(0, n_text, len(windows), seed), windows.shape[1]
    requests = [Request(windows[i, :n_prompt].tolist(), tokenizer, length - n_prompt, (), False) for i in chosen]
    tasks = [Task(request, Sampling(temperature=1.0), seed + i) for i, request in enumerate(requests)]
    write(teacher, tasks, length, "Writing")
    return [request.prompt + request.token_ids for request in requests]


def write(teacher: Transformer, tasks: list[Task], length: int, what: str) -> None:
    """Run tasks of up to `length` tokens each, as many at a time as make it faster."""
    scheduler = Scheduler(Engine(teacher), min(rows_that_fit(teacher, length), len(tasks)), length)
    with progress(total=len(tasks), desc=what, unit="text") as bar:
        for request, _ in run_tasks(scheduler, tasks, Timing()):
            bar.update(request.finish_reason is not None)


def fingerprint(windows: Tensor) -> str:
    """Tells one text from another."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
