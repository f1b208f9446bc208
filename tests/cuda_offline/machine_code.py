"""The machine code of Triton kernels for a GPU that is not there, read back by the tools in Triton's wheels."""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction, MockTensor

from tests.cuda_offline.imagined_gpu import imagined_gpu

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@contextlib.contextmanager
def compiled_launches(sm: int) -> Iterator[list[CompiledKernel]]:
    """While this lasts, what launches a Triton kernel compiles it for the imagined GPU, and does not run it."""
    made, run = [], JITFunction.run

    def compile_launch(kernel, *args, grid, warmup, **kwargs):
        kernel.device_caches.clear()  # they may be of another GPU
        args, kwargs = map(mocked, args), {name: mocked(value) for name, value in kwargs.items()}
        made.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))

    with imagined_gpu(sm), mock.patch.object(JITFunction, "run", compile_launch):
        yield made


def mocked(value):
    """A fake tensor has no address, which Triton wants to know."""
    return MockTensor(value.dtype) if isinstance(value, Tensor) else value


@functools.cache
def compile_generated(tuner, sm: int) -> CompiledKernel:
    """The code of a kernel of inductor, a `CachingAutotuner`, in its first configuration."""
    with imagined_gpu(sm), torch._inductor.config.patch(use_static_cuda_launcher=False):
        return tuner._precompile_config(tuner.configs[0]).kernel


def spilled(kernel: CompiledKernel) -> int:
    """Bytes a thread that registers do not hold."""
    return int(re.search(r"STACK:(\d+)", output("cuobjdump", "--dump-resource-usage", kernel))[1])


def hands_over(kernel: CompiledKernel) -> bool:
    """Whether all threads of a program that is counted write before that, and read what others wrote after it."""
    before, *after = re.split(r"atom\.global\.gpu\.acq_rel\.add", kernel.asm["ptx"])
    if not after:
        return True
    has_written = before.rindex("bar.sync") > before.rindex("st.global")
    return has_written and len(after) == 1 and after[0].index("bar.sync") < after[0].index("ld.global.cg")


def instructions(kernel: CompiledKernel) -> str:
    return output("nvdisasm", "-c", kernel)


def output(tool: str, option: str, kernel: CompiledKernel) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
