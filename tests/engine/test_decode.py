"""Sampling against transformers and hand-worked numbers, prefill against one forward, compiled steps against plain."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import tensor
from transformers.generation import logits_process as hf

from engine.cache import prefix_length, slots_for
from engine.compile import compile_step
from engine.decode import decode, decode_one_token, forward_chunk, prefill
from engine.sampling import NO_TOKEN, Sampling, argmax, choose, logits_to_probs, place_of, sample, seed_row
from engine.speculation.speculative import accept
from ranks import Ranks
from tests.tiny import CPU, GREEDY, continuation, random_ids, tiny_model
from tp import full_logits

# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "field, value",
    [
        *[("temperature", value) for value in (-1e-9, -1.0, math.nan, math.inf)],
        *[("top_k", value) for value in (-1, -200)],
        *[("top_p", value) for value in (0.0, -0.1, 1.0001, math.nan)],
        *[("min_p", value) for value in (-0.1, 1.1, math.nan)],
    ],
)
def test_sampling_refuses_what_is_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; it must be"):
        Sampling(**{field: value})


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-31, 1e-29])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature):
    logits, sampling = torch.randn(3, 97, generator=torch.Generator().manual_seed(1)) * 30, Sampling(temperature)
    assert torch.equal(choose(logits, sampling, torch.rand(3)), logits.argmax(-1))
    assert torch.equal(logits_to_probs(logits, sampling), logits_to_probs(logits, GREEDY))


BAD = {"NaN": math.nan, "inf": math.inf}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 5), Sampling(1.0, 0, 0.9, 0.1)], ids=str)
@pytest.mark.parametrize("value", BAD.values(), ids=BAD.keys())
def test_no_token_is_drawn_from_logits_that_are_not_finite(sampling, value):
    """One such logit is enough; -inf bars a token, and may stand beside others."""
    logits = torch.zeros(4, 50)
    logits[1, 7], logits[2, 7], logits[3] = value, -math.inf, value
    token = choose(logits, sampling, torch.rand(4))
    assert (token == NO_TOKEN).tolist() == [False, True, False, True]
    draft = torch.zeros(4, 2, dtype=torch.long)  # the second is never reached: row 0 and 2 may take the first
    new, count = accept(logits[:, None].repeat(1, 3, 1), draft, None, sampling, torch.zeros(4, 3))
    assert [NO_TOKEN in ids[:n] for ids, n in zip(new.tolist(), count, strict=True)] == [False, True, False, True]


def test_ranks_hand_on_logits_that_are_not_finite():
    alone = Ranks(0, 1, 0, 1, watch=None)
    model, logits = SimpleNamespace(ranks=alone, args=SimpleNamespace(vocab_size=50)), torch.zeros(1, 50)
    logits[0, 7] = math.nan
    for best, sampling in ((1, GREEDY), (5, Sampling(1.0, 5)), (None, Sampling(1.0, 0))):
        assert choose(full_logits(model, logits, best), sampling, torch.rand(1)).item() == NO_TOKEN


def test_sampling_takes_the_ends_of_each_range():
    Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    Sampling(temperature=1e6, top_k=10**9, top_p=1e-9, min_p=1.0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 1e-4])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_probs_equal_those_of_transformers_warpers(temperature, top_k, top_p, min_p):
    logits = torch.randn(7, 97, generator=torch.Generator().manual_seed(1)) * 3
    warpers = [hf.TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(hf.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(hf.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(hf.MinPLogitsWarper(min_p))
    expected = hf.LogitsProcessorList(warpers)(None, logits).softmax(-1)
    probs = logits_to_probs(logits, Sampling(temperature, top_k, top_p, min_p))
    torch.testing.assert_close(probs, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(probs > 0, expected > 0)


# probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1
@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(1.0, 0), [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        (Sampling(0.5, 0), [16 / 22, 4 / 22, 1 / 22, 1 / 22]),  # squares: 16, 4, 1, 1
        (Sampling(1.0, 2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(1.0, 1), [1, 0, 0, 0]),
        (Sampling(1.0, 0, top_p=0.7), [2 / 3, 1 / 3, 0, 0]),  # the first alone does not reach 0.7
        (Sampling(1.0, 0, top_p=0.3), [1, 0, 0, 0]),
        (Sampling(1.0, 0, min_p=0.4), [2 / 3, 1 / 3, 0, 0]),  # 0.4 of 0.5 is 0.2
        (Sampling(1.0, 2, top_p=0.6), [1, 0, 0, 0]),  # of the two left, the first has 2/3
        (Sampling(1.0, 0, top_p=0.7, min_p=0.6), [1, 0, 0, 0]),  # 1/3 is below 0.6 of 2/3
    ],
)
def test_probs_by_hand(sampling, expected):
    logits = tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    torch.testing.assert_close(logits_to_probs(logits, sampling), tensor([expected], dtype=torch.float32))


def test_temperature_zero_is_one_hot_at_the_first_of_equal_maxima():
    logits = tensor([[1.0, 3.0, 2.999, 3.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)  # 2.999 rounds to 3 in bf16
    probs = logits_to_probs(logits, GREEDY)
    assert probs.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert probs.dtype == torch.float32
    assert choose(logits, GREEDY, None).tolist() == [1, 0]


def test_low_precision_logits_are_softened_in_float32():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = (logits.double() / 0.8).softmax(-1).float()
    torch.testing.assert_close(logits_to_probs(logits, Sampling(0.8, 0)), expected, rtol=1e-5, atol=1e-8)


def test_samples_follow_the_distribution():
    probs = tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01, 0.0])
    n = 100_000
    torch.manual_seed(0)
    counts = sample(probs.expand(n, -1)).bincount(minlength=7)
    assert counts[6] == 0
    chi_square = ((counts - n * probs)[:6] ** 2 / (n * probs[:6])).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: beyond it once in a thousand seeds


@pytest.mark.parametrize("sampling", [Sampling(0.7, 40), Sampling(1.0, 0), Sampling(1.0, 50, 0.8, 0.02)], ids=str)
def test_choices_follow_the_distribution_of_transformers(sampling):
    """3000 tokens, of which some cannot be drawn, in bins of one expected draw or more."""
    logits, n = torch.randn(3000, generator=torch.Generator().manual_seed(4)) * 2, 20_000
    warpers = [hf.TemperatureLogitsWarper(sampling.temperature), hf.TopKLogitsWarper(sampling.top_k or 3000)]
    warpers += [hf.TopPLogitsWarper(sampling.top_p), hf.MinPLogitsWarper(sampling.min_p)]
    expected = n * hf.LogitsProcessorList(warpers)(None, logits[None]).softmax(-1)[0].double()
    torch.manual_seed(0)
    drawn = [choose(logits.expand(1000, -1), sampling, torch.rand(1000)) for _ in range(n // 1000)]
    counts = torch.cat(drawn).bincount(minlength=3000)
    assert not counts[expected == 0].any()
    large = expected >= 5
    counts, expected = (torch.cat((x[large], x[~large].sum()[None])) for x in (counts, expected))
    freedom = int(large.sum())
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1)).sum()
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 10


def test_the_place_in_whose_share_a_number_falls():
    probs = tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]] * 6)
    numbers = tensor([0.0, 0.49, 0.5, 0.74, 0.76, 1 - 2**-20])  # the last: the greatest of `seed_row`
    assert place_of(numbers, probs).tolist() == [1, 1, 3, 3, 4, 4]
    assert place_of(numbers, probs * 0.7).tolist() == [1, 1, 3, 3, 4, 4]  # shares of what there is


def test_the_numbers_of_a_seed_do_not_depend_on_the_size_of_the_cache():
    small, large = tiny_model().new_cache(1, 40), tiny_model().new_cache(3, 512)
    seed_row(small, 0, 2**40 + 7)
    seed_row(large, 2, 2**40 + 7)
    assert torch.equal(small.uniforms[0], large.uniforms[2, :40])
    assert not large.uniforms[:2].any() and large.uniforms[2].max() < 1


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 5000])
def test_argmax_is_the_one_of_torch(size):
    values = torch.randint(-9, 9, (6, size), generator=torch.Generator().manual_seed(size)).float()
    values[1], values[2], values[3, size // 2 :] = -math.inf, math.inf, math.nan
    assert torch.equal(argmax(values), values.argmax(-1))


def test_the_compiled_draw_follows_the_distribution():
    logits = tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01]).log().repeat(50_000, 1)
    torch.manual_seed(0)
    compiled = torch.compile(choose, fullgraph=True, options={"cpp.vec_isa_ok": True})
    uniforms = torch.rand(len(logits))
    drawn = compiled(logits, Sampling(1.0, 5), uniforms)
    counts, expected = drawn.bincount(minlength=6), 50_000 * logits[0].exp() / 0.99
    assert counts[5] == 0
    assert (compiled(logits * math.nan, Sampling(1.0, 5), uniforms) == NO_TOKEN).all()
    assert ((counts - expected)[:5] ** 2 / expected[:5]).sum() < 18.5  # 4 degrees of freedom


# ---------------------------------------------------------------- prefill and decode


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 16, 2048])
@pytest.mark.parametrize("lengths", [(9,), (1,), (1, 5, 13), (4, 8, 5, 12), (13, 13)])
def test_prefill_in_chunks_equals_one_forward_of_each_row(monkeypatch, chunk, lengths):
    monkeypatch.setattr("engine.decode.PREFILL_CHUNK", chunk)
    monkeypatch.setattr("engine.decode.least_chunk", lambda device: 1)
    model, prompts = tiny_model(), random_ids(*lengths)
    cache = model.new_cache(len(prompts), 64)
    seen = []

    def forward(*arguments):
        seen.append(arguments[1].shape[1])
        return forward_chunk(*arguments)

    token, pos = prefill(model, cache, prompts, GREEDY, 0, forward)
    assert max(seen) <= chunk
    assert pos.tolist() == [[length] for length in lengths]
    cache = model.new_cache(1, 64)
    for row, prompt in enumerate(prompts):
        with torch.inference_mode():
            logits = model(tensor([prompt]), torch.arange(len(prompt))[None])
        assert token[row].item() == logits[0, -1].argmax().item()


def test_prefill_of_the_second_half_equals_prefill_of_all():
    model, (prompt,) = tiny_model(), random_ids(40)
    cache = model.new_cache(1, 128)
    whole = continuation(model, cache, [prompt], 8)
    cache = model.new_cache(1, 128)
    prefill(model, cache, [prompt[:25]], GREEDY)
    assert torch.equal(continuation(model, cache, [prompt[25:]], 8, start=25), whole)


def test_decode_equals_forwarding_everything_again():
    model, prompts = tiny_model(), random_ids(3, 11, 6)
    cache = model.new_cache(3, 64)
    tokens = continuation(model, cache, prompts, 12)
    cache = model.new_cache(1, 64)
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(12):
            with torch.inference_mode():
                ids.append(model(tensor([ids]), torch.arange(len(ids))[None])[0, -1].argmax().item())
        assert ids[len(prompt) :] == tokens[row].tolist()


def test_decode_yields_one_new_token_a_row_and_moves_every_row_on():
    model, prompts = tiny_model(), random_ids(3, 7)
    cache = model.new_cache(2, 64)
    positions = []

    def step(model, token, pos, cache, sampling):
        positions.append(pos.flatten().tolist())
        return decode_one_token(model, token, pos, cache, sampling)

    token, pos = prefill(model, cache, prompts, GREEDY)
    for tokens, count in decode(model, cache, token, pos, 4, GREEDY, step):
        assert tokens.shape == (2, 1) and count.tolist() == [1, 1]
    assert positions == [[3, 7], [4, 8], [5, 9], [6, 10]]


@pytest.mark.parametrize("slots", [2, 100, 255, 256, 257, 512])
def test_the_whole_cache_can_be_filled(slots):
    """One form of the compiled step serves every prefix of the cache but the whole, so that is never asked for."""
    model, (prompt,) = tiny_model(), random_ids(max(slots - 12, 1))
    cache = model.new_cache(1, slots)
    short = continuation(model, cache, [prompt], slots - len(prompt))
    cache = model.new_cache(1, 1024)
    assert torch.equal(short, continuation(model, cache, [prompt], slots - len(prompt)))


@pytest.mark.parametrize("count, slots", [(1, 256), (256, 256), (257, 512), (512, 512), (513, 768)])
def test_a_step_attends_to_a_prefix_of_the_cache_that_holds_all_used_slots(count, slots):
    model = tiny_model()
    cache = model.new_cache(1, 1024)
    assert prefix_length(cache, count) == slots
    assert cache.view(length=slots).slots.tolist() == list(range(slots))


@pytest.mark.parametrize("length, filled, slots", [(9, 9, 512), (513, 512, 512), (513, 513, 1024), (1990, 1990, 2000)])
def test_on_cuda_prefixes_double_and_are_aligned(length, filled, slots):
    n_slots = slots_for(tiny_model(max_seq_length=2000).args, length)
    cache = SimpleNamespace(slots=SimpleNamespace(is_cuda=True), n_slots=n_slots)
    assert prefix_length(cache, filled) == slots < n_slots


@pytest.mark.parametrize("compiled", [False, True])
def test_the_head_is_computed_only_where_a_row_ends(compiled, monkeypatch):
    monkeypatch.setattr("engine.decode.PREFILL_CHUNK", 8)
    monkeypatch.setattr("engine.decode.least_chunk", lambda device: 1)
    model, heads = tiny_model(), []
    forward = compile_step(forward_chunk, CPU, any_length=True) if compiled else forward_chunk
    model.output.register_forward_hook(lambda _module, _inputs, logits: heads.append(logits.shape[1]))
    prefill(model, model.new_cache(2, 64), random_ids(30, 12), GREEDY, 0, forward)
    assert heads == [1, 1]  # of one place, in the second and the fourth of four chunks


def test_bucket_sizes_do_not_change_the_tokens():
    model, prompts = tiny_model(), random_ids(250, 240)
    cache = model.new_cache(2, 512)

    def all_slots(model, token, pos, view, sampling):
        return decode_one_token(model, token, pos, cache.view(), sampling)

    assert torch.equal(continuation(model, cache, prompts, 12), continuation(model, cache, prompts, 12, step=all_slots))


# ---------------------------------------------------------------- the compiled step


def test_compiled_step_equals_plain_across_sizes_without_recompiling():
    model = tiny_model()
    step, forward = compile_step(decode_one_token, CPU), compile_step(forward_chunk, CPU, any_length=True)
    cache = model.new_cache(1, 1024)
    torch._dynamo.reset()
    continuation(model, cache, random_ids(5), 3, step=step, forward=forward)  # compiles both, once
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (2, 3, 17, 250, 300, 511, 600):  # 250 crosses the 256 boundary while decoding
            prompts = random_ids(length, seed=length)
            compiled = continuation(model, cache, prompts, 12, step=step, forward=forward)
            assert torch.equal(compiled, continuation(model, cache, prompts, 12)), length


def test_a_prompt_of_one_token_needs_no_form_of_its_own(monkeypatch):
    monkeypatch.setattr("engine.decode.PREFILL_CHUNK", 8)
    monkeypatch.setattr("engine.decode.least_chunk", lambda device: 2)
    model, forward = tiny_model(), compile_step(forward_chunk, CPU, any_length=True)
    cache = model.new_cache(1, 1024)
    torch._dynamo.reset()
    continuation(model, cache, random_ids(5), 2, forward=forward)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (1, 7, 8, 9, 12, 17, 30):  # 9 and 17 leave one token to the last chunk
            prompts = random_ids(length, seed=length)
            assert torch.equal(
                continuation(model, cache, prompts, 4, forward=forward), continuation(model, cache, prompts, 4)
            )


def test_compiled_step_of_a_ragged_batch_equals_plain():
    model, prompts = tiny_model(sliding_window=12), random_ids(3, 30, 11)
    step, forward = compile_step(decode_one_token, CPU), compile_step(forward_chunk, CPU, any_length=True)
    cache = model.new_cache(3, 256)
    plain = continuation(model, cache, prompts, 20)
    assert torch.equal(continuation(model, cache, prompts, 20, step=step, forward=forward), plain)


def test_models_samplings_and_batches_may_take_turns_on_one_compiled_step():
    """Guards are skipped for kinds of call already seen; each call must still find its own compiled form."""
    models = [tiny_model(seed=1), tiny_model(seed=2, n_layer=1, sliding_window=8)]
    caches = [model.new_cache(2, 512) for model in models]
    step = compile_step(decode_one_token, CPU)
    samplings = [GREEDY, Sampling(1.0, top_k=1)]  # both take the likeliest
    for turn in range(3):
        for model, cache in zip(models, caches, strict=True):
            for n_rows in (1, 2):
                prompts = random_ids(*[6, 9][:n_rows], seed=turn)
                plain = continuation(model, cache, prompts, 6)
                for sampling in samplings:
                    assert torch.equal(continuation(model, cache, prompts, 6, sampling, step=step), plain), (
                        turn,
                        sampling,
                    )


def test_one_compiled_prefill_serves_any_number_of_rows():
    cached, model, forward = 5, tiny_model(), compile_step(forward_chunk, CPU, any_length=True)
    cache = model.new_cache(cached, 256)
    for n_rows in (2, 1):  # the forms there are
        continuation(model, cache, random_ids(*[5] * n_rows), 2, forward=forward)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n_rows in range(1, cached + 1):
            prompts = random_ids(*range(4, 4 + n_rows))
            plain = continuation(model, cache, prompts, 4)
            assert torch.equal(continuation(model, cache, prompts, 4, forward=forward), plain), n_rows


def test_caches_made_anew_are_used_and_filled_by_a_step_compiled_before():
    model = tiny_model()
    step, forward = compile_step(decode_one_token, CPU), compile_step(forward_chunk, CPU, any_length=True)
    for slots in (200, 512, 256, 512):
        cache, prompts = model.new_cache(1, slots), random_ids(slots - 8, seed=slots)
        compiled = continuation(model, cache, prompts, 8, step=step, forward=forward)
        assert torch.equal(compiled, continuation(model, cache, prompts, 8)), slots


def test_the_seed_decides_what_a_compiled_step_draws():
    model, step = tiny_model(), compile_step(decode_one_token, CPU)
    cache = model.new_cache(1, 256)

    def drawn(seed):
        seed_row(cache, 0, seed)
        return continuation(model, cache, [[1, 2, 3]], 20, Sampling(1.5), step=step).tolist()

    assert drawn(1) == drawn(1) != drawn(2)
