"""The Triton linear kernels without a GPU: numbers from Triton's interpreter, and machine code of every launch."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.tiny import ROOT, all_offline

pytest.importorskip("triton", reason="the CUDA path needs Triton, which has wheels for Linux only")

from kernels.gpu import linear as gpu
from tests.cuda_offline.imagined_gpu import CUDA, FAKE, PROCESSORS
from tests.cuda_offline.machine_code import compiled_launches, hands_over, instructions, spilled

FORMATS = {"float": (16, None), "int8": (8, None), "int8.g64": (8, 64), "int4.g32": (4, 32), "int4.g128": (4, 128)}
FORMATS |= {"2:4": (16, None), "2:4.int8": (8, None)}
ROWS = (1, 2, 4, 16, 32, 64, 100)  # one for each launch of the table; float prompts are cuBLAS's
# the layers of Llama 3.1 8B: out, in, activation; of which the first adds a residual, the second has a norm
LAYERS = {"w2": (4096, 14336, None), "w13": (28672, 4096, "silu")}
ALL = [
    (sm, name, rows, layer)
    for sm in PROCESSORS
    for name in FORMATS
    for rows in ROWS
    for layer in LAYERS
    if name != "float" or rows <= 64
]
QUICK = [(90, "int4.g32", 1, "w13"), (90, "int8", 4, "w13"), (90, "float", 16, "w2"), (90, "int4.g32", 16, "w2")]
QUICK += [(90, "2:4", 1, "w13"), (90, "2:4.int8", 16, "w2")]
SPILLED = {(100, "float", 64, "w13"): 24}  # bytes a thread


def test_kernels_in_the_interpreter():
    """In a process of their own: a kernel is interpreted or compiled from its import on."""
    command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore", "tests/kernels/interpreted_linear.py"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:]


def run_linear(name, rows, layer):
    """A layer of bfloat16 on fake tensors."""
    (bits, group), (out, inputs, activation) = FORMATS[name], LAYERS[layer]

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device=CUDA)

    packed = {4: empty(out, inputs // 2, dtype=torch.uint8), 8: empty(out, inputs, dtype=torch.int8)}
    weight = packed.get(bits, empty(out, inputs))
    scales = None if bits == 16 else empty(out, inputs // group if group else 1)
    zeros = scales if bits == 4 else None
    norm, residual = (empty(inputs), None) if activation else (None, empty(rows, out))
    positions = None
    if name.startswith("2:4"):
        weight, positions = empty(out, inputs // 2, dtype=weight.dtype), empty(out, inputs // 8, dtype=torch.uint8)
    tensors = (empty(rows, inputs), weight, scales, zeros, None, gpu.new_counters(weight))
    gpu.linear(*tensors, norm, 1e-5, False, residual, activation, None, positions)


@pytest.mark.slow
@pytest.mark.parametrize("sm, name, rows, layer", all_offline(ALL, QUICK))
def test_machine_code(sm, name, rows, layer):
    """No value but those of SPILLED is spilled, a small GPU has the shared memory, weights come 16 bytes at a time."""
    with compiled_launches(sm) as kernels, FAKE:
        run_linear(name, rows, layer)
    (kernel,) = kernels
    assert spilled(kernel) <= SPILLED.get((sm, name, rows, layer), 0) and hands_over(kernel)
    assert kernel.metadata.shared <= 99 << 10
    reads = set(re.findall(r"\bLDG(?:STS)?\.E\S*", instructions(kernel)))
    assert any(".128" in read for read in reads)
    # two bytes: a scale, a zero, positions of 16 inputs; the sums of programs are no weights either; of float, 8 bytes
    # of x; of 2:4 codes, four bytes of positions
    narrow = [read for read in reads if ".128" not in read and "U16" not in read and "STRONG" not in read]
    known = {"float": r".*\.64.*", "2:4.int8": r"LDG(STS)?\.E"}
    assert all(re.fullmatch(known.get(name, ""), read) for read in narrow), narrow


@pytest.mark.parametrize("pdl", [False, True])
def test_a_kernel_that_begins_early_requests_weights_before_it_waits(pdl, monkeypatch):
    monkeypatch.setattr(gpu, "overlaps", lambda device: pdl)
    with compiled_launches(90) as kernels, FAKE:
        run_linear("int4.g32", 1, "w13")
    (kernel,) = kernels
    assert kernel.metadata.launch_pdl == pdl
    # loads, the wait, the start of the next kernel
    found = re.findall(r"\bLDG\.E\S*|\bACQBULK|\bPREEXIT", instructions(kernel))
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
