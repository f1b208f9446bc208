"""Kernels are launched on the device of their inputs, which need not be the current one. No GPU is needed."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA path needs Triton, which has wheels for Linux only")

from triton.runtime.jit import JITFunction

from kernels.gpu import attention, experts, linear
from tests.cuda_offline.imagined_gpu import FAKE, imagined_gpu

SECOND = torch.device("cuda", 1)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=SECOND)


def call_linear():
    weight = empty(64, 64)
    linear.linear(empty(1, 64), weight, None, None, None, linear.new_counters(weight), None, 0.0, False, None, None)


def call_attention():
    pos, table, cache = empty(1, 1, dtype=torch.int64), empty(1, 1, 1, 32, dtype=torch.float32), empty(1, 1, 512, 64)
    how = (None, None, attention.new_counters(1, SECOND), False, 0.0, 1.0, None, None, 512)
    attention.attend(empty(1, 1, 3, 64), cache, None, cache, None, None, pos, table, table, *how)


def call_experts():
    x, chosen = empty(1, 64), empty(1, 1, dtype=torch.int64)
    experts.experts(x, chosen, empty(2, 128, 64), None, None, empty(2, 64, 64), None, None, "silu")


@pytest.mark.parametrize("call, n_launch", [(call_linear, 1), (call_attention, 1), (call_experts, 3)])
def test_kernels_are_launched_on_the_device_of_their_inputs(call, n_launch):
    current, found = [0], []

    def exchange(index):
        before, current[0] = current[0], index
        return before

    with (
        imagined_gpu(90),
        FAKE,
        mock.patch.object(torch.cuda, "_exchange_device", exchange),
        mock.patch.object(torch.cuda, "_maybe_exchange_device", exchange),
        mock.patch.object(JITFunction, "run", lambda *_, **__: found.append(current[0])),
    ):
        call()
    assert found == [1] * n_launch and current == [0]
