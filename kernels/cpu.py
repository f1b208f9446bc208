"""Builds and registers the operators of `cpu.cpp`; a machine that cannot build them does without."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.cpp")
HEAD_DIMS = (64, 96, 128, 256)  # that `attend` and `join_blocks` take


def library_path() -> Path:
    """Where the built operators are kept: one folder for each source text, torch version and platform."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    text = SOURCE.read_bytes() + f"{torch.__version__} {sys.platform}".encode()
    return cache / "gpt-faster" / "kernels" / hashlib.sha256(text).hexdigest()[:16] / "cpu.so"


def build(library: Path) -> None:
    """Compile `cpu.cpp` into `library`, about 10 s. Raises what `available` catches if it cannot be."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise RuntimeError("no C++ compiler")
    from torch.utils import cpp_extension

    print("Building the CPU operators, once, about 10 seconds ...", file=sys.stderr, flush=True)
    # ninja is installed beside this Python, whose folder is on the path only in an activated environment
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        # without -fopenmp at::parallel_for compiles to a plain loop
        flags = ["-O3", "-fopenmp"]
        cpp_extension.load("cpu", [str(SOURCE)], extra_cflags=flags, build_directory=folder, is_python_module=False)
        os.replace(Path(folder) / "cpu.so", library)  # several processes may build; the last one wins


@functools.cache
def available() -> bool:
    """Load the operators, building them first if need be. False, with one line on standard error, if that fails."""
    library = library_path()
    try:
        if not library.exists():
            build(library)
        torch.ops.load_library(str(library))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        print(f"PyTorch's own linear layers are used: the CPU operators cannot be built ({reason})", file=sys.stderr)
        return False
    torch.library.register_fake("gpt_faster::linear_bf16")(_linear_bf16_shape)
    torch.library.register_fake("gpt_faster::linear_codes")(_linear_codes_shape)
    torch.library.register_fake("gpt_faster::linear_experts")(_linear_experts_shape)
    for name in ("attend", "run_blocks"):
        torch.library.register_fake(f"gpt_faster::{name}")(lambda x, *_: torch.empty_like(x))
    return True


@functools.cache
def has_bf16() -> bool:
    """Whether this processor has the instructions that `linear_bf16` is written for, and the operator is there."""
    return available() and torch.ops.gpt_faster.has_bf16()


@functools.cache
def has_vnni() -> bool:
    """Whether this processor has the instructions that the other operators are written for, and they are there."""
    return available() and torch.ops.gpt_faster.has_vnni()


def _linear_bf16_shape(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_codes_shape(x, weight, scales, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0] * scales.shape[3])


def _linear_experts_shape(x, chosen, weight, scales):
    return x.new_empty(*chosen.shape, weight.shape[1] * (1 if scales is None else scales.shape[4]))
