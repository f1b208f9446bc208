"""Flags that commands share, and their checks."""

import os

import torch

from cli import say
from ranks import Ranks


def say_device(device: torch.device, ranks: Ranks | None) -> None:
    say(f"Using device={device}" if ranks is None else f"Using device={device.type} on {ranks.size} ranks")


def check_threads(threads: int | None) -> None:
    """Raise ValueError on a number of threads that cannot be started."""
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"--threads is {threads}; this machine has {os.cpu_count()} processors")


def number_or_text(argument: str) -> int | str:
    try:
        return int(argument)
    except ValueError:
        return argument
