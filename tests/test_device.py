"""A device against float32 on the CPU: pytest tests/test_device.py --device cuda."""

import pytest
import torch

from tests import device_cases
from tests.device_cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float32_on_the_cpu(name, request, monkeypatch, one_thread):
    device = torch.device(request.config.getoption("--device"))
    torch._dynamo.reset()
    if device.type == "cpu":  # traced and run as they are: to compile all takes minutes, and other tests do
        compile = torch.compile
        traced = {"backend": "eager", "options": None}
        monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, **how | traced))
        monkeypatch.setattr(device_cases, "BATCHES", (2, 64))
    CASES[name](device, torch.bfloat16)
