"""The Triton linear kernels without a GPU: numbers from Triton's interpreter, and machine code of every launch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.gpu import linear as gpu  # noqa: E402
from tests.cuda_offline.disassembly import disassembled, hands_over  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
NAMES |= {torch.int8: "*i8", torch.uint8: "*u8"}
FORMATS = {"float": (16, None), "int8": (8, None), "int8.g64": (8, 64), "int4.g32": (4, 32), "int4.g128": (4, 128)}
ROWS = (1, 2, 4, 16, 32, 64, 100)  # one for each launch of the table; float prompts are cuBLAS's
# the layers of Llama 3.1 8B: out, in, activation; of which the first adds a residual, the second has a norm
LAYERS = {"w2": (4096, 14336, None), "w13": (28672, 4096, "silu")}
ALL = [
    (architecture, name, rows, layer)
    for architecture in (80, 90, 100)
    for name in FORMATS
    for rows in ROWS
    for layer in LAYERS
    if name != "float" or rows <= 64
]
FEW = [(90, "int4.g32", 1, "w13"), (90, "int8", 4, "w13"), (90, "float", 16, "w2"), (90, "int4.g32", 16, "w2")]


def test_kernels_in_the_interpreter():
    """In a process of their own: a kernel is interpreted or compiled from its import on."""
    command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore", "tests/kernels/interpreted_linear.py"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:]


def launch_of(name, rows, layer):
    """How the product would start a layer of bfloat16, on meta tensors."""
    (bits, group), (out, inputs, activation) = FORMATS[name], LAYERS[layer]

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = {16: empty(out, inputs), 8: empty(out, inputs, dtype=torch.int8)}.get(bits)
    weight = empty(out, inputs // 2, dtype=torch.uint8) if weight is None else weight
    scales = None if bits == 16 else empty(out, inputs // group if group else 1)
    zeros = scales if bits == 4 else None
    norm, residual = (empty(inputs), None) if activation else (None, empty(rows, out))
    counters = gpu.new_counters(weight)
    x = empty(rows, inputs)
    return gpu.launch(x, weight, scales, zeros, None, counters, norm, 1e-5, False, residual, activation)


def compiled(launch, architecture):
    """A launch as the JIT compiles it: Triton's kernel for one architecture."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor) or name == "N":
            attributes[(i,)] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            signature[name] = NAMES[value.dtype]
        elif name in ("M", "N", "eps"):
            signature[name] = "fp32" if name == "eps" else "i32"
        else:
            signature[name], constants[(i,)] = "constexpr", value
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def check_machine_code(architecture, name, rows, layer, monkeypatch):
    """No value is spilled, the shared memory of a small GPU suffices, and weights are read 16 bytes at a time."""
    monkeypatch.setattr(gpu, "before_hopper", lambda device: architecture < 90)
    launch = launch_of(name, rows, layer)
    kernel = compiled(launch, architecture)
    assert launch.arguments.get("SPLIT", 1) == 1 or hands_over(kernel.asm["ptx"])
    used, code = disassembled(kernel.asm["cubin"])
    assert "STACK:0 " in used and not re.search(r"\b(STL|LDL)\b", code), used
    assert kernel.metadata.shared <= 99 << 10
    reads = set(re.findall(r"\bLDG(?:STS)?\.E\S*", code))
    assert any(".128" in read for read in reads)
    # two bytes: a scale or a zero; the sums of programs are no weights either; of float, 8 bytes of x
    narrow = [read for read in reads if ".128" not in read and "U16" not in read and "STRONG" not in read]
    assert all(name == "float" and ".64" in read for read in narrow), narrow


@pytest.mark.parametrize("pdl", [False, True])
def test_a_kernel_that_begins_early_requests_weights_before_it_waits(pdl, monkeypatch):
    monkeypatch.setattr(gpu, "overlaps", lambda device: pdl)
    kernel = compiled(launch_of("int4.g32", 1, "w13"), 90)
    assert kernel.metadata.launch_pdl == pdl
    _, code = disassembled(kernel.asm["cubin"])
    found = re.findall(r"\bLDG\.E\S*|\bACQBULK|\bPREEXIT", code)  # loads, the wait, the start of the next kernel
    assert ("ACQBULK" in found) == ("PREEXIT" in found) == pdl
    if pdl:
        before = found[: found.index("ACQBULK")]
        assert before and all(".128" in load for load in before)


def test_who_asks_for_early_kernels(monkeypatch):
    for asked, found in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("GPT_FASTER_PDL", asked)
        assert gpu.overlaps.__wrapped__(torch.device("meta")) == found
    monkeypatch.setattr(gpu, "before_hopper", lambda device: True)
    with pytest.raises(ValueError, match="GPT_FASTER_PDL=1 needs a GPU of compute capability 9.0"):
        gpu.overlaps.__wrapped__(torch.device("cuda"))
    monkeypatch.setenv("GPT_FASTER_PDL", "yes")
    with pytest.raises(ValueError, match="GPT_FASTER_PDL is 'yes'; use 1"):
        gpu.overlaps.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize("architecture, name, rows, layer", FEW)
def test_machine_code(architecture, name, rows, layer, monkeypatch):
    check_machine_code(architecture, name, rows, layer, monkeypatch)


@pytest.mark.slow
@pytest.mark.cuda_offline
@pytest.mark.parametrize("architecture, name, rows, layer", [each for each in ALL if each not in FEW])
def test_machine_code_of_every_launch(architecture, name, rows, layer, monkeypatch):
    check_machine_code(architecture, name, rows, layer, monkeypatch)
