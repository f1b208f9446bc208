"""The Triton linear kernels in Triton's interpreter against float64: test_gpu_linear.py starts it in a process.

Activations are float32 here where the layers give the kernels half precision: a wrong sum cannot hide in rounding.
"""

from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F

from kernels.gpu import linear as gpu
from layers.formats import Table4Linear
from layers.gpu.linear import GpuBlock, codes_on_gpu
from layers.quantized import LAYERS, QuantSpec, quantize_weight, replace_
from mixers.norms import RMSNorm
from model import ModelArgs, Transformer

FORMATS = {"float": None, "int8": QuantSpec(8), "int8.g64": QuantSpec(8, 64)}
FORMATS |= {"int4.g32": QuantSpec(4, 32), "int4.g256": QuantSpec(4, 256)}
ROWS = (1, 2, 5, 16, 33, 64, 70)
SHAPES = ((40, 512), (70, 768))  # out, in: neither is a multiple of the programs' blocks
LASTS = ("nothing", "bias", "residual", "silu", "gelu_tanh")
NORMS = (None, False, True)  # whether there is one, and whether it multiplies by 1 + weight
LASTS_AND_NORMS = zip(cycle(SHAPES), cycle(LASTS), cycle((*NORMS, False)))  # of lengths that make all pairs meet
CASES = [(*each, *others) for each, others in zip(product(FORMATS, ROWS), LASTS_AND_NORMS, strict=False)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(name, out, inputs):
    """The tensors of a layer as `linear` takes them, its weight in float64, and the last arguments, if needed."""
    weight, spec = random(out, inputs).half(), FORMATS[name]
    if spec is None:
        return (weight, None, None), weight.double(), ()
    if spec.pattern is not None:
        places = random(out, inputs // 4, 4, seed=5).argsort(-1)  # any two of four
        weight = weight * (places < 2).flatten(1)
    layer = spec.layer(**quantize_weight(weight, spec))
    lasts = (layer.table().float(),) if isinstance(layer, Table4Linear) else ()
    lasts = lasts if spec.pattern is None else (None, layer.positions)
    return (layer.weight, layer.scales, layer.zeros), layer.dequantize().double(), lasts


def case(name, rows, shape, last, offset):
    """Arguments of `linear`, and what it makes of them."""
    tensors, weight, lasts = layer_of(name, *shape)
    x = random(rows, shape[1], seed=1) * torch.logspace(-1, 1, rows)[:, None]
    norm = random(shape[1], seed=2) / 4 + (not offset) if offset is not None else None
    bias = random(shape[0], seed=3) if last == "bias" else None
    h = x.double()
    if norm is not None:
        h = F.rms_norm(h, shape[1:], norm.double() + (1 if offset else 0), eps=0.1)
    y = F.linear(h, weight, None if bias is None else bias.double())
    residual = random(*y.shape, seed=4) if last == "residual" else None
    if residual is not None:
        y = y + residual.double()
    activation = last if last in ("silu", "gelu_tanh") else None
    if activation is not None:
        gate, up = y.chunk(2, dim=-1)
        y = (F.silu(gate) if last == "silu" else F.gelu(gate, approximate="tanh")) * up
    counters = gpu.new_counters(tensors[0])
    return (x, *tensors, bias, counters, norm, 0.1, bool(offset), residual, activation, *lasts), y


OTHERS = {"float8": QuantSpec(8, None, "float8"), "float8.g64": QuantSpec(8, 64, "float8")}
OTHERS |= {"int8.zeros": QuantSpec(8, None, "int8.zeros"), "int8.zeros.g64": QuantSpec(8, 64, "int8.zeros")}
OTHERS |= {"float4.g32": QuantSpec(4, 32, "float4"), "nf4.g64": QuantSpec(4, 64, "nf4")}
OTHERS |= {"2:4": QuantSpec(pattern="2:4"), "2:4.int8": QuantSpec(8, pattern="2:4")}
OTHERS |= {"2:4.int8.g64": QuantSpec(8, 64, pattern="2:4")}
FORMATS |= OTHERS
OF_OTHERS = [(name, rows, SHAPES[0], "silu", False) for name in OTHERS for rows in (1, 16)]
OF_OTHERS += [("2:4", rows, SHAPES[1], "bias", None) for rows in (2, 70)]
ONE_GROUP = [("int4.g256", rows, (24, 256), "nothing", None) for rows in (1, 5)]  # a row: it has a zero nevertheless


@pytest.mark.parametrize("name, rows, shape, last, offset", CASES + OF_OTHERS + ONE_GROUP)
def test_kernels_equal_float64(name, rows, shape, last, offset):
    arguments, expected = case(name, rows, shape, last, offset)
    y = torch.ops.gpt_faster.linear_on_gpu(*arguments)
    assert y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=3e-6 * expected.abs().max().item())
    assert not arguments[5].any(), "the counters serve the next launch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 16])
def test_half_precision(rows, dtype):
    (x, *tensors, eps, offset, residual, activation), _ = case("int4.g32", rows, SHAPES[0], "residual", False)
    x, residual = x.to(dtype), residual.to(dtype)
    norm = tensors.pop().to(dtype)
    y = gpu.linear(x, *tensors, norm, eps, offset, residual, activation)
    weight = layer_of("int4.g32", *SHAPES[0])[1]
    expected = F.rms_norm(x.double(), x.shape[1:], norm.double(), eps=eps) @ weight.T + residual.double()
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 16])
def test_large_activations_before_a_norm_in_float16(rows):
    layer = LAYERS[4](**quantize_weight(random(40, 512), QuantSpec(4, 32)))
    x, norm = random(rows, 512, seed=1).clamp(-2, 2).mul(15_000).half(), RMSNorm(512, ARGS).half()
    norm.weight.fill_(4)
    expected = F.rms_norm(x.double(), (512,), norm.weight.double()) @ layer.dequantize().double().T
    y = codes_on_gpu(layer)(x, norm)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name, few, many", [("int8", 1, 2), ("int8", 3, 4), ("int4.g32", 5, 16), ("int8", 33, 64)])
def test_a_row_does_not_depend_on_the_rows_beside_it(name, few, many):
    (x, *others), _ = case(name, many, SHAPES[0], "nothing", False)
    torch.testing.assert_close(gpu.linear(x[:few], *others), gpu.linear(x, *others)[:few], rtol=0, atol=0)


@pytest.mark.parametrize("rows, split", [(1, None), (5, 16)])
def test_many_inputs(rows, split):
    """A loop whose last turn is not full, and the largest split of the table."""
    arguments, expected = case("int4.g32", rows, (24, 11008), "residual", True)
    made = gpu.launch(*arguments)
    assert made.arguments.get("SPLIT") == split
    made.run()
    torch.testing.assert_close(made.arguments["y"].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_operator_keeps_its_promises():
    operator, checks = torch.ops.gpt_faster.linear_on_gpu.default, ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, case("int4.g32", 5, SHAPES[0], "silu", False)[0], test_utils=checks)
    (x, *others), _ = case("int8", 1, SHAPES[0], "bias", None)
    assert gpu.linear(x[:0], *others).shape == (0, 40)
    torch.testing.assert_close(gpu.linear(x.expand(2, 3, -1), *others), gpu.linear(x, *others).expand(2, 3, -1))


ARGS = ModelArgs(64, 1, 2, 1, 32, 96, 8, 64)
OTHER_FIELDS = {"activation": "gelu_tanh", "norm_offset": True, "qkv_bias": True, "qk_norm": True}


@torch.inference_mode()
@pytest.mark.parametrize("spec, fields", [(None, {}), (QuantSpec(4, 32), {}), (QuantSpec(8), OTHER_FIELDS)], ids=str)
def test_block_equals_plain_one(spec, fields):
    torch.manual_seed(0)
    args = replace(ARGS, **fields)
    plain, fused = (Transformer(args).eval() for _ in range(2))
    for parameter in plain.parameters():
        parameter.copy_(torch.randn_like(parameter).half() / 8 + (parameter.ndim == 1 and not args.norm_offset))
    fused.load_state_dict(plain.state_dict())
    for name in ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2") if spec else ():
        layer = plain.layers[0].get_submodule(name)
        rounded = LAYERS[spec.bits](**quantize_weight(layer.weight, spec), bias=layer.bias)
        layer.weight.copy_(rounded.dequantize())
        replace_(fused.layers[0], name, codes_on_gpu(rounded))
    fused.half()
    assert GpuBlock.fits(fused.layers[0], args)
    fused.layers[0] = GpuBlock(fused.layers[0])
    plain.double()
    for n_token in (1, 9):
        x, pos = random(1, n_token, 64, seed=n_token).half(), torch.arange(n_token)[None]
        expected = plain.layers[0](x.double(), pos, *plain.contexts(pos, None)[0])
        y = fused.layers[0](x, pos, *fused.contexts(pos, None)[0])
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=4e-3 * expected.abs().max().item())
