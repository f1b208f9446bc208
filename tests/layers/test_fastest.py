"""The table of fast layers; and which models run as fused blocks, each against its plain form."""

import copy
from dataclasses import MISSING, fields, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from engine.compile import compile_step
from kernels import cpu
from layers.blocks import HONOURED, FusedBlocks, RegionBlocks
from layers.fastest import fastest, pack_, rounds_each_row
from layers.gpu.attention import GpuAttention
from layers.gpu.experts import GpuExperts
from layers.gpu.linear import join_head_
from layers.packed import (
    HAS_HALF,
    AnyExperts,
    CodesLinear,
    FewRowsLinear,
    FloatLinear,
    TorchInt4,
    TorchInt8,
    by_torch,
    has_triton,
)
from layers.quantized import LAYERS, QuantSpec, linear_table, quantize_, quantize_weight
from mixers.experts import ExpertLinear, Gate, MixtureOfExperts
from mixers.recurrent.delta_net import DeltaSizes
from mixers.recurrent.short_conv import ConvSizes
from mixers.rope import RopeScaling
from model import Attention, Blocks, ModelArgs, Transformer

TINY = ModelArgs(
    dim=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=64, intermediate_size=96, vocab_size=130, max_seq_length=64
)
INT4 = QuantSpec(4, 32)
SIZES = {field.name for field in fields(ModelArgs) if field.default is MISSING}
# a value other than the default for each field, with what it needs beside it; of models that fused blocks take ...
TAKEN = {
    "norm_eps": {"norm_eps": 0.1},
    "rope_base": {"rope_base": 100.0},
    "rope_scaling": {"rope_scaling": RopeScaling("linear", 3.0)},
    "rope_dim": {"rope_dim": 32},
    "sliding_window": {"sliding_window": 5},
    "window_rope_base": {"window_rope_base": 100.0, "sliding_window": 5},
    "qkv_bias": {"qkv_bias": True},
    "wo_bias": {"wo_bias": True},
    "ffn_bias": {"ffn_bias": True},
    "qk_norm": {"qk_norm": True},
    "attention_scale": {"attention_scale": 0.3},
    "embedding_scale": {"embedding_scale": 3.0},
    "logit_scale": {"logit_scale": 0.7},
    "logit_softcap": {"logit_softcap": 2.0},
    "tie_embeddings": {"tie_embeddings": True},
    "learned_positions": {"learned_positions": True},
}
# ... and of models that they refuse
EXPERTS = {"n_expert": 4, "n_expert_used": 2}
GROUPS = EXPERTS | {"sigmoid_experts": True, "n_expert_group": 2, "n_group_used": 1}
SHARED = EXPERTS | {"shared_size": 32}
REUSING = {"n_reusing_layer": 1, "reusing_size": 64}
SCALED = {"layer_scales": True, "layer_input_size": 32}
IN_TURN = {"sliding_window": 5, "full_layers": (1,), "full_head_dim": 128, "full_kv_head": 1}
LATENT = {"kv_latent": 32, "q_latent": 64, "value_dim": 48, "rope_dim": 32, "n_kv_head": 4}
DENSE = EXPERTS | {"dense_layers": (0,), "dense_size": 64}
REFUSED = {
    "full_layers": {"full_layers": (1,), "sliding_window": 5},
    "unrotated_layers": {"unrotated_layers": (1,)},
    "late_query_scale": {"late_query_scale": 0.5, "rope_scaling": RopeScaling("yarn", 4.0, 1.0, 8.0, 8)},
    "qk_norm_last": {"qk_norm": True, "qk_norm_last": True},
    "joint_qk_norm": {"joint_qk_norm": True},
    "kv_latent": LATENT | {"kv_latent": 128},  # of a size that operators take
    "q_latent": LATENT,
    "value_dim": LATENT | {"q_latent": None},
    "attention_sinks": {"attention_sinks": True},
    "attention_softcap": {"attention_softcap": 2.0},
    "attention_gate": {"attention_gate": True},
    "delta": {"delta": DeltaSizes((1,), 2, 4, 16, 32, 4)},
    "short_conv": {"short_conv": ConvSizes((1,), 64, 3, bias=True)},
    "activation": {"activation": "gelu_tanh"},
    "norm_offset": {"norm_offset": True},
    "mean_norm": {"mean_norm": True},
    "norm_bias": {"mean_norm": True, "norm_bias": True},
    "gated": {"gated": False},
    "parallel": {"parallel": True},
    "pre_norm": {"pre_norm": False},
    "post_norm": {"post_norm": True},
    "residual_scale": {"residual_scale": 0.5},
    "n_expert": EXPERTS,
    "n_expert_used": EXPERTS | {"ffn_bias": True, "activation": "clamped_swiglu"},
    "normalize_experts": {"normalize_experts": False},  # refused without experts too
    "expert_scale": {"expert_scale": 2.0, **EXPERTS},
    "sigmoid_experts": {"sigmoid_experts": True, **EXPERTS},
    "n_expert_group": GROUPS,
    "n_group_used": GROUPS,
    "shared_size": SHARED,
    "shared_gate": {"shared_gate": False, **SHARED},
    "dense_layers": DENSE,
    "dense_size": DENSE,
    "full_head_dim": IN_TURN,
    "full_kv_head": IN_TURN,
    "value_norm": {"value_norm": True},
    "keys_as_values": {"keys_as_values": True},
    "n_reusing_layer": REUSING,
    "reusing_size": REUSING,
    "separate_experts": SHARED | {"shared_gate": False, "separate_experts": True},
    "layer_input_size": SCALED,
    "layer_scales": SCALED,
}
needs_operators = pytest.mark.skipif(not cpu.available(), reason="there are no operators for this processor")
pytestmark = pytest.mark.usefixtures("one_thread")


def quantised(changes, spec=INT4):
    """A float32 model of random int8 and, by default, int4 layers, nothing packed; of floats without a spec."""
    torch.manual_seed(0)
    model = Transformer(replace(TINY, **changes)).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 4 + (parameter.ndim == 1))
    if spec is not None:
        quantize_(model, linear_table(model, spec, QuantSpec(8)))
    return model


@torch.inference_mode()
def logits(model):
    """Of a prompt of many tokens, then of few, then of one, in two rows at positions of their own."""
    tokens = torch.randint(130, (2, 30), generator=torch.Generator().manual_seed(1))
    pos, cache = torch.arange(30) + torch.tensor([[0], [3]]), model.new_cache(2, 40).view(length=36)
    parts = (slice(0, 20), slice(20, 24), slice(24, 25), slice(25, 30))
    return torch.cat([model(tokens[:, part], pos[:, part], cache) for part in parts], 1)


def assert_equals_plain(changes, kind, spec=INT4):
    plain, packed = quantised(changes, spec), quantised(changes, spec)
    pack_(packed)
    assert type(packed.layers) is kind
    found, wanted = (
        logits(packed),
        logits(plain),
    )  # sums of float32 in two orders, each off by up to 1e-5 from the truth
    assert (found - wanted).abs().max() < 3e-5 * wanted.abs().max()


WITHOUT_OPERATORS = {  # the dtype, how layers are quantised, and the forms they get
    "int4": (torch.bfloat16, QuantSpec(4, 32), {TorchInt4, TorchInt8}),
    "int8": (torch.bfloat16, QuantSpec(8), {TorchInt8}),
    "int8 in groups": (torch.bfloat16, QuantSpec(8, 32), {FloatLinear, TorchInt8}),
    "float8": (torch.bfloat16, QuantSpec(8, 32, "float8"), {FloatLinear, TorchInt8}),
    "float16": (torch.float16, QuantSpec(4, 32), {FloatLinear}),
    "float32": (torch.float32, QuantSpec(4, 32), {FloatLinear}),
}


def without_operators(monkeypatch, dtype, spec, memory=None, **changes):
    """A quantised model in plain form, and packed on a processor that has no operators."""
    monkeypatch.setattr(cpu, "available", lambda: False)
    pair = []
    for _ in range(2):
        model = quantised(changes, spec)
        for layer in model.modules():  # not the scales, whose dtype stays
            for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
                if name in ("weight", "bias") and tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
        pair.append(model)
    pack_(pair[1], memory)
    return pair


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": True}, {"ffn_bias": True, "n_expert": 2, "n_expert_used": 2}], ids=str
)
@pytest.mark.parametrize("case", WITHOUT_OPERATORS)
def test_quantised_models_without_operators_equal_plain_ones(case, changes, monkeypatch):
    dtype, spec, kinds = WITHOUT_OPERATORS[case]
    plain, packed = without_operators(monkeypatch, dtype, spec, **changes)
    found, wanted = logits(packed).double(), logits(plain).double()
    forms = {type(layer) for layer in packed.modules()}
    assert kinds - {TorchInt4} <= forms and not forms & set(LAYERS.values())
    # a norm: one rounding may choose another expert for a token
    assert (found - wanted).norm() < {torch.float32: 3e-5}.get(dtype, 0.04) * wanted.norm()


def test_layers_are_not_copied_where_memory_is_short(monkeypatch, capsys):
    _, packed = without_operators(monkeypatch, torch.float32, QuantSpec(4, 32), memory=100_000)
    assert type(packed.output) is LAYERS[8] and type(packed.layers[0].attention.wo) is LAYERS[4]
    assert capsys.readouterr().err.startswith("Decoding is slow: 9 layers are unpacked at each step")


def test_compiled_models_without_operators_equal_eager_ones(monkeypatch):
    """The step of one token, in which blocks are compiled once for all layers."""
    _, packed = without_operators(monkeypatch, torch.bfloat16, QuantSpec(4, 32), **EXPERTS)
    step = compile_step(lambda model, tokens, pos, cache: model(tokens, pos, cache), torch.device("cpu"))
    with torch.inference_mode():
        token, cache = torch.tensor([[7]]), packed.new_cache(1, 8)
        found, wanted = (run(packed, token, token * 0, cache.view(length=4)) for run in (step, Transformer.__call__))
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.fixture
def any_processor(monkeypatch):
    """Layers are chosen as on a processor that has everything; they cannot run."""
    monkeypatch.setattr(cpu, "available", lambda: True)
    monkeypatch.setattr(FusedBlocks, "__init__", Blocks.__init__)


def test_every_field_is_honoured_or_refused_by_fused_blocks():
    assert SIZES | TAKEN.keys() == HONOURED
    assert {field.name for field in fields(ModelArgs)} == HONOURED | REFUSED.keys()
    for name, changes in {**TAKEN, **REFUSED}.items():
        assert getattr(replace(TINY, **changes), name) != getattr(TINY, name)


@pytest.mark.parametrize("name", [*TAKEN, *REFUSED])
def test_fused_blocks_take_only_models_whose_fields_they_honour(name, any_processor):
    model = quantised({**TAKEN, **REFUSED}[name])
    pack_(model)
    assert type(model.layers) is (FusedBlocks if name in TAKEN else RegionBlocks)


@needs_operators
@pytest.mark.parametrize("name", TAKEN)
def test_fused_blocks_equal_plain_ones(name):
    assert_equals_plain(TAKEN[name], FusedBlocks)


@needs_operators
@pytest.mark.parametrize("head_dim, n_kv_head", [(64, 4), (96, 1), (128, 2), (256, 1)])
def test_fused_blocks_of_other_sizes_equal_plain_ones(head_dim, n_kv_head):
    changes = {"dim": 96, "n_layer": 3, "n_kv_head": n_kv_head, "head_dim": head_dim, "intermediate_size": 160}
    assert_equals_plain(changes, FusedBlocks)


@needs_operators
@pytest.mark.parametrize("name, bits", [("float8", 8), ("int8.zeros", 8), ("float4", 4)])
@pytest.mark.parametrize("groupsize", [16, 32])
def test_blocks_of_formats_with_a_name_equal_plain_ones(name, bits, groupsize):
    assert_equals_plain({}, FusedBlocks, QuantSpec(bits, groupsize, name))


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_fused_blocks_refuse_compute_right(name):
    assert_equals_plain(REFUSED[name], RegionBlocks)


def test_the_table_by_hand(monkeypatch, any_processor):
    floats = [nn.Linear(64, 48), Gate(64, 48), ExpertLinear(torch.empty(3, 48, 64))]
    codes = [LAYERS[bits](**quantize_weight(torch.ones(48, 64), QuantSpec(bits, 32))) for bits in (8, 4)]
    experts = [LAYERS[bits](**quantize_weight(torch.ones(3, 48, 64), QuantSpec(bits, 32))) for bits in (8, 4)]
    assert [fastest(layer) for layer in floats] == [None, None, AnyExperts]
    assert [fastest(layer.bfloat16()) for layer in floats] == [FewRowsLinear] * 3
    assert [fastest(layer) for layer in codes + experts] == [CodesLinear] * 4
    elsewhere = [copy.deepcopy(layer).to("meta") for layer in floats + codes + experts]
    assert [fastest(layer) for layer in elsewhere] == [None, None, AnyExperts, None, None, AnyExperts, AnyExperts]
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert [fastest(layer) for layer in codes + experts] == [None, None, AnyExperts, AnyExperts]
    model = SimpleNamespace(args=None, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert [fastest(layer, model) for layer in codes + experts] == [None, by_torch, AnyExperts, by_torch]
    for has, kind in ((True, None), (False, FloatLinear.of)):  # instructions for bfloat16
        monkeypatch.setitem(HAS_HALF, torch.bfloat16, has)
        assert [fastest(layer) for layer in floats] == [kind, kind, AnyExperts]


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_forms_on_cuda_by_hand():
    def chosen(dtype, **changes):
        args = replace(TINY, **EXPERTS, **changes)
        model = SimpleNamespace(args=args, dtype=dtype, device=torch.device("cuda"))
        return [
            fastest(layer, model) for layer in (Attention(args, 0), MixtureOfExperts(args, None), Transformer(args))
        ]

    assert chosen(torch.bfloat16) == chosen(torch.float16) == [GpuAttention, GpuExperts, join_head_]
    others = [None, GpuExperts, join_head_]
    assert chosen(torch.bfloat16, joint_qk_norm=True) == chosen(torch.bfloat16, head_dim=16) == others
    assert chosen(torch.bfloat16, dim=66) == [GpuAttention, GpuExperts, None]  # rows of no multiple of 16 bytes
    assert chosen(torch.float32) == [None, None, None]


@torch.inference_mode()
def test_one_key_head_without_a_cache():
    """Its keys lie in memory as those of a cache would; its values do not."""
    model = quantised({"n_head": 2, "n_kv_head": 1, "head_dim": 64}).bfloat16()
    tokens, pos = torch.tensor([[5, 6, 7, 8]]), torch.arange(4)[None]
    wanted = model(tokens, pos)
    pack_(model)
    assert (model(tokens, pos) - wanted).abs().max() < 0.1 * wanted.abs().max()


@needs_operators
@pytest.mark.parametrize("changes, alone", [({}, True), ({"attention_softcap": 2.0}, False), (EXPERTS, False)], ids=str)
def test_whether_a_token_has_the_same_numbers_whatever_is_read_with_it(changes, alone):
    model = quantised({"head_dim": 64, **changes}).bfloat16()
    pack_(model)
    assert rounds_each_row(model.layers) == alone


@needs_operators
@pytest.mark.parametrize("spec", [None, INT4], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"delta": DeltaSizes((0,), 2, 2, 32, 32, 4)},
        {"short_conv": ConvSizes((0,), 64, 3)},
        {"attention_sinks": True},
        {"sliding_window": 40},
        {"gated": False, "activation": "gelu_tanh"},
        {"activation": "relu"},
    ],
    ids=str,
)
@torch.inference_mode()
def test_a_prompt_in_parts_has_the_numbers_of_the_whole_where_that_is_said(changes, spec):
    """In bfloat16 where its rows are multiplied one by one; elsewhere the product of matrices sums in another order."""
    model = quantised({"max_seq_length": 128, **changes}, spec).bfloat16()
    pack_(model)
    said = rounds_each_row(model.layers)
    assert changes or said == (spec is not None or cpu.bf16_rows_apart())
    cache, tokens, pos = model.new_cache(2, 128), torch.arange(100)[None] % 50, torch.arange(100)[None]
    whole = model(tokens, pos, cache.view(torch.tensor([0]), 128))
    parts = [model(tokens[:, i:j], pos[:, i:j], cache.view(torch.tensor([1]), 128)) for i, j in ((0, 32), (32, 100))]
    assert torch.equal(torch.cat(parts, 1), whole) or not said
