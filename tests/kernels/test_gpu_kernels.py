"""The Triton kernels of attention and experts without a GPU: numbers of the interpreter, machine code of launches."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.tiny import ROOT, all_offline

pytest.importorskip("triton", reason="the CUDA path needs Triton, which has wheels for Linux only")

from kernels.gpu import attention, experts
from tests.cuda_offline.imagined_gpu import CUDA, FAKE, PROCESSORS
from tests.cuda_offline.machine_code import compiled_launches, hands_over, instructions, spilled


def test_kernels_in_the_interpreter():
    """In a process of its own: a kernel is interpreted or compiled from its import on."""
    files = [f"tests/kernels/interpreted_{name}.py" for name in ("attention", "experts", "model")]
    command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore::RuntimeWarning", *files]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:]


def fake(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=CUDA)


def attend(head_dim, group, tokens, cache_dtype=torch.bfloat16):
    """Eight key heads, a window, a soft cap and norms."""
    cache, pos = fake(4, 8, 4096, head_dim, dtype=cache_dtype), fake(4, tokens, dtype=torch.int64)
    scales = fake(4, 8, 4096, dtype=torch.float32) if cache_dtype == torch.int8 else None
    tables = [fake(4, tokens, 1, head_dim // 2, dtype=torch.float32)] * 2
    qkv, rows, norm = fake(4, tokens, (group + 2) * 8, head_dim), fake(4, dtype=torch.int64), fake(head_dim)
    counters = attention.new_counters(group * 8, CUDA)
    caches, how = (cache, scales) * 2, (norm, norm, counters, False, 1e-5, 0.1, 50.0, 1024, 2048)
    attention.attend(qkv, *caches, rows, pos, *tables, *how)


def run_experts(bits, groupsize, n_token):
    """Qwen3-30B-A3B's: 128 experts of 768, 8 of them used."""
    tensors = []
    for out, inputs in ((1536, 2048), (2048, 768)):
        groups = (128, out, inputs // groupsize if groupsize else 1)
        packed = {4: fake(128, out, inputs // 2, dtype=torch.uint8), 8: fake(128, out, inputs, dtype=torch.int8)}
        tensors += [packed.get(bits, fake(128, out, inputs))]
        tensors += [fake(*groups) if bits else None, fake(*groups) if bits == 4 else None]
    experts.experts(fake(n_token, 2048), fake(n_token, 8, dtype=torch.int64), *tensors, "silu")


ATTENTION = [(64, 3, 1, torch.int8), (128, 4, 1, torch.int8), (128, 8, 8, torch.int8), (256, 2, 1, torch.int8)]
ATTENTION += [(64, 3, 1), (128, 4, 1), (128, 8, 8), (80, 1, 64), (96, 1, 33), (256, 2, 1), (256, 2, 32)]
EXPERTS = [
    (bits, size, n) for bits, size in ((None, None), (8, None), (8, 32), (4, 32), (4, 128)) for n in (1, 400, 2000)
] + [(4, 256, 2000)]
CALLS = [(attend, sizes) for sizes in ATTENTION] + [(run_experts, sizes) for sizes in EXPERTS]
QUICK = [(90, attend, (128, 4, 1)), (90, attend, (128, 4, 1, torch.int8)), (90, run_experts, (4, 32, 1))]
# bytes a thread: with more threads, codes would come 8 bytes at a time
SPILLED = dict.fromkeys([(80, (4, 128, 400)), (90, (4, 128, 400)), (80, (4, 32, 1))], 8)
ALL = [(sm, *call) for sm in PROCESSORS for call in CALLS]


@pytest.mark.slow
@pytest.mark.parametrize("sm, call, sizes", all_offline(ALL, QUICK))
def test_machine_code(sm, call, sizes):
    """No spills, the shared memory of a small GPU suffices, and what is prefetched comes 16 bytes at a time.

    Scales are narrower, and so are codes of the experts of a prompt; keys and values in int8 come 8 bytes at a time.
    """
    with compiled_launches(sm) as kernels, FAKE:
        call(*sizes)
    for kernel in kernels:
        assert spilled(kernel) <= SPILLED.get((sm, sizes), 0) and hands_over(kernel)
        assert kernel.metadata.shared <= 99 << 10
        loads = re.findall(r"\bLDG(?:STS)?\.E[.\w]*", instructions(kernel))
        assert not [load for load in loads if re.search(r"[US]8", load)]
        if kernel.name in ("attend_part", "linear_pairs") and 2000 not in sizes:
            prefetched = [load for load in loads if load.startswith("LDGSTS") and load != "LDGSTS.E"]
            widths = (".128", ".64") if torch.int8 in sizes else ".128"
            assert prefetched and all(load.endswith(widths) for load in prefetched), prefetched
