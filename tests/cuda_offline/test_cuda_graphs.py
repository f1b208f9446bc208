"""The graphs of the CUDA path: whole, captured, few kernels, no copies of weights. No GPU is needed."""

from itertools import product

import pytest

from tests.tiny import pairwise

pytest.importorskip("triton", reason="the CUDA path needs Triton, which has wheels for Linux only")

from tests.cuda_offline.cases import FAMILIES, FORMATS, call_of, fake_model
from tests.cuda_offline.generated import generated
from tests.cuda_offline.wrapper import copied_weights, kernels_a_layer, recorded, written_inputs

CHOICES = {
    "family": FAMILIES,
    "form": FORMATS,
    "call": ("step", "verification", "draft", "prompt"),
    "n_rows": (1, 2, 16, 32),
}
UNCAPTURED = {"experts": {"gpt_faster.each_expert.default"}}  # operators that stand between captured parts
N_TOKENS = {"step": 1, "verification": 5, "draft": 2, "prompt": 250}  # a row
# launches from one layer's cache write to the next one's; attention of several queries takes its slowest path here
MOST_KERNELS = {"plain": 13, "experts": 17, "biased": 14, "capped": 17}  # a layer, in a step
MOST_KERNELS_SEVERAL = 22  # a layer, in a verification or a draft's first pass
WITHOUT_COPIES = {"bf16": 250 * 32, "int8": 1, "int4": 1}  # tokens up to which no product makes a copy of its weight


def check(family, form, call, n_rows, sm):
    """One graph; all on the device; only caches written; nothing captured waits; few kernels; no copies of weights."""
    model = fake_model(FAMILIES[family], FORMATS[form])
    function, arguments = call_of(call, model, n_rows)
    made = generated(function, *arguments, sm=sm)
    record = recorded(made)  # an operator that waits cannot be recorded
    assert made.device_types == {"cuda"}
    assert written_inputs(made, record) <= made.static
    if call != "prompt":
        assert made.why_no_cuda_graph is None
        assert {launch.name for launch in record.launches if launch.part is None} <= UNCAPTURED.get(family, set())
        most = MOST_KERNELS[family] if call == "step" else MOST_KERNELS_SEVERAL
        assert kernels_a_layer(made, record) <= most
    if n_rows * N_TOKENS[call] <= WITHOUT_COPIES[form]:
        assert not copied_weights(model, record)


@pytest.mark.parametrize(*pairwise(**CHOICES))
def test_a_graph_can_be_captured(family, form, call, n_rows):
    check(family, form, call, n_rows, sm=90)


@pytest.mark.cuda_offline
@pytest.mark.parametrize("family,form,call,n_rows", list(product(*CHOICES.values())))
def test_every_graph_can_be_captured(family, form, call, n_rows):
    check(family, form, call, n_rows, sm=90)


@pytest.mark.cuda_offline
@pytest.mark.parametrize("sm", [80, 100])
@pytest.mark.parametrize(*pairwise(**CHOICES))
def test_graphs_of_other_gpus_can_be_captured(family, form, call, n_rows, sm):
    check(family, form, call, n_rows, sm)
