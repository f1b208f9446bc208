"""Levels of instructions that are not this processor's own: their operators, in an emulator if need be."""

import os
import shutil

import pytest
import torch

from kernels import cpu
from layers.quantized import QuantSpec
from tests.kernels import test_delta_operator as delta
from tests.kernels import test_fused_blocks as blocks
from tests.kernels import test_operators as operators
from tests.kernels.emulated import EmulatedOperators
from tests.layers import test_packed as layers
from tests.layers import test_two_four as two_four

FLOAT32, FLOAT16, BFLOAT16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
FORMS = [(QuantSpec(8), BFLOAT16), (QuantSpec(8, 64), FLOAT16), (QuantSpec(4, 32), BFLOAT16)]
FORMS += [
    (QuantSpec(4, 128), FLOAT32),
    (QuantSpec(8, 64, "float8"), BFLOAT16),
    (QuantSpec(8, 16, "int8.zeros"), FLOAT16),
    (QuantSpec(4, 32, "float4"), BFLOAT16),
    (QuantSpec(4, 64, "nf4"), BFLOAT16),
]
TWO_FOUR = [(two_four.SPECS[0], BFLOAT16), (two_four.SPECS[0], FLOAT32), (two_four.SPECS[2], FLOAT16)]
CASES = [  # a test, and the arguments for it
    *((operators.test_linear_equals_float64, M, 37, 30, True) for M in (1, 5)),
    *((operators.test_linear_equals_float64, M, 576, 101, False) for M in (1, 2, 16)),
    *((layers.test_operator_equals_float64, *form) for form in FORMS),
    *((layers.test_a_row_does_not_depend_on_the_rows_beside_it, *form) for form in FORMS),
    (layers.test_operator_with_inputs_that_are_no_multiple, 33, BFLOAT16),
    (layers.test_operator_on_zeros_nan_infinity_no_rows_and_strided_inputs,),
    *((two_four.test_two_four_equals_float64, *form) for form in TWO_FOUR),
    (two_four.test_no_row_of_a_two_four_layer_depends_on_those_beside_it, two_four.SPECS[0]),
    (two_four.test_fused_blocks_take_two_four_layers, two_four.SPECS[1], BFLOAT16, {}),
    *((operators.test_experts_equal_float64, 7, 3, 4, 96, 40, bits) for bits in (None, 8, 4)),
    *((operators.test_experts_equal_float64, 40, 2, 3, 64, 32, bits) for bits in (8, 4)),
    *((operators.test_experts_of_codes_are_exact_in_float32, bits) for bits in (8, 4)),
    *((operators.test_attention_of_few_queries_equals_float64, 2, D, BFLOAT16, BFLOAT16) for D in cpu.HEAD_DIMS),
    *((operators.test_attention_of_few_queries_equals_float64, 2, 64, *types) for types in operators.CACHES),
    *((operators.test_attention_of_many_queries_equals_float64, 20, 33, 60, D, None, BFLOAT16) for D in cpu.HEAD_DIMS),
    *(
        (operators.test_attention_of_many_queries_equals_float64, 70, 33, 110, 64, 40, kind)
        for kind in (BFLOAT16, INT8)
    ),
    *((delta.test_delta_net_equals_its_definition, dtype, 3) for dtype in (FLOAT32, BFLOAT16)),
    *((blocks.test_fused_blocks_equal_the_blocks_one_by_one, *form, {}, None, [(1, 13)]) for form in blocks.FORMS[:-1]),
    *(
        (blocks.test_fused_blocks_equal_the_blocks_one_by_one, BFLOAT16, None, blocks.EXTRAS, kind, [(2, 3)])
        for kind in (None, INT8)
    ),
]


FUSED = [(8, {}, None), (4, blocks.EXTRAS, INT8), (None, {}, None)]
SEEN = [(64, 0, 100, D, None, BFLOAT16) for D in cpu.HEAD_DIMS]
SEEN += [(130, 33, 170, 64, 40, kind) for kind in (BFLOAT16, INT8)]
PROMPTS = [  # that a matrix unit multiplies
    *((layers.test_prompts_equal_float64, spec) for spec, _ in FORMS),
    *((operators.test_attention_of_many_queries_equals_float64, *seen) for seen in SEEN),
    *((blocks.test_fused_blocks_equal_the_blocks_one_by_one, BFLOAT16, *some, [(2, 70)]) for some in FUSED),
]


def tools_for(level):
    """Flags and a compiler for a level, and the command of an emulator, if the processor lacks the level."""
    if level == cpu.level():
        pytest.skip("the tests of operators themselves test this processor's own level")
    has, flags = torch.cpu.get_capabilities(), cpu.LEVELS[level].flags
    if level == "amx" and has.get("avx2"):  # the program has a matrix unit of its own
        level, flags = "avx2", (*cpu.AVX2.flags, cpu.MATRIX_UNIT)
    if all(has.get(need) for need in cpu.LEVELS[level].needs):
        if "clang" in cpu.compiler_version():
            pytest.skip("the program is linked with GCC's OpenMP")
        return flags, os.environ.get("CXX", "c++"), []
    if not level.startswith("neon"):
        pytest.skip(f"this processor has no {level}")
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if not (shutil.which(compiler) and shutil.which(emulator)):
        pytest.skip(f"{level} needs {compiler} and {emulator}: apt-get install g++-aarch64-linux-gnu qemu-user")
    return flags, compiler, [emulator, "-cpu", "max"]


@pytest.mark.parametrize("level", ["avx2", "neon", "neon.bf16", "amx"])
def test_operators_of_a_level_pass_the_tests_of_operators(level, monkeypatch, tmp_path):
    emulated = EmulatedOperators(*tools_for(level), tmp_path)
    emulated.bf16_rows_apart = lambda: level != "neon.bf16"
    monkeypatch.setattr(torch.ops, "gpt_faster", emulated)
    monkeypatch.setattr(cpu, "available", lambda: True)
    monkeypatch.setattr(cpu, "level", lambda: level)
    for test, *arguments in PROMPTS if level == "amx" else CASES:
        test(*arguments)
    emulated.close()
