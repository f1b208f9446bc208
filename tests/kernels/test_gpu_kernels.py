"""The Triton kernels of attention and experts without a GPU: numbers of the interpreter, machine code of launches."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.tiny import ROOT

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.gpu import attention, experts  # noqa: E402
from tests.cuda_offline.disassembly import disassembled, hands_over  # noqa: E402

KINDS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}
KINDS |= {torch.int8: "*i8", torch.uint8: "*u8", int: "i32"}


def test_kernels_in_the_interpreter():
    """In a process of its own: a kernel is interpreted or compiled from its import on."""
    files = [f"tests/kernels/interpreted_{name}.py" for name in ("attention", "experts", "model")]
    command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore::RuntimeWarning", *files]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:]


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(head_dim, group, tokens):
    """Eight key heads, a window, a soft cap and norms."""
    cache, pos = meta(4, 8, 4096, head_dim), meta(4, tokens, dtype=torch.int64)
    tables = [meta(4, tokens, 1, head_dim // 2, dtype=torch.float32)] * 2
    qkv, rows, norm = meta(4, tokens, (group + 2) * 8, head_dim), meta(4, dtype=torch.int64), meta(head_dim)
    counters = attention.new_counters(group * 8, torch.device("meta"))
    attention.attend(qkv, cache, cache, rows, pos, *tables, norm, norm, counters, False, 1e-5, 0.1, 50.0, 1024, 2048)


def run_experts(bits, groupsize, n_token):
    """Qwen3-30B-A3B's: 128 experts of 768, 8 of them used."""
    tensors = []
    for out, inputs in ((1536, 2048), (2048, 768)):
        groups = (128, out, inputs // groupsize if groupsize else 1)
        packed = {4: meta(128, out, inputs // 2, dtype=torch.uint8), 8: meta(128, out, inputs, dtype=torch.int8)}
        tensors += [packed.get(bits, meta(128, out, inputs))]
        tensors += [meta(*groups) if bits else None, meta(*groups) if bits == 4 else None]
    experts.experts(meta(n_token, 2048), meta(n_token, 8, dtype=torch.int64), *tensors, "silu")


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *values, **how: self.launches.append((self.kernel, values, how))


def machine_code(kernel, values, how, architecture):
    """Shared memory, use of registers, and instructions of a kernel as the JIT compiles it for a launch."""
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        signature[parameter.name] = KINDS[value.dtype if isinstance(value, torch.Tensor) else type(value)]
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=how)
    assert "counters" not in signature or hands_over(made.asm["ptx"])
    return made.metadata.shared, *disassembled(made.asm["cubin"])


ATTENTION = [(64, 3, 1), (128, 4, 1), (128, 8, 8), (80, 1, 64), (96, 1, 33), (256, 2, 1), (256, 2, 32)]
EXPERTS = [
    (bits, size, n) for bits, size in ((None, None), (8, None), (8, 32), (4, 32), (4, 128)) for n in (1, 400, 2000)
]
CALLS = [(attend, sizes) for sizes in ATTENTION] + [(run_experts, sizes) for sizes in EXPERTS]
FEW = [(90, attend, (128, 4, 1)), (90, run_experts, (4, 32, 1))]
ALL = [(architecture, *call) for architecture in (80, 90, 100) for call in CALLS]
# without warpgroup products the form for prompts spills: 152 bytes in int4
ALL = [each for each in ALL if each[0] != 80 or 2000 not in each[2]]


def check_machine_code(architecture, call, sizes, monkeypatch):
    """No spills, the shared memory of a small GPU suffices, and what is prefetched comes 16 bytes at a time.

    Scales are narrower, and so are codes of the experts of a prompt.
    """
    launches = []
    for module, name in ((attention, "attend_part"), (experts, "linear_pairs")):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    monkeypatch.setattr(experts, "sort_pairs", Recorder(experts.sort_pairs, []))  # small
    call(*sizes)
    for kernel, values, how in launches:
        shared, used, code = machine_code(kernel, values, how, architecture)
        assert re.search(r"STACK:0 ", used), used
        assert shared <= 99 << 10
        loads = re.findall(r"\bLDG(?:STS)?\.E[.\w]*", code)
        assert not [load for load in loads if re.search(r"[US]8", load)]
        if 2000 not in sizes:
            prefetched = [load for load in loads if load.startswith("LDGSTS") and load != "LDGSTS.E"]
            assert prefetched and all(load.endswith(".128") for load in prefetched), prefetched


@pytest.mark.parametrize("architecture, call, sizes", FEW)
def test_machine_code(architecture, call, sizes, monkeypatch):
    check_machine_code(architecture, call, sizes, monkeypatch)


@pytest.mark.slow
@pytest.mark.cuda_offline
@pytest.mark.parametrize("architecture, call, sizes", [each for each in ALL if each not in FEW])
def test_machine_code_of_every_launch(architecture, call, sizes, monkeypatch):
    check_machine_code(architecture, call, sizes, monkeypatch)
