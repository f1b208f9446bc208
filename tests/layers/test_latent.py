"""Latent attention that reads latents alone, against the plain form, which makes keys and values of each head."""

import pytest
import torch

from engine.cache import copy_prefix, row_bytes
from layers.fastest import pack_
from layers.mixers.latent import AbsorbedAttention, OperatorHeadLinear
from layers.quantized import QuantSpec, linear_table, quantize_
from model import ModelArgs, Transformer
from tests.layers.test_fastest import needs_operators
from weights.layout import weight_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"dim": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "head_dim": 56, "intermediate_size": 96}
ARGS = ModelArgs(
    **SIZES, vocab_size=130, max_seq_length=64, kv_latent=64, q_latent=64, value_dim=40, rope_dim=32, qkv_bias=True
)


def model_of(dtype=torch.float32, spec=None):
    torch.manual_seed(0)
    model = Transformer(ARGS).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 4 + (parameter.ndim == 1))
    model = model.to(dtype)
    if spec is not None:
        quantize_(model, linear_table(model, spec, None))
    return model


def packed(*how):
    model = model_of(*how)
    pack_(model)
    return model


def run(model, tokens, start, cache):
    return model(tokens, torch.arange(start, start + tokens.shape[1]).expand(len(tokens), -1), cache)


TOKENS = torch.randint(130, (2, 45), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_a_step_reads_nothing_but_latents():
    """Few tokens never see wkv_b, which would make keys and values of them all."""
    model, plain = packed(), model_of()
    expected, cache = run(plain, TOKENS, 0, None), model.new_cache(2, 64)
    run(model, TOKENS[:, :40], 0, cache.view(length=48))
    for layer in model.layers:
        assert type(layer.attention) is AbsorbedAttention
        layer.attention.wkv_b = None
    found = [run(model, TOKENS[:, a:b], a, cache.view(length=48)) for a, b in ((40, 41), (41, 45))]
    torch.testing.assert_close(torch.cat(found, 1), expected[:, 40:], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_rows_of_a_cache_that_are_chosen_and_copied():
    model, cache = packed(), packed().new_cache(4, 64)
    expected = run(model, TOKENS, 0, None)
    run(model, TOKENS[:, :43], 0, cache.view(torch.tensor([3, 0]), 48))
    copy_prefix(cache, torch.tensor([0, 3]), torch.tensor([1, 2]), 43)
    found = run(model, TOKENS[:, 43:], 43, cache.view(torch.tensor([2, 1]), 48))
    torch.testing.assert_close(found, expected[:, 43:], atol=1e-4, rtol=1e-4)


@needs_operators
@pytest.mark.parametrize("spec", [None, QuantSpec(8), QuantSpec(4, 32)], ids=str)
@torch.inference_mode()
def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_form(spec):
    model, plain = packed(torch.bfloat16, spec), model_of(torch.bfloat16, spec)
    assert any(type(each) is OperatorHeadLinear for each in model.modules())
    exact, cache = run(model_of(torch.float32, spec), TOKENS, 0, None), model.new_cache(2, 64)
    found = [run(model, TOKENS[:, a:b], a, cache.view(length=48)) for a, b in ((0, 40), (40, 44), (44, 45))]
    error, usual = ((logits - exact).norm() for logits in (torch.cat(found, 1), run(plain, TOKENS, 0, None)))
    assert error < 1.5 * usual


def test_what_is_kept_and_read():
    model = packed()
    assert row_bytes(model, 10) == 2 * 10 * (64 + 32) * 4  # layers, slots, latent and turned key, float32
    weights = sum(t.numel() for name, t in model_of().state_dict().items() if name != "tok_embeddings.weight")
    assert weight_bytes(model) == 4 * weights  # the parts of wkv_b in its place


def test_an_int8_cache_is_refused_by_name():
    model = packed()
    model.cache_dtype = torch.int8
    for made in (lambda: row_bytes(model, 10), lambda: model.new_cache(1, 10)):
        with pytest.raises(ValueError, match="int8 caches are not supported in latent attention"):
            made()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"kv_latent": None}, "q_latent 64 is for a model with kv_latent"),
        ({"rope_dim": None}, "rope_dim below head_dim, 56"),
        ({"value_dim": None}, "kv_latent needs value_dim"),
        ({"n_kv_head": 2}, "as many key heads as heads, 4, not 2"),
        ({"sliding_window": 8}, "sliding_window 8 is not supported in latent attention"),
        ({"attention_sinks": True}, "attention_sinks True is not supported in latent attention"),
    ],
    ids=str,
)
def test_fields_that_contradict_each_other(fields, words):
    with pytest.raises(ValueError, match=words):
        ModelArgs.from_dict(ARGS.to_dict() | fields)
