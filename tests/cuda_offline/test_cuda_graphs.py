"""The graphs of the CUDA path: whole, captured, few kernels, no copies of weights. No GPU is needed."""

from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from tests.tiny import pairwise

pytest.importorskip("triton", reason="the CUDA path needs Triton, which has wheels for Linux only")

from tests.cuda_offline.cases import FAMILIES, FORMATS, call_of, fake_model, fake_ranks, zeros
from tests.cuda_offline.generated import generated
from tests.cuda_offline.imagined_gpu import CUDA, FAKE
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
FOR_RANKS = 6  # a layer: two sums, each a copy, the collective and what waits for it
WITHOUT_COPIES = {"bf16": 250 * 32, "int8": 1, "int4": 1}  # tokens up to which no product makes a copy of its weight


def check(family, form, call, n_rows, sm=90, ranks=None):
    """One graph; all on the device; only caches written; nothing captured waits; few kernels; no copies of weights."""
    model = fake_model(FAMILIES[family], FORMATS[form], ranks=ranks)
    function, arguments = call_of(call, model, n_rows)
    made = generated(function, *arguments, sm=sm)
    record = recorded(made)  # an operator that waits cannot be recorded
    assert made.device_types == {"cuda"}
    assert written_inputs(made, record) <= made.static
    if call != "prompt":
        assert made.why_no_cuda_graph is None
        assert {launch.name for launch in record.launches if launch.part is None} <= UNCAPTURED.get(family, set())
        most = MOST_KERNELS[family] if call == "step" else MOST_KERNELS_SEVERAL
        assert kernels_a_layer(made, record) <= most + (0 if ranks is None else FOR_RANKS)
    if n_rows * N_TOKENS[call] <= WITHOUT_COPIES[form]:
        assert not copied_weights(model, record)


@pytest.mark.parametrize(*pairwise(**CHOICES))
def test_a_graph_can_be_captured(family, form, call, n_rows):
    check(family, form, call, n_rows)


@pytest.mark.cuda_offline
@pytest.mark.parametrize("family,form,call,n_rows", list(product(*CHOICES.values())))
def test_every_graph_can_be_captured(family, form, call, n_rows):
    check(family, form, call, n_rows)


@pytest.mark.cuda_offline
@pytest.mark.parametrize("sm", [80, 100])
@pytest.mark.parametrize(*pairwise(**CHOICES))
def test_graphs_of_other_gpus_can_be_captured(family, form, call, n_rows, sm):
    check(family, form, call, n_rows, sm)


@pytest.mark.cuda_offline
@pytest.mark.parametrize("call", ["step", "verification"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_of_ranks_can_be_captured(family, form, call):
    with fake_ranks(2) as ranks:
        check(family, form, call, 2, ranks=ranks)


def test_eager_experts_are_not_copied():
    """Without a graph the choice is read on the host, which a fake tensor refuses; then only those chosen are read."""
    layer = fake_model(FAMILIES["experts"], FORMATS["int4"]).layers[0].feed_forward.w13
    with FAKE, pytest.raises(DynamicOutputShapeException):
        layer(torch.empty(1, 1, 256, device=CUDA), zeros(1, 2))
