"""Packed layers of codes against float64, and how their operator takes what is not usual."""

import itertools

import pytest
import torch

from kernels import cpu
from layers.packed import CodesLinear
from layers.quantized import GROUPSIZES, QuantSpec, quantize_weight

SPECS = [QuantSpec(8), *(QuantSpec(bits, size) for bits in (8, 4) for size in GROUPSIZES)]
SPECS += [QuantSpec(8, size, name) for name in ("int8.zeros", "float8") for size in (None, 16, 64)]
SPECS += [QuantSpec(4, 64, "nf4"), QuantSpec(4, 16, "nf4"), QuantSpec(4, 64, "fp4")]
SPECS += [QuantSpec(4, size, "float4") for size in (16, 32)]
needs_operators = pytest.mark.skipif(not cpu.available(), reason="there are no operators for this processor")
pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight, spec, bias=None):
    return spec.layer(**quantize_weight(weight, spec), bias=bias)


def exactly(layer, x):
    y = x.double() @ layer.dequantize().double().T
    return y if layer.bias is None else y + layer.bias.double()


def whole_codes(M, features, dtype):
    """Activations that rounding to int8 leaves as they are: in each group of 32 integers up to 127, times 2^n."""
    codes = random(M, features, seed=1).mul(40).round().clamp(-127, 127)
    codes[:, ::32] = 127
    return (codes * 2.0 ** (torch.arange(features) // 32 % 9 - 4)).to(dtype)


def assert_right(y, expected):
    """Half a unit in the last place of y's type, and the error of a float32 sum, from the truth."""
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[y.dtype]
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=3e-6 * expected.abs().max().item())


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_operator_equals_float64(spec, dtype):
    for out, counts in ((7, (1, 3, 16)), (16, (2, 4, 17)), (160, (1, 7, 63)), (1000, (1, 3, 5, 16, 17))):
        layer = rounded(random(out, 512), spec, random(out, seed=2))
        packed = CodesLinear(layer)
        for M in counts:
            y = packed(whole_codes(M, 512, dtype))
            assert y.dtype == dtype and y.shape == (M, out)
            assert_right(y, exactly(layer, whole_codes(M, 512, dtype)))
            x = (random(M, 512, seed=1) * torch.logspace(-3, 3, 512)).to(dtype)
            if dtype == torch.float32:
                assert_right(packed(x), exactly(layer, x))
                continue
            # each activation is rounded by half a step of its group at most
            steps = x.double().unflatten(1, (-1, 32)).abs().amax(-1) / 127
            scaled = type(layer)(layer.weight, layer.scales).dequantize()  # zeros meet activations as they are
            weight = scaled.double().abs().unflatten(1, (-1, 32)).sum(-1)
            bound = 0.51 * steps @ weight.T + 2**-8 * exactly(layer, x).abs() + 1e-6 * exactly(layer, x).abs().max()
            assert ((packed(x).double() - exactly(layer, x)).abs() <= bound).all()


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [1, 31, 33, 100, 2000])
def test_operator_with_inputs_that_are_no_multiple(features, dtype):
    layer = rounded(random(20, features), QuantSpec(8))
    for M in (1, 5, 40):
        x = whole_codes(M, features, dtype)
        assert_right(CodesLinear(layer)(x), exactly(layer, x))


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(8, 16), QuantSpec(4, 16)], ids=str)
def test_inputs_that_are_whole_halves_of_groups(spec, dtype):
    for features in (16, 48, 144):
        layer = rounded(random(20, features), spec)
        for M in (1, 5, 40):
            x = whole_codes(M, features, dtype)
            assert_right(CodesLinear(layer)(x), exactly(layer, x))


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(spec, dtype):
    layer = CodesLinear(rounded(random(200, 512), spec))
    x = random(40, 512, seed=1).to(dtype)
    together = layer(x)
    for M in (1, 2, 3, 5, 16, 17):
        assert torch.equal(layer(x[:M]), together[:M])


@needs_operators
def test_operator_on_zeros_nan_infinity_no_rows_and_strided_inputs():
    int8, packed = (CodesLinear(rounded(random(32, 64), spec)) for spec in (QuantSpec(8), QuantSpec(4, 32)))
    assert packed(torch.zeros(2, 64)).tolist() == [[0.0] * 32] * 2
    assert packed(torch.zeros(3, 0, 64)).shape == (3, 0, 32)
    assert int8(torch.full((1, 64), 1e-38).bfloat16()).abs().max() < 1e-30
    for bad in (float("nan"), float("inf"), float("-inf")):
        for layer, dtype in itertools.product((int8, packed), (torch.float32, torch.bfloat16)):
            x = random(2, 64).to(dtype)
            x[0, 40] = bad
            y = layer(x)
            assert not y[0].isfinite().any() and y[1].isfinite().all()
    x = random(64, 6).T[::2]
    assert not x.is_contiguous() and torch.equal(packed(x), packed(x.contiguous()))


@needs_operators
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_prompts_equal_float64(spec):
    """Where there is a matrix unit, activations of 64 tokens and more are not rounded, which halves the error."""
    for S, out in ((63, 200), (64, 16), (70, 40), (150, 200)):
        layer, x = rounded(random(out, 512), spec, random(out, seed=2)), random(2, S, 512, seed=1).bfloat16()
        packed, expected = CodesLinear(layer), exactly(layer, x)
        y = packed(x)
        assert (y - expected).norm() < (0.003 if cpu.isa() == "amx" and S >= 64 else 0.008) * expected.norm()
        assert y.dtype == x.dtype and torch.equal(packed(x[1:]), y[1:])
        assert packed(x.expand(2, S, 512)[:, :0]).shape == (2, 0, out)


@needs_operators
def test_inputs_that_do_not_fit_are_errors():
    packed = CodesLinear(rounded(random(32, 64), QuantSpec(4, 32)))
    with pytest.raises(RuntimeError, match="linear_codes"):
        packed(random(2, 65))
    with pytest.raises(RuntimeError, match="linear_codes"):
        packed(random(2, 64).double())


@needs_operators
def test_float32_scales_are_used_as_they_are():
    layer = rounded(random(32, 64), QuantSpec(4, 32))
    layer.scales, layer.zeros = layer.scales.float() * 1.0001, layer.zeros.float() * 0.9999
    x = random(3, 64, seed=1)
    assert_right(CodesLinear(layer)(x), exactly(layer, x))


@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4, 32), QuantSpec(8, 32, "float8")], ids=str)
def test_experts_are_packed_as_as_many_layers(spec):
    weight = random(4, 40, 64)
    alone = [CodesLinear(rounded(each, spec)).state_dict() for each in weight]
    for name, tensor in CodesLinear(rounded(weight, spec)).state_dict().items():
        assert torch.equal(tensor, torch.stack([tensors[name] for tensors in alone])), name
