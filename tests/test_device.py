"""A device against float32 on the CPU: pytest tests/test_device.py --device cuda."""

import pytest
import torch

from tests.device_cases import CASES

COMPILED_ON_CPU = ("tokens with a draft, k 4, compiled", "experts int4.g32, compiled")


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float32_on_the_cpu(name, request, one_thread):
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cpu" and name.endswith("compiled") and name not in COMPILED_ON_CPU:
        pytest.skip("other tests compile on a CPU")
    torch._dynamo.reset()
    CASES[name](device, torch.bfloat16)
