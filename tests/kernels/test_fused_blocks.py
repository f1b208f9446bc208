"""Fused blocks, one operator for all of a model's layers, against the blocks one by one and against float64."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from engine.compile import compile_step
from layers.blocks import FusedBlocks, RegionBlocks
from layers.fastest import pack_
from layers.packed import FEW
from layers.quantized import QuantSpec, linear_table, quantize_
from model import Blocks, Context, ModelArgs, Transformer
from tests.kernels.test_operators import needs_operators, random
from tests.tiny import pairwise

BLOCKS = ModelArgs(
    dim=192, n_layer=3, n_head=6, n_kv_head=2, head_dim=64, intermediate_size=96, vocab_size=130, max_seq_length=128
)
FORMS = [(dtype, bits) for dtype in (torch.float32, torch.bfloat16, torch.float16) for bits in (8, 4)]
FORMS += [(torch.bfloat16, None)]
SHAPES = ((1, 1), (1, 5), (3, 4), (4, 1), (2, 8), (4, 6), (1, 17), (2, 70))  # rows, and tokens after the first of them


def model_of(dtype, bits, **fields):
    """A model with random weights, biases and norms, its layers quantised or, None, not."""
    model = Transformer(replace(BLOCKS, **fields)).requires_grad_(False).eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.copy_((random(*parameter.shape, seed=i).float() / 8 + (parameter.ndim == 1)).bfloat16())
    model.to(dtype)
    if bits:
        quantize_(model, linear_table(model, QuantSpec(bits, 32 if bits == 4 else None), QuantSpec(8)))
    pack_(model)
    return model


EXTRAS = {"qkv_bias": True, "wo_bias": True, "ffn_bias": True, "qk_norm": True, "rope_dim": 32, "sliding_window": 7}
EXTRAS |= {"attention_scale": 0.2, "embedding_scale": 3.0}


def join_cache(keys, values):
    """Of float keys and values of each layer."""
    layers = zip(keys, values, strict=True)
    return torch.ops.gpt_faster.join_cache([each for k, v in layers for each in (k, None, v, None)])


def run_blocks(model, blocks, tokens, pos, last):
    """Logits [B, S, V] of the last tokens of each row after those before, and what the cache then holds."""
    model.layers = blocks
    slots = tokens.shape[1] + 10
    cache = model.new_cache(4, slots)
    model(tokens[:, :-last], pos[:, :-last], cache.view())
    logits = model(tokens[:, -last:], pos[:, -last:], cache.view(length=slots - 3))
    like = torch.empty(4, 0, slots)  # all rows and slots
    return logits.clone(), torch.stack([each.read(None, like) for i in range(3) for each in cache.view().layer(i)[:2]])


@needs_operators
@pytest.mark.parametrize("fields, cache_dtype", [({}, None), (EXTRAS, None), (EXTRAS, torch.int8)], ids=str)
@pytest.mark.parametrize("dtype, bits", FORMS, ids=str)
@torch.inference_mode()
def test_fused_blocks_equal_the_blocks_one_by_one(dtype, bits, fields, cache_dtype, shapes=SHAPES):
    fields = fields | {"dim": 192 if bits == 4 else 208}  # 208 is no multiple of a group; in the file there are none
    model, exact = model_of(dtype, bits, **fields), model_of(torch.float32, bits, **fields)
    model.cache_dtype = exact.cache_dtype = cache_dtype
    exact_enough = 2e-6 if cache_dtype is None else 1e-3  # a code in thousands is rounded to its other neighbour
    fused, generator = model.layers, torch.Generator().manual_seed(0)
    assert isinstance(fused, FusedBlocks)
    for B, S in shapes:
        tokens = torch.randint(130, (B, max(30, S + 10)), generator=generator)
        pos = torch.arange(tokens.shape[1]) + torch.arange(B)[:, None]  # rows at positions of their own
        found = [
            run_blocks(each, blocks, tokens, pos, S)
            for each, blocks in ((model, fused), (model, Blocks(fused)), (exact, Blocks(exact.layers)))
        ]
        for ours, plain, truth in zip(*found, strict=True):
            error, as_usual = ((some.float() - truth).norm() / truth.norm() for some in (ours, plain))
            assert error <= (exact_enough if dtype == torch.float32 else 1.25 * as_usual), (B, S)
        assert found[0][0].dtype == dtype
        model.layers = fused
        if B * S > FEW:
            continue
        cache = model.new_cache(4, 40)
        model(tokens[:, :-S], pos[:, :-S], cache.view())
        steps = range(30 - S, 30)
        alone = [model(tokens[:, i : i + 1], pos[:, i : i + 1], cache.view(length=37)) for i in steps]
        assert torch.equal(torch.cat(alone, 1), found[0][0])  # no token's result depends on those beside it


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_fused_blocks_serve_any_tokens_in_bfloat16_and_16_at_most_in_others(dtype, monkeypatch):
    model, left = model_of(dtype, 4), []
    monkeypatch.setattr(RegionBlocks, "forward", lambda self, x, *_: left.append(x.shape[:2].numel()) or x)
    for B, S in ((1, 1), (4, 4), (2, 8), (1, FEW), (1, FEW + 1), (4, 5)):
        tokens, pos = torch.arange(B * S).view(B, S), torch.arange(S).repeat(B, 1)
        model(tokens, pos, model.new_cache(4, 40).view())
    assert left == ([] if dtype == torch.bfloat16 else [17, 20])


@needs_operators
@pytest.mark.parametrize(
    *pairwise(any_length=[False, True], dtype=[torch.float32, torch.bfloat16], rows=[None, (2, 0)])
)
@torch.inference_mode()
def test_fused_blocks_compile(dtype, any_length, rows):
    model = model_of(dtype, 4)
    step = compile_step(lambda model, tokens, pos, cache: model(tokens, pos, cache), model.device, any_length)
    cache, rows = model.new_cache(4, 40), None if rows is None else torch.tensor(rows)
    for S in (1, 3, 12):
        tokens, pos = torch.arange(2 * S).view(2, S), torch.arange(S).repeat(2, 1)
        expected = model(tokens, pos, cache.view(rows, 20))
        found = step(model, tokens, pos, cache.view(rows, 20))
        if dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        else:  # the last norm is fused, and rounded once
            assert (found - expected).norm() <= 0.01 * expected.norm()


@needs_operators
@pytest.mark.parametrize("S", [1, 3, 20])
@torch.inference_mode()
def test_blocks_use_the_rows_of_the_cache_that_are_chosen(S):
    model, B = model_of(dtype := torch.bfloat16, 8), 3
    run, blocks = torch.ops.gpt_faster.run_blocks, model.layers.fused
    x, pos = random(B, S, 192, seed=5).to(dtype), 9 + torch.arange(S).repeat(B, 1)
    mask = torch.zeros(B, S, 40, dtype=dtype).masked_fill(torch.arange(40) > pos[..., None], float("-inf"))
    angles = random(B, S, 1, 32, seed=6).float()
    keys, values = random(2, 3, 4, 2, 40, 64, seed=7).to(dtype)  # of 3 layers, 4 rows
    rows = torch.tensor([3, 0, 2])
    copies = [keys[:, rows].clone(), values[:, rows].clone()]
    untouched = keys[:, 1].clone()
    found, expected = (
        run(x, blocks, join_cache(list(k), list(v)), chosen, pos, angles.cos(), angles.sin(), mask)
        for k, v, chosen in ((keys, values, rows), (*copies, None))
    )
    assert torch.equal(found, expected)
    assert torch.equal(keys[:, rows], copies[0]) and torch.equal(values[:, rows], copies[1])
    assert torch.equal(keys[:, 1], untouched)


@needs_operators
@torch.inference_mode()
def test_fused_blocks_refuse_what_would_leave_their_memory():
    model = model_of(torch.float32, 8)
    one, cos = torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, 1, 32)
    x, mask = torch.ones(1, 1, 192), torch.zeros(1, 1, 40)
    fused, cache, row = model.layers.fused, model.new_cache(4, 40).handle, torch.tensor([3])
    run = torch.ops.gpt_faster.run_blocks

    def other_cache(*shape, layers=3, dtype=torch.float32):
        return join_cache(*2 * [[torch.zeros(shape, dtype=dtype)] * layers])

    assert run(x, fused, cache, None, one, cos, cos, mask).shape == x.shape
    assert run(x, fused, cache, row, one, cos, cos, mask).shape == x.shape
    assert run(x, fused, other_cache(1, 2, 40, 64), None, one, cos, cos, mask).shape == x.shape
    many = x.expand(1, 17, 192), one.expand(1, 17), *2 * [cos.expand(1, 17, 1, 32)], mask.expand(1, 17, 40)
    five = x.expand(5, 1, 192), one.expand(5, 1), *2 * [cos.expand(5, 1, 1, 32)], mask.expand(5, 1, 40)
    for wrong in (
        (x, fused, cache, None, 40 * one, cos, cos, mask),
        (x, fused, cache, None, -one, cos, cos, mask),
        (x, fused, cache, row + 1, one, cos, cos, mask),
        (x, fused, cache, row - 4, one, cos, cos, mask),
        (x, fused, cache, row.repeat(2), one, cos, cos, mask),
        (x, fused.clone(), cache, None, one, cos, cos, mask),
        (x, fused, cache.clone(), None, one, cos, cos, mask),
        (x, cache, fused, None, one, cos, cos, mask),
        (x, fused, other_cache(4, 2, 40, 64, layers=2), None, one, cos, cos, mask),
        (x, fused, other_cache(4, 1, 40, 64), None, one, cos, cos, mask),
        (x, fused, other_cache(4, 2, 40, 128), None, one, cos, cos, mask),
        (x, fused, other_cache(4, 2, 40, 64, dtype=torch.bfloat16), None, one, cos, cos, mask),
        (x, fused, other_cache(4, 2, 39, 64), None, one, cos, cos, mask),
        (x, fused, cache, None, one, cos, cos[..., :16], mask),
        (x, fused, cache, None, one, cos, cos, torch.zeros(1, 1, 41)),
        (five[0], fused, cache, None, *five[1:]),
        (many[0], fused, cache, None, *many[1:]),
        (x.bfloat16(), fused, cache, None, one, cos, cos, mask),
    ):
        with pytest.raises(RuntimeError, match="run_blocks"):
            run(*wrong)


@needs_operators
def test_caches_that_do_not_fit_each_other_are_refused():
    k, join = torch.zeros(2, 1, 8, 64), torch.ops.gpt_faster.join_cache
    codes, scales = k.to(torch.int8), torch.zeros(2, 1, 8)
    assert join_cache([k, k], [k, k]).dtype == torch.uint8
    assert join([codes, scales] * 4).dtype == torch.uint8
    others = (k[:1], k.double(), k.mT.contiguous().mT, torch.zeros(2, 1, 8, 32), k[0], codes)
    for tensors in (
        [],
        [k, None, k],
        [None, None] * 2,
        *([k, None, k, None, k, None, other, None] for other in others),
        [others[3], None] * 2,
        [codes, None] * 2,
        [codes, scales, codes, None],
        [codes, scales, codes, scales[:1]],
        [codes, scales.double()] * 2,
        [k, scales] * 2,
    ):
        with pytest.raises(RuntimeError, match="join_cache"):
            join(tensors)


@needs_operators
@torch.inference_mode()
def test_copies_of_a_model_fuse_blocks_of_their_own():
    model = model_of(torch.float32, 8)
    other = copy.deepcopy(model)
    assert isinstance(other.layers, FusedBlocks)
    for weights in other.layers[0].attention.wqkv.buffers():
        weights.zero_()
    tokens, pos = torch.arange(3)[None], torch.arange(3)[None]
    ours, theirs = (each(tokens, pos, each.new_cache(1, 40).view()) for each in (model, other))
    assert not torch.equal(ours, theirs)
    other.layers = Blocks(other.layers)
    torch.testing.assert_close(other(tokens, pos, other.new_cache(1, 40).view()), theirs)


@needs_operators
@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": 32},
        {"dim": 200},
        {"intermediate_size": 80},
        {"sliding_window": 7, "full_layers": (1,)},
        {"joint_qk_norm": True},
        {"attention_softcap": 5.0},
        {"activation": "gelu_tanh"},
        {"norm_offset": True},
        {"pre_norm": False},
        {"post_norm": True},
        {"residual_scale": 0.5},
        {"n_expert": 4, "n_expert_used": 2},
    ],
    ids=str,
)
@torch.inference_mode()
def test_other_models_run_layer_by_layer(fields):
    model = model_of(torch.float32, 8, **fields)
    assert not isinstance(model.layers, FusedBlocks)
    cache = model.new_cache(1, 40).view()
    assert model(torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), cache).isfinite().all()


@needs_operators
@torch.inference_mode()
def test_gates_of_any_size_neither_overflow_nor_vanish():
    model = model_of(torch.float32, 8, n_layer=1)
    block = model.layers[0]
    block.attention.wo.scales.zero_()
    x = torch.linspace(-1, 1, 192)[None, None]
    for scale in (1e-3, 1.0, 1e3, 1e6, 1e15):
        block.ffn_norm.weight.fill_(scale)
        h = block.ffn_norm(x)
        gate, up = block.feed_forward.w13(h).double().chunk(2, -1)
        hidden = F.silu(gate) * up
        assert scale != 1e3 or (gate.min() < -100 and gate.max() > 100)
        zero = torch.zeros(1, 1, dtype=torch.long)
        context = Context(*2 * [torch.ones(1, 1, 1, 32)], torch.zeros(1, 1, 1))
        found = model.layers(x, zero, [context], model.new_cache(1, 40).view())
        expected = x + block.feed_forward.w2(hidden.float())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
