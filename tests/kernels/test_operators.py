"""The CPU operators for layers, experts and attention against float64, and machines that cannot have them."""

import os
import platform
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils import cpp_extension

from kernels import cpu
from layers.fastest import fastest
from layers.packed import FEW, AnyExperts, CodesLinear, FewRowsLinear
from layers.quantized import LAYERS, QuantSpec, quantize_weight
from mixers.experts import ExpertLinear
from model import ModelArgs
from tests.tiny import dead_process
from weights.checkpoint import build
from weights.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
TINY = ModelArgs(
    dim=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, intermediate_size=96, vocab_size=128, max_seq_length=64
)

needs_operators = pytest.mark.skipif(not cpu.available(), reason="there are no operators for this processor")


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_right(y, x, weight, bias):
    """y is bfloat16(x w^T + b): half a unit in the last place, and the error of a float32 sum, from the truth."""
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-4 * weight.shape[1] ** 0.5)


@needs_operators
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 16, 17, 40, 131])
@pytest.mark.parametrize("K, N", [(32, 8), (64, 7), (37, 30), (1, 5), (31, 1), (576, 1001), (40000, 6)])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_linear_equals_float64(M, K, N, has_bias):
    x, weight = random(M, K, seed=0), random(N, K, seed=1)
    bias = random(N, seed=2) if has_bias else None
    assert_right(torch.ops.gpt_faster.linear_bf16(x, weight, bias), x, weight, bias)


@needs_operators
@pytest.mark.parametrize("K, N", [(576, 50), (37, 16), (300, 7)])
def test_a_row_of_many_does_not_depend_on_those_beside_it(K, N):
    """Where no processor multiplies bfloat16 matrices, so that the product is ours."""
    x, weight = random(200, K, seed=0), random(N, K, seed=1)
    linear, whole = torch.ops.gpt_faster.linear_bf16, torch.ops.gpt_faster.linear_bf16(x, weight, None)
    for i, j in ((0, 17), (3, 35), (50, 179), (183, 200)):
        assert torch.equal(linear(x[i:j], weight, None), whole[i:j]) or not cpu.bf16_rows_apart()


@needs_operators
@pytest.mark.parametrize("K", [64, 50])
def test_inputs_need_not_be_contiguous(K):
    weight, bias = random(K, 2 * 20, seed=1).T[::2], random(40, seed=2)[::2]
    assert not weight.is_contiguous()
    for x in (random(K, 3, seed=0).T, random(3, 2 * K, seed=0)[:, ::2], random(1, 1, K, seed=0).expand(2, 3, K)):
        assert not x.is_contiguous()
        assert_right(torch.ops.gpt_faster.linear_bf16(x, weight, bias), x, weight, bias)


def chosen_experts(T, K, n_expert):
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(n_expert, generator=generator)[:K] for _ in range(T)])


@needs_operators
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("T, K, n_expert", [(1, 2, 8), (5, 1, 3), (7, 3, 4), (40, 2, 4), (100, 4, 64)])
@pytest.mark.parametrize("n_in, n_out", [(64, 32), (96, 40)])
def test_experts_equal_float64(T, K, n_expert, n_in, n_out, bits):
    chosen = chosen_experts(T, K, n_expert)
    layer = ExpertLinear(random(n_expert, n_out, n_in, seed=1)).requires_grad_(False)
    if bits:
        layer = LAYERS[bits](**quantize_weight(layer.weight, QuantSpec(bits, 32 if bits == 4 else None)))
    fast = fastest(layer)(layer)
    exact = layer.dequantize().double() if bits else layer.weight.double()
    for x in (random(T, 1, n_in, seed=2), random(T, K, n_in, seed=2), random(n_in, K, T, seed=2).permute(2, 1, 0)):
        expected = torch.einsum("tkoi,tki->tko", exact[chosen], x.expand(-1, K, -1).double())
        found = fast(x, chosen)
        assert found.dtype == torch.bfloat16 and found.shape == expected.shape
        for each in (found, AnyExperts(layer)(x, chosen)):
            assert (each - expected).norm() < (0.01 if bits else 0.003) * expected.norm()
        for (t, k), e in zip(torch.cartesian_prod(torch.arange(T), torch.arange(K)), chosen.flatten(), strict=True):
            one = ExpertLinear(layer.weight[e : e + 1]) if not bits else layer.expert(e)
            row = x[t, k if x.shape[1] > 1 else 0][None]
            alone = CodesLinear(one)(row) if bits else torch.ops.gpt_faster.linear_bf16(row, one.weight[0], None)
            n_row = (chosen == e).sum()
            assert torch.equal(found[t, k], alone[0]) or (not bits and n_row > FEW)


@needs_operators
@pytest.mark.parametrize("bits", [8, 4])
def test_experts_of_codes_are_exact_in_float32(bits):
    spec, chosen = QuantSpec(bits, 32), chosen_experts(20, 2, 4)
    layer = LAYERS[bits](**quantize_weight(random(4, 40, 64, seed=1), spec))
    x = random(20, 2, 64, seed=2).float()
    torch.testing.assert_close(fastest(layer)(layer)(x, chosen), layer(x, chosen), rtol=1e-5, atol=1e-5)


@needs_operators
def test_mistakes_with_experts_are_errors():
    x, weight, chosen = random(3, 1, 32, seed=0), random(4, 16, 32, seed=1), torch.zeros(3, 2, dtype=torch.long)
    run = torch.ops.gpt_faster.linear_experts
    assert run(x, chosen, weight, None).shape == (3, 2, 16)
    for wrong in (
        (x, chosen + 4, weight),
        (x, chosen - 1, weight),
        (x[:2], chosen, weight),
        (x[..., :31], chosen, weight),
        (x.float(), chosen, weight),
        (x[:, 0], chosen, weight),
    ):
        with pytest.raises(RuntimeError, match="linear_experts"):
            run(*wrong, None)


@needs_operators
@pytest.mark.parametrize("fast", [True, False], ids=["C++", "plain"])
@pytest.mark.parametrize("bits", [None, 8, 4])
@torch.inference_mode()
def test_experts_compile(bits, fast):
    layer = ExpertLinear(random(4, 40, 64, seed=1))
    if bits:
        layer = LAYERS[bits](**quantize_weight(layer.weight, QuantSpec(bits, 32)))
    packed = fastest(layer)(layer) if fast else AnyExperts(layer)
    for T in (1, 20):
        x, chosen = random(T, 1, 64, seed=2), chosen_experts(T, 2, 4)
        compiled = torch.compile(packed, fullgraph=True, dynamic=False, options={"cpp.vec_isa_ok": True})
        assert torch.equal(compiled(x, chosen), packed(x, chosen))


@needs_operators
def test_shape_mistakes_are_errors():
    x, weight = random(1, 32, seed=0), random(8, 32, seed=1)
    for wrong in (x.float(), x[:, :31]):
        with pytest.raises(RuntimeError, match="linear_bf16"):
            torch.ops.gpt_faster.linear_bf16(wrong, weight, None)


@needs_operators
@pytest.mark.parametrize("M", [1, 5, 17])
def test_linear_compiles_whole(M):
    weight, bias = random(30, 50, seed=1), random(30, seed=2)

    @torch.compile(fullgraph=True, options={"cpp.vec_isa_ok": True})
    def doubled(x):
        return torch.ops.gpt_faster.linear_bf16(x * 2, weight, bias)

    x = random(1, M, 50, seed=0)
    assert_right(doubled(x), x * 2, weight, bias)


def stored(*shape, seed, dtype):
    """Random keys or values, as the tensors of `Vectors` and in float64; of int8, scales differ by a factor of ten."""
    if dtype != torch.int8:
        data = random(*shape, seed=seed).to(dtype)
        return (data, None), data.double()
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(-127, 128, shape, generator=generator).to(dtype)
    scales = (0.1 + torch.rand(shape[:-1], generator=generator)) / 50
    return (data, scales), data.double() * scales.double()[..., None]


def exact_attention(q, k, v, mask, scale, sinks):
    """In float64; a sink is the score of one more slot, whose value is zeros. k and v [B, Hkv, C, D]."""
    k, v = (each.repeat_interleave(q.shape[2] // k.shape[1], 1) for each in (k, v))
    scores = torch.einsum("bshd,bhcd->bhsc", q.double(), k) * scale + mask.double()[:, None]
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)), -1)
    return torch.einsum("bhsc,bhcd->bshd", scores.softmax(-1)[..., : k.shape[2]], v)


def some_sinks(n_head, wanted):
    """Some above all scores, some below."""
    return 8 * random(n_head, seed=4).float() if wanted else None


CACHES = [(dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
CACHES += [(dtype, torch.int8) for dtype, _ in CACHES]


@needs_operators
@pytest.mark.parametrize("dtype, cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("head_dim", [*cpu.HEAD_DIMS, 18 * cpu.HEAD_UNIT])
@pytest.mark.parametrize("S", [1, 2, 5])
def test_attention_of_few_queries_equals_float64(S, head_dim, dtype, cache_dtype):
    scale = 1.5 * head_dim**-0.5
    sizes = ((1, 1, 1, 17, 16), (2, 9, 3, 70, 33), (3, 4, 4, 300, 299), (1, 10, 2, 1099, 1070), (1, 10, 2, 1099, 1070))
    for i, (B, H, n_kv_head, slots, used) in enumerate(sizes):
        sinks = some_sinks(H, i % 2)
        q = random(B, S, H, head_dim, seed=0).to(dtype) * 3
        (k, exact_k), (v, exact_v) = (  # of a cache for more rows
            stored(B + 1, n_kv_head, slots, head_dim, seed=i, dtype=cache_dtype) for i in (1, 2)
        )
        mask = torch.zeros(B, S, used, dtype=dtype)
        for row in range(B):  # an end that is not seen, and with a window a beginning
            for query in range(S):
                last = row * used // B + query
                mask[row, query, last + 1 :] = float("-inf")
                mask[row, query, : max(0, last - 20) if B > 1 else 0] = float("-inf")
        y = torch.ops.gpt_faster.attend(q, *k, *v, None, mask, scale, sinks)
        expected = exact_attention(q, exact_k[:B, :, :used], exact_v[:B, :, :used], mask, scale, sinks)
        rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=3e-6)
        parts = ((q[:, s : s + 1], mask[:, s : s + 1]) for s in range(S))
        alone = [torch.ops.gpt_faster.attend(q, *k, *v, None, mask, scale, sinks) for q, mask in parts]
        assert torch.equal(torch.cat(alone, dim=1), y)


@needs_operators
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("window", [None, 40], ids=["causal", "window"])
@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
@pytest.mark.parametrize(
    "S, first, slots", [(17, 0, 17), (64, 0, 100), (130, 3, 140), (100, 333, 450), (20, 2000, 2050)]
)
def test_attention_of_many_queries_equals_float64(S, first, slots, head_dim, window, cache_dtype):
    scale = 1.5 * head_dim**-0.5
    for B, H, n_kv_head, has_sinks in ((1, 1, 1, False), (2, 9, 3, False), (3, 4, 4, True), (1, 6, 2, True)):
        q, sinks = random(B, S, H, head_dim, seed=0) * 3, some_sinks(H, has_sinks)
        (k, exact_k), (v, exact_v) = (  # of a cache for more rows
            stored(B + 1, n_kv_head, slots + 9, head_dim, seed=i, dtype=cache_dtype) for i in (1, 2)
        )
        last = first + torch.arange(S)[None, :, None] - torch.arange(B)[:, None, None] % (first + 1)
        seen = torch.arange(slots) <= last  # [B, S, C]
        if window:
            seen &= torch.arange(slots) > last - window
        v[0 if cache_dtype == torch.bfloat16 else 1][:, :, slots:] = torch.nan  # what no query may touch
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        y = torch.ops.gpt_faster.attend(q, *k, *v, None, mask.bfloat16(), scale, sinks)
        expected = exact_attention(q, exact_k[:B, :, :slots], exact_v[:B, :, :slots], mask, scale, sinks)
        assert y.dtype == torch.bfloat16
        # weights below 1 and the result are rounded to 8 bits; times a scale, a weight of 1 is too
        atol = (2**-9 if cache_dtype == torch.bfloat16 else 2**-8) * expected.abs().max().item()
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=atol)
        row = torch.ops.gpt_faster.attend(q[:1], *k, *v, None, mask[:1].bfloat16(), scale, sinks)
        assert torch.equal(row[0], y[0])  # no row's result depends on the rows beside it


@needs_operators
@pytest.mark.parametrize("S", [1, 5, 40])
def test_attention_to_chosen_rows_equals_attention_to_copies_of_them(S):
    k, v = (random(5, 2, 70, 64, seed=i) for i in (1, 2))
    q, mask = random(4, S, 6, 64, seed=0), torch.zeros(4, S, 60, dtype=torch.bfloat16)
    mask[:, :, 50:] = float("-inf")
    for rows in (torch.tensor([3, 0, 4, 1]), torch.tensor([2, 2, 0, 2])):
        found = torch.ops.gpt_faster.attend(q, k, None, v, None, rows, mask, 0.1)
        assert torch.equal(found, torch.ops.gpt_faster.attend(q, k[rows], None, v[rows], None, None, mask, 0.1))


@needs_operators
def test_mistakes_with_attention_are_errors():
    q, k, mask, rows = torch.ones(2, 1, 4, 64), torch.ones(3, 2, 9, 64), torch.zeros(2, 1, 9), torch.tensor([2, 0])
    codes, scales = torch.ones(3, 2, 9, 64, dtype=torch.int8), torch.ones(3, 2, 9)

    def run(q, k, v, rows, mask, scale, *scales):
        return torch.ops.gpt_faster.attend(q, k, *scales[:1] or [None], v, *scales[1:] or [None], rows, mask, scale)

    assert run(q, k, k, rows, mask, 1.0).shape == run(q, codes, codes, rows, mask, 1.0, scales, scales).shape == q.shape
    for wrong in (
        (codes, codes),
        (k, k, scales, scales),
        (codes, codes, scales, scales[:2]),
        (codes, codes, scales.double(), scales),
        (codes, codes, scales, scales.mT.contiguous().mT),
    ):
        with pytest.raises(RuntimeError, match="attend"):
            run(q, *wrong[:2], rows, mask, 1.0, *wrong[2:])
    for sinks in (torch.ones(3), torch.ones(4).bfloat16(), torch.ones(8)[::2]):
        with pytest.raises(RuntimeError, match="attend: sinks"):
            torch.ops.gpt_faster.attend(q, k, None, k, None, rows, mask, 1.0, sinks)
    for wrong in (
        (q, k, k, rows + 1, mask),
        (q, k, k, rows - 1, mask),
        (q, k, k, rows[:1], mask),
        (q, k, k, rows.int(), mask),
        (q, k[:1], k[:1], None, mask),
        (q, k, k[:, :1], None, mask),
        (q, k.mT.contiguous().mT, k, None, mask),
        (q, k, k.bfloat16(), None, mask),
        (q, k, k, None, mask.bfloat16()),
        (q, k, k, None, mask[:1]),
        (q, k, k, None, torch.zeros(2, 1, 10)),
        (q[:, :, :3], k, k, None, mask),
        (q[..., :48], k[..., :48].contiguous(), k[..., :48].contiguous(), None, mask),
        (q.expand(2, 17, 4, 64), k, k, None, mask.expand(2, 17, 9)),
    ):
        with pytest.raises(RuntimeError, match="attend"):
            run(*wrong, 1.0)


def logits_of_tiny():
    shapes = Layout(TINY).tensors
    state = {name: 0.1 * random(*meta.shape, seed=i) for i, (name, meta) in enumerate(shapes.items())}
    state = {name: value + 1 if value.ndim == 1 else value for name, value in state.items()}
    model = build(TINY, state)
    cache = model.new_cache(1, 32).view()
    tokens, pos = torch.arange(12)[None], torch.arange(12)[None]
    steps = [model(tokens[:, i : i + 1], pos[:, i : i + 1], cache) for i in range(12)]
    return model, torch.cat(steps, dim=1).float()


@torch.inference_mode()
def test_model_works_without_the_operators(monkeypatch):
    model, logits = logits_of_tiny()
    assert any(isinstance(layer, FewRowsLinear) for layer in model.modules()) == cpu.available()
    monkeypatch.setattr(cpu, "available", lambda: False)
    plain, expected = logits_of_tiny()
    assert not any(isinstance(layer, FewRowsLinear) for layer in plain.modules())
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=0.02 * expected.abs().max().item(), rtol=0)


def run_python(code, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


def test_processors_without_a_level_build_nothing_and_have_no_operators(tmp_path):
    code = """
        import torch
        from kernels import cpu
        cpu.level = lambda: None
        print(cpu.available(), cpu.isa(), hasattr(torch.ops.gpt_faster, "linear_codes"))
    """
    result = run_python(textwrap.dedent(code), XDG_CACHE_HOME=str(tmp_path), PATH=os.environ["PATH"])
    assert result.stdout.split() == ["False", "plain", "False"] and not result.stderr and not list(tmp_path.iterdir())


def test_the_level_is_the_first_that_the_processor_has(monkeypatch):
    avx2 = {"avx2", "fma3", "f16c"}
    avx512 = avx2 | {"avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni"}
    neon = {"neon", "dot"}
    monkeypatch.delenv("GPT_FASTER_ISA", raising=False)
    amx = avx512 | {"avx512_bf16", "amx_tile", "amx_bf16"}
    for has, asked, expected in (
        (amx, "", "amx"),
        (amx, "avx512", "avx512.bf16"),
        (amx - {"amx_bf16"}, "", "avx512.bf16"),
        (amx - {"avx512_bf16"}, "", "avx512"),
        (avx512 | {"avx512_bf16"}, "", "avx512.bf16"),
        (avx512, "", "avx512"),
        (avx512 | {"avx512_bf16"}, "avx512", "avx512.bf16"),
        (avx512 - {"avx512_vnni"}, "", "avx2"),
        (avx2 | {"avx_vnni"}, "", "avx2.vnni"),
        (avx512 | {"avx512_bf16"}, "avx2", "avx2"),
        (avx512, "plain", None),
        (avx2 - {"fma3"}, "", None),
        (neon | {"i8mm", "bf16"}, "neon", "neon.bf16"),
        (neon | {"bf16"}, "", "neon"),
        (neon - {"dot"}, "", None),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: dict.fromkeys(has, True))
        monkeypatch.setenv("GPT_FASTER_ISA", asked)
        assert cpu.level.__wrapped__() == expected
    for has, asked, words in (
        (avx2, "avx512", "GPT_FASTER_ISA is 'avx512'; this processor has avx2, plain"),
        (avx512, "amx", "GPT_FASTER_ISA is 'amx'; this processor has avx512, avx2, plain"),
        (avx512, "AVX2", "GPT_FASTER_ISA is 'AVX2'; this processor has avx512, avx2, plain"),
        (neon, "avx2", "GPT_FASTER_ISA is 'avx2'; this processor has neon, plain"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: dict.fromkeys(has, True))
        monkeypatch.setenv("GPT_FASTER_ISA", asked)
        with pytest.raises(ValueError, match=words):
            cpu.level.__wrapped__()


def test_each_build_has_a_library_of_its_own(monkeypatch, tmp_path):
    """One for each level, flag, compiler, torch, C library and text of the sources."""
    monkeypatch.setattr(cpu, "compiler_version", lambda: "c++ 1")
    paths = {cpu.library_folder(name) for name in cpu.LEVELS}
    assert len(paths) == len(cpu.LEVELS) and cpu.library_folder("avx512") in paths
    folder = shutil.copytree(cpu.FOLDER, tmp_path / "cpu")
    (folder / "simd.h").write_text("changed")
    for owner, name, value in (
        (cpu, "compiler_version", lambda: "c++ 2"),
        (cpu, "LEVELS", {"avx512": replace(cpu.AVX512, flags=("-mavx512f",))}),
        (cpu, "FOLDER", folder),
        (torch, "__version__", "0"),
        (platform, "libc_ver", lambda: ("glibc", "0")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert cpu.library_folder("avx512") not in paths, name


@pytest.mark.parametrize("version, is_gcc", [("g++ (Debian 12.2.0)", True), ("Apple clang version 17.0.0", False)])
def test_flags_of_gcc_are_for_gcc(monkeypatch, version, is_gcc):
    monkeypatch.setattr(cpu, "compiler_version", lambda: version)
    assert (set(cpu.IN_ORDER) <= set(cpu.build_flags("avx2"))) == is_gcc and "-mfma" in cpu.build_flags("avx2")


def test_a_library_that_is_damaged_or_not_ours_is_built_again(monkeypatch, tmp_path):
    def compiler(_, sources, build_directory, **__):
        Path(build_directory, "cpu.so").write_bytes(b"a library")

    monkeypatch.setattr(cpp_extension, "load", compiler)
    (tmp_path / ".build.elsewhere.1.tmp").mkdir()  # of another machine, which may be at work
    (tmp_path / f".build.{platform.node()}.{dead_process()}.tmp").mkdir()
    whole = cpu.build("avx512", tmp_path)
    assert cpu.find_library(tmp_path) == whole and len(list(tmp_path.iterdir())) == 2
    for content in (b"a lib", b"", b"another library"):
        whole.write_bytes(content)
        (tmp_path / "cpu.so").write_bytes(content)
        assert cpu.find_library(tmp_path) is None
        assert cpu.build("avx512", tmp_path) == whole and cpu.find_library(tmp_path) == whole
        assert len(list(tmp_path.iterdir())) == 2


KILLED = """#!/bin/sh
[ "$1" = --version ] && echo c++ 1 && exit
echo "$@" >> $0.log
echo "c++: fatal error: Killed signal terminated program cc1plus" >&2
exit 1
"""
FAILURES = {  # the compiler, where libraries are kept, and what is said
    ("/bin/false", "."): "'/bin/false', '--version'",
    ("/no/such/compiler", "."): "there is no C++ compiler /no/such/compiler; install g++, or name another in CXX",
    ("{}/killed", "."): "(c++: fatal error: Killed signal terminated program cc1plus)",
    ("c++", "/dev/null"): "(Not a directory: /dev/null/gpt-faster",
}


@pytest.fixture
def killed_compiler(tmp_path):
    """A compiler that fails half-way; it writes what it is told to a file beside it."""
    path = tmp_path / "killed"
    path.write_text(KILLED)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", cpu.LEVELS)
def test_a_build_uses_the_instructions_of_its_level_and_no_others(name, killed_compiler, monkeypatch, tmp_path):
    """-march=native would make libraries that another machine with the same home folder cannot run."""
    monkeypatch.setenv("CXX", str(killed_compiler))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # to which the build adds
    with pytest.raises(RuntimeError, match="Killed"):
        cpu.build(name, tmp_path)
    told = killed_compiler.with_suffix(".log").read_text().split()
    assert [flag for flag in told if flag.startswith("-m")] == [f for f in cpu.LEVELS[name].flags if f[1] == "m"]


@pytest.mark.parametrize("compiler, cache", FAILURES)
def test_a_failing_build_says_so_in_one_line_and_goes_on(
    compiler, cache, killed_compiler, monkeypatch, tmp_path, capfd
):
    monkeypatch.setattr(cpu, "level", lambda: "avx512")
    monkeypatch.setattr(cpu, "compiler_version", cpu.compiler_version.__wrapped__)
    monkeypatch.setenv("CXX", compiler.format(killed_compiler.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    assert not cpu.available.__wrapped__()
    printed = capfd.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "CPU operators cannot be built" in line]
    assert line.startswith("PyTorch's own linear layers are used") and FAILURES[compiler, cache] in line
    assert len(printed.err.splitlines()) <= 2, printed.err  # the other: that a build was begun
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.tmp"))


@needs_operators
def test_the_build_needs_only_a_compiler_on_the_path(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("c++", "as", "ld"):  # no ninja: this Python's own is not on the path unless the venv is activated
        (tools / tool).symlink_to(shutil.which(tool))
    code = "from kernels import cpu; print(cpu.available())"
    result = run_python(code, XDG_CACHE_HOME=str(tmp_path), PATH=str(tools))
    assert result.stdout.strip() == "True", result.stderr
    (library,) = tmp_path.rglob("kernels/*/*")
    assert library == cpu.find_library(library.parent)
