"""Which layers and blocks the kernels for GPUs take, and what these do with float32, in the plain form."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
from layers.fastest import TABLE
from layers.formats import Int4Linear, Int8Linear
from layers.gpu.attention import GpuAttention
from layers.gpu.linear import BLOCK_FIELDS, ON_GPU, FloatOnGpu, GpuBlock, NormedLinear, OnGpu, TwoFourOnGpu
from layers.quantized import LAYERS, QuantSpec, quantize_weight
from mixers.norms import RMSNorm
from model import Blocks
from tests.layers.test_fastest import REFUSED, SIZES, TAKEN, TINY, quantised

ATTENTION = ("full_layers", "unrotated_layers", "late_query_scale", "qk_norm_last", "joint_qk_norm", "attention_sinks")
ATTENTION += ("attention_softcap",)
TAKEN = TAKEN | {name: REFUSED[name] for name in (*ATTENTION, "activation", "norm_offset")}
REFUSED = {name: fields for name, fields in REFUSED.items() if name not in TAKEN}
KINDS = {None: FloatOnGpu, 8: ON_GPU[Int8Linear], 4: ON_GPU[Int4Linear]}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", KINDS)
def test_float32_takes_the_plain_form(bits):
    plain = nn.Linear(64, 48, dtype=torch.float32).requires_grad_(False)
    if bits is not None:
        plain = LAYERS[bits](**quantize_weight(random(48, 64), QuantSpec(bits, 32)), bias=random(48, seed=1))
    layer, x, norm = KINDS[bits](plain), random(3, 5, 64, seed=2), RMSNorm(64, TINY).requires_grad_(False)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    residual = random(3, 5, 24, seed=3)
    gate, up = plain(norm(x)).chunk(2, dim=-1)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer(x, norm, residual, "silu"), residual + F.silu(gate) * up)


def test_every_field_is_honoured_or_refused_by_blocks():
    assert SIZES | TAKEN.keys() == BLOCK_FIELDS


@pytest.mark.parametrize("name", [*TAKEN, *REFUSED])
def test_blocks_take_only_models_whose_fields_they_honour(name):
    """In float32, in which they compute as plain ones do."""
    model, packed = quantised((TAKEN | REFUSED)[name]), quantised((TAKEN | REFUSED)[name])
    for layer in packed.layers:
        for module in list(layer.modules()):
            for child, each in list(module.named_children()):
                kind = ON_GPU.get(type(each))
                if kind is not None and kind.fits(each, packed.args):
                    setattr(module, child, kind(each))
    assert [GpuBlock.fits(layer, packed.args) for layer in packed.layers] == [name in TAKEN] * len(packed.layers)
    if name in TAKEN:
        packed.layers = Blocks(GpuBlock(layer) for layer in packed.layers)
        assert isinstance(packed.layers[0].attention.wqkv, NormedLinear)
        tokens, pos = torch.arange(7)[None], torch.arange(7)[None]
        torch.testing.assert_close(packed(tokens, pos), model(tokens, pos), rtol=1e-5, atol=1e-5)


def test_more_rows_than_attention_counts_take_the_plain_form():
    """The kernel cannot run here: without a GPU it must not be asked."""
    model = quantised({})
    plain, tokens, pos = copy.deepcopy(model), torch.arange(6).view(3, 2), torch.arange(2).repeat(3, 1)
    for layer in model.layers:
        layer.attention = GpuAttention(layer.attention)
        layer.attention.most_rows = 2
    found, wanted = (each(tokens, pos, each.new_cache(3, 8).view()) for each in (model, plain))
    torch.testing.assert_close(found, wanted)


def test_shapes_that_kernels_do_not_take():
    def layer(bits, out, inputs):
        return LAYERS[bits](**quantize_weight(torch.ones(out, inputs), QuantSpec(bits, None if bits == 8 else 32)))

    assert OnGpu.fits(layer(4, 7, 96), None) and OnGpu.fits(layer(8, 7, 96), None)
    assert not OnGpu.fits(layer(8, 7, 100), None), "a row is no multiple of 16 bytes"
    experts = LAYERS[8](**quantize_weight(torch.ones(2, 7, 96), QuantSpec(8)))
    assert not OnGpu.fits(experts, None)


def two_four(spec, inputs):
    kept = random(48, inputs // 4, 4, seed=1).argsort(-1) < 2
    weight = (random(48, inputs) * kept.flatten(1)).bfloat16()
    return spec.layer(**quantize_weight(weight, spec), bias=random(48, seed=2))


def test_two_four_layers_that_kernels_take():
    floats, codes = QuantSpec(pattern="2:4"), QuantSpec(8, pattern="2:4")
    assert TwoFourOnGpu.fits(two_four(floats, 64), None) and TwoFourOnGpu.fits(two_four(codes, 64), None)
    assert TwoFourOnGpu.fits(two_four(QuantSpec(8, 32, pattern="2:4"), 64), None)
    [row] = [row for row in TABLE if row.fast is TwoFourOnGpu]
    assert torch.float32 not in row.dtypes, "in a model of float32 it becomes a dense layer, codes too"
    assert not TwoFourOnGpu.fits(two_four(floats, 56), None), "a row is no multiple of 16 bytes"
    assert not TwoFourOnGpu.fits(two_four(QuantSpec(8, 16, pattern="2:4"), 64), None), "two scales in 16 bytes"
    plain, x = two_four(codes, 64), random(3, 5, 64, seed=3)
    layer = TwoFourOnGpu(plain)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(layer(x), plain.dense()(x), rtol=1e-5, atol=1e-5)
