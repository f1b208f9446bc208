"""Which device a run takes, and what is said of it."""

import pytest
import torch

import cli
from kernels import cpu
from weights.device import pick_device


@pytest.mark.parametrize("asked", ["neon", "AVX2", "avx9"])
def test_an_isa_that_is_not_there_is_refused_before_anything_slow(asked, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(("avx2", "fma3", "f16c"), True))
    monkeypatch.setattr(cpu, "level", cpu.level.__wrapped__)
    monkeypatch.setenv("GPT_FASTER_ISA", asked)
    with pytest.raises(ValueError, match=f"GPT_FASTER_ISA is '{asked}'; this processor has avx2, plain"):
        pick_device("cpu")


def test_mps_is_said_once_never_to_have_run(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    cli.say_once.cache_clear()
    assert [pick_device(name).type for name in ("mps", None, "cpu")] == ["mps", "mps", "cpu"]
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == printed.err.count("ever run on an MPS device") == 1
