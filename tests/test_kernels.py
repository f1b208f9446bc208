"""The CPU operators against float64, against the plain path, and on machines that cannot have them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from checkpoint import build, expected_tensors
from kernels import cpu
from model import ModelArgs, attend
from qlinear import FewRowsLinear

ROOT = Path(__file__).resolve().parent.parent
TINY = ModelArgs(
    dim=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, intermediate_size=96, vocab_size=128, max_seq_length=64
)

needs_bf16 = pytest.mark.skipif(
    not cpu.has_bf16(), reason="this processor lacks AVX-512 BF16, or the operators could not be built"
)


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_right(y, x, weight, bias):
    """y is bfloat16(x w^T + b): half a unit in the last place, and the error of a float32 sum, from the truth."""
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-4 * weight.shape[1] ** 0.5)


@needs_bf16
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 16, 17])
@pytest.mark.parametrize("K, N", [(32, 8), (64, 7), (37, 30), (1, 5), (31, 1), (576, 1001), (40000, 6)])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_linear_equals_float64(M, K, N, has_bias):
    x, weight = random(M, K, seed=0), random(N, K, seed=1)
    bias = random(N, seed=2) if has_bias else None
    assert_right(torch.ops.gpt_faster.linear_bf16(x, weight, bias), x, weight, bias)


@needs_bf16
@pytest.mark.parametrize("K", [64, 50])
def test_inputs_need_not_be_contiguous(K):
    weight, bias = random(K, 2 * 20, seed=1).T[::2], random(40, seed=2)[::2]
    assert not weight.is_contiguous()
    for x in (random(K, 3, seed=0).T, random(3, 2 * K, seed=0)[:, ::2], random(1, 1, K, seed=0).expand(2, 3, K)):
        assert not x.is_contiguous()
        assert_right(torch.ops.gpt_faster.linear_bf16(x, weight, bias), x, weight, bias)


@needs_bf16
def test_shape_mistakes_are_errors():
    x, weight = random(1, 32, seed=0), random(8, 32, seed=1)
    for wrong in (x.float(), x[:, :31]):
        with pytest.raises(RuntimeError, match="linear_bf16"):
            torch.ops.gpt_faster.linear_bf16(wrong, weight, None)


@needs_bf16
@pytest.mark.parametrize("M", [1, 5, 17])
def test_linear_compiles_whole(M):
    weight, bias = random(30, 50, seed=1), random(30, seed=2)

    @torch.compile(fullgraph=True, options={"cpp.vec_isa_ok": True})
    def doubled(x):
        return torch.ops.gpt_faster.linear_bf16(x * 2, weight, bias)

    x = random(1, M, 50, seed=0)
    assert_right(doubled(x), x * 2, weight, bias)


@pytest.mark.skipif(not cpu.has_vnni(), reason="this processor lacks AVX-512, or the operators could not be built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
@pytest.mark.parametrize("S", [1, 2, 5])
def test_attention_of_few_queries_equals_float64(S, head_dim, dtype):
    for B, H, n_kv_head, slots, used in ((1, 1, 1, 17, 16), (2, 9, 3, 70, 33), (3, 4, 4, 300, 299)):
        q = random(B, S, H, head_dim, seed=0).to(dtype) * 3
        k, v = (random(B + 1, n_kv_head, slots, head_dim, seed=i).to(dtype) for i in (1, 2))  # of a cache for more rows
        mask = torch.zeros(B, S, used, dtype=dtype)
        for row in range(B):  # an end that is not seen, and with a window a beginning
            for query in range(S):
                last = row * used // B + query
                mask[row, query, last + 1 :] = float("-inf")
                mask[row, query, : max(0, last - 20)] = float("-inf")
        y = torch.ops.gpt_faster.attend_few(q, k, v, mask)
        wide = [tensor[:B, :, :used].double() for tensor in (k, v)]
        expected = attend(q.double(), *wide, mask.double().repeat(1, H // n_kv_head, 1))
        rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=3e-6)
        alone = [torch.ops.gpt_faster.attend_few(q[:, i : i + 1], k, v, mask[:, i : i + 1]) for i in range(S)]
        assert torch.equal(torch.cat(alone, dim=1), y)


def logits_of_tiny():
    shapes = expected_tensors(TINY)
    state = {name: 0.1 * random(*meta.shape, seed=i) for i, (name, meta) in enumerate(shapes.items())}
    state = {name: value + 1 if value.ndim == 1 else value for name, value in state.items()}
    model = build(TINY, state)
    model.setup_caches(1, 32)
    tokens, pos = torch.arange(12)[None], torch.arange(12)[None]
    steps = [model(tokens[:, i : i + 1], pos[:, i : i + 1]) for i in range(12)]
    return model, torch.cat(steps, dim=1).float()


@torch.inference_mode()
def test_model_works_without_the_operators(monkeypatch):
    model, logits = logits_of_tiny()
    assert any(isinstance(layer, FewRowsLinear) for layer in model.modules()) == cpu.has_bf16()
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    plain, expected = logits_of_tiny()
    assert not any(isinstance(layer, FewRowsLinear) for layer in plain.modules())
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=0.02 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("compiler, reason", [("/bin/false", ""), ("/no/such/compiler", "no C++ compiler")])
def test_a_failing_build_says_so_in_one_line_and_goes_on(compiler, reason, tmp_path):
    code = "from kernels import cpu; print(cpu.available(), cpu.has_bf16())"
    env = {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"], result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "CPU operators cannot be built" in line]
    assert line.startswith("PyTorch's own linear layers are used") and reason in line
    assert len(result.stderr.splitlines()) <= 2, result.stderr  # the other: that a build was begun
    assert not list(tmp_path.rglob("*.so"))


@needs_bf16
def test_the_build_needs_only_a_compiler_on_the_path(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("c++", "as", "ld"):  # no ninja: this Python's own is not on the path unless the venv is activated
        (tools / tool).symlink_to(shutil.which(tool))
    env = {"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tools)}
    code = "from kernels import cpu; print(cpu.available())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr
    assert [path.name for path in tmp_path.rglob("kernels/*/*")] == ["cpu.so"]
