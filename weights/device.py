"""Decisions about device, dtype and memory."""

import re
from pathlib import Path

import torch

from cli import say_once
from kernels import cpu
from ranks import Ranks
from weights.files import size_text

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str | None, ranks: Ranks | None = None) -> torch.device:
    """The device called `name`, or the first there is of cuda, mps and cpu.

    ranks: those of a model that is shared; each takes the GPU of its number.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        name = next(each for each, is_there in there.items() if is_there and not (ranks and each == "mps"))
    device_type, _, index = name.partition(":")
    if device_type not in there or (index and not (index.isdecimal() and device_type == "cuda")):
        raise ValueError(f"device {name!r} is unknown; use one of {', '.join(there)}, or cuda:N")
    if not there[device_type] or (index and int(index) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not on this machine; use {pick_device(None).type}")
    if device_type == "cpu":
        cpu.level()  # a GPT_FASTER_ISA that is not there is refused before anything slow
    elif device_type == "mps":
        say_once("Nothing here has ever run on an MPS device: compare the text with that of --device cpu")
    return torch.device(name) if ranks is None else ranks.place(name)


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_cache_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of keys and values; None: that of the model."""
    if name not in (None, "int8"):
        raise ValueError(f"cache_dtype {name!r} is unknown; use int8, or leave it out for the model's dtype")
    return None if name is None else torch.int8


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024
    except (OSError, TypeError):
        return None
    group = Path("/sys/fs/cgroup")  # a container's own limit
    try:
        limit, used = (group / "memory.max").read_text(), int((group / "memory.current").read_text())
        cached = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)", (group / "memory.stat").read_text(), re.M)))
        return free if limit.strip() == "max" else min(free, int(limit) - used + cached)
    except (OSError, ValueError):
        return free


def require_memory(size: int, device: torch.device, what: str, advice: str) -> None:
    """Refuse, before anything is allocated, `size` bytes for `what` that do not fit on `device`."""
    free = free_memory(device)
    if free is not None and size > free:
        raise ValueError(f"{what} need {size_text(size)}, but {device} has {size_text(free)} free; {advice}")
