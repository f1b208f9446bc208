"""The tables `sparse` and `placement`: what their models are made of, what they count, and their figures by hand."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from engine.engine import Engine
from kernels import cpu
from layers.offload import Slots, Unit
from layers.quantized import QuantSpec
from layers.sparse import ReluFeedForward
from mixers.experts import ExpertLinear
from model import ModelArgs
from scripts.bench.random_weights import placement
from scripts.bench.skipping import relu, table, teal
from tests.tiny import make_tiny_checkpoint
from weights.checkpoint import load_model, open_model

pytestmark = pytest.mark.usefixtures("one_thread")
needs_operators = pytest.mark.skipif(not cpu.available(), reason="the CPU operators cannot be built")
SIZES = dict(dim=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, intermediate_size=160, vocab_size=128)
RELU = ModelArgs(**SIZES, max_seq_length=64, activation="relu")
EXPERTS = ModelArgs(**SIZES | {"n_layer": 1}, max_seq_length=64, n_expert=8, n_expert_used=2)


@needs_operators
@pytest.mark.parametrize("inactive", [0.9, 0.5, 0.0])
def test_that_share_of_neurons_is_inactive(inactive):
    unit = relu.sparse_unit(relu.crafted(RELU, inactive), RELU, None).feed_forward
    gate = unit.gate(torch.rand(1, 1, 64).bfloat16() + 0.5)
    assert (gate <= 0).float().mean() == pytest.approx(inactive)


@needs_operators
@pytest.mark.parametrize("spec", [None, QuantSpec(8), QuantSpec(4, 32)], ids=str)
def test_units_take_turns_with_dense_ones(spec):
    found = relu.measure_units(RELU, spec, rounds=2, least_bytes=1 << 18)
    assert list(found) == ["90% inactive", "50% inactive", "0% inactive"]
    assert all(len(each[side]["runs"]) == 2 for each in found.values() for side in ("dense", "sparse"))
    # a third is the gate's; of an int4 down projection the scales, a fifth, are read whatever is active
    assert [round(each["allowed"], 1) for each in found.values()] == (
        [2.2, 1.4, 1.0] if spec and spec.bits == 4 else [2.5, 1.5, 1.0]
    )


def test_a_gain_is_that_of_rounds():
    times = {"dense": (6, 9, 8), "sparse": (3, 3, 2)}
    turns = {side: {"runs": [{"us": each} for each in of]} for side, of in times.items()}
    assert relu.gain(turns, "us") == 3
    rates = {side: {"runs": [{"tok_s": 1 / run["us"]} for run in each["runs"]]} for side, each in turns.items()}
    assert relu.gain(rates, "tok_s") == pytest.approx(3)


@pytest.fixture
def eager(monkeypatch):
    """Nothing is compiled."""
    for module in (relu, teal):
        monkeypatch.setattr(module, "build_engine", lambda model, compile: Engine(model))


@needs_operators
def test_decoding_of_a_model_whose_neurons_are_inactive(eager, monkeypatch):
    seen, forward = [], ReluFeedForward.forward

    def watched(unit, x):
        seen.append((unit.gate(x) <= 0).float().mean().item())
        return forward(unit, x)

    monkeypatch.setattr(ReluFeedForward, "forward", watched)
    found = relu.measure_decode(RELU, QuantSpec(4, 32), 0.9, new_tokens=4, rounds=1)
    assert seen and all(share == pytest.approx(0.9) for share in seen)
    assert found["sparse"]["median"]["tok_s"] > 0 and 1 < found["allowed"] < 2.5


@needs_operators
def test_thresholds_are_found_measured_and_timed(eager, monkeypatch, tmp_path):
    monkeypatch.setattr(teal, "LENGTH", 32)
    path = make_tiny_checkpoint(tmp_path)
    ids = torch.randint(200, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    quality = teal.measure_quality(path, 0.4, ids[:200], ids[200:])
    assert quality["all inputs"]["divergence"] == 0 < quality["found"]["divergence"]
    assert (
        quality["all inputs"]["perplexity"] != quality["found"]["perplexity"] and quality["calibration_tokens"] == 128
    )
    rates = teal.measure_decode(path, QuantSpec(4, 32), {"40%": quality["thresholds"]}, ids[:8], 6, 2)
    assert list(rates) == ["all inputs", "40%"] and all(each["median"]["tok_s"] > 0 for each in rates.values())
    teal.write(path, tmp_path / "sparse.pth", quality["thresholds"])
    specs = open_model(tmp_path / "sparse.pth").table
    assert specs["layers.1.feed_forward.w2"].threshold == quality["thresholds"][1][3]


def test_the_tables_by_hand():
    unit = {"dense": {"median": {"us": 100.0}}, "sparse": {"median": {"us": 50.0}}, "ratio": 2.0, "allowed": 2.5}
    rate = {"dense": {"median": {"tok_s": 10.0}}, "sparse": {"median": {"tok_s": 15.0}}, "ratio": 1.5, "allowed": 2.0}
    pairs = {"all inputs": (10.0, 0.0), "found": (11.0, 0.05), "uniform": (12.0, 0.0625)}
    quality = {"40%": {name: {"perplexity": p, "divergence": d} for name, (p, d) in pairs.items()}}
    sides = {name: {"median": {"tok_s": each}} for name, each in {"all inputs": 60.0, "40%": 75.0}.items()}
    result = {"model": "m", "units": {"TinyLlama-1.1B, bf16": {"90% inactive": unit}}, "decode": {"T, bf16": rate}}
    text = table.table(result | {"quality": quality, "thresholds": {"bf16": sides}})
    assert "| feed-forward of TinyLlama-1.1B, bf16, 90% inactive | 100 us | 50 us | x2.00 | x2.50 | 80% |" in text
    assert "| decoding of T, bf16, 90% inactive | 10.0 tok/s | 15.0 tok/s | x1.50 | x2.00 | 75% |" in text
    losses = "11.000 (+10.0 %), 0.050 nats | 12.000 (+20.0 %), 0.062 nats"
    assert f"| 40% of each block's weights skipped | {losses} | 75.0 tok/s (x1.25) |" in text


# ---------------------------------------------------------------- placement


def test_a_file_is_as_large_as_asked_for(tmp_path):
    args = placement.sized(EXPERTS, 500_000)
    placement.make_file(args, tmp_path / "model.pth")
    assert 350_000 < (tmp_path / "model.pth").stat().st_size < 530_000
    model = load_model(tmp_path / "model.pth", dequantize=True)
    for layer in (model.layers[0].feed_forward.w2, model.layers[0].attention.wo, model.output):
        assert layer.weight.float().std().item() == pytest.approx(0.02, rel=0.1)
    with pytest.raises(ValueError, match="--file_gb 1e-05 is too small; give at least 0.00"):
        placement.sized(EXPERTS, 10_000)


def test_a_full_disk_is_asked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(placement.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="do not fit in .*, where 1.0 kB are free; give a smaller --file_gb"):
        placement.make_file(EXPERTS, tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


def test_choices_follow_zipf():
    generator = torch.Generator().manual_seed(0)
    gate = nn.Linear(256, 4, bias=False).requires_grad_(False)
    gate.weight.copy_(0.02 * torch.randn(4, 256, generator=generator))
    x = torch.randn(20000, 256, generator=generator)
    zipf = placement.ZipfGate(gate, 0)
    x = x / x.square().mean(-1, keepdim=True).sqrt() * 0.02 * 16 / gate(x).std()
    shares = zipf(x).argmax(-1).bincount(minlength=4) / len(x)
    wanted = torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 4])
    torch.testing.assert_close(shares.sort(descending=True).values, wanted / wanted.sum(), atol=0.05, rtol=0)
    assert shares.argmax() == zipf.logarithms.argmax()


def test_what_is_read_for_a_call_is_missed_once():
    packed = nn.Module()
    packed.w13, packed.w2 = ExpertLinear(torch.zeros(1, 4, 2)), ExpertLinear(torch.zeros(1, 2, 2))
    units = [Unit("a", e) for e in range(4)]
    slots = Slots(packed, True, 3, lambda *_: None, dict.fromkeys(units, 0.25))
    watch = placement.Watch(slots)
    for called, expected in (([0, 1], [2]), ([2, 0], []), ([2, 3], [])):
        slots.use("a", [units[e] for e in called])
        slots.take([units[e] for e in called])
        slots.expect([units[e] for e in expected])
    assert (watch.used, watch.missed) == (6, 4)  # 0, 1, 2 ahead, 3


def test_pages_in_the_cache_are_counted(tmp_path):
    (tmp_path / "file").write_bytes(bytes(3 * 4096 + 1))
    assert placement.cached_bytes(tmp_path / "file") == 4 * 4096


@needs_operators
def test_decoding_within_a_budget_and_with_one_that_holds_all(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "SHARE", 0.6)
    monkeypatch.setattr(placement, "measured_bandwidth", lambda _: 10.0)
    args = placement.sized(EXPERTS, 1_500_000)
    placement.make_file(args, tmp_path / "model.pth")
    found = placement.measure_within(tmp_path / "model.pth", new_tokens=16, rounds=1)
    [run] = found["runs"]
    assert 0 < run["missed"] < 2 * args.n_layer and run["share"] > 0
    whole = placement.measure_whole(tmp_path / "model.pth", new_tokens=8, rounds=1)
    assert whole["ratio"] > 0 and whole["budget"]["runs"][0]["missed"] == 0
    text = placement.table({"file_gb": 6.0, "found": {placement.WITHIN: found, placement.WHOLE: whole}})
    assert "a mixture of experts of 6 GB" in text and "held at most, of the budget" in text


def test_rates_and_bytes_allow_a_time_by_hand(monkeypatch):
    monkeypatch.setattr(placement, "weight_bytes", lambda _: 1000)
    slots = SimpleNamespace(nbytes=500, n_slot=5)
    found = placement.allowed({"s": 10.0, "missed": 2.0}, None, slots, disk=50.0, memory=200.0)
    assert found["allowed_s"] == 200 / 50 + 800 / 200 and found["share"] == 0.8
