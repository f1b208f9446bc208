"""Quantised layers against numbers by hand, GGUF's own rounding, and the dequantised float model."""

import subprocess
import sys
from dataclasses import replace

import gguf
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from compress.gptq import gptq_
from engine.compile import compile_step
from engine.decode import decode_one_token, forward_chunk
from kernels import cpu
from layers.formats import Int4Linear, pack_nibbles, unpack_nibbles
from layers.packed import FloatLinear, Permuted
from layers.quantized import (
    GROUPSIZES,
    QuantSpec,
    linear_table,
    quant_spec,
    quantize_,
    quantize_weight,
    table_from_json,
    table_to_json,
)
from model import ModelArgs
from tests import tiny
from tests.tiny import CPU
from weights.checkpoint import build, load_model, new_table, open_model, read_tensors, save_checkpoint
from weights.layout import Layout

# every groupsize divides these inputs
TINY = ModelArgs(
    dim=256, n_layer=2, n_head=4, n_kv_head=2, head_dim=64, intermediate_size=512, vocab_size=300, max_seq_length=512
)
SPECS = [QuantSpec(8), *(QuantSpec(bits, size) for bits in (8, 4) for size in GROUPSIZES)]
OTHERS = [QuantSpec(8, None, "float8"), QuantSpec(8, 64, "float8"), QuantSpec(8, 64, "int8.zeros")]
OTHERS += [QuantSpec(4, 32, "float4")]
FORMATS = [QuantSpec(8), QuantSpec(8, 64), QuantSpec(4, 32), *OTHERS]
pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- rounding


def rounded(weight, spec, bias=None):
    return spec.layer(**quantize_weight(weight, spec), bias=bias)


def test_int8_by_hand():
    weight = torch.tensor([[127.0, -127.0, 64.0, 0.4], [0.0, 0.0, 0.0, 0.0], [2.54, -1.27, 0.02, 0.0]])
    tensors = quantize_weight(weight, QuantSpec(8))
    assert tensors["weight"].dtype == torch.int8 and tensors["scales"].dtype == torch.bfloat16
    assert tensors["weight"].tolist() == [[127, -127, 64, 0], [0, 0, 0, 0], [127, -63, 1, 0]]
    assert tensors["scales"].float().tolist() == [[1.0], [0.0], [torch.tensor(0.02).bfloat16().item()]]


def test_int4_by_hand():
    ramp = torch.arange(16.0).repeat(2)  # scale 1, zero 8: code - 8
    tensors = quantize_weight(torch.stack([ramp, 3 * ramp - 5, torch.full((32,), 0.75)]), QuantSpec(4, 32))
    codes = unpack_nibbles(tensors["weight"])
    assert torch.equal(codes[0], (ramp - 8).to(torch.int8)) and torch.equal(codes[1], codes[0])
    assert tensors["scales"].flatten().tolist() == [1, 3, 0]
    assert tensors["zeros"].flatten().tolist() == [8, 19, 0.75]
    assert Int4Linear(**tensors).dequantize()[2].tolist() == [0.75] * 32


def test_float8_by_hand():
    codes = torch.tensor([[0x38, 0xB8, 0x01, 0x7E], [0x00, 0x80, 0x08, 0x40]], dtype=torch.uint8)
    layer = QuantSpec(8, None, "float8").layer(codes, torch.tensor([[2.0], [0.5]]))
    assert layer.dequantize().tolist() == [[2, -2, 2**-8, 896], [0, 0, 2**-7, 1]]
    tensors = quantize_weight(torch.tensor([[448.0, -3.0, 0.0]]), QuantSpec(8, None, "float8"))
    assert tensors["weight"].tolist() == [[0x7E, 0xC4, 0]] and tensors["scales"].item() == 1


def test_float4_by_hand():
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0]).repeat(2)
    tensors = quantize_weight(torch.stack([numbers, 8 * numbers, 0 * numbers]), QuantSpec(4, 32, "float4"))
    assert tensors["weight"][0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x0F]
    assert tensors["scales"].tolist() == [[0.5], [4], [0]]
    assert QuantSpec(4, 32, "float4").layer(**tensors).dequantize()[1].tolist() == (8 * numbers).tolist()


def test_int8_with_zeros_by_hand():
    tensors = quantize_weight(torch.tensor([[0.0, 255.0, 1.0]]), QuantSpec(8, None, "int8.zeros"))
    assert [tensors[name].tolist() for name in ("weight", "scales", "zeros")] == [[[-128, 127, -127]], [[1]], [[128]]]


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(8, 32, "int8.zeros")], ids=str)
def test_an_order_of_inputs(spec):
    """Column i of the codes is for input order[i], in plain form and with the inputs put in order first."""
    order, x = torch.stack([torch.randperm(64), torch.randperm(64)]), random(3, 2, 64, seed=1)
    alone = rounded(random(2, 40, 64), spec)
    experts = spec.layer(**alone.state_dict(), order=order)
    chosen = torch.tensor([[0, 1], [1, 0], [1, 1]])
    places = zip(x.flatten(0, 1), chosen.flatten(), strict=True)
    expected = torch.stack([alone.expert(e)(row[order[e]]) for row, e in places])
    for layer in (experts, Permuted(experts)):
        torch.testing.assert_close(layer(x, chosen), expected.view(3, 2, 40))
    torch.testing.assert_close(Permuted(experts.expert(1))(x), experts.expert(1)(x))


def test_nibbles_keep_the_even_input_low():
    packed = pack_nibbles(torch.tensor([[-8, 7, 0, -1]]))
    assert packed.dtype == torch.uint8 and packed.tolist() == [[0xF0, 0x78]]
    assert unpack_nibbles(packed).tolist() == [[-8, 7, 0, -1]]


def test_scales_are_bfloat16_before_codes_are_chosen():
    weight = random(64, 256)
    for spec in SPECS:
        layer = rounded(weight, spec)
        groups = layer.scales.shape[1]
        error = (layer.dequantize() - weight).unflatten(1, (groups, -1)).abs()
        # half a step; at the ends of the range the rounding of scale and zero is added
        assert (error <= layer.scales.float()[..., None] * (0.5 + 16 / 256) + 2**-8 * 5).all(), spec


@pytest.mark.parametrize("kind, spec", [("Q4_1", QuantSpec(4, 32)), ("Q8_0", QuantSpec(8, 32))])
def test_rounding_is_as_good_as_ggufs(kind, spec):
    weight = random(64, 256)
    kind = gguf.GGMLQuantizationType[kind]
    theirs = torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    ours = rounded(weight, spec).dequantize()
    assert (ours - weight).norm() <= 1.02 * (theirs - weight).norm()


def test_parts_of_a_large_weight_are_rounded_as_one(monkeypatch):
    weight = random(50, 64)
    whole = quantize_weight(weight, QuantSpec(4, 32))
    monkeypatch.setattr("layers.quantized.PART", 640)
    parts = quantize_weight(weight, QuantSpec(4, 32))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("spec", [*SPECS, *OTHERS], ids=str)
def test_plain_forward_is_the_dequantised_weight(spec):
    weight, x, bias = random(40, 512), random(3, 512, seed=1), random(40, seed=2)
    layer = rounded(weight, spec, bias)
    expected = F.linear(x.double(), layer.dequantize().double(), bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)
    layer.bias = bias.bfloat16()
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    layer.bias = None
    large = 100 * x.half()  # sums of unscaled codes would be infinite in float16
    torch.testing.assert_close(layer(large).double(), 100 * (expected - bias.double()), rtol=0, atol=50)


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_experts_are_as_many_layers(spec):
    weight, x, chosen = (
        random(4, 40, 64),
        random(5, 1, 64, seed=1),
        torch.tensor([[0, 3], [2, 0], [3, 2], [0, 2], [3, 0]]),
    )
    alone, experts = [rounded(each, spec) for each in weight], rounded(weight, spec)
    for name, tensor in experts.state_dict().items():
        assert torch.equal(tensor, torch.stack([layer.state_dict()[name] for layer in alone])), name
    assert torch.equal(experts.dequantize(), torch.stack([layer.dequantize() for layer in alone]))
    expected = torch.stack(
        [torch.cat([alone[e](row) for e in own]) for row, own in zip(x, chosen.tolist(), strict=True)]
    )
    torch.testing.assert_close(experts(x, chosen), expected)


# ---------------------------------------------------------------- specs and tables


@pytest.mark.parametrize(
    "fields",
    [(4, None), (4, 8), (8, 0), (4, 48), (5, 32), (True, 32), (8, "32"), (4, 32.0), (4, 32, "float8"), (8, 32, 8)],
)
def test_specs_that_do_not_exist(fields):
    with pytest.raises(ValueError, match="bits is|groupsize|format"):
        QuantSpec(*fields)


def test_flags_to_specs():
    assert quant_spec(None, None) is None
    assert quant_spec("int8", None) == QuantSpec(8) and quant_spec("int8", 64) == QuantSpec(8, 64)
    assert quant_spec("int4", None) == QuantSpec(4, 32) and quant_spec("int4", 128) == QuantSpec(4, 128)
    for mode, groupsize in ((None, 32), ("int4", 0), ("int8", 7)):
        with pytest.raises(ValueError, match="groupsize"):
            quant_spec(mode, groupsize)


def test_a_groupsize_that_does_not_divide_names_those_that_do():
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(256, 8), "b": nn.Linear(192, 8)})
    with pytest.raises(ValueError, match="groupsize 128 does not divide the 192 inputs of b; use 16, 32, 64$"):
        linear_table(model, QuantSpec(4, 128), None)
    with pytest.raises(ValueError, match="the 40 inputs of c; use int8, which needs none$"):
        quantize_weight(random(8, 40), QuantSpec(4, 32), "c")


def test_tables_survive_json_and_damaged_ones_are_refused():
    table = {"a.b": QuantSpec(8), "c": QuantSpec(4, 64, ordered=True), "d": QuantSpec(8, 64, "float8")}
    assert table_from_json(table_to_json(table)) == table and table_from_json(None) == {}
    for wrong in ([1], {"a": 3}, {"a": {"bits": 4}}, {"a": {"bits": 8, "size": 3}}, {"a": {}}, {"a": None}):
        with pytest.raises(ValueError):
            table_from_json(wrong)
    for name in ("layers.9.attention.wo", "norm", "layers.0", ""):
        with pytest.raises(ValueError, match="not a linear layer"):
            quantize_(Layout(TINY).model, {name: QuantSpec(8)})


@pytest.mark.parametrize("spec", [*SPECS, *OTHERS], ids=str)
def test_shells_have_the_shapes_and_types_of_real_layers(spec):
    real = nn.Sequential(nn.Linear(512, 48))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(512, 48))
    for model in (real, empty):
        quantize_(model, {"0": spec})
    kinds = [{n: (t.shape, t.dtype) for n, t in model.state_dict().items()} for model in (real, empty)]
    assert kinds[0] == kinds[1] and type(real[0]) is type(empty[0]) is spec.layer


# In a process of its own, because the tests around it compile.
EAGER = """
import sys, torch
from layers.quantized import QuantSpec
from model import ModelArgs
from weights.checkpoint import random_model
sizes = dict(dim=64, n_layer=1, n_head=4, n_kv_head=2, head_dim=16, intermediate_size=96, vocab_size=32)
for experts in ({}, {"n_expert": 4, "n_expert_used": 2}):
    for spec in (None, QuantSpec(8), QuantSpec(4, 32)):
        random_model(ModelArgs(**sizes, max_seq_length=8, **experts), quantize=spec)(*torch.zeros(2, 1, 2).long())
print({"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys())
"""


def test_a_model_that_is_not_compiled_does_not_wait_for_the_compilers_modules():
    done = subprocess.run([sys.executable, "-c", EAGER], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# ---------------------------------------------------------------- models


def random_weights(args):
    shapes = {name: meta.shape for name, meta in Layout(args).tensors.items()}
    return {n: 0.15 * random(*s, seed=i) + (len(s) == 1) for i, (n, s) in enumerate(shapes.items())}


def save_quantised(source, target, spec, head="int8", gptq=False):
    """What quantize.py does."""
    source = open_model(source)
    table = new_table(source, spec, target, head)
    tensors = read_tensors(source, CPU, torch.float32, "", table)
    if gptq:
        ids = torch.randint(300, (4, 256), generator=torch.Generator().manual_seed(0))
        model = build(source.args, read_tensors(source, CPU, torch.float32, ""))
        tensors |= gptq_(model, ids, table, percdamp=0.01, blocksize=128, act_order=True)
    save_checkpoint(target, source.args, tensors, table)
    return target


def saved(path, args, spec, head="int8", gptq=False):
    """A checkpoint of random weights, quantised; the dequantised float model."""
    save_checkpoint(path.parent / "float.pth", args, random_weights(args))
    return dequantised(save_quantised(path.parent / "float.pth", path, spec, head, gptq))


def dequantised(path):
    """The float32 model whose weights are what the file's codes stand for."""
    source = open_model(path)
    state = read_tensors(source, CPU, torch.float32, "")
    if "output.weight" not in state:
        state["output.weight"] = state["tok_embeddings.weight"]
    return tiny.dequantised(source.args, state, source.table)


@torch.inference_mode()
def logits(model, ids):
    return model(torch.tensor([ids]), torch.arange(len(ids))[None], model.new_cache(1, len(ids)).view())[0].float()


def assert_close_logits(got, expected, tolerance):
    assert expected.std() > 0.1
    error = (got - expected).norm() / expected.norm()
    assert error < tolerance, f"{error:.1e}"


IDS = [[5, 6, 7, 8, 9], [11], list(range(100, 140)), [3] * 17]
# pairwise: each spec, each head with and without an embedding of its own, rounded both ways
HEADS = [("int8", False), ("int4", False), ("float", False), ("int8", True), ("int4", True), ("float", True)]
MODELS = [(spec, *HEADS[i % 6], i in (4, 6, 8)) for i, spec in enumerate(SPECS)]


@pytest.mark.parametrize("spec, head, tied, gptq", MODELS, ids=lambda value: str(value))
def test_model_agrees_with_the_dequantised_one(spec, head, tied, gptq, tmp_path, monkeypatch):
    path, args = tmp_path / "model.pth", replace(TINY, tie_embeddings=tied, qkv_bias=tied)
    expected = logits(saved(path, args, spec, head, gptq), IDS[2])
    assert_close_logits(logits(load_model(path, dtype=torch.float32), IDS[2]), expected, 1e-5)
    # bfloat16 itself costs 2 %, activations rounded to int8 as much again in each of these random layers
    assert_close_logits(logits(load_model(path), IDS[2]), expected, 0.1)
    monkeypatch.setattr(cpu, "available", lambda: False)
    model = load_model(path, dtype=torch.float32)
    kind = nn.Linear if head == "float" else FloatLinear
    assert type(model.output) is kind and isinstance(model.tok_embeddings, nn.Embedding)
    assert model.tok_embeddings.weight.dtype == torch.float32
    assert_close_logits(logits(model, IDS[2]), expected, 1e-5)


def run(model, prompts, **functions):
    return tiny.continuation(model, model.new_cache(len(prompts), 128), prompts, 16, **functions).tolist()


def compiled():
    return {"step": compile_step(decode_one_token, CPU), "forward": compile_step(forward_chunk, CPU, any_length=True)}


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_ragged_batch_equals_each_row_alone(spec, tmp_path):
    saved(tmp_path / "model.pth", TINY, spec)
    model = load_model(tmp_path / "model.pth", dtype=torch.float32)
    assert run(model, IDS) == [run(model, [ids])[0] for ids in IDS]


def test_compiled_equals_eager(tmp_path):
    saved(tmp_path / "model.pth", TINY, QuantSpec(8))
    model = load_model(tmp_path / "model.pth", dtype=torch.float32)
    functions = compiled()
    for prompts in (IDS[:1], IDS):
        assert run(model, prompts, **functions) == run(model, prompts)


def test_quantising_while_loading_equals_the_file(tmp_path):
    saved(tmp_path / "q.pth", TINY, QuantSpec(4, 32))
    a = load_model(tmp_path / "q.pth").state_dict()
    b = load_model(tmp_path / "float.pth", quantize=QuantSpec(4, 32)).state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="q.pth is quantised already .int4.g32, int8.; start from .* or give --deq"):
        load_model(tmp_path / "q.pth", quantize=QuantSpec(8))


def edit(path, change):
    content = torch.load(path)
    change(content)
    torch.save(content, path)


WO = "layers.0.attention.wo"
DAMAGE = {
    "bits": (lambda c: c["quant"][WO].update(bits=5), "model.pth: bits is 5"),
    "no scales": (lambda c: c["model"].pop(f"{WO}.scales"), f"lacks the tensor {WO}.scales"),
    "scales do not fit": (lambda c: c["model"].update({f"{WO}.scales": torch.ones(256, 3)}), f"{WO}.scales has shape"),
    "NaN": (lambda c: c["model"][f"{WO}.scales"].fill_(float("nan")), f"{WO}.scales holds NaN"),
    "codes of another type": (lambda c: c["model"].update({f"{WO}.weight": torch.ones(256, 128)}), "uint8 are needed"),
    "a layer that is float": (lambda c: c["quant"].pop(WO), f"{WO}.weight|no place for"),
    "a layer that is not": (lambda c: c["quant"].update({"norm": {"bits": 8}}), "'norm', not a linear layer"),
    "another groupsize": (lambda c: c["quant"][WO].update(groupsize=64), "has shape"),
    "no table": (lambda c: c.update(quant=None), "no place for|codes|floats"),
    "a table that is none": (lambda c: c.update(quant=[1, 2]), "damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(case, tmp_path):
    saved(tmp_path / "model.pth", TINY, QuantSpec(4, 32))
    change, message = DAMAGE[case]
    edit(tmp_path / "model.pth", change)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model.pth")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2], ids=str)
def test_scales_of_other_float_types(dtype, tmp_path):
    saved(tmp_path / "model.pth", TINY, QuantSpec(8))
    edit(tmp_path / "model.pth", lambda c: c["model"].update({f"{WO}.scales": c["model"][f"{WO}.scales"].to(dtype)}))
    assert logits(load_model(tmp_path / "model.pth"), IDS[2]).isfinite().all()


def test_default_model(default_model_dir, tmp_path):
    """Compiled float32 tokens, alone and in a ragged batch, are those of the dequantised float model."""
    path = save_quantised(default_model_dir / "model.pth", tmp_path / "model.pth", QuantSpec(4, 32))
    prompts = [[504, 3575, 282, 4649, 314], [1000], list(range(2000, 2060)), [504, 2988]]
    reference, fast = dequantised(path), load_model(path, dtype=torch.float32)
    expected = [run(reference, [ids])[0] for ids in prompts]
    functions = compiled()
    assert run(fast, prompts) == expected
    assert run(fast, prompts, **functions) == expected
    assert run(fast, prompts[:1], **functions) == expected[:1]
    # in bfloat16 activations are rounded too
    assert_close_logits(logits(load_model(path), prompts[2]), logits(reference, prompts[2]), 0.06)
