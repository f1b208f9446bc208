"""A cache of int8 keys and values against numbers by hand, a float cache that holds the same, and form against form."""

import copy
import pydoc_data.topics

import numpy as np
import pytest
import torch

from engine.cache import allocate, copy_prefix, row_bytes
from engine.compile import compile_step
from engine.decode import decode_one_token
from engine.engine import Engine, generate
from engine.speculation.drafters import PromptLookup
from engine.speculation.speculative import Speculation
from layers.fastest import pack_
from layers.quantized import QuantSpec, linear_table, quantize_
from measure.perplexity import perplexity
from mixers.layer_kinds import Vectors, quantize_vectors
from model import Blocks
from tests.tiny import DIFFERING, GREEDY, continuation, random_ids, tiny_model
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


def with_int8_cache(model):
    model = copy.deepcopy(model)
    model.cache_dtype = torch.int8
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_and_scales_by_hand(dtype):
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -127], [0, 0, 0, 0, 0, 0], [-4, 1, 2, 3, 0, 0]], dtype=dtype)
    codes, scales = quantize_vectors(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -127], [0] * 6, [-127, 32, 64, 95, 0, 0]]  # 31.75, 63.5, 95.25
    assert scales.dtype == torch.float32 and scales[[0, 2]].tolist() == [1, np.float32(4) / np.float32(127)]
    assert torch.equal(codes[1] * scales[1], torch.zeros(6))
    assert not (codes * quantize_vectors(x * torch.nan)[1][:, None]).isfinite().any()  # what went wrong is not hidden


def write_what_int8_gives_back(self, rows, pos, x):
    """In place of `Vectors.write`, in float64."""
    wide = x.double().numpy()
    scales = np.abs(wide).max(-1, keepdims=True) / 127
    self.data[rows[:, None], :, pos] = torch.from_numpy(np.rint(wide / scales) * scales).to(x.dtype)


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 9}, {"attention_softcap": 4.0}, DIFFERING], ids=str)
@torch.inference_mode()
def test_logits_equal_those_of_a_float_cache_that_holds_what_int8_gives_back(fields, monkeypatch):
    model, (tokens,) = tiny_model(**fields), random_ids(40)
    tokens, pos = torch.tensor([tokens] * 2), torch.arange(40).repeat(2, 1)

    def logits(model):
        view = model.new_cache(4, 64).view(torch.tensor([3, 1]), 48)
        return torch.cat([model(tokens[:, a:b], pos[:, a:b], view) for a, b in ((0, 30), (30, 33), (33, 34))], 1)

    found, plain = logits(with_int8_cache(model)), logits(model)
    monkeypatch.setattr(Vectors, "write", write_what_int8_gives_back)
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("bits", [8, 4])
def test_greedy_text_is_the_same_in_every_form_and_batch(bits, window):
    plain = tiny_model(head_dim=64, n_head=6, sliding_window=window).requires_grad_(False)
    quantize_(plain, linear_table(plain, QuantSpec(bits, 32), QuantSpec(8)))
    fused, prompts = copy.deepcopy(plain), random_ids(3, 600, 40)
    pack_(fused)
    one_by_one = copy.deepcopy(fused)
    one_by_one.layers = Blocks(fused.layers)
    plain, fused, one_by_one = map(with_int8_cache, (plain, fused, one_by_one))
    expected = [greedy(Engine(plain), [prompt])[0] for prompt in prompts]
    for model in (plain, fused, one_by_one):
        assert greedy(Engine(model), prompts) == expected
        assert greedy(Engine(model, speculation=Speculation(PromptLookup(), 4)), prompts) == expected


def greedy(engine, prompts):
    rows = [[] for _ in prompts]
    for chunk in generate(engine, prompts, 24, GREEDY):
        for row, ids in zip(rows, chunk, strict=True):
            row += ids
    return rows


@pytest.mark.parametrize(
    "fields", [{}, {"head_dim": 64}, {"head_dim": 64, "residual_scale": 0.5}, DIFFERING | {"head_dim": 64}], ids=str
)
def test_compiled_step_equals_plain(fields):
    """Of attention in elementary operators, of fused blocks, and of one region for all blocks."""
    model, prompts = with_int8_cache(tiny_model(**{"n_layer": 3, **fields})), random_ids(5, 250)
    pack_(model)
    cache, step = model.new_cache(2, 512), compile_step(decode_one_token, model.device)
    plain = continuation(model, cache, prompts, 12)  # slot 256 is crossed on the way
    assert torch.equal(continuation(model, cache, prompts, 12, step=step), plain)


@pytest.mark.parametrize("fields", [{}, DIFFERING], ids=str)
def test_a_prefix_is_copied_with_its_scales(fields):
    model, (prompt,) = with_int8_cache(tiny_model(**fields)), random_ids(20)
    cache = model.new_cache(3, 64)
    expected = continuation(model, cache, [prompt], 8)
    other = model.new_cache(3, 64)
    continuation(model, other, [[1], [2], prompt], 1)
    copy_prefix(other, torch.tensor([2]), torch.tensor([0]), 18)
    assert torch.equal(continuation(model, other, [prompt[18:]], 8, start=18), expected)


@pytest.mark.parametrize(
    "dtype, vector, named", [(None, 16 * 4, "the caches of"), (torch.int8, 16 + 4, "the int8 caches of")]
)
def test_the_size_of_a_cache_is_known_and_named_before_it_is_allocated(dtype, vector, named):
    model = tiny_model()  # 2 layers of 2 key heads
    model.cache_dtype = dtype
    assert row_bytes(model, 100) == 2 * 2 * 2 * 100 * vector
    assert row_bytes(model, 100) == sum(each.nbytes for each in model.new_cache(1, 100).layers.buffers())
    with pytest.raises(ValueError, match=f"{named} 1000000000 x 100 positions need .* free; use fewer rows"):
        allocate(model, 10**9, 100)


def test_layers_that_reuse_keys_and_values_take_no_memory():
    """2 layers keep 2 key heads of 16 numbers, 1 keeps 1 of 32."""
    model = tiny_model(**DIFFERING)
    assert row_bytes(model, 100) == 2 * 100 * 4 * (2 * 2 * 16 + 32)
    assert row_bytes(model, 100) == sum(each.nbytes for each in model.new_cache(1, 100).layers.buffers())


def test_perplexity_of_the_default_model_hardly_changes(default_model_dir):
    model = load_model(default_model_dir / "model.pth")
    text = pydoc_data.topics.topics["assignment"] + pydoc_data.topics.topics["formatstrings"]
    ids = load_tokenizer(default_model_dir).encode(text)[:2048]  # bfloat16 itself moves that of 512 by 0.5 %
    float_cache, int8_cache = (
        perplexity(Engine(each), ids, window=512).perplexity for each in (model, with_int8_cache(model))
    )
    assert 0 < abs(int8_cache / float_cache - 1) < 0.003
