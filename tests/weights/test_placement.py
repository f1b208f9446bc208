"""Plans of what lies in which tier: against enumeration, what they refuse, and the bytes that they promise."""

import json
import os
from dataclasses import replace
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from engine.cache import planned_bytes, rows_that_fit
from flags import memory_budget
from layers.offload import Slots, Unit
from layers.quantized import QuantSpec, quant_spec
from tests.tiny import make_tiny_checkpoint
from weights import checkpoint
from weights.checkpoint import load_model, new_table, open_model, read_tensors, save_checkpoint
from weights.layout import Parts
from weights.tiers import packed_copy
from weights.tiers.packed_copy import PackedCopy
from weights.tiers.place import beside, read_units
from weights.tiers.placement import MemoryBudget, Plan, fingerprint, hottest, make_plan, parse_size

EXPERTS = {"n_layer": 3, "n_expert": 8, "n_expert_used": 2, "vocab_size": 320}
UNIT = 3 * 64 * 96  # weights of one expert
GPU = MemoryBudget(0, second=torch.device("cpu"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("experts"), **EXPERTS)


def units(n_layer=3, n_expert=8):
    return [Unit(f"layers.{layer}.feed_forward", e) for layer in range(n_layer) for e in range(n_expert)]


def plan_of(path, size, second=GPU.second, **others):
    opened = open_model(path)
    sizes = dict.fromkeys(units(), 4 * UNIT)
    return make_plan(
        opened.layout, torch.float32, MemoryBudget(size, second=second, **others), sizes, beside(path, "profile.json")
    )


@pytest.mark.parametrize(("text", "size"), [("6GB", 6e9), ("6GiB", 6 * 2**30), ("1.5 MB", 1.5e6), ("3MiB", 3 * 2**20)])
def test_sizes_are_read_with_their_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["6", "GB", "0GB", "-1GB", "6gb", "6 TB", "", "1e9GB", "nanGB"])
def test_nonsense_is_no_size(text):
    with pytest.raises(ValueError, match="is no size; give a number above 0 with its unit"):
        parse_size(text)


@pytest.mark.parametrize("seed", range(20))
def test_the_hottest_units_save_most_of_all_choices(seed):
    """Against every choice: equal sizes exactly; differing ones by no more than the last that did not fit."""
    generator = torch.Generator().manual_seed(seed)
    use = torch.rand(9, generator=generator).tolist()
    for sizes in ([5] * 9, torch.randint(1, 10, (9,), generator=generator).tolist()):
        names = [Unit("a", e) for e in range(9)]
        size_of, use_of = dict(zip(names, sizes, strict=True)), dict(zip(names, use, strict=True))

        def saved(kept, use_of=use_of, size_of=size_of):
            return sum(use_of[unit] * size_of[unit] for unit in kept)

        for room in (0, 4, 17, 30, 100):
            kept = hottest(sorted(names, key=lambda unit: -use_of[unit]), size_of, room)
            assert sum(size_of[unit] for unit in kept) <= room
            choices = (c for n in range(10) for c in combinations(names, n) if sum(size_of[u] for u in c) <= room)
            best = max(map(saved, choices))
            assert saved(kept) >= best - (0 if len(set(sizes)) == 1 else max(saved([unit]) for unit in names)) - 1e-9


def test_expected_speed_is_that_of_bytes_by_rates():
    a, b = Unit("a", 0), Unit("a", 1)
    plan = Plan([a], [b], {"weights outside of feed-forwards": 30}, {a: 100, b: 200}, {a: 0.5, b: 0.25}, False)
    assert plan.tokens_per_second(first=40, second=10) == pytest.approx(1 / ((30 + 50) / 40 + 50 / 10))
    table = plan.table(MemoryBudget(10**6, rates=(40e9, 10e9)))
    assert "1 of 2 experts" in table and "measured: 40.0 GB/s of the first, 10.0 GB/s of the second" in table


def test_a_budget_too_small_says_how_much_is_needed(path):
    outside = sum(
        t.nbytes for name, t in open_model(path).layout.tensors.items() if ".w13." not in name and ".w2." not in name
    )
    with pytest.raises(ValueError, match=f"does not hold what has to be in memory, {outside / 1e3:.1f} kB"):
        plan_of(path, outside - 1)
    assert plan_of(path, outside).near == []
    with pytest.raises(ValueError, match="caches 5.0 kB"):
        plan_of(path, outside, cache_bytes=lambda args: 5000)
    with pytest.raises(ValueError, match="2 experts"):  # of which both are in memory while they are used
        plan_of(path, outside + 10, second=None)


def test_without_a_profile_each_layer_gets_as_many(path):
    outside = plan_of(path, 10**9).must["weights outside of feed-forwards"]
    near = plan_of(path, outside + 9 * 4 * UNIT).near
    assert sorted(unit.module for unit in near) == sorted(3 * [unit.module for unit in units(n_expert=1)])


def write_profile(path, **changes):
    counts = {str(layer): [100 if e == layer else 10 + e for e in range(8)] for layer in range(3)}
    profile = {"model": fingerprint(open_model(path).args), "tokens": 100, "experts": counts} | changes
    beside(path, "profile.json").write_text(json.dumps(profile))


def test_a_profile_decides_which_experts_stay(tmp_path):
    path = make_tiny_checkpoint(tmp_path, **EXPERTS)
    write_profile(path)
    outside = plan_of(path, 10**9).must["weights outside of feed-forwards"]
    plan = plan_of(path, outside + 4 * 4 * UNIT)
    assert set(plan.near[:3]) == {Unit(f"layers.{layer}.feed_forward", layer) for layer in range(3)}
    assert plan.near[3].expert == 7 and plan.is_known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "is the profile of another model"),
        ({"experts": {"0": [1] * 8}}, "has no counts of the 8 experts of layers.1.feed_forward"),
        ({"experts": 3}, "has no counts"),
        ({"tokens": 7}, "counts 100 uses by 7 tokens"),
        ({"tokens": "7"}, "counts 100 uses by '7' tokens"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(tmp_path, changes, message):
    path = make_tiny_checkpoint(tmp_path, **EXPERTS)
    write_profile(path, **changes)
    with pytest.raises(ValueError, match=message):
        plan_of(path, 10**9)


def test_what_cannot_be_placed_is_refused(path, monkeypatch):
    monkeypatch.setattr("weights.tiers.place.require_memory", lambda size, device, what, advice: refuse(what))
    with pytest.raises(ValueError, match="--memory_budget keeps there"):
        load_model(path, budget=MemoryBudget(10**9))
    with pytest.raises(ValueError, match="a third tier, the disk behind main memory, is not supported"):
        monkeypatch.setattr(
            "weights.tiers.place.require_memory", lambda size, _, what, __: "third" in what and refuse(what)
        )
        load_model(path, budget=replace(GPU, size=400_000))


def test_a_file_that_skips_inputs_is_refused(tmp_path):
    opened = open_model(make_tiny_checkpoint(tmp_path))
    table = {"layers.0.feed_forward.w13": QuantSpec(threshold=0.5)}
    tensors = {name: read() for name, read in opened.tensors.items()}
    save_checkpoint(tmp_path / "sparse.pth", opened.args, tensors, table)
    with pytest.raises(ValueError, match="which skips inputs; leave it out, or use the file that it was made of"):
        load_model(tmp_path / "sparse.pth", budget=MemoryBudget(10**9))


@pytest.mark.parametrize(("device", "n_row"), [("cpu", 3), ("cuda", 4)])
def test_as_many_rows_as_were_planned_fit(path, device, n_row):
    """On CUDA a scheduler has one more, for padding."""
    args, device = open_model(path).args, torch.device(device)
    flags = SimpleNamespace(memory_budget=1, cache_dtype=None, dtype="bfloat16", max_seq_length=None, speculate_k=12)
    room = memory_budget(flags, "nowhere", device, None, 3, guesses=True).cache_bytes(args)
    assert room == n_row * planned_bytes(args, torch.bfloat16, 1, 2048, ahead=13)
    model = SimpleNamespace(args=args, cache_dtype=None, dtype=torch.bfloat16, device=device, cache_room=room)
    assert rows_that_fit(model, args.max_seq_length, 13) == 3


def test_copies_of_latent_attention_are_planned(tmp_path, monkeypatch):
    latent = {"kv_latent": 32, "value_dim": 24, "rope_dim": 8, "n_kv_head": 4}
    path, plans = make_tiny_checkpoint(tmp_path, **EXPERTS, **latent), []
    monkeypatch.setattr("weights.tiers.place.make_plan", lambda *given: plans.append(make_plan(*given)) or plans[-1])
    model = load_model(path, dtype=torch.float32, budget=replace(GPU, size=10**9))
    assert sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values()) == plans[0].near_bytes


def test_a_profile_of_the_floats_of_a_tied_head_is_that_of_its_codes(tmp_path):
    opened = open_model(path := make_tiny_checkpoint(tmp_path, **EXPERTS))
    table = new_table(opened, quant_spec("int4", None), path)
    save_checkpoint(path, opened.args, read_tensors(opened, torch.device("cpu"), torch.float32, "", table), table)
    codes, floats = open_model(path).args, open_model(path, dequantize=True).args
    assert codes != floats and fingerprint(codes) == fingerprint(floats)


def refuse(what):
    raise ValueError(what)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_bytes_of_the_plan_are_those_of_the_model(path, quantize, capsys, monkeypatch):
    plans = []
    monkeypatch.setattr("weights.tiers.place.make_plan", lambda *given: plans.append(make_plan(*given)) or plans[-1])
    model = load_model(
        path, dtype=torch.float32, quantize=quant_spec(quantize, None), budget=replace(GPU, size=260_000)
    )
    far = sum(t.nbytes for name, t in model.state_dict().items() if ".far." in name)
    near = {t.data_ptr(): t.nbytes for name, t in model.state_dict().items() if ".far." not in name}
    assert (sum(near.values()), far) == (plans[0].near_bytes, plans[0].far_bytes) and far
    assert f"{len(plans[0].far)} of 24 experts" in capsys.readouterr().err


def test_experts_are_read_one_by_one_as_together(path):
    """A file's rows in parts, or experts apart: nothing else of the file is read for one expert."""
    opened, name = open_model(path), "layers.1.feed_forward"
    read = partial(read_tensors, device=torch.device("cpu"), dtype=torch.bfloat16, what="Reading")
    together = replace(opened, tensors={key: (lambda each=each: each()) for key, each in opened.tensors.items()})
    one_by_one, whole = ([*read_units(each, name, 8, read)] for each in (opened, together))
    assert len(one_by_one) == len(whole) == 8
    for ours, theirs in zip(one_by_one, whole, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert all(len(each) == 1 for each in ours.values())
    asked = []

    def reader(expert, value):
        return lambda: asked.append(expert) or torch.full((2, 3), float(value))

    apart = Parts([[reader(e, e), reader(e, 10 * e)] for e in range(3)])
    assert apart.expert(2).tolist() == [[[2.0] * 3] * 2 + [[20.0] * 3] * 2] and set(asked) == {2}
    assert torch.equal(apart()[2:], apart.expert(2))


def test_what_stays_in_memory_is_read_after_all_else(tmp_path, monkeypatch):
    """What reading other weights takes beside them is then still free."""
    path, order = make_tiny_checkpoint(tmp_path, **EXPERTS), []
    monkeypatch.setattr(checkpoint, "forget", lambda paths: order.append("others"))
    take = Slots.take
    monkeypatch.setattr(Slots, "take", lambda slots, units: order.append(len(units)) or take(slots, units))
    load_model(path, dtype=torch.float32, budget=MemoryBudget(1_400_000))
    assert order[0] == "others" and len(order) == 2 and 2 <= order[1] < 24


@pytest.mark.parametrize("is_direct", [True, False])
def test_units_larger_than_a_request_are_read_whole(tmp_path, monkeypatch, is_direct):
    """In pages, into tensors that begin and end anywhere in them."""
    monkeypatch.setattr(packed_copy, "PIECE", 2 * packed_copy.PAGE)
    if not is_direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    layers = [torch.nn.Linear(37, 101) for _ in range(3)]
    copy = PackedCopy(tmp_path / "m.packed", [], {"x": 3}, {"x": layers[0]})
    copy.write((Unit("x", e), layer) for e, layer in enumerate(layers))
    copy.open()
    for e in (2, 0, 1):
        tensors = [torch.zeros_like(each) for each in layers[e].state_dict().values()]
        copy.read(Unit("x", e), [each.view(-1).view(torch.uint8).numpy().data for each in tensors])
        assert all(map(torch.equal, tensors, layers[e].state_dict().values()))


def test_a_copy_is_taken_only_for_the_model_that_it_was_made_of(tmp_path):
    form = torch.nn.Linear(4, 3)
    copy = PackedCopy(tmp_path / "m.packed", ["a"], {"x": 2}, {"x": form})
    layers = [torch.nn.Linear(4, 3) for _ in range(2)]
    copy.write((Unit("x", e), layer) for e, layer in enumerate(layers))
    assert copy.is_there() and not PackedCopy(copy.path, ["b"], {"x": 2}, {"x": form}).is_there()
    copy.open()
    buffers = [bytearray(48), bytearray(12)]
    copy.read(Unit("x", 1), list(map(memoryview, buffers)))
    assert bytes(buffers[0]) == layers[1].weight.detach().numpy().tobytes()
    assert bytes(buffers[1]) == layers[1].bias.detach().numpy().tobytes()
    with copy.path.open("r+b") as file:
        file.truncate(5000)
    assert not copy.is_there()
    with pytest.raises(ValueError, match="was cut short while it was read"):
        copy.read(Unit("x", 1), list(map(memoryview, buffers)))
    copy.write((Unit("x", e), layer) for e, layer in enumerate(layers))
    assert copy.is_there() and list(tmp_path.iterdir()) == [copy.path]
