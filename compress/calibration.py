"""Text to calibrate with."""

import contextlib
import io
import json

import torch
from torch import Tensor

from measure.tasks import require_harness
from weights.files import read_text


def calibration_windows(ids: list[int], *, limit: int, seq_length: int, needed: int, seed: int) -> Tensor:
    """Up to `limit` windows [n, seq_length] of a text, drawn at random, in its order, none overlapping.

    needed: the tokens they must hold together, the inputs of the widest layer: H of fewer is singular. Raises
    ValueError if they hold less.
    """
    fewest = -(-max(needed, 1) // seq_length)  # windows
    if len(ids) < fewest * seq_length:
        raise ValueError(
            f"the calibration text is too short (tokens: {len(ids)}); this model needs {fewest * seq_length}, "
            f"{fewest} windows of {seq_length}"
        )
    if limit < fewest:
        raise ValueError(
            f"--calibration_limit {limit} windows of {seq_length} tokens are fewer tokens than the {needed} inputs of "
            f"the widest layer; raise it to at least {fewest}"
        )
    windows = torch.tensor(ids[: len(ids) // seq_length * seq_length]).view(-1, seq_length)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:limit]
    return windows[drawn.sort().values]


def calibration_text(path: str) -> str:
    """The text in a file: plain, or JSONL, whose lines' texts are joined with a blank line between. UTF-8.

    JSONL is what is called .jsonl or begins with a line that is a JSON object. Raises ValueError if the file cannot be
    read, has no text, or a line is no object with a `text`.
    """
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and (str(path).endswith(".jsonl") or isinstance(from_json(lines[0][1]), dict)):
        text = "\n\n".join(text_field(line, f"line {number} of {path}") for number, line in lines)
    if not text.strip():
        raise ValueError(f"the text {path} is empty")
    return text


def text_field(line: str, where: str) -> str:
    """The `text` of one line of JSONL. Raises ValueError if it has none."""
    value = from_json(line)
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where} is no JSON object with a text; each line must be like {{"text": "some words"}}')
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{where} is no text: half of a surrogate pair stands alone") from None
    return text


def from_json(line: str):
    """The value that a line holds, None if it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def task_texts(tasks: list[str], include_path: str | None) -> list[str]:
    """The first request of each document of some lm-eval tasks, with the answer it asks about.

    Raises ValueError if lm-eval is missing, a task is unknown, or its data cannot be had.
    """
    require_harness("--calibration_tasks", "give --calibration_file")
    from harness import data_of, load_tasks

    advice, texts = ", or a text with --calibration_file", []
    for task in load_tasks(tasks, include_path, advice).leaves():
        with data_of(task.task_name, advice), contextlib.redirect_stderr(io.StringIO()):  # a progress bar each
            task.build_all_requests()
        first = {request.doc_id: request for request in reversed(task.instances)}
        texts += ["".join(part for part in first[i].args if isinstance(part, str)) for i in sorted(first)]
    return texts
