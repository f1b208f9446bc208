"""The bytes and kernels that a prediction adds up, against sizes by hand. No GPU is needed."""

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="the CUDA path needs Triton, which has wheels for Linux only")

from tests.cuda_offline.cases import PLAIN
from tests.cuda_offline.traffic import SLOTS, traced, traffic


def test_bytes_of_a_layer_and_of_the_rest():
    args = replace(PLAIN, dim=1024, n_head=8, n_kv_head=2, head_dim=128, intermediate_size=2048, vocab_size=4096)
    found = traffic(args, traced(args, "int8", 1), 1)
    n_kernel, codes = found["layer"]["int8"]
    inputs = {1536: 1024, 1024: 1024, 4096: 1024}  # wqkv, wo, w13
    weights = sum(out * size + 2 * out for out, size in inputs.items()) + 1024 * 2048 + 2 * 1024  # and w2; bf16 scales
    assert n_kernel == 4 and weights < codes < 1.01 * weights  # inputs and outputs beside them
    cache = 2 * SLOTS * 2 * 128 * 2
    assert found["layer"]["bf16"][0] == 1 and cache < found["layer"]["bf16"][1] < 1.2 * cache
    head = 4096 * 1024 + 2 * 4096
    assert found["rest"]["int8"][0] == 1 and head < found["rest"]["int8"][1] < 1.01 * head
    assert found["rest"]["bf16"][1] < 4096 * 1024  # of the embedding one row
    assert found["rest"]["bf16"][0] == 6  # embedding, cos, sin, two of the argmax, position: no norm before the head
