"""Pruning against its definition in float64, closed-form least squares, and one forward of the finished model."""

from dataclasses import replace

import pytest
import torch

from compress.pruning import by_magnitude, least, packed, prune_, sparsegpt_weight, wanda_weight, weight_of
from compress.student import block_influences
from layers.quantized import QuantSpec, linear_table
from tests.compress.test_gptq import MIXTURE, TINY, calibration, correlated, logits, random_state, second_moments
from tests.tiny import tiny_model
from weights.checkpoint import build
from weights.layout import Layout

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERNS = ["2:4", 0.5, 0.8]
FLOAT = QuantSpec()
SPECS = [FLOAT, QuantSpec(8), QuantSpec(8, 32), QuantSpec(4, 32)]
patterns = pytest.mark.parametrize("pattern", PATTERNS)
NAMED = {"name": "the layer"}


def pruned(method, pattern, spec=FLOAT, n_in=128):
    """The weight that a method leaves, the one before, and the inputs."""
    weight, x = correlated(n_in)
    H = second_moments(x)
    if method == "sparsegpt":
        tensors = sparsegpt_weight(weight, H, pattern, spec, percdamp=0.01, **NAMED)
    elif method == "wanda":
        tensors = wanda_weight(weight, H.diagonal(), pattern, spec, **NAMED)
    else:
        tensors = by_magnitude({"the layer": weight}, {"the layer": spec}, pattern)
        tensors = {name.rpartition(".")[2]: each for name, each in tensors.items()}
    return weight_of(tensors, spec).float(), weight, x


def output_error(new, weight, x):
    return (x @ (new - weight).T).square().mean().item()


def share_of_zeros(weight, pattern, method):
    """As the pattern says: two of each four, a share of each row, or of all rows together."""
    if pattern == "2:4":
        return (weight.unflatten(1, (-1, 4)) == 0).sum(-1).eq(2).all()
    counts = (weight == 0).sum(1)
    wanted = round(pattern * weight.shape[1])
    if method != "sparsegpt":
        return counts.eq(wanted).all()
    return abs(counts.sum().item() - pattern * weight.numel()) <= 1


def test_least_by_hand():
    scores = torch.tensor([[1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0], [5.0, 5.0, 5.0, 5.0, 0.0, 1.0, 0.0, 0.0]])
    assert least(scores, "2:4").int().tolist() == [[1, 0, 1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 1, 0, 1, 0]]
    assert least(scores, 0.25).int().tolist() == [[1, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 1, 0]]
    assert not least(scores, 0.0).any()


def test_wanda_by_hand():
    """A small weight of a loud input is kept, and a large one of a silent input goes."""
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.1, 0.1, 0.1, 0.1]])
    energy = torch.tensor([100.0, 1.0, 0.01, 25.0])  # norms of 10, 1, 0.1 and 5
    for pattern in ("2:4", 0.5):  # scores 10, 2, 0.3, 2.5 and 1, 0.1, 0.01, 0.5
        got = wanda_weight(weight, energy, pattern, FLOAT, **NAMED)["weight"]
        assert got.equal(torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.1, 0.0, 0.0, 0.1]]))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@patterns
def test_zeros_are_where_the_pattern_has_them_and_are_exact(method, pattern, spec):
    new, *_ = pruned(method, pattern, spec)
    if spec.bits is None:
        assert share_of_zeros(new, pattern, method)
    else:  # rounding makes more
        assert (new == 0).float().mean() >= (0.5 if pattern == "2:4" else pattern) - 0.01
        assert pattern != "2:4" or (new.unflatten(1, (-1, 4)) == 0).sum(-1).ge(2).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_outputs_change_less_the_more_a_method_knows(pattern, spec):
    magnitude, wanda, sparsegpt = (output_error(*pruned(m, pattern, spec)) for m in ("magnitude", "wanda", "sparsegpt"))
    assert sparsegpt < 0.75 * wanda < 0.5 * magnitude


def by_definition(weight, H, pattern, block=128):
    """SparseGPT in float64 by explicit inverses: choose zeros, spread the error of a column, drop its input."""
    W, n_in = weight.double(), len(H)
    H = H.double() + 0.01 * H.diagonal().mean() * torch.eye(n_in)
    left = [torch.linalg.inv(H[j:, j:]) for j in range(n_in)]  # once all columns before j are settled
    for i in range(n_in):
        width = 4 if pattern == "2:4" else block
        if i % width == 0:
            costs = torch.stack([W[:, j].square() / left[j][0, 0] for j in range(i, i + width)], 1)
            if pattern == "2:4":
                gone = torch.stack([costs.argsort(1)[:, :2] == j for j in range(4)], 1).any(-1)
            else:
                gone = costs <= costs.flatten().sort().values[round(pattern * costs.numel()) - 1]
        error = W[:, i] * gone[:, i % width]
        W[:, i:] -= torch.outer(error, left[i][0] / left[i][0, 0])
        W[gone[:, i % width], i] = 0
    return W


@patterns
def test_sparsegpt_is_its_definition(pattern):
    new, weight, x = pruned("sparsegpt", pattern, n_in=256)
    expected = by_definition(weight, second_moments(x), pattern).float()
    assert ((new == 0) == (expected == 0)).float().mean() > 0.999
    assert (new - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_sparsegpt_comes_near_least_squares_for_the_same_zeros(pattern):
    """Which are the best for any zeros, and which it finds where all columns that go come first."""
    new, weight, x = pruned("sparsegpt", pattern)
    best = least_squares(weight, second_moments(x), new != 0)
    best_error, error, plain = (output_error(each, weight, x) for each in (best, new, weight * (new != 0)))
    assert best_error <= error < 0.6 * plain
    H = second_moments(x / x.std(0))
    small = torch.cat([0.1 * weight[:, :64].sign(), weight[:, 64:].sign() + weight[:, 64:]], 1)
    found = sparsegpt_weight(small, H, 0.5, FLOAT, percdamp=0.01, **NAMED)["weight"]
    assert not found[:, :64].any() and found[:, 64:].all()  # all that goes goes before any that stays
    torch.testing.assert_close(found, least_squares(small, H, found != 0), rtol=1e-3, atol=1e-4)


def least_squares(weight, H, kept):
    """Of each row the weights at `kept` that change the outputs least, with SparseGPT's damping."""
    H = (H + 0.01 * H.diagonal().mean() * torch.eye(len(H))).double()
    rows = torch.zeros_like(weight).double()
    for row, w, keep in zip(rows, weight.double(), kept, strict=True):
        row[keep] = torch.linalg.solve(H[keep][:, keep], H[keep] @ w)
    return rows.float()


def test_an_input_that_is_always_zero_is_pruned_first():
    weight, x = correlated(64)
    x[:, [3, 40]] = 0
    H = second_moments(x)
    for new in (
        wanda_weight(weight, H.diagonal(), 0.5, FLOAT, **NAMED)["weight"],
        sparsegpt_weight(weight, H, 0.5, FLOAT, percdamp=0.01, **NAMED)["weight"],
    ):
        assert not new[:, [3, 40]].any()


# ---------------------------------------------------------------- one model


def table_for(args, spec=FLOAT):
    return dict.fromkeys(linear_table(Layout(args).model, QuantSpec(8), None), spec)


def fresh(args, **changed):
    return build(args, random_state(args) | changed)


@pytest.mark.parametrize(
    "args", [TINY, replace(TINY, qkv_bias=True, sliding_window=5), MIXTURE], ids=["plain", "bias", "experts"]
)
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_each_layer_is_pruned_for_the_inputs_it_has_in_the_finished_model(args, pattern):
    floats, windows, seen = random_state(args), calibration(20), {}
    model, table = fresh(args), table_for(args)
    tensors = prune_(model, windows, table, "wanda", pattern, batch_size=2)
    assert tensors.keys() == {f"{name}.weight" for name in table}
    for name in table:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs}))
    logits(model, windows)
    for name in table:
        x, *chosen = seen[name]
        weight, new = floats[f"{name}.weight"], tensors[f"{name}.weight"]
        assert new.equal(model.get_submodule(name).weight)
        rows = [x.flatten(0, 1)]
        if weight.ndim == 3:
            rows = [x.expand(-1, 2, -1)[chosen[0] == e] for e in range(args.n_expert)]
        for w, n, own in zip(weight.view(-1, *weight.shape[-2:]), new.view(-1, *weight.shape[-2:]), rows, strict=True):
            expected = wanda_weight(w, own.square().sum(0), pattern, FLOAT, **NAMED)["weight"]
            assert ((n == 0) == (expected == 0)).float().mean() > 0.995
            assert n[n != 0].equal(w[n != 0])


def test_an_expert_that_no_token_reaches_is_pruned_by_magnitude_and_named(capsys):
    args = replace(TINY, n_expert=3, n_expert_used=1)
    state, table, name = random_state(args), table_for(args), "layers.1.feed_forward.gate.weight"
    gate = state[name]
    gate[1], gate[2] = -gate[0], 0  # one of the first two scores is above 0
    for method, how in (("wanda", {}), ("sparsegpt", {"percdamp": 0.01})):
        tensors = prune_(fresh(args, **{name: gate}), calibration(20), table, method, "2:4", **how)
        assert "w13: no token reached experts 2; they are pruned by magnitude" in capsys.readouterr().err
        w2 = "layers.1.feed_forward.w2"
        magnitude = by_magnitude({w2: state[f"{w2}.weight"]}, {w2: FLOAT}, "2:4")[f"{w2}.weight"]
        same = [tensors[f"{w2}.weight"][e].equal(magnitude[e]) for e in range(3)]
        assert same == [False, False, True]


def test_only_two_of_four_in_floats_and_int8_is_packed():
    table = {"a": FLOAT, "b": QuantSpec(8), "c": QuantSpec(4, 32), "experts": FLOAT}
    weights = {name: torch.randn(*(2,) * (name == "experts"), 16, 64) for name in table}
    tensors, made = packed(by_magnitude(weights, table, "2:4"), table, "2:4")
    assert made == {"a": QuantSpec(pattern="2:4"), "b": QuantSpec(8, pattern="2:4"), "c": QuantSpec(4, 32)}
    assert tensors["a.weight"].shape == tensors["b.weight"].shape == (16, 32)
    assert tensors["a.positions"].shape == tensors["b.positions"].shape == (16, 8)
    assert tensors["experts.weight"].shape == (2, 16, 64)
    assert packed(by_magnitude(weights, table, 0.5), table, 0.5)[1] == {"b": QuantSpec(8), "c": QuantSpec(4, 32)}


def test_influence_is_what_a_block_turns():
    model, windows = tiny_model(n_layer=3), torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(0))
    for name in ("attention.wo", "feed_forward.w2"):
        model.layers[1].get_submodule(name).weight.data.zero_()  # it returns what it takes
    pos = torch.arange(16)[None].expand(3, 16)
    hidden, expected = [model.embed(windows, pos)], []
    for block, context in zip(model.layers, model.contexts(pos, None), strict=True):
        hidden.append(block(hidden[-1], pos, *context))
        a, b = hidden[-2:]
        expected.append((1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean().item())
    found = block_influences(model, windows)
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[1] == pytest.approx(0, abs=1e-6) and min(found[0], found[2]) > 0.01
