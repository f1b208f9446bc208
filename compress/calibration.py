"""Text to calibrate with."""

import contextlib
import io

import torch
from torch import Tensor

from measure.tasks import data_of, load_tasks, require_harness
from model import ModelArgs
from text.files import is_json_object, numbered_lines, read_text, text_fields
from tp import inputs_split


def calibration_windows(ids: list[int], *, limit: int, seq_length: int, needed: int, seed: int) -> Tensor:
    """Up to `limit` windows [n, seq_length] of a text, drawn at random, in its order, none overlapping.

    needed: the tokens that they must hold together, at least as many as the widest layer has inputs: the Hessian of
    fewer is singular.
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


def widest(args: ModelArgs) -> int:
    """The inputs of a model's widest layer."""
    return max(args.dim, *(width or 0 for width in inputs_split(args).values()))


def calibration_text(path: str) -> str:
    """The text in a file: plain, or JSON Lines, whose texts are joined with a blank line between.

    JSON Lines is what is called .jsonl or begins with a line that is a JSON object.
    """
    text = read_text(path)
    lines = numbered_lines(text)
    if lines and (path.endswith(".jsonl") or is_json_object(next(iter(lines.values())))):
        text = "\n\n".join(text_fields(lines, path, "text", allow_empty=True).values())
    if not text.strip():
        raise ValueError(f"the text {path} is empty")
    return text


def task_texts(tasks: list[str], include_path: str | None) -> list[str]:
    """The first request of each document of some lm-eval tasks, with the answer it asks about."""
    require_harness("--calibration_tasks", "give --calibration_file")
    advice, texts = ", or a text with --calibration_file", []
    for task in load_tasks(tasks, include_path, advice).leaves():
        with data_of(task.task_name, advice), contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each
            task.build_all_requests()
        first = {request.doc_id: request for request in reversed(task.instances)}
        texts += ["".join(part for part in first[i].args if isinstance(part, str)) for i in sorted(first)]
    return texts
