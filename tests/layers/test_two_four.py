"""2:4 layers: the stored form by hand, their operator against float64, and models of them against dense ones."""

import pytest
import torch
import torch.nn as nn

from engine.compile import compile_step
from kernels import cpu
from layers.blocks import FusedBlocks, RegionBlocks
from layers.fastest import fastest, pack_, rounds_each_row
from layers.low_rank import WithAdapter
from layers.packed import CodesLinear
from layers.quantized import QuantSpec, quantize_, quantize_weight, table_from_json, table_to_json
from layers.two_four import PackedTwoFour, TwoFourLinear, compress, expand
from model import ModelArgs
from tests.tiny import ids_of, make_tiny_checkpoint, random_ids, tiny_model
from tp import require_split, shard
from weights.checkpoint import build, load_model, open_model, read_tensors, save_checkpoint
from weights.layout import LEAVES, Layout, weight_bytes
from weights.tiers.placement import MemoryBudget

needs_operators = pytest.mark.skipif(not cpu.available(), reason="there are no operators for this processor")
pytestmark = pytest.mark.usefixtures("one_thread")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FLOATS, INT8 = QuantSpec(pattern="2:4"), QuantSpec(8, pattern="2:4")
SPECS = [FLOATS, INT8, QuantSpec(8, 32, pattern="2:4"), QuantSpec(8, 64, pattern="2:4")]
PROJECTIONS = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pruned(weight):
    """The weight with the two smaller ones of each four set to 0."""
    fours = weight.unflatten(-1, (-1, 4))
    return fours.scatter(-1, fours.abs().argsort(-1)[..., :2], 0).flatten(-2)


def two_four(spec, out, n_in, dtype=F32, bias=True):
    tensors = quantize_weight(pruned(random(out, n_in)).to(dtype), spec)
    return spec.layer(**tensors, bias=random(out, seed=2).to(dtype) if bias else None)


# ---------------------------------------------------------------- the stored form


@pytest.mark.parametrize("dtype", [F32, BF16, torch.int8], ids=str)
def test_the_stored_form_by_hand(dtype):
    weight = torch.tensor([[0, 3, 0, -1, 5, 0, 0, 0], [0, 0, 0, 7, 0, 0, 0, 0]], dtype=dtype)
    stored = compress({"weight": weight, "scales": torch.ones(2, 1)})
    assert stored["weight"].tolist() == [[3, -1, 5, 0], [0, 7, 0, 0]] and stored["weight"].dtype == dtype
    # places 1 and 3, then 0 and, of those that are 0, the first: 1; then 0 and 3, and 0 and 1
    assert stored["positions"].tolist() == [[0b0100_1101], [0b0100_1100]]
    assert stored["positions"].dtype == torch.uint8 and stored["scales"].tolist() == [[1], [1]]
    back = expand(stored)
    assert back.keys() == {"weight", "scales"} and torch.equal(back["weight"], weight)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.int8], ids=str)
def test_expanded_is_what_was_compressed(dtype, monkeypatch):
    monkeypatch.setattr("layers.two_four.PART", 7 * 64)  # some rows at a time
    weight = (pruned(random(50, 64)) * (random(50, 64, seed=1) > -0.5) * 9).to(dtype)  # of many fours less than two
    weight[:, 8:16] = 0
    stored = compress({"weight": weight})
    assert stored["weight"].shape == (50, 32) and stored["positions"].shape == (50, 8)
    assert torch.equal(expand(stored)["weight"], weight)


def test_what_has_no_such_form_is_refused():
    weight = pruned(random(4, 16))
    weight[2, 4:7] = 1
    with pytest.raises(ValueError, match="more than 2 of 4 successive inputs are not 0"):
        compress({"weight": weight})
    with pytest.raises(ValueError, match=r"shape \[4, 12\] has no 2:4 form; it needs a multiple of 8"):
        compress({"weight": torch.zeros(4, 12)})


def test_specs():
    assert [str(spec) for spec in SPECS] == ["float.2-4", "int8.2-4", "int8.g32.2-4", "int8.g64.2-4"]
    assert table_from_json(table_to_json({"a": FLOATS, "b": INT8})) == {"a": FLOATS, "b": INT8}
    for bits, groupsize, name, said in ((4, 32, None, "int4.g32"), (8, None, "float8", "float8")):
        with pytest.raises(ValueError, match=f"the pattern 2:4 is for floats and for int8 .* not for {said}"):
            QuantSpec(bits, groupsize, name, pattern="2:4")
    with pytest.raises(ValueError, match="pattern is '1:4'; supported: 2:4"):
        QuantSpec(pattern="1:4")
    with pytest.raises(ValueError, match="2:4 does not fit the 12 inputs of a: .*leave the layer as it is"):
        quantize_(nn.ModuleDict({"a": nn.Linear(12, 8, device="meta")}), {"a": FLOATS})
    with pytest.raises(ValueError, match="w2 has the pattern 2:4, which is not supported for experts"):
        args = ModelArgs(64, 1, 4, 4, 16, 96, 128, 64, n_expert=2, n_expert_used=1)
        Layout(args, {"layers.0.feed_forward.w2": FLOATS})


# ---------------------------------------------------------------- the operator


@needs_operators
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_two_four_equals_float64(spec, dtype):
    """Outputs that fill no tile, inputs that fill no block; one row, few and more than are read at a time."""
    sizes = [(7, 128), (160, 192)] if spec.groupsize else [(7, 128), (33, 8), (40, 200), (160, 192), (16, 4104)]
    for out, n_in in sizes:
        layer = two_four(spec, out, n_in, dtype)
        packed = PackedTwoFour(layer)
        for rows in (1, 2, 3, 4, 5, 16, 17, 45):
            x = random(rows, n_in, seed=rows).to(dtype)
            y, expected = packed(x), x.double() @ layer.dequantize().double().T + layer.bias.double()
            rtol = {F32: 1e-5, BF16: 2**-8, F16: 2**-11}[dtype]
            torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=2e-6 * n_in**0.5)
            assert y.dtype == dtype and y.shape == (rows, out)


@needs_operators
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_row_of_a_two_four_layer_depends_on_those_beside_it(spec):
    layer = PackedTwoFour(two_four(spec, 200, 512, BF16))
    x = random(200, 512, seed=1).bfloat16()
    together = layer(x)
    for rows in (1, 2, 3, 5, 16, 17, 129):
        assert torch.equal(layer(x[:rows]), together[:rows])


@needs_operators
def test_no_rows_and_strided_rows():
    layer = PackedTwoFour(two_four(INT8, 24, 64, bias=False))
    assert layer(torch.zeros(3, 0, 64)).shape == (3, 0, 24)
    x = random(64, 6).T[::2]
    assert not x.is_contiguous() and torch.equal(layer(x), layer(x.contiguous()))
    assert layer(torch.zeros(2, 64)).tolist() == [[0.0] * 24] * 2
    with pytest.raises(RuntimeError, match="linear_two_four: weight takes other than 72 features"):
        layer(torch.zeros(2, 72))
    floats = PackedTwoFour(two_four(FLOATS, 24, 64, BF16))
    with pytest.raises(RuntimeError, match="linear_two_four: .*another dtype"):
        floats(torch.zeros(2, 64))


@needs_operators
def test_a_packed_layer_takes_the_bytes_that_it_should():
    for spec, bits in ((FLOATS, 9), (INT8, 5)):
        layer = PackedTwoFour(two_four(spec, 64, 256, BF16, bias=False))
        assert layer.weight.nbytes == 64 * 256 * bits // 8


@needs_operators
def test_which_form_is_used():
    model = tiny_model()
    assert [fastest(two_four(spec, 32, 64), model) for spec in SPECS] == [PackedTwoFour] * 4
    halves = two_four(QuantSpec(8, 16, pattern="2:4"), 32, 64)
    wide = TwoFourLinear(halves.weight, halves.positions, halves.scales[:, :1].float())
    assert [fastest(layer, model) for layer in (halves, wide)] == [None, None]
    model.layers[0].attention.wo, dense = halves, halves.dequantize()
    pack_(model)
    assert type(model.layers[0].attention.wo) is CodesLinear
    torch.testing.assert_close(model.layers[0].attention.wo(torch.eye(64)).T, dense + halves.bias[:, None])


# ---------------------------------------------------------------- models


def save_two_four(folder, spec, dtype=F32, **fields):
    """A checkpoint of which all projections follow the pattern; the same with floats in their place."""
    path = make_tiny_checkpoint(folder, **fields)
    opened = open_model(path)
    table = {f"layers.{i}.{name}": spec for i in range(opened.args.n_layer) for name in PROJECTIONS}
    tensors = read_tensors(opened, torch.device("cpu"), dtype, "Reading")
    for module in table:
        rounded = quantize_weight(pruned(tensors.pop(f"{module}.weight").float()).to(dtype), spec)
        tensors |= {f"{module}.{name}": tensor for name, tensor in rounded.items()}
    save_checkpoint(folder / "two_four.pth", opened.args, tensors, table)
    floats = open_model(folder / "two_four.pth", dequantize=True)
    save_checkpoint(path, floats.args, read_tensors(floats, torch.device("cpu"), dtype, "Reading"))
    return folder / "two_four.pth", path


@pytest.mark.parametrize("spec", [FLOATS, INT8, SPECS[2]], ids=str)
def test_a_model_writes_what_the_dense_one_writes(spec, tmp_path):
    path, dense = save_two_four(tmp_path, spec)
    prompts = random_ids(20, 3)
    wanted = ids_of(load_model(dense, dtype=F32), prompts, 24)
    model = load_model(path, dtype=F32)
    assert ids_of(model, prompts, 24) == wanted
    if cpu.available():
        assert type(model.layers[1].feed_forward.w2) is PackedTwoFour
    floats = load_model(path, dtype=F32, dequantize=True)
    assert open_model(path, dequantize=True).table == {} and ids_of(floats, prompts, 24) == wanted


def test_sizes_by_hand(tmp_path):
    path, _ = save_two_four(tmp_path, FLOATS, BF16)
    opened, floats = open_model(path), open_model(path, dequantize=True).layout
    weights = sum(floats.tensors[f"{module}.weight"].numel() for module in opened.table)
    for dtype, bits in ((BF16, 16), (F32, 32)):
        assert floats.bytes(dtype) - opened.layout.bytes(dtype) == weights * (bits - bits // 2 - 1) // 8
    if cpu.available():
        saved = weight_bytes(load_model(path, dequantize=True)) - weight_bytes(load_model(path))
        assert saved == weights * 7 // 8


@pytest.mark.parametrize("damaged", [0, 0b0100_0001, 0b0001_0100, 0b1111_0100])
def test_damaged_positions_are_refused(damaged, tmp_path):
    path, _ = save_two_four(tmp_path, FLOATS)
    content = torch.load(path, weights_only=True)
    content["model"]["layers.1.attention.wo.positions"][3, 2] = damaged
    torch.save(content, path)
    for dequantize in (False, True):
        with pytest.raises(ValueError, match="layers.1.attention.wo.positions is damaged: of some four inputs"):
            load_model(path, dequantize=dequantize)


def test_positions_of_a_wrong_shape_are_refused(tmp_path):
    path, _ = save_two_four(tmp_path, FLOATS)
    content = torch.load(path, weights_only=True)
    positions = content["model"].pop("layers.1.attention.wo.positions")
    for value, words in ((positions[:, 1:], "has shape"), (positions.float(), "codes of torch.uint8 are needed")):
        content["model"]["layers.1.attention.wo.positions"] = value
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"layers.1.attention.wo.positions .*{words}"):
            load_model(path)


def test_what_is_pruned_is_not_quantised_again(tmp_path):
    for spec, said in ((FLOATS, "pruned already .float.2-4."), (INT8, "quantised already .int8.2-4.")):
        path, _ = save_two_four(tmp_path, spec)
        with pytest.raises(ValueError, match=f"{said}; start from the float file, or give --dequantize"):
            load_model(path, quantize=QuantSpec(8))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("spec", [FLOATS, INT8], ids=str)
def test_machines_without_operators_have_dense_layers(spec, dtype, tmp_path, monkeypatch, capsys):
    path, dense = save_two_four(tmp_path, spec, dtype)
    monkeypatch.setattr(cpu, "available", lambda: False)
    model, plain = load_model(path, dtype=dtype), load_model(dense, dtype=dtype)
    assert "Nothing here reads 2:4 layers as they are: 8 with all weights take 0.0 GB" in capsys.readouterr().err
    assert not any(isinstance(layer, TwoFourLinear) for layer in model.modules())
    tokens, pos = torch.tensor(random_ids(9)), torch.arange(9)[None]
    found, wanted = model(tokens, pos), plain(tokens, pos)
    assert (found - wanted).norm() < (1e-5 if dtype == F32 else 0.03) * wanted.norm()


def fused_model(spec, dtype, **fields):
    args = ModelArgs(208, 3, 4, 2, 64, 96, 128, 256, **fields)
    state = {name: random(*t.shape, seed=i) / 8 + (t.ndim == 1) for i, (name, t) in enumerate(tensors_of(args))}
    table = {f"layers.{i}.{name}": spec for i in range(3) for name in PROJECTIONS}
    for module in table:
        rounded = quantize_weight(pruned(state.pop(f"{module}.weight")).to(dtype), spec)
        state |= {f"{module}.{name}": tensor for name, tensor in rounded.items()}
    kept = Layout(args, table).keeps_dtype
    return build(args, {name: t if kept(name) else t.to(dtype) for name, t in state.items()}, table)


def tensors_of(args):
    return Layout(args).tensors.items()


@needs_operators
@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True, "wo_bias": True, "ffn_bias": True}], ids=str)
@pytest.mark.parametrize("spec", [FLOATS, INT8], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@torch.inference_mode()
def test_fused_blocks_take_two_four_layers(spec, dtype, fields):
    """A prompt, few tokens and one, against blocks one by one; and each token alone."""
    model = fused_model(spec, dtype, **fields)
    fused = model.layers
    assert type(fused) is FusedBlocks and rounds_each_row(fused) == (dtype == BF16)
    tokens, pos = torch.tensor(random_ids(40, 40)), torch.arange(40).repeat(2, 1)
    parts, found = (slice(0, 30), slice(30, 35), slice(35, 36), slice(36, 40)), []
    for blocks in (fused, RegionBlocks(fused)):
        model.layers = blocks
        cache = model.new_cache(2, 50)
        found.append(torch.cat([model(tokens[:, part], pos[:, part], cache.view()) for part in parts], 1))
    assert (found[0] - found[1]).norm() < (1e-5 if dtype == F32 else 0.03) * found[1].norm()
    model.layers = fused
    cache = model.new_cache(2, 50)
    model(tokens[:, :30], pos[:, :30], cache.view())
    alone = [model(tokens[:, i : i + 1], pos[:, i : i + 1], cache.view()) for i in range(30, 40)]
    alone, together = torch.cat(alone, 1), found[0][:, 30:]
    if dtype == BF16:
        assert torch.equal(alone, together)
    else:  # the head is a product of matrices
        assert (alone - together).norm() < 1e-5 * together.norm()


@needs_operators
@torch.inference_mode()
def test_two_four_layers_compile():
    model = fused_model(FLOATS, F32)
    model.layers = RegionBlocks(model.layers)
    step = compile_step(lambda model, tokens, pos, cache: model(tokens, pos, cache), model.device, True)
    cache = model.new_cache(1, 40)
    for S in (1, 12):
        tokens, pos = torch.arange(S)[None], torch.arange(S)[None]
        expected = model(tokens, pos, cache.view(None, 20))
        torch.testing.assert_close(step(model, tokens, pos, cache.view(None, 20)), expected, rtol=1e-5, atol=1e-5)


def test_the_command_writes_the_dense_text(tmp_path, call):
    path, dense = save_two_four(tmp_path, FLOATS)
    how = ("--prompt", "the cat", "--max_new_tokens", 12, "--temperature", 0, "--dtype", "float32", "--compile")
    texts = [call("generate.py", "--checkpoint_path", each, *how).out for each in (path, dense)]
    assert texts[0] == texts[1] != ""


# ---------------------------------------------------------------- beside other features


def test_a_rank_has_its_part(tmp_path):
    path, _ = save_two_four(tmp_path, SPECS[2], intermediate_size=128)
    opened, floats = open_model(path), open_model(path, dequantize=True)
    require_split(opened.args, opened.table, 2)
    for rank in range(2):
        for module, spec in opened.table.items():
            names = [f"{module}.{leaf}" for leaf in LEAVES if f"{module}.{leaf}" in opened.tensors]
            parts = {name: shard(name, opened.tensors[name](), opened.args, rank, 2) for name in names}
            weight = spec.layer(**{name.rpartition(".")[2]: part for name, part in parts.items()}).dequantize()
            name = f"{module}.weight"
            assert torch.equal(weight, shard(name, floats.tensors[name](), opened.args, rank, 2))


def test_ranks_do_not_cut_a_byte_of_positions():
    args = ModelArgs(64, 1, 4, 4, 16, 40, 128, 64)
    with pytest.raises(ValueError, match="into parts of 20, which would cut the positions of 8 inputs .* fewer ranks"):
        require_split(args, {"layers.0.feed_forward.w2": FLOATS}, 2)


@pytest.mark.parametrize("spec", [FLOATS, INT8], ids=str)
def test_an_adapter_goes_beside(spec):
    layer = two_four(spec, 32, 64, bias=False)
    model = nn.Module()
    model.wo, a, b = WithAdapter(layer, random(3, 64), random(32, 3)), random(3, 64), random(32, 3)
    model.args, model.dtype, model.device = None, F32, torch.device("cpu")
    pack_(model)
    x = random(2, 64, seed=5)
    torch.testing.assert_close(model.wo(x), x @ (layer.dequantize() + b @ a).T, rtol=1e-4, atol=1e-4)


@needs_operators
def test_a_budget_takes_two_four_feed_forwards(tmp_path):
    path, _ = save_two_four(tmp_path, FLOATS, n_layer=6)
    whole = load_model(path, dtype=F32)
    sizes = {name: tensor.nbytes for name, tensor in whole.state_dict().items() if name != "output.weight"}
    feed_forwards = sum(size for name, size in sizes.items() if "feed_forward" in name)
    model = load_model(path, dtype=F32, budget=MemoryBudget(sum(sizes.values()) - feed_forwards // 6))
    model.cache_room = None
    prompts = random_ids(9)
    assert ids_of(model, prompts, 12) == ids_of(whole, prompts, 12)
