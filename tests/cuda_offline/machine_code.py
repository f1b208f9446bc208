"""The machine code of Triton kernels for a GPU that is not there: registers, spills, shared memory, widths of loads."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from tests.cuda_offline.imagined_gpu import imagined_gpu

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"  # in Triton's wheels for x86


@dataclass(frozen=True)
class MachineCode:
    """What the assembler made of one kernel. registers, spilled and loads are None where the tools are missing."""

    shared: int  # bytes a block
    registers: int | None  # a thread
    spilled: int | None  # bytes a thread on the stack
    loads: Counter | None  # instructions that read global memory, by their bits a thread: 8, 16, 32, 64, 128


def compile_generated(tuner, sm: int) -> MachineCode:
    """The code of a kernel of inductor, a `CachingAutotuner`, in its first configuration."""
    with imagined_gpu(sm), torch._inductor.config.patch(use_static_cuda_launcher=False):
        return describe(tuner._precompile_config(tuner.configs[0]).kernel)


def compile_kernel(function, signature: dict[str, str], constants: dict, sm: int, **options) -> MachineCode:
    """The code of a kernel of ours. signature: the type of each argument, such as *bf16, i32 and constexpr."""
    source = triton.compiler.ASTSource(function, signature, constants)
    with imagined_gpu(sm):
        target = triton.runtime.driver.active.get_current_target()
        return describe(triton.compile(source, target=target, options=options))


def describe(kernel) -> MachineCode:
    shared = kernel.metadata.shared
    if not all((TOOLS / name).exists() for name in ("cuobjdump", "nvdisasm")):
        return MachineCode(shared, None, None, None)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = output("cuobjdump", "--dump-resource-usage", file.name)
        assembly = output("nvdisasm", "-c", file.name)
    registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return MachineCode(shared, registers, spilled, Counter(map(width, re.findall(r"\bLDG\.E([\w.]*)", assembly))))


def output(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


def width(suffixes: str) -> int:
    """Bits a thread of a load such as LDG.E.EL.128.CONSTANT."""
    return next((int(found[1]) for found in re.finditer(r"\.[US]?(8|16|64|128|256)\b", suffixes)), 32)
