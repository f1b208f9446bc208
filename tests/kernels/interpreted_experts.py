"""Experts on CUDA in Triton's interpreter, against `by_expert` in float64; run by `test_gpu_kernels.py`."""

import pytest
import torch

from kernels.gpu.experts import experts, sort_pairs
from layers.formats import Table4Linear
from layers.quantized import QuantSpec, quantize_weight
from mixers.activations import ACTIVATIONS
from mixers.experts import ExpertLinear
from tests.tiny import pairwise

SPECS = [None, QuantSpec(8), QuantSpec(8, 32), QuantSpec(4, 32), QuantSpec(4, 128)]
SPECS += [QuantSpec(4, 32, "float4"), QuantSpec(8, 64, "float8"), QuantSpec(8, 32, "int8.zeros")]
FEATURES = {
    "spec": SPECS,
    "n_expert_used": [(5, 1), (2, 2)],
    "n_token": [1, 20],
    "activation": list(ACTIVATIONS),
    "dtype": [torch.float16, torch.bfloat16],
}


@torch.no_grad()
@pytest.mark.parametrize(*pairwise(**FEATURES))
def test_experts_equal_float64(spec, n_expert_used, n_token, activation, dtype):
    n_expert, n_used = n_expert_used
    group = spec.groupsize if spec else None
    dim, size = (2 * group, group) if group else (136, 40)  # no multiples of a block
    torch.manual_seed(0)
    weights = (torch.randn(n_expert, 2 * size, dim) * dim**-0.5, torch.randn(n_expert, dim, size) * size**-0.5)
    x, chosen = torch.randn(n_token, dim).to(dtype), torch.rand(n_token, n_expert).argsort(1)[:, :n_used]
    if spec:
        layers = [spec.layer(**quantize_weight(weight, spec)) for weight in weights]
        exact_weights = [layer.dequantize().double() for layer in layers]
    else:
        layers = [ExpertLinear(weight.to(dtype)) for weight in weights]
        exact_weights = [layer.weight.double() for layer in layers]
    biases = [torch.randn(weight.shape[:2]).to(dtype) if spec else None for weight in weights]
    pairs = zip(exact_weights, biases, strict=True)
    w13, w2 = (ExpertLinear(weight, None if bias is None else bias.double()) for weight, bias in pairs)
    gate, up = w13(x.double()[:, None], chosen).chunk(2, -1)
    exact = w2(ACTIVATIONS[activation](gate, up), chosen)
    tensors = [getattr(layer, name, None) for layer in layers for name in ("weight", "scales", "zeros")]
    table = spec.layer.table().float() if spec and issubclass(spec.layer, Table4Linear) else None
    found = experts(x, chosen, *tensors, activation, biases[0], table, biases[1], table)
    assert found.shape == exact.shape and found.dtype == dtype
    assert (found - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()  # weights and products are rounded


def test_pairs_are_sorted_as_by_a_stable_sort():
    chosen = torch.randint(7, (50, 3), generator=torch.Generator().manual_seed(0))
    order, ends = torch.empty(150, dtype=torch.int32), torch.empty(9, dtype=torch.int32)
    sort_pairs[(5,)](chosen, order, ends, 150, 9, 32, 128)
    assert order.tolist() == chosen.flatten().argsort(stable=True).tolist()
    assert ends.tolist() == chosen.flatten().bincount(minlength=9).cumsum(0).tolist()
