"""Builds and registers the operators of `cpu.cpp`; a machine that cannot build them does without."""

import functools
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.cpp")


def cache_dir() -> Path:
    """Where built operators are kept: one folder for each source text, torch version and platform."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    text = SOURCE.read_bytes() + f"{torch.__version__} {sys.platform}".encode()
    return root / "gpt-faster" / "kernels" / hashlib.sha256(text).hexdigest()[:16]


def build() -> Path:
    """The shared library, compiled on the first call (about 10 s). Raises RuntimeError or OSError if it cannot be."""
    library = cache_dir() / "cpu.so"
    if library.exists():
        return library
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise RuntimeError("no C++ compiler")
    from torch.utils import cpp_extension

    print("Building the CPU operators, once, about 10 seconds ...", file=sys.stderr, flush=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        cpp_extension.load(
            "gpt_faster_cpu", [str(SOURCE)], extra_cflags=["-O3", "-fopenmp"], build_directory=folder, is_python_module=False
        )
        os.replace(Path(folder) / "gpt_faster_cpu.so", library)  # several processes may build; the last one wins
    return library


@functools.cache
def available() -> bool:
    """Load the operators. False, with one line on standard error, where they cannot be built."""
    try:
        torch.ops.load_library(str(build()))
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()
        print(f"The CPU operators cannot be built, using PyTorch's own: {reason[0] if reason else error!r}",
              file=sys.stderr)
        return False
    return True


@functools.cache
def has_bf16() -> bool:
    """Whether `linear_bf16` can be used and this processor has the instructions it is written for."""
    return available() and torch.ops.gpt_faster.has_bf16()


def register_fakes() -> None:
    @torch.library.register_fake("gpt_faster::linear_bf16")
    def _(x, weight, bias):
        return x.new_empty(*x.shape[:-1], weight.shape[0])
