"""The graphs of the CUDA path: whole, captured, few kernels without spills, no copies of weights. No GPU is needed.

In every run, every two choices meet: of a family, a form of weights, a call, its rows. Offline, every three meet, of
these and of three GPUs; and so does every family with every form in every step on an H100.
"""

from itertools import product

import pytest
import torch

from tests.tiny import all_offline, covering, pairwise

pytest.importorskip("triton", reason="the CUDA path needs Triton, which has wheels for Linux only")

from tests.cuda_offline.cases import FAMILIES, FORMATS, OTHERS, PRUNED, SHIPPED, call_of, fake_model, fake_ranks
from tests.cuda_offline.generated import generated
from tests.cuda_offline.imagined_gpu import PROCESSORS
from tests.cuda_offline.machine_code import compile_generated, spilled
from tests.cuda_offline.wrapper import copied_weights, kernels_a_layer, recorded, written_inputs

CHOICES = {
    "family": FAMILIES,
    "form": FORMATS,
    "call": ("step", "served step", "verification", "long verification", "draft", "prompt"),
    "n_rows": (1, 2, 16, 32),
}


def different(cases):
    """Each case once; a long verification has one row, because of more rows it runs as a prompt does."""
    return dict.fromkeys((*case[:3], 1 if case[2] == "long verification" else case[3], *case[4:]) for case in cases)


PAIR_NAMES, PAIRS = pairwise(**CHOICES, cache_dtype=(None, torch.int8))
NAMES, TRIPLES = covering(3, **CHOICES, sm=PROCESSORS)
STEPS = product(FAMILIES, FORMATS, ["step"], CHOICES["n_rows"], [90])
MOST_KERNELS = {"plain": 5, "experts": 12, "biased": 5, "sinks": 18, "capped": 11}  # a layer, but for prompts
MOST_TOKENS = 64  # more run as prompts do
# bytes a thread, of kernels of the compiler's own: the softmax of many queries' scores, what chooses experts on an A100
SPILLED = {"softmax": 48, "sigmoid_sum": 8}
FOR_RANKS = 11  # a layer: two sums, each a copy, the collective and what waits for it, and what is then not fused


def graph_of(model, call, n_rows, sm=90):
    """One graph; all on the device; only what may be is written; nothing captured waits; no copies of weights."""
    function, arguments = call_of(call, model, n_rows)
    made = generated(function, *arguments, sm=sm)
    record = recorded(made)  # an operator that waits cannot be recorded
    assert made.device_types == {"cuda"} and written_inputs(made, record) <= made.static
    if call != "prompt":
        assert made.why_no_cuda_graph is None
        assert all(launch.part is not None for launch in record.launches)
    assert not copied_weights(model, record)
    return made, record, arguments[1].numel()


def check(family, form, call, n_rows, sm=90, ranks=None, cache_dtype=None):
    """A graph whose caches are written, of few kernels, which are returned."""
    model = fake_model(FAMILIES[family], (FORMATS | SHIPPED | PRUNED)[form], ranks=ranks)
    model.cache_dtype = cache_dtype
    made, record, n_token = graph_of(model, call, n_rows, sm)
    caches = {i for i, each in enumerate(made.inputs) if isinstance(each, torch.Tensor) and each.ndim == 4}
    assert len(caches) == 2 * model.args.n_layer and caches <= written_inputs(made, record)
    if call != "prompt" and n_token <= MOST_TOKENS:
        assert kernels_a_layer(made, record) <= MOST_KERNELS[family] + (0 if ranks is None else FOR_RANKS)
    return record.tuners


@pytest.mark.parametrize(PAIR_NAMES, different(PAIRS))
def test_a_graph_can_be_captured(family, form, call, n_rows, cache_dtype):
    check(family, form, call, n_rows, cache_dtype=cache_dtype)


OTHER_CASES = [(family, form, call) for family in OTHERS for form in ("bf16", "int4") for call in CHOICES["call"][:3]]
OTHER_CASES += [("biased experts", form, "step") for form in SHIPPED] + [("latent", "float8", "step")]


@pytest.mark.parametrize("family, form, call", all_offline(OTHER_CASES, [("biased experts", "float4", "step")]))
def test_a_graph_of_other_families_can_be_captured(family, form, call):
    graph_of(fake_model(OTHERS[family], (FORMATS | SHIPPED)[form]), call, 2)


@pytest.mark.parametrize("form, n_rows", all_offline([*product(SHIPPED | PRUNED, [1, 16])], [("float8", 1)]))
def test_a_graph_of_shipped_formats_can_be_captured(form, n_rows):
    check("plain", form, "step", n_rows)


def check_machine_code(kernels, sm):
    for name, tuner in kernels.items():
        known = max((most for part, most in SPILLED.items() if part in name), default=0)
        assert spilled(compile_generated(tuner, sm)) <= known, name


def test_a_step_compiles_without_spills():
    check_machine_code(check("plain", "int4", "step", 1), 90)


@pytest.mark.cuda_offline
@pytest.mark.parametrize(NAMES, different([*STEPS, *TRIPLES]))
def test_every_graph_can_be_captured_and_compiles_without_spills(family, form, call, n_rows, sm):
    check_machine_code(check(family, form, call, n_rows, sm), sm)


@pytest.mark.cuda_offline
@pytest.mark.parametrize("call", ["step", "verification"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_of_ranks_can_be_captured(family, form, call):
    with fake_ranks(2) as ranks:
        check(family, form, call, 2, ranks=ranks)
