"""Layers that skip small inputs, against float64 products of the inputs that are left; and models of them."""

import pytest
import torch
import torch.nn as nn
import transformers

from engine.engine import Engine, build_engine
from kernels import cpu
from layers.blocks import FusedBlocks, RegionBlocks
from layers.packed import FEW
from layers.quantized import QuantSpec, quantize_, quantize_weight
from layers.sparse import ReluFeedForward, SparseLinear, Thresholded, in_large_pages
from model import FeedForward, ModelArgs, Transformer
from tests.tiny import SIZES as FAMILY_SIZES
from tests.tiny import ids_of, pairwise, random_ids, random_prompts, save_tiny, tiny_model
from weights.checkpoint import build, load_model, random_model

needs_operators = pytest.mark.skipif(not cpu.available(), reason="the CPU operators cannot be built")
SPECS = {"float": None, "int8": QuantSpec(8), "int8.g16": QuantSpec(8, 16), "int4": QuantSpec(4, 32)}
SPECS |= {"int4.g64": QuantSpec(4, 64)}
BF16, F32 = torch.bfloat16, torch.float32


def thresholded(spec, n_in, n_out, dtype, threshold, bias=True):
    generator = torch.Generator().manual_seed(n_in + n_out)
    weight = torch.randn(n_out, n_in, generator=generator)
    layer = nn.Linear(n_in, n_out)
    layer.weight.data, layer.bias.data = weight.to(dtype), torch.randn(n_out, generator=generator).to(dtype)
    if spec is not None:
        layer = spec.layer(**quantize_weight(weight, spec), bias=layer.bias)
    return Thresholded(layer if bias else layer, threshold)


@needs_operators
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [BF16, F32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (192, 80), (64, 7)], ids=str)
def test_few_rows_skip_what_is_small(spec, dtype, shape):
    """Rows alone and together, of which each skips other inputs; outputs that fill no vector; no input, and all."""
    if dtype == torch.float16 and spec == "float":
        pytest.skip("float16 weights keep the plain form")
    n_in, n_out = shape
    tolerance = {BF16: 1e-2, F32: 2e-6, torch.float16: 2e-3}[dtype]
    for threshold in (0.0, 0.7, 100.0):
        plain = thresholded(SPECS[spec], n_in, n_out, dtype, threshold)
        weight = plain.layer.weight if SPECS[spec] is None else plain.layer.dequantize()
        layer = SparseLinear(plain)
        for rows in (1, 2, 5, FEW):
            x = torch.randn(1, rows, n_in, generator=torch.Generator().manual_seed(rows)).to(dtype)
            kept = x.double() * (x.abs().float() > threshold)
            wanted = kept @ weight.detach().double().T + plain.layer.bias.double()
            torch.testing.assert_close(layer(x).double(), wanted, rtol=tolerance, atol=tolerance * n_in**0.5)


@pytest.mark.parametrize("dtype", [BF16, torch.uint8], ids=str)
def test_values_in_large_pages_are_the_same(dtype):
    small, large = (torch.randn(n, 1024, generator=torch.Generator().manual_seed(0)).to(dtype).T for n in (3, 3001))
    for each in (small, large):
        copy = in_large_pages(each)
        assert torch.equal(copy, each) and copy.is_contiguous() and copy.dtype == dtype
        assert copy.data_ptr() != each.data_ptr()


@needs_operators
@pytest.mark.parametrize("spec", SPECS)
def test_prompts_take_all_inputs(spec):
    plain = thresholded(SPECS[spec], 64, 96, F32, 0.7)
    x = torch.randn(2, FEW + 1, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(SparseLinear(plain)(x), plain.layer(x), rtol=1e-4, atol=1e-4)
    rows = x[:, :9]  # few of each request, many in all: small inputs are 0
    torch.testing.assert_close(SparseLinear(plain)(rows), plain(rows), rtol=1e-4, atol=1e-4)


@needs_operators
@pytest.mark.parametrize("rows", [1, 3])
def test_nan_is_not_skipped(rows):
    layer = SparseLinear(thresholded(None, 64, 32, F32, 0.5))
    x = torch.zeros(1, rows, 64)
    x[:, -1, 5] = float("nan")
    assert layer(x)[:, -1].isnan().all() and not layer(x)[:, :-1].isnan().any()


SIZES = dict(dim=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=64, intermediate_size=96, vocab_size=128)
LAYERS = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")


def sparse_model(dtype, threshold=0.3, spec=None, **fields):
    """A model that skips, packed; and the plain one with the same weights, float or codes."""
    args = ModelArgs(**SIZES, max_seq_length=128, **fields)
    torch.manual_seed(0)
    state = {
        name: torch.randn(t.shape) * (0.2 if t.ndim > 1 else 1) for name, t in Transformer(args).state_dict().items()
    }
    names = [f"layers.{i}.{name}" for i in range(args.n_layer) for name in LAYERS]
    bits = {} if spec is None else {"bits": spec.bits, "groupsize": spec.groupsize}
    for name in names if spec else ():
        rounded = quantize_weight(state.pop(f"{name}.weight"), spec)
        state |= {f"{name}.{key}": tensor for key, tensor in rounded.items()}
    coded = ("weight", "scales", "zeros") if spec else ()
    is_coded = {f"{name}.{leaf}" for name in names for leaf in coded}
    state = {name: t if name in is_coded else t.to(dtype) for name, t in state.items()}
    return build(args, state, {name: QuantSpec(**bits, threshold=threshold) for name in names})


@needs_operators
@pytest.mark.parametrize("spec", [None, QuantSpec(8), QuantSpec(4, 32)], ids=str)
def test_fused_blocks_skip_as_blocks_one_by_one(spec):
    model = sparse_model(BF16, spec=spec, qkv_bias=True)
    assert type(model.layers) is FusedBlocks
    prompt = random_ids(20)[0]
    fused = ids_of(Engine(model), [prompt], 12)
    pos = torch.arange(3).view(1, 3)
    tokens = torch.tensor([prompt[:3]])
    cache = model.new_cache(1, 64)
    together = model(tokens, pos, cache.view())
    model.layers = RegionBlocks(model.layers)
    plain = model.new_cache(1, 64)
    apart = model(tokens, pos, plain.view())
    torch.testing.assert_close(together, apart, rtol=3e-2, atol=3e-1)
    assert len(fused[0]) == 12


@needs_operators
def test_a_threshold_of_zero_changes_nothing():
    """Exact: only inputs that are 0 are skipped."""
    model, plain = sparse_model(F32, threshold=0.0), sparse_model(F32, threshold=0.0)
    for block in plain.layers:
        for path in LAYERS:
            owner, name = path.split(".")
            layer = getattr(getattr(block, owner), name)
            setattr(getattr(block, owner), name, linear_of(layer))
    prompt = random_ids(20)[0]
    assert ids_of(model, [prompt], 24) == ids_of(plain, [prompt], 24)


def linear_of(sparse):
    layer = nn.Linear(*sparse.by_output().T.shape, bias=False)
    layer.weight.data = sparse.by_output().contiguous()
    return layer


def test_a_threshold_is_refused_where_there_are_experts():
    args = ModelArgs(**SIZES, max_seq_length=128, n_expert=2, n_expert_used=1)
    with pytest.raises(ValueError, match="not supported for experts"):
        build(args, tiny_model().state_dict(), {"layers.0.feed_forward.w2": QuantSpec(threshold=0.5)})
    with pytest.raises(ValueError, match="threshold is -1.0; it must be a number from 0 on"):
        QuantSpec(threshold=-1.0)


# ---------------------------------------------------------------- ReLU


def relu_unit(activation, spec, dtype, inactive=0.9, dim=64, size=96, gated=True):
    """A feed-forward of which so many neurons are inactive, for inputs around 1."""
    sizes = SIZES | {"dim": dim, "intermediate_size": size, "gated": gated}
    args = ModelArgs(**sizes, max_seq_length=64, activation=activation)
    torch.manual_seed(3)
    unit = FeedForward(args, size).requires_grad_(False)
    unit.w13.weight[: int(inactive * size)] = -unit.w13.weight[: int(inactive * size)].abs()
    unit = unit.to(dtype)
    if spec is not None:
        quantize_(unit, {"w13": spec, "w2": spec})
    return unit, args


@needs_operators
@pytest.mark.parametrize(
    *pairwise(
        activation=["relu", "relu2"],
        spec=[None, QuantSpec(8), QuantSpec(8, 32), QuantSpec(4, 32)],
        inactive=[0.9, 0.5, 0.0],
        gated=[True, False],
        size=[96, 160],
    )
)
def test_inactive_neurons_change_nothing(activation, spec, inactive, gated, size):
    plain, args = relu_unit(activation, spec, F32, inactive, 64, size, gated)
    assert ReluFeedForward.fits(plain, args)
    fast = ReluFeedForward(plain)
    for shape in ((1, 1), (1, 5), (4, 1), (1, FEW + 1)):
        x = torch.rand(*shape, 64, generator=torch.Generator().manual_seed(1)) + 0.5
        assert (plain.w13(x)[..., :size] <= 0).float().mean() > 0.95 * inactive
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4)
    nothing = torch.full((1, 1, 64), 0.0)
    torch.testing.assert_close(fast(nothing), plain(nothing))


@needs_operators
def test_a_relu_model_writes_the_same_tokens():
    args = ModelArgs(**SIZES, max_seq_length=128, activation="relu")
    torch.manual_seed(0)
    state = {
        name: torch.randn(t.shape) * (0.2 if t.ndim > 1 else 1) for name, t in Transformer(args).state_dict().items()
    }
    fast, plain = build(args, state), Transformer(args).eval()
    plain.load_state_dict(state)
    assert all(type(block.feed_forward) is ReluFeedForward for block in fast.layers)
    prompts = random_ids(20, 3)
    assert ids_of(fast, prompts, 24) == ids_of(plain, prompts, 24)


@needs_operators
@pytest.mark.parametrize("spec", [None, QuantSpec(4, 32)], ids=str)
def test_compiled_a_relu_model_writes_the_same_tokens(spec):
    """Its up and gate projections are parts of one weight, of which the compiler takes no views."""
    model = random_model(ModelArgs(**SIZES, max_seq_length=128, activation="relu"), quantize=spec)
    assert all(type(block.feed_forward) is ReluFeedForward for block in model.layers)
    prompt = random_ids(20)
    assert ids_of(build_engine(model, compile=True), prompt, 12) == ids_of(model, prompt, 12)


def test_only_relu_units_whose_rows_operators_take():
    assert not ReluFeedForward.fits(*relu_unit("silu", None, F32))
    assert not ReluFeedForward.fits(*relu_unit("relu", QuantSpec(4, 16), F32))
    assert not ReluFeedForward.fits(*relu_unit("relu", None, torch.float16))
    assert ReluFeedForward.fits(*relu_unit("relu", QuantSpec(4, 16), F32, gated=False))


RELU_FAMILIES = {
    "llama, relu": transformers.LlamaConfig(**FAMILY_SIZES, hidden_act="relu"),
    "llama, relu2": transformers.LlamaConfig(**FAMILY_SIZES, hidden_act="relu2"),
    "nemotron": transformers.NemotronConfig(**FAMILY_SIZES),
    "opt": transformers.OPTConfig(**FAMILY_SIZES | {"num_key_value_heads": 4, "ffn_dim": 64, "init_std": 0.3}),
}


@needs_operators
@pytest.mark.parametrize("family", RELU_FAMILIES)
def test_a_model_with_a_relu_is_that_of_transformers(family, tmp_path):
    config = RELU_FAMILIES[family]
    theirs, ours = save_tiny(config, tmp_path), load_model(tmp_path, dtype=F32)
    assert all(type(block.feed_forward) is ReluFeedForward for block in ours.layers)
    tokens, cache = torch.tensor([random_prompts(12)[0]]), ours.new_cache(1, 64)
    steps = [ours(tokens[:, i : i + 1], torch.tensor([[i]]), cache.view()) for i in range(12)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(steps, 1), theirs(tokens).logits, rtol=1e-3, atol=1e-3)
