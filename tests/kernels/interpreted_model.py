"""A model of the layers for CUDA in Triton's interpreter, against float64; run by `test_gpu_kernels.py`."""

import copy

import pytest
import torch

from layers.gpu.attention import GpuAttention
from layers.gpu.experts import GpuExperts
from layers.quantized import QuantSpec, linear_table, quantize_, replace_
from model import ModelArgs, Transformer

ARGS = ModelArgs(
    dim=64, n_layer=2, n_head=2, n_kv_head=1, head_dim=32, intermediate_size=32, vocab_size=48, max_seq_length=64,
    sliding_window=5, full_layers=(1,), window_rope_base=100.0, qk_norm=True, n_expert=2, n_expert_used=2,
)  # fmt: skip  # all experts are used, because rounding might choose others


@torch.no_grad()
def logits(model):
    """Of a prompt, of few tokens and of one, in two rows at positions of their own, which use rows 2 and 0 of three."""
    tokens = torch.randint(48, (2, 12), generator=torch.Generator().manual_seed(1))
    pos, cache = torch.arange(12) + torch.tensor([[0], [3]]), model.new_cache(3, 20)
    view = cache.view(torch.tensor([2, 0]), 16)
    return torch.cat([model(tokens[:, a:b], pos[:, a:b], view) for a, b in ((0, 8), (8, 11), (11, 12))], 1)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@torch.no_grad()
def test_a_model_equals_float64(cache_dtype):
    torch.manual_seed(0)
    model = Transformer(ARGS).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 4 + (parameter.ndim == 1))
    quantize_(model, {k: v for k, v in linear_table(model, QuantSpec(4, 32), None).items() if "feed" in k})
    model, model.cache_dtype = model.half(), cache_dtype
    exact = copy.deepcopy(model).double()
    for i, block in enumerate(model.layers):
        replace_(model, f"layers.{i}.attention", GpuAttention(block.attention))
        replace_(model, f"layers.{i}.feed_forward", GpuExperts(block.feed_forward))
    found, wanted = logits(model), logits(exact)
    assert (found - wanted).norm() < 0.01 * wanted.norm()
