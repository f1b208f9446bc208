"""GPTQ against round-to-nearest, against its definition in float64, and against one forward of the finished model."""

from dataclasses import replace

import pytest
import torch

from compress.calibration import calibration_text, calibration_windows
from compress.gptq import gptq_, gptq_weight
from kernels import cpu
from layers.blocks import FusedBlocks
from layers.formats import scales_and_zeros, to_codes
from layers.quantized import LAYERS, QuantSpec, linear_table, quantize_weight
from model import Blocks, ModelArgs
from tests.tiny import dequantised
from weights.checkpoint import build, load_model, save_checkpoint
from weights.layout import Layout

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [  # specs, and act_order
    *[(QuantSpec(4, 32), order) for order in (False, True)],
    (QuantSpec(4, 64), True),
    (QuantSpec(4, 128), False),
    (QuantSpec(8), True),
    *[(QuantSpec(8, 64), order) for order in (False, True)],
]
cases = pytest.mark.parametrize("spec, act_order", CASES, ids=lambda value: str(value))
OPTIONS = {"percdamp": 0.01, "blocksize": 128, "act_order": False}
TINY = ModelArgs(
    dim=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, intermediate_size=96, vocab_size=128, max_seq_length=64
)
VARIANTS = {
    "plain": TINY,
    "tied": replace(TINY, tie_embeddings=True),
    "windows in turn, scales": replace(
        TINY, sliding_window=5, full_layers=(1,), window_rope_base=100.0, embedding_scale=3.0, post_norm=True
    ),
    "bias, norms, window": replace(TINY, qkv_bias=True, qk_norm=True, sliding_window=5),
}


def correlated(n_in, n_tokens=1024, n_out=40):
    """weight [out, in], and inputs x [tokens, in] that lie near a space of in / 4 dimensions, some far larger."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    x = draw(n_tokens, n_in // 4) @ draw(n_in // 4, n_in) + 0.3 * draw(n_tokens, n_in)
    return 0.05 * draw(n_out, n_in), x * draw(n_in).exp()


def second_moments(x):
    return 2 * x.T @ x / len(x)


def gptq(weight, H, spec, **options):
    return gptq_weight(weight, H, spec, **OPTIONS | options, name="the layer")


def output_error(tensors, spec, weight, x):
    return (x @ (LAYERS[spec.bits](**tensors).dequantize() - weight).T).square().mean()


def agreement(a, b, spec):
    """The fraction of codes that two roundings of a layer have in common."""
    return (LAYERS[spec.bits](**a).codes() == LAYERS[spec.bits](**b).codes()).float().mean()


@cases
def test_outputs_change_far_less_than_by_rounding_to_nearest_whatever_the_blocksize(spec, act_order):
    weight, x = correlated(256)
    nearest = output_error(quantize_weight(weight, spec), spec, weight, x)
    results = [gptq(weight, second_moments(x), spec, blocksize=size, act_order=act_order) for size in (1, 48, 999)]
    for tensors in results:
        assert output_error(tensors, spec, weight, x) < 0.5 * nearest
        assert agreement(results[0], tensors, spec) > 0.99


def by_definition(weight, H, spec, percdamp, act_order):
    """Codes [out, in] in float64: round a column, spread its error by the explicit inverse, drop its input."""
    W, n_in = weight.double(), len(H)
    size = spec.groupsize or n_in
    scales, zeros = (
        t.expand(-1, -1, size).flatten(1) for t in scales_and_zeros(weight.unflatten(1, (-1, size)), spec.bits)
    )
    scales, zeros, codes = scales.clone(), zeros.clone(), torch.zeros_like(W)
    H = H.double()
    inverse = (H + percdamp * H.diagonal().mean() * torch.eye(n_in)).inverse()
    columns = sorted(range(n_in), key=lambda i: -H[i, i]) if act_order else range(n_in)
    for i in columns:
        if i % size == 0 and not act_order:
            scales[:, i : i + size], zeros[:, i : i + size] = scales_and_zeros(W[:, i : i + size].float(), spec.bits)
        codes[:, i] = to_codes(W[:, i], scales[:, i], zeros[:, i], spec.bits)
        error = W[:, i] - (codes[:, i] * scales[:, i] + zeros[:, i])
        W -= torch.outer(error, inverse[i] / inverse[i, i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@cases
def test_codes_are_those_of_the_definition(spec, act_order):
    weight, x = correlated(128)
    H = second_moments(x)
    codes = LAYERS[spec.bits](**gptq(weight, H, spec, blocksize=48, act_order=act_order)).codes()
    assert (codes == by_definition(weight, H, spec, 0.01, act_order)).float().mean() > 0.99


@cases
def test_independent_inputs_leave_rounding_to_nearest(spec, act_order):
    weight, _ = correlated(128)
    expected, got = quantize_weight(weight, spec), gptq(weight, torch.eye(128), spec, act_order=act_order)
    assert got.keys() == expected.keys()
    for key in got:
        assert got[key].dtype == expected[key].dtype
        assert got[key].equal(expected[key])


@pytest.mark.parametrize("act_order", [False, True])
def test_an_input_that_is_always_zero_is_rounded_to_zero_and_disturbs_nothing(act_order):
    weight, x = correlated(64)
    x[:, [3, 40]] = 0
    got = gptq(weight, second_moments(x), QuantSpec(8), act_order=act_order)
    assert not got["weight"][:, [3, 40]].any()
    weight[:, [3, 40]] = 0
    assert output_error(got, QuantSpec(8), weight, x) < 0.5 * output_error(
        quantize_weight(weight, QuantSpec(8)), QuantSpec(8), weight, x
    )


def test_inputs_that_vary_too_little_are_refused_by_name():
    with pytest.raises(ValueError, match="the layer.*--percdamp.*calibration text"):
        gptq(torch.randn(8, 32), torch.ones(32, 32), QuantSpec(4, 32), percdamp=0)


def test_a_groupsize_that_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="groupsize 64 does not divide the 96 inputs of the layer"):
        gptq(torch.randn(8, 96), torch.eye(96), QuantSpec(4, 64))


# ---------------------------------------------------------------- one model


def random_state(args, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = Layout(args).tensors
    return {name: (0.2 * torch.randn(meta.shape, generator=generator)).to(dtype) for name, meta in shapes.items()}


def calibration(n=5):
    return torch.randint(TINY.vocab_size, (n, 24), generator=torch.Generator().manual_seed(1))


def tiny_table(args):
    """All layers but one, one of them in other bits, and the head."""
    table = linear_table(Layout(args).model, QuantSpec(4, 32), QuantSpec(8)) | {"layers.1.attention.wo": QuantSpec(8)}
    del table["layers.0.feed_forward.w2"]
    return table


def run_gptq(args, table, dtype=torch.float32, windows=None, **options):
    """The model left behind, and the tensors. Batches of 2 leave a last one of 1."""
    model = build(args, random_state(args, dtype))
    windows = calibration() if windows is None else windows
    return model, gptq_(model, windows, table, **OPTIONS | options, batch_size=2)


@torch.inference_mode()
def logits(model, tokens=None):
    tokens = calibration() if tokens is None else tokens
    return model(tokens, torch.arange(tokens.shape[1]).repeat(len(tokens), 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tensors_are_those_of_a_file_and_the_weights_left_behind_are_theirs(variant, tmp_path):
    args = VARIANTS[variant]
    table = tiny_table(args)
    model, tensors = run_gptq(args, table)
    expected = {n: meta for n, meta in Layout(args, table).tensors.items() if n.rpartition(".")[0] in table}
    expected = {n: meta for n, meta in expected.items() if not n.endswith(".bias")}
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}

    floats = random_state(args)
    state = {name: tensors.get(name, floats.get(name)) for name in Layout(args, table).tensors}
    save_checkpoint(tmp_path / "model.pth", args, state, table)
    loaded = load_model(tmp_path / "model.pth", dtype=torch.float32)
    model.output = dequantised(args, state, table).output  # the head keeps its float weight
    torch.testing.assert_close(logits(model), logits(dequantised(args, state, table)))
    # the CPU's kernels round the activations too
    assert (logits(model) - logits(loaded)).norm() < 0.05 * logits(loaded).norm()


def test_the_head_is_rounded_to_nearest_and_a_tied_embedding_stays():
    args = VARIANTS["tied"]
    embedding = random_state(args)["tok_embeddings.weight"]
    model, tensors = run_gptq(args, tiny_table(args))
    for key, expected in quantize_weight(embedding, QuantSpec(8)).items():
        assert tensors[f"output.{key}"].equal(expected)
    assert model.tok_embeddings.weight.equal(embedding)


@pytest.mark.parametrize("variant, act_order", [*zip(VARIANTS, [True, False] * 2, strict=True)])
def test_each_layer_is_rounded_for_the_inputs_it_has_in_the_finished_model(variant, act_order):
    args, seen = VARIANTS[variant], {}
    table, floats = tiny_table(args), random_state(args)
    model, tensors = run_gptq(args, table, act_order=act_order)
    for name in table:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].flatten(0, 1)}))
    logits(model)
    for name in table.keys() - {"output"}:
        spec = table[name]
        expected = gptq(floats[f"{name}.weight"], second_moments(seen[name]), spec, act_order=act_order)
        got = {key: tensors[f"{name}.{key}"] for key in expected}
        assert agreement(got, expected, spec) > 0.99
        torch.testing.assert_close(LAYERS[spec.bits](**got).dequantize(), model.get_submodule(name).weight)


def test_the_same_run_gives_the_same_bits():
    runs = [run_gptq(TINY, tiny_table(TINY), torch.bfloat16)[1] for _ in range(2)]
    assert runs[0].keys() == runs[1].keys()
    for name, tensor in runs[0].items():
        assert tensor.equal(runs[1][name]), name


def test_a_bfloat16_model_keeps_bfloat16_weights():
    model, tensors = run_gptq(TINY, tiny_table(TINY), torch.bfloat16)
    name = "layers.1.feed_forward.w13"
    stored = LAYERS[4](*(tensors[f"{name}.{key}"] for key in ("weight", "scales", "zeros")))
    assert model.get_submodule(name).weight.equal(stored.dequantize().bfloat16())


def test_a_model_whose_blocks_are_one_operator_is_rounded_as_any():
    args = replace(TINY, head_dim=64, dim=96)
    table = linear_table(Layout(args).model, QuantSpec(4, 32), None)
    fused, plain = (build(args, random_state(args, torch.bfloat16)) for _ in range(2))
    assert isinstance(fused.layers, FusedBlocks) or not cpu.available()
    plain.layers = Blocks(plain.layers)
    found = [gptq_(model, calibration(), table, **OPTIONS) for model in (fused, plain)]
    assert all(tensor.equal(found[1][name]) for name, tensor in found[0].items())


MIXTURE = replace(TINY, n_expert=4, n_expert_used=2)


@pytest.mark.parametrize("act_order, shared_size", [(False, 64), (True, None)])
def test_experts_are_rounded_for_the_rows_they_get(act_order, shared_size):
    args, seen = replace(MIXTURE, shared_size=shared_size), {}
    table, floats = tiny_table(args), random_state(args)
    assert not any("gate" in name for name in table)
    windows = calibration(20)
    model, tensors = run_gptq(args, table, windows=windows, act_order=act_order)
    names = [name for name in table if name.endswith(("feed_forward.w13", "feed_forward.w2"))]
    for name in names:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs}))
    logits(model, windows)
    for name in names:
        x, chosen = seen[name]
        x = x.expand(-1, 2, -1)
        for e in range(args.n_expert):
            H = second_moments(x[chosen == e])
            expected = gptq(floats[f"{name}.weight"][e], H, table[name], act_order=act_order)
            got = {key: tensors[f"{name}.{key}"][e] for key in expected}
            assert agreement(got, expected, table[name]) > 0.99
            assert LAYERS[4](**got).dequantize().equal(model.get_submodule(name).weight[e])


def test_an_expert_that_no_token_reaches_is_rounded_to_nearest_and_named(capsys):
    args = replace(TINY, n_expert=3, n_expert_used=1)
    state, table = random_state(args), tiny_table(args)
    gate = state["layers.1.feed_forward.gate.weight"]
    gate[1], gate[2] = -gate[0], 0  # one of the first two scores is above 0
    tensors = gptq_(build(args, dict(state)), calibration(), table, **OPTIONS)
    err = capsys.readouterr().err
    for name in ("layers.1.feed_forward.w13", "layers.1.feed_forward.w2"):
        assert f"{name}: no token reached experts 2; they are rounded to nearest" in err
        nearest = quantize_weight(state[f"{name}.weight"], table[name])
        same = [all(tensors[f"{name}.{key}"][e].equal(nearest[key][e]) for key in nearest) for e in range(3)]
        assert same == [False, False, True]
    assert "layers.0" not in err


def test_inputs_that_are_not_finite_are_refused_by_name():
    model = build(TINY, random_state(TINY))
    model.layers[1].ffn_norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"the inputs of layers\.1\.feed_forward\.w13 are NaN or infinite"):
        gptq_(model, calibration(), tiny_table(TINY), **OPTIONS)


# ---------------------------------------------------------------- calibration text


def test_windows_are_whole_distinct_in_order_and_drawn_by_the_seed():
    ids = list(range(1000))

    def draw(limit, seed):
        return calibration_windows(ids, limit=limit, seq_length=30, needed=60, seed=seed)

    everything = draw(100, 0)  # 33 windows and 10 tokens over
    assert everything.dtype == torch.int64
    assert everything.flatten().tolist() == ids[:990]
    some = draw(8, 0)
    assert some.shape == (8, 30)
    assert set(map(tuple, some.tolist())) <= set(map(tuple, everything.tolist()))
    assert (some[1:, 0] > some[:-1, 0]).all()
    assert some.equal(draw(8, 0))
    assert not some.equal(draw(8, 1))


@pytest.mark.parametrize(
    "n_tokens, limit, words",
    [
        (599, 9, ["tokens: 599", "600"]),
        (10, 9, ["tokens: 10", "600"]),
        (0, 9, ["tokens: 0"]),
        (5000, 5, ["--calibration_limit 5", "590", "at least 6"]),
    ],
)
def test_too_little_text_is_refused_with_what_is_needed(n_tokens, limit, words):
    with pytest.raises(ValueError) as error:
        calibration_windows([0] * n_tokens, limit=limit, seq_length=100, needed=590, seed=0)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "One.\n\nTwo {\n", "One.\n\nTwo {\n"),
        ("a.txt", '\n{"text": "One."}\r\n\n{"text": "T\\u2028wo", "id": 2}\n', "One.\n\nT\u2028wo"),
        ("a.jsonl", '{"text": "One\u2028."}', "One\u2028."),
        ("a.json", '{\n  "text": "One."\n}\n', '{\n  "text": "One."\n}\n'),
        ("a.txt", "\ufeff[1]\n", "[1]\n"),
    ],
)
def test_text_is_read_plain_or_from_the_lines_of_jsonl(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content.encode())
    assert calibration_text(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"text": "One."}\n\n{"words": "Two."}\n', ["line 3 ", '"text"']),
        ("a.txt", b'{"text": "One."}\nTwo.\n', ["line 2 ", '"text"']),
        ("a.jsonl", b"[1]", ["line 1 ", '"text"']),
        ("a.jsonl", b'{"text": " "}\n', ["empty"]),
        ("a.txt", b" \n\n", ["empty"]),
        ("a.txt", b"", ["empty"]),
    ],
)
def test_text_that_cannot_be_used_is_refused_in_one_line(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        calibration_text(str(tmp_path / name))
    assert "\n" not in str(error.value)
    for word in [name, *words]:
        assert word in str(error.value)
