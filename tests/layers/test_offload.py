"""Feed-forwards that are not all in fast memory: the same tokens as if they were, and what is in memory when."""

import pytest
import torch
from torch import nn

from engine.engine import Engine, build_engine
from engine.speculation.drafters import PromptLookup
from engine.speculation.speculative import Speculation
from layers.blocks import RegionBlocks
from layers.offload import FarFeedForward, OffloadedExperts, OffloadedFeedForward, Slots, SplitExperts, Unit
from layers.quantized import QuantSpec, quant_spec
from mixers.experts import ExpertLinear
from tests.tiny import ids_of, make_tiny_checkpoint, pairwise, random_ids
from weights.checkpoint import load_model, new_table, open_model, read_tensors, save_checkpoint
from weights.tiers.placement import MemoryBudget, is_part, units_of

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {
    "experts": {"n_layer": 3, "n_expert": 8, "n_expert_used": 2},
    "biases": {"n_layer": 3, "n_expert": 8, "n_expert_used": 2, "ffn_bias": True, "normalize_experts": False},
    "shared": {
        "n_layer": 3,
        "n_expert": 8,
        "n_expert_used": 3,
        "shared_size": 96,
        "dense_layers": (0,),
        "dense_size": 64,
    },
    "separate": {"n_layer": 3, "n_expert": 8, "n_expert_used": 2, "shared_size": 96, "shared_gate": False},
    "dense": {"n_layer": 6},
}
KINDS["separate"] |= {"separate_experts": True}
FORMS = {"disk": (OffloadedExperts, OffloadedFeedForward), "two devices": (SplitExperts, FarFeedForward)}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return {kind: make_tiny_checkpoint(tmp_path_factory.mktemp(kind), **fields) for kind, fields in KINDS.items()}


def within(path, share, second=None, **how):
    """A model with room for a share of what its feed-forwards take, and the model without a budget."""
    whole, modules = load_model(path, **how), units_of(open_model(path).layout)
    sizes = {name: tensor.nbytes for name, tensor in whole.state_dict().items()}
    units = sum(size for name, size in sizes.items() if is_part(name, modules))
    rest = sum(sizes.values()) - units - (whole.output.weight is whole.tok_embeddings.weight) * sizes["output.weight"]
    more = 0 if second is not None else (3 if whole.args.n_expert else 4) * units // sum(modules.values())
    model = load_model(path, budget=MemoryBudget(int(rest + share * units + more), second=second), **how)
    model.cache_room = None
    forms = FORMS["disk" if second is None else "two devices"]
    assert any(isinstance(module, forms) for module in model.modules())
    return model, whole


@pytest.mark.parametrize(
    *pairwise(
        kind=list(KINDS), dtype=[torch.float32, torch.bfloat16], quantize=[None, "int8", "int4"], form=list(FORMS)
    )
)
def test_tokens_are_those_without_a_budget(paths, kind, dtype, quantize, form):
    """In a batch, with prompts that use more experts than there is memory for."""
    how = {"dtype": dtype, "quantize": quant_spec(quantize, None)}
    model, whole = within(paths[kind], 0.2, None if form == "disk" else torch.device("cpu"), **how)
    prompts = random_ids(70, 9)
    assert ids_of(model, prompts, 12) == ids_of(whole, prompts, 12)
    tokens, pos = torch.tensor(random_ids(20)), torch.arange(20)[None]
    if dtype == torch.float32:
        torch.testing.assert_close(model(tokens, pos), whole(tokens, pos), rtol=0, atol=0 if form == "disk" else 1e-5)


@pytest.mark.parametrize("second", [None, torch.device("cpu")])
@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_what_waits_for_the_host_is_in_no_cuda_graph(paths, kind, second):
    model, whole = within(paths[kind], 0.2, second, dtype=torch.float32)
    assert not RegionBlocks.fits_cuda_graph(model.layers, None)
    assert RegionBlocks.fits_cuda_graph(whole.layers, None) == (kind == "dense")


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_guesses_are_checked_within_a_budget(paths, kind):
    model, whole = within(paths[kind], 0.2, dtype=torch.float32)
    engine = Engine(model, speculation=Speculation(PromptLookup(), 5))
    prompts = [random_ids(12)[0] * 3]
    assert ids_of(engine, prompts, 20) == ids_of(whole, prompts, 20)


def test_a_compiled_step_equals_a_plain_one(paths):
    model, whole = within(paths["experts"], 0.2, dtype=torch.float32)
    prompts = random_ids(12)
    assert ids_of(build_engine(model, compile=True), prompts, 12) == ids_of(whole, prompts, 12)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w13, self.w2 = ExpertLinear(torch.zeros(1, 4, 2)), ExpertLinear(torch.zeros(1, 2, 2))


def slots_of(n_slot, use, fail=()):
    """Slots of experts, whose tensors are filled with their number, and the list of what was read."""
    read = []

    def fetch(unit, buffers):
        if unit.expert in fail:
            raise OSError("the disk is gone")
        read.append(unit.expert)
        for buffer in buffers:
            buffer[:] = torch.full((len(buffer) // 4,), float(unit.expert)).numpy().tobytes()

    return Slots(Packed(), True, n_slot, fetch, {Unit("a", e): share for e, share in use.items()}), read


def taken(slots, *experts):
    units = [Unit("a", e) for e in experts]
    slots.use("a", units)
    places = slots.take(units)
    weights = slots.layers[0].w13.weight
    assert [weights[place].unique().tolist() for place in places] == [[e] for e in experts]


def test_what_is_used_least_leaves():
    slots, read = slots_of(2, dict.fromkeys(range(4), 0.25))
    for expert in (0, 0, 1, 2, 0, 3, 0, 2):  # 0 is used more than the others, and stays
        taken(slots, expert)
    assert read == [0, 1, 2, 3, 2]
    assert len(slots.slot_of) == 2


def test_old_uses_fade():
    slots, read = slots_of(2, dict.fromkeys(range(3), 0.01))
    for expert in (*[0] * 50, *[1, 2] * 60):
        taken(slots, expert)
    read.clear()
    taken(slots, 1, 2)
    assert read == []


def test_a_known_use_counts_from_the_beginning():
    slots, read = slots_of(2, {0: 0.9, 1: 0.01, 2: 0.01})
    for expert in (0, 1, 2, 1, 2):
        taken(slots, expert)
    assert read.count(0) == 1


def test_what_is_read_ahead_leaves_what_is_in_use_alone():
    slots, read = slots_of(3, dict.fromkeys(range(6), 0.2))
    taken(slots, 0, 1)
    slots.expect([Unit("a", e) for e in (1, 2, 3, 4)])
    taken(slots, 2, 1)
    assert read == [0, 1, 2]
    for _ in range(40):  # what is expected in vain is no longer read
        slots.expect([Unit("a", 5)])
        taken(slots, 1, 2)
    read.clear()
    slots.expect([Unit("a", 4)])
    assert read == []


def test_what_cannot_be_read_is_not_there():
    slots, read = slots_of(2, dict.fromkeys(range(3), 0.2), fail := [1])
    taken(slots, 0)
    with pytest.raises(OSError, match="the disk is gone"):
        slots.take([Unit("a", 0), Unit("a", 1)])
    fail.clear()
    taken(slots, 1, 0)
    assert sorted(read) == [0, 1] and len(slots.slot_of) == 2


def test_scales_keep_the_dtype_of_the_file(tmp_path):
    """Other formats have scales in float32, of which a copy in bfloat16 would be another model."""
    path = make_tiny_checkpoint(tmp_path, **KINDS["experts"])
    spec = quant_spec("int4", None)
    opened = open_model(path)
    table = new_table(opened, spec, path)
    state = read_tensors(opened, torch.device("cpu"), torch.float32, "", table)
    wide = {name: tensor.float() if name.endswith((".scales", ".zeros")) else tensor for name, tensor in state.items()}
    wide = {name: t * 1.001 if name.endswith(".scales") else t for name, t in wide.items()}
    save_checkpoint(path, opened.args, wide, table)
    model, whole = within(path, 0.6, dtype=torch.float32)
    tokens, pos = torch.tensor(random_ids(20)), torch.arange(20)[None]
    torch.testing.assert_close(model(tokens, pos), whole(tokens, pos), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_each_form_is_read_into_slots_of_its_own(tmp_path, kind):
    """Files often have more bits for w2 in some layers; what is read ahead is the next one of the same form."""
    path = make_tiny_checkpoint(tmp_path, **KINDS[kind] | {"n_layer": 10})
    opened = open_model(path)
    table = new_table(opened, quant_spec("int4", None), path)
    table |= {name: QuantSpec(8) for name in table if name.endswith("feed_forward.w2") and int(name.split(".")[1]) % 2}
    save_checkpoint(path, opened.args, read_tensors(opened, torch.device("cpu"), torch.float32, "", table), table)
    model, whole = within(path, 0.4, dtype=torch.float32)
    prompts = random_ids(20)
    assert ids_of(model, prompts, 12) == ids_of(whole, prompts, 12)
    away = [layer for layer in model.modules() if isinstance(layer, OffloadedFeedForward)]
    for layer in away:
        alike = [other.name for other in away if other.slots is layer.slots]  # in the order in which they run
        assert layer.following == alike[(alike.index(layer.name) + 1) % len(alike)]
    assert len({id(layer.slots) for layer in model.modules() if hasattr(layer, "slots")}) == 2
