"""The machine code of Triton kernels for a GPU that is not there: registers, spills, shared memory, widths of loads."""

import re
from collections import Counter
from dataclasses import dataclass

import torch

from tests.cuda_offline.disassembly import disassembled
from tests.cuda_offline.imagined_gpu import imagined_gpu


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


def describe(kernel) -> MachineCode:
    shared = kernel.metadata.shared
    try:
        usage, assembly = disassembled(kernel.asm["cubin"])
    except FileNotFoundError:
        return MachineCode(shared, None, None, None)
    registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return MachineCode(shared, registers, spilled, Counter(map(width, re.findall(r"\bLDG\.E([\w.]*)", assembly))))


def width(suffixes: str) -> int:
    """Bits a thread of a load such as LDG.E.EL.128.CONSTANT."""
    return next((int(found[1]) for found in re.finditer(r"\.[US]?(8|16|64|128|256)\b", suffixes)), 32)
