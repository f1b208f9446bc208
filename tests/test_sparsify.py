"""sparsify.py: thresholds that skip what was asked, better than one share everywhere; pruning; profiles; bad input."""

import json
import math

import pytest
import torch

from compress.activations import (
    PROJECTIONS,
    Projection,
    divergences,
    error,
    find_thresholds,
    set_thresholds,
    skip_greedily,
    skippable_,
)
from compress.hotness import count_uses, coverage, in_words
from layers.quantized import QuantSpec
from layers.sparse import Thresholded
from tests.tiny import DIFFERING, make_tiny_checkpoint, tiny_model
from weights.checkpoint import load_model, open_model, save_checkpoint

TEXT = "the cat sat on the mat and the dog ate the hat, he said; the hat ate the dog and the mat. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparsify")
    make_tiny_checkpoint(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def flags(folder, *others):
    where = ("--checkpoint_path", folder / "model.pth", "--calibration_file", folder / "text.txt")
    return (*where, "--calibration_seq_length", 32, "--dtype", "float32", *others)


def test_greedy_steps_by_hand():
    """Of two projections as large the one whose error is a third skips first, until its steps cost more."""
    parts = [Projection(Thresholded(torch.nn.Identity(), 0.0), 100, torch.linspace(0, 1, 101)) for _ in range(2)]
    skip_greedily(parts, lambda: 3 * parts[0].share ** 2 + parts[1].share ** 2, 0.4)
    assert [round(part.share, 2) for part in parts] == [0.2, 0.6]
    assert [part.layer.threshold for part in parts] == pytest.approx([0.2, 0.6])


def test_a_token_of_large_numbers_counts_as_any_other():
    """Of two tokens, one of numbers a thousand times larger, both are wrong by a tenth of their own."""
    exact = torch.tensor([[[1.0, 2.0], [1000.0, 2000.0]]])
    assert error(lambda x: 1.1 * x, [(exact,)], [exact]) == pytest.approx(2 * 0.1**2)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5])
def test_thresholds_skip_what_was_asked_and_disturb_less_than_uniform_ones(sparsity):
    model, windows = tiny_model(), torch.randint(128, (4, 24), generator=torch.Generator().manual_seed(0))
    sizes = [model.layers[0].get_submodule(name).weight.numel() for name in PROJECTIONS]
    layers = skippable_(model)
    found, uniform = find_thresholds(model, sizes, windows, sparsity)
    pos = torch.arange(24)[None].expand(4, 24)
    batch = (model.embed(windows, pos), pos, *model.contexts(pos, None)[0])
    block, skipped, errors = model.layers[0], [], {}
    wanted = block(*batch)

    def count(layer, inputs):
        skipped.append((inputs[0].abs() <= layer.threshold).float().mean().item())

    for name, thresholds in (("uniform", uniform[0]), ("found", found[0])):
        for layer, threshold in zip(layers[0], thresholds, strict=True):
            layer.threshold = threshold
        errors[name] = error(block, [batch], [wanted])
    hooks = [layer.register_forward_pre_hook(count) for layer in layers[0]]
    block(*batch)
    [hook.remove() for hook in hooks]
    share = sum(each * size for each, size in zip(skipped, sizes, strict=True)) / sum(sizes)
    assert share == pytest.approx(sparsity, abs=0.02)
    assert errors["found"] <= errors["uniform"]


def test_divergence_is_that_of_the_distributions():
    model, ids = tiny_model(), torch.randint(128, (56,), generator=torch.Generator().manual_seed(0))
    layers = skippable_(model)
    tried = [[[threshold] * 4] * len(layers) for threshold in (0.0, 0.05, 0.2)]
    by_hand = []
    for each in tried:
        sums = 0.0
        for tokens in ids.split(24):  # two windows and the rest
            call = tokens[None], torch.arange(len(tokens))[None]
            set_thresholds(layers, tried[0])
            exact = torch.distributions.Categorical(logits=model(*call))
            set_thresholds(layers, each)
            own = torch.distributions.Categorical(logits=model(*call))
            sums += torch.distributions.kl_divergence(exact, own).sum().item()
        by_hand.append(sums / 56)
    assert 0 == by_hand[0] < by_hand[1] < by_hand[2]
    assert divergences(model, layers, ids, 24, tried) == pytest.approx(by_hand, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_a_sparse_checkpoint_is_read_like_any_other(mode, folder, call):
    source = folder / "model.pth"
    if mode:
        call("quantize.py", "--checkpoint_path", source, "--mode", mode)
        source = next(folder.glob(f"model_{mode}*.pth"))
    target = folder / f"sparse-{mode}.pth"
    options = ("--checkpoint_path", source, "--mode", "activations", "--sparsity", 0.4, "--output", target)
    out = call("sparsify.py", *flags(folder, *options, "--check", folder / "text.txt")).out
    assert all(name in out for name in ("perplexity", "divergence", "decode tok/s", "sparse 0.4"))
    specs = open_model(target).table
    assert all(specs[f"layers.{i}.{name}"].threshold > 0 for i in range(2) for name in PROJECTIONS)
    assert {spec.bits for name, spec in specs.items() if name != "output"} == {{"int8": 8, "int4": 4}.get(mode)}
    assert all(spec.threshold is None for spec in open_model(source).table.values())
    where = ("--checkpoint_path", target, "--dtype", "float32", "--temperature", 0, "--num_samples", 1)
    plain = call("generate.py", *where, "--prompt", "the cat", "--max_new_tokens", 16).out
    guessed = call("generate.py", *where, "--prompt", "the cat", "--max_new_tokens", 16, "--speculate", "ngram").out
    assert plain.strip() and guessed == plain


def test_what_is_skipped_is_measured_in_bfloat16_too(folder, call):
    """Where all blocks are one operator, if nothing is skipped."""
    path, target = make_tiny_checkpoint(folder / "fused", head_dim=64), folder / "fused_sparse.pth"
    options = ("--checkpoint_path", path, "--dtype", "bfloat16", "--mode", "activations", "--sparsity", 0.5)
    out = call("sparsify.py", *flags(folder, *options, "--output", target, "--check", folder / "text.txt")).out
    whole, uniform, found = map(float, out.partition("perplexity")[2].split()[:3])
    assert whole not in (uniform, found)
    with pytest.raises(ValueError, match="15 tokens can be guessed"):
        call("generate.py", "--checkpoint_path", target, "--speculate", "ngram", "--speculate_k", 20, "--prompt", "a")
    with pytest.raises(ValueError, match="then use sparsify.py"):
        call(
            "quantize.py", "--checkpoint_path", target, "--mode", "int4-gptq", "--calibration_file", folder / "text.txt"
        )


def test_a_sparse_float_file_can_be_quantised_and_codes_become_floats(folder, call):
    options = ("--mode", "activations", "--sparsity", 0.25)
    call("sparsify.py", *flags(folder, *options))
    source = folder / "model_sparse-0.25.pth"
    call("quantize.py", "--checkpoint_path", source, "--mode", "int4")
    before, after = open_model(source).table, open_model(folder / "model_sparse-0.25_int4.g32.pth").table
    assert {name: spec.threshold for name, spec in before.items()} == {n: after[n].threshold for n in before}
    assert all(after[name].bits == 4 for name in before)
    back = open_model(folder / "model_sparse-0.25_int4.g32.pth", dequantize=True).table
    assert back == before == {name: QuantSpec(threshold=spec.threshold) for name, spec in before.items()}


def test_a_profile_counts_what_a_text_uses(folder, call):
    experts = make_tiny_checkpoint(folder / "experts", n_expert=4, n_expert_used=2, dense_layers=(0,), dense_size=64)
    out = call("sparsify.py", *flags(folder, "--checkpoint_path", experts, "--mode", "profile")).out
    profile = json.loads((folder / "experts" / "model.pth.profile.json").read_text())
    assert list(profile) == ["model", "tokens", "experts", "neurons"]
    assert sum(profile["experts"]["1"]) == 2 * profile["tokens"] and len(profile["experts"]["1"]) == 4
    assert list(profile["neurons"]) == ["0"] and sum(profile["neurons"]["0"]) == 6 * profile["tokens"]
    assert "experts: the hottest 25% do " in out and "neurons: the hottest 20% do " in out


def test_counts_are_those_of_the_gate(folder):
    path = make_tiny_checkpoint(folder / "gates", n_expert=4, n_expert_used=1)
    model, windows = load_model(path, dtype=torch.float32), torch.randint(300, (2, 9))
    chosen, gate = [], model.layers[0].feed_forward.gate
    hook = gate.register_forward_hook(lambda _, x, scores: chosen.append(scores.argmax(-1)))
    counts = count_uses(model, windows)["experts"]["0"]
    hook.remove()
    assert counts == torch.cat(chosen).bincount(minlength=4).tolist()


def test_coverage_by_hand():
    assert coverage([5, 1, 1, 1, 1, 1, 0, 0, 0, 0]) == pytest.approx(0.6)
    assert "71% of the work (from 71% in layer 3" in in_words("neurons", {"3": [71] + [7] * 4 + [1]})
    assert "cannot pay: neurons that are used alike would do 20%" in in_words("neurons", {"0": [3] * 10})


METHODS = [  # mode, pattern, flags, the file's name, and the table of a layer
    ("wanda", "2:4", (), "wanda-2-4", QuantSpec(pattern="2:4")),
    ("wanda", "0.5", (), "wanda-0.5", None),
    ("wanda", "0.5", ("--quantize", "int4"), "wanda-0.5_int4.g32", QuantSpec(4, 32)),
    ("sparsegpt", "2:4", ("--quantize", "int8"), "sparsegpt-2-4_int8", QuantSpec(8, pattern="2:4")),
    ("wanda", "2:4", ("--quantize", "int8", "--groupsize", 32), "wanda-2-4_int8.g32", QuantSpec(8, 32, pattern="2:4")),
    ("sparsegpt", "2:4", ("--quantize", "int4"), "sparsegpt-2-4_int4.g32", QuantSpec(4, 32)),
]


@pytest.mark.parametrize("mode, pattern, others, name, spec", METHODS, ids=lambda value: str(value))
def test_a_pruned_checkpoint_is_read_like_any_other(mode, pattern, others, name, spec, folder, call):
    options = ("--mode", mode, "--pattern", pattern, *others, "--check", folder / "text.txt")
    printed = call("sparsify.py", *flags(folder, *options))
    target = folder / f"model_{name}.pth"
    header, weights, perplexity, nats, *_ = printed.out.splitlines()
    assert header.split() == ["dense", "magnitude", mode] and weights.startswith("weights")
    numbers, losses = ([float(each) for each in line.split()[-3:]] for line in (perplexity, nats))
    assert losses[1:] == pytest.approx([math.log(each / numbers[0]) for each in numbers[1:]], abs=2e-3)
    assert ("zeros of 8 layers of 8 are stored as numbers" in printed.err) == (spec is None or spec.pattern is None)
    opened, source = open_model(target, dequantize=True), open_model(folder / "model.pth")
    assert open_model(target).table.get("layers.1.attention.wo") == spec
    for layer in ("layers.0.attention.wqkv", "layers.1.feed_forward.w2"):
        weight = opened.tensors[f"{layer}.weight"]()
        zeros = (weight == 0).unflatten(1, (-1, 4)).sum(-1)
        assert zeros.ge(2).all() if pattern == "2:4" else zeros.sum() >= weight.numel() // 2
        if mode == "wanda" and not others:
            kept = weight != 0
            assert weight[kept].equal(source.tensors[f"{layer}.weight"]()[kept])
    where = ("--checkpoint_path", target, "--dtype", "float32", "--temperature", 0, "--num_samples", 1)
    assert call("generate.py", *where, "--prompt", "the cat", "--max_new_tokens", 8).out.strip()


def test_two_of_four_is_smaller_and_computes_as_its_dense_form(folder, call):
    target = folder / "packed.pth"
    call("sparsify.py", *flags(folder, "--mode", "wanda", "--pattern", "2:4", "--output", target))
    models = [load_model(target, dtype=torch.float32, dequantize=dense) for dense in (False, True)]
    tokens, pos = torch.arange(40)[None], torch.arange(40)[None]
    torch.testing.assert_close(*(model(tokens, pos) for model in models), rtol=1e-3, atol=1e-3)
    sizes = [open_model(path).layout.bytes(torch.bfloat16) for path in (target, folder / "model.pth")]
    assert sizes[0] < 0.75 * sizes[1]


def test_what_a_share_leaves_can_be_rounded_and_two_of_four_is_refused(folder, call):
    names = {pattern: folder / f"later-{i}.pth" for i, pattern in enumerate(("0.5", "2:4"))}
    for pattern, path in names.items():
        call("sparsify.py", *flags(folder, "--mode", "wanda", "--pattern", pattern, "--output", path))
    call("quantize.py", "--checkpoint_path", names["0.5"], "--mode", "int8")
    before, after = open_model(names["0.5"]), open_model(folder / "later-0_int8.pth")
    name = "layers.0.feed_forward.w13.weight"
    assert not after.tensors[name]()[before.tensors[name]() == 0].any()
    with pytest.raises(ValueError, match="is pruned already"):
        call("quantize.py", "--checkpoint_path", names["2:4"], "--mode", "int8")
    with pytest.raises(ValueError, match="is pruned; give --dequantize"):
        call("sparsify.py", *flags(folder, "--checkpoint_path", names["2:4"], "--mode", "wanda", "--pattern", "2:4"))


def test_the_blocks_of_least_influence_go(folder, call):
    source = make_tiny_checkpoint(folder / "deep", n_layer=4)
    opened = open_model(source)
    tensors = {name: read().clone() for name, read in opened.tensors.items()}
    for i, size in ((1, 0.01), (2, 0.0)):
        for name in ("attention.wo", "feed_forward.w2"):
            tensors[f"layers.{i}.{name}.weight"] *= size
    save_checkpoint(source, opened.args, tensors)
    options = ("--checkpoint_path", source, "--mode", "layers", "--drop", 2, "--check", folder / "text.txt")
    out = call("sparsify.py", *flags(folder, *options)).out
    assert "without block   1, of influence" in out and "without block   2, of influence 0.0000" in out
    target = source.parent / "model_drop-2.pth"
    left = {name: read() for name, read in open_model(target).tensors.items()}
    assert open_model(target).args.n_layer == 2
    for i, before in enumerate((0, 3)):
        for name in ("attention.wqkv", "feed_forward.w13"):
            assert left[f"layers.{i}.{name}.weight"].equal(tensors[f"layers.{before}.{name}.weight"])
    all_blocks, fewer = map(float, out.partition("perplexity")[2].split()[:2])
    assert fewer == pytest.approx(all_blocks, rel=0.05)
    where = ("--checkpoint_path", target, "--dtype", "float32", "--temperature", 0, "--num_samples", 1)
    assert call("generate.py", *where, "--prompt", "the cat", "--max_new_tokens", 8).out.strip()


def test_blocks_of_codes_keep_their_codes(folder, call):
    source = make_tiny_checkpoint(folder / "coded", n_layer=3)
    call("quantize.py", "--checkpoint_path", source, "--mode", "int4")
    coded = source.parent / "model_int4.g32.pth"
    call("sparsify.py", *flags(folder, "--checkpoint_path", coded, "--mode", "layers", "--drop", 1))
    before, after = open_model(coded), open_model(source.parent / "model_int4.g32_drop-1.pth")
    assert after.table == {name: spec for name, spec in before.table.items() if not name.startswith("layers.2.")}
    assert after.tensors["layers.1.feed_forward.w2.zeros"]().shape == (64, 3)


BAD = [
    (("--mode", "wanda"), "--mode wanda needs --pattern, such as 2:4"),
    (("--mode", "wanda", "--pattern", "3:4"), "--pattern is 3:4; it must be 2:4, or the share of weights"),
    (("--mode", "wanda", "--pattern", "0.95"), "--pattern is 0.95; it must be 2:4"),
    (("--mode", "wanda", "--pattern", "nan"), "--pattern is nan; it must be 2:4"),
    (("--mode", "wanda", "--pattern", "2:4", "--sparsity", 0.5), "--sparsity is for --mode activations; leave it out"),
    (("--mode", "wanda", "--pattern", "2:4", "--percdamp", 0.1), "--percdamp is for --mode sparsegpt"),
    (("--mode", "sparsegpt", "--pattern", "2:4", "--percdamp", 0), "--percdamp is 0.0; it must be above 0"),
    (("--mode", "sparsegpt", "--pattern", "2:4", "--groupsize", 32), "--groupsize needs --quantize int8 or int4"),
    (("--mode", "sparsegpt", "--pattern", "2:4", "--calibration_limit", 2), "raise it to at least 3"),
    (("--mode", "wanda", "--pattern", "0", "--quantize", "int4", "--groupsize", 256), "does not divide the 64 inputs"),
    (("--mode", "layers"), "--mode layers needs --drop, such as 6"),
    (("--mode", "layers", "--drop", 0), "--drop is 0; it must be at least 1"),
    (("--mode", "layers", "--drop", 2), "--drop is 2; the model has 2 blocks, of which 1 to 1 can go"),
    (("--mode", "layers", "--drop", 1, "--pattern", "2:4"), "--pattern is for --mode wanda or sparsegpt"),
    (("--mode", "profile", "--output", "x.pth"), "--output is for --mode activations, wanda, sparsegpt or layers"),
    (("--mode", "activations"), "--mode activations needs --sparsity"),
    (("--mode", "activations", "--sparsity", 0.95), "--sparsity is 0.95; it must be from 0 to 0.9"),
    (("--mode", "activations", "--sparsity", -0.1), "--sparsity is -0.1"),
    (("--mode", "activations", "--sparsity", "nan"), "--sparsity is nan"),
    (("--mode", "profile", "--sparsity", 0.4), "--sparsity is for --mode activations"),
    (("--mode", "activations", "--sparsity", 0.4, "--output", "MODEL"), "this run reads it"),
    (("--mode", "profile", "--calibration_seq_length", 600), "more than the model's context of 512"),
    (("--mode", "profile", "--calibration_file", "SHORT"), "the calibration text is too short"),
    (("--mode", "profile", "--calibration_limit", 0), "--calibration_limit is 0"),
]


@pytest.mark.parametrize(("others", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_an_error_that_says_what_to_do(others, message, folder, call):
    (folder / "short.txt").write_text("the cat")
    names = {"MODEL": folder / "model.pth", "SHORT": folder / "short.txt"}
    with pytest.raises(ValueError, match=message):
        call("sparsify.py", *flags(folder, *(names.get(each, each) for each in others)))


def test_models_that_are_refused(folder, call):
    path = make_tiny_checkpoint(folder / "mixture", n_expert=4, n_expert_used=2)
    with pytest.raises(ValueError, match="not supported for models with n_expert"):
        call("sparsify.py", *flags(folder, "--checkpoint_path", path, "--mode", "activations", "--sparsity", 0.4))
    call("quantize.py", "--checkpoint_path", folder / "model.pth", "--mode", "int8")
    with pytest.raises(ValueError, match="is quantised; give --dequantize"):
        call("sparsify.py", *flags(folder, "--checkpoint_path", folder / "model_int8.pth", "--mode", "profile"))
    pruning = ("--mode", "wanda", "--pattern", "2:4")
    with pytest.raises(ValueError, match="is quantised; give --dequantize"):
        call("sparsify.py", *flags(folder, "--checkpoint_path", folder / "model_int8.pth", *pruning))
    path = make_tiny_checkpoint(folder / "narrow", intermediate_size=100)
    with pytest.raises(ValueError, match="layers.0.feed_forward.w2 has 100; give a share, such as 0.5"):
        call("sparsify.py", *flags(folder, "--checkpoint_path", path, *pruning))
    path = make_tiny_checkpoint(folder / "differing", **DIFFERING)
    for mode in (pruning, ("--mode", "layers", "--drop", 1)):
        with pytest.raises(ValueError, match="is not supported for models with n_reusing_layer or layer_input_size"):
            call("sparsify.py", *flags(folder, "--checkpoint_path", path, *mode))
