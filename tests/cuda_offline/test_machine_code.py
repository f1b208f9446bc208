"""Every kernel of a step compiles for a GPU without spilled registers, and reads weights in wide pieces."""

import pytest

pytest.importorskip("triton", reason="the CUDA path needs Triton, which has wheels for Linux only")

from tests.cuda_offline.cases import FAMILIES, FORMATS, call_of, fake_model
from tests.cuda_offline.generated import generated
from tests.cuda_offline.machine_code import compile_generated
from tests.cuda_offline.wrapper import recorded


def check(family, form, n_rows, sm):
    function, arguments = call_of("step", fake_model(FAMILIES[family], FORMATS[form]), n_rows)
    for name, tuner in recorded(generated(function, *arguments, sm=sm)).tuners.items():
        assert not compile_generated(tuner, sm).spilled, name


def test_a_step_compiles_without_spills():
    check("plain", "int4", 1, sm=90)


@pytest.mark.cuda_offline
@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_compiles_without_spills(family, sm):
    for form in FORMATS:
        check(family, form, 2, sm)
