"""What this machine has and can do: memory, bandwidth."""

import mmap
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kernels import cpu
from measure.memory import peak_main_memory
from ranks import Ranks
from weights.files import GB, open_past_cache


def peak_memory(device: torch.device) -> int | None:
    """Bytes, at most, that this process has held: of the device on CUDA, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return peak_main_memory()


@torch.inference_mode()
def measured_bandwidth(device: torch.device) -> float | None:
    """GB/s this machine moves: the median of five reads of 256 MiB on a CPU, of ten copies (read + write) on CUDA."""
    if device.type not in ("cpu", "cuda"):
        return None
    size = 256 << 20
    buffer = torch.ones(size // 8192, 4096, dtype=torch.bfloat16, device=device)
    other = torch.empty_like(buffer) if device.type == "cuda" else torch.ones(1, 4096, dtype=torch.bfloat16)
    if device.type == "cuda":

        def work():
            for _ in range(10):  # so that waiting for the last takes a small share
                other.copy_(buffer)
            torch.cuda.synchronize(device)

        moved = 10 * 2 * size
    elif cpu.available():
        moved, work = size, lambda: torch.ops.gpt_faster.linear_bf16(other, buffer, None)
    else:
        moved, work = size, lambda: buffer.view(torch.int64).sum()
    return moved / median_seconds(work, 5) / GB


def disk_rate(path: Path) -> float:
    """GB/s at which the largest file here is read, at eight places, past the page cache."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    size, file = largest.stat().st_size, open_past_cache(largest)
    try:
        pages = mmap.mmap(-1, (min(size // 8, 16 << 20) // mmap.PAGESIZE + 1) * mmap.PAGESIZE)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        places = (i * size // 8 // mmap.PAGESIZE * mmap.PAGESIZE for i in range(8))
        n_byte = sum(os.preadv(file, [pages], place) for place in places)
        return n_byte / (time.perf_counter() - began) / GB
    finally:
        os.close(file)


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations/s of a product of two square matrices, random because a GPU is faster with equal numbers."""
    n = 8192 if device.type == "cuda" else 256  # seconds on a CPU that has no instructions for bfloat16
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: (a @ b)[0, 0].item(), 5)


def median_seconds(work: Callable, times: int) -> float:
    work()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def run_facts(flags: dict, device: torch.device, ranks: Ranks | None) -> dict:
    """What every report says of the run it comes from."""
    return {
        "args": flags,
        "device": str(device),
        "ranks": 1 if ranks is None else ranks.size,
        "pipeline_stages": 1 if ranks is None else ranks.n_stage,
        "dtype": flags["dtype"],
        "cache_dtype": flags["cache_dtype"] or flags["dtype"],
        "torch": torch.__version__,
        "isa": cpu.isa() if device.type == "cpu" else None,
        "threads": torch.get_num_threads(),
    }
