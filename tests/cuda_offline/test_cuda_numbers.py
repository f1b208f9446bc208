"""The numbers of the code that is written for a GPU."""

import json
import subprocess
import sys

import pytest

from tests.tiny import ENV, ROOT

pytest.importorskip("triton", reason="the CUDA path needs Triton, which has wheels for Linux only")

from tests.cuda_offline.number_cases import BF16, CASES

QUICK = "experts in int4"


def check(*names):
    """In a process of its own: Triton decides at its import whether it interprets."""
    command = [sys.executable, "-m", "tests.cuda_offline.number_cases", *names]
    env = ENV | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr
    for name, off in json.loads(run.stdout).items():
        assert off < (4e-2 if BF16 in CASES[name] else 1e-5), name


def test_logits_equal_those_of_plain_layers():
    check(QUICK)


@pytest.mark.cuda_offline
def test_all_logits_equal_those_of_plain_layers():
    check(*CASES.keys() - {QUICK})
