"""Continuous batching against one request alone: the same tokens, whatever else is served."""

import random

import pytest
import torch

from engine.decode import least_chunk
from engine.engine import Engine, generate
from engine.request import Request
from engine.sampling import Sampling
from engine.speculation.drafters import PromptLookup
from engine.speculation.speculative import Speculation
from layers.quantized import quant_spec
from serving.scheduler import Scheduler, Task
from tests.tiny import GREEDY, ids_of, make_tiny_checkpoint, random_ids
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model

FORMS = {"bf16": None, "int8": quant_spec("int8", None), "int4": quant_spec("int4", 32)}
SAMPLINGS = [GREEDY, Sampling(1.0, 0), Sampling(0.9, 20), Sampling(1.3, 0, 0.9, 0.02)]
CONTEXT = 300


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("served"), dim=128, n_head=2, n_kv_head=1, head_dim=64)


@pytest.fixture(scope="session")
def tokenizer(path):
    return load_tokenizer(path)


@pytest.fixture(scope="session", params=FORMS)
def model(request, path):
    return load_model(path, quantize=FORMS[request.param])


@pytest.fixture
def scheduler(path):
    return Scheduler(Engine(load_model(path)), 2, CONTEXT)


def task_of(tokenizer, prompt, budget, sampling=GREEDY, seed=0, stop=(), **how):
    return Task(Request(prompt, tokenizer, budget, list(stop), True), sampling, seed, **how)


def finished(scheduler, *tasks):
    """Submit tasks and run until all that there is has ended."""
    for task in tasks:
        scheduler.submit(task)
    for _ in range(10_000):
        if not scheduler.has_work:
            return tasks
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


def prompts_with_shared_beginnings(n):
    stems = random_ids(200, 100, 3, seed=1)
    draw = random.Random(2)
    for i in range(n):
        stem = draw.choice(stems)
        yield stem[: draw.randint(1, len(stem))] + random_ids(draw.randint(1, 60), seed=i + 10)[0]


@torch.inference_mode()
def test_what_a_task_draws_depends_on_nothing_else_that_is_served(model, tokenizer):
    draw = random.Random(0)
    tasks = [
        task_of(tokenizer, prompt, draw.randint(1, 20), draw.choice(SAMPLINGS), seed)
        for seed, prompt in enumerate(prompts_with_shared_beginnings(60))
    ]
    scheduler, waiting = Scheduler(Engine(model), 20, CONTEXT), list(tasks)
    while waiting or scheduler.has_work:
        while waiting and draw.random() < 0.7:
            scheduler.submit(waiting.pop())
        if scheduler.running and draw.random() < 0.05:
            scheduler.cancel(draw.choice(scheduler.running))
        scheduler.step()
    assert len(scheduler.free) == 20 and scheduler.timing.steps
    assert any(task.cached_tokens for task in tasks) or scheduler.chunk > 128  # too large for these prompts
    alone = Scheduler(Engine(model), 1, CONTEXT)
    for task in tasks:
        request = task.request
        assert request.finish_reason in ("length", None)  # None: it was cancelled
        [again] = finished(alone, task_of(tokenizer, request.prompt, request.max_new_tokens, task.sampling, task.seed))
        n = len(request.token_ids)
        assert again.request.token_ids[: n if request.finish_reason is None else None] == request.token_ids


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_tokens_are_those_of_the_library(path, tokenizer, form, sampling):
    """Chunks of prompts have other sizes there; the operators for codes round each row by itself."""
    model = load_model(path, quantize=FORMS[form])
    prompts = random_ids(1, 2, 16, 17, 40, 49, 130, 250)
    tasks = [task_of(tokenizer, prompt, 30, sampling, seed) for seed, prompt in enumerate(prompts)]
    finished(Scheduler(Engine(model), 8, CONTEXT), *tasks)
    engine = Engine(model)
    for task in tasks:
        chunks = generate(engine, [task.request.prompt], 30, sampling, seeds=[task.seed])
        assert task.request.token_ids == [token for [ids] in chunks for token in ids]


def test_rows_of_latents_come_go_and_share_beginnings(tmp_path, tokenizer):
    latent = {"n_kv_head": 4, "kv_latent": 64, "q_latent": 32, "value_dim": 24, "rope_dim": 8}
    model = load_model(make_tiny_checkpoint(tmp_path, **latent), dtype=torch.float32)
    tasks = [task_of(tokenizer, prompt, 20) for prompt in prompts_with_shared_beginnings(6)]
    finished(Scheduler(Engine(model), 3, CONTEXT), *tasks)
    for task in tasks:
        assert [task.request.token_ids] == ids_of(model, [task.request.prompt], 20)


@pytest.mark.parametrize("k", [3, "auto"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_guesses_for_a_task_that_runs_alone_change_no_token(path, tokenizer, sampling, k):
    model, stem = load_model(path, quantize=FORMS["int8"]), random_ids(9, seed=4)[0]
    speculation = Speculation(PromptLookup(), k)
    scheduler = Scheduler(Engine(model, speculation=speculation), 2, CONTEXT)
    scheduler.warm_up()
    plain = Scheduler(Engine(model), 1, CONTEXT)
    # the second task comes and goes while the first one runs
    prompts, budgets = [stem * 6, stem * 3 + [7]], [90, 20]
    asked = list(zip(prompts, budgets, strict=True))
    found, expected = ([task_of(tokenizer, *each, sampling, 5) for each in asked] for _ in range(2))
    scheduler.submit(found[0])
    for _ in range(4):
        scheduler.step()
    finished(scheduler, found[1])
    finished(plain, *expected)
    assert [task.request.token_ids for task in found] == [task.request.token_ids for task in expected]
    assert any(proposed for proposed, _ in found[0].request.rounds)


def test_a_prompt_is_read_from_the_first_chunk_that_no_row_holds(scheduler, tokenizer):
    chunk = scheduler.chunk
    long = random_ids(3 * chunk + 20, seed=3)[0][:290]
    n_chunks = (len(long) - least_chunk(scheduler.engine.model.device)) // chunk
    first, again, other = (task_of(tokenizer, ids, 2) for ids in (long, long, [5, *long[1:]]))
    assert [task.cached_tokens for task in finished(scheduler, first, other)] == [0, 0]
    assert [task.cached_tokens for task in finished(scheduler, again)] == [n_chunks * chunk]
    assert again.request.token_ids == first.request.token_ids
    both = [task_of(tokenizer, long, 2) for _ in range(2)]  # one row is taken over, the other gets a copy
    assert [task.cached_tokens for task in finished(scheduler, *both)] == [n_chunks * chunk] * 2
    assert [task.request.token_ids for task in both] == [first.request.token_ids] * 2


def test_a_task_that_is_cancelled_leaves_its_row_to_the_next(scheduler, tokenizer):
    tasks = [task_of(tokenizer, ids, 50) for ids in random_ids(5, 6, 7, 8)]
    for task in tasks:
        scheduler.submit(task)
    for _ in range(3):
        scheduler.step()
    assert scheduler.running == tasks[:2] and list(scheduler.waiting) == tasks[2:]
    scheduler.cancel(tasks[0])
    scheduler.cancel(tasks[3])
    assert not scheduler.waiting or tasks[3] not in scheduler.waiting
    scheduler.step()
    assert tasks[2] in scheduler.running and not scheduler.waiting
    finished(scheduler)
    assert sorted(scheduler.free) == [0, 1]
    scheduler.cancel(tasks[1])  # it has ended: nothing happens
    assert sorted(scheduler.free) == [0, 1]


def test_a_task_that_no_row_can_hold_is_refused_with_both_numbers(scheduler, tokenizer):
    with pytest.raises(ValueError, match=f"prompt's 290 tokens and 11 new ones are more than the context of {CONTEXT}"):
        scheduler.submit(task_of(tokenizer, [1] * 290, 11))
    assert not scheduler.has_work


def test_text_and_stop_strings(scheduler, tokenizer):
    [whole] = finished(scheduler, task_of(tokenizer, [40, 41], 30))
    text = whole.request.stream.text
    assert text == tokenizer.decode(whole.request.token_ids)
    stop = text[8:10]
    task, pieces = task_of(tokenizer, [40, 41], 30, stop=[stop]), []
    scheduler.submit(task)
    while scheduler.has_work:
        pieces += [piece for _, piece in scheduler.step()]
    assert task.request.finish_reason == "stop"
    assert "".join(pieces) == task.request.stream.text == text[: text.index(stop)]


@torch.inference_mode()
def test_logprobs_are_those_of_the_distribution_before_sampling(scheduler, tokenizer):
    task = task_of(tokenizer, [40, 41, 42], 6, Sampling(1.5, 5), 3, n_logprobs=4)
    finished(scheduler, task)
    ids = torch.tensor([task.request.prompt + task.request.token_ids])
    logits = scheduler.engine.model(ids, torch.arange(ids.shape[1])[None])[0, 2:-1]
    expected = logits.float().log_softmax(-1)
    assert len(task.logprobs) == 6
    for found, wanted, token in zip(task.logprobs, expected, task.request.token_ids, strict=True):
        assert found.logprob == pytest.approx(wanted[token].item(), abs=0.05)
        best = wanted.topk(4)
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=0.05)


def test_processors_see_every_token_once_and_a_failure_ends_its_task_alone(scheduler, tokenizer):
    seen = []

    def only_even(logits, ids):
        seen.append(list(ids))
        return logits.index_fill(0, torch.arange(1, len(logits), 2), float("-inf"))

    def broken(logits, ids):
        if len(ids) == 2:
            raise RuntimeError("the grammar is broken")
        return logits

    even = task_of(tokenizer, [40, 41], 9, Sampling(1.0, 0), 1, processors=[only_even])
    fails = task_of(tokenizer, [40, 41], 9, processors=[broken])
    finished(scheduler, even, fails)
    ids = even.request.token_ids
    assert seen == [ids[:n] for n in range(9)] and all(token % 2 == 0 for token in ids)
    assert str(fails.error) == "the grammar is broken" and even.error is None
    assert fails.request.finish_reason == "error" and len(fails.request.token_ids) == 2
    assert sorted(scheduler.free) == [0, 1]


def test_logits_that_are_not_finite_end_their_task_with_an_error(scheduler, tokenizer):
    model = scheduler.engine.model
    bad, good = (task_of(tokenizer, ids, 3) for ids in ([40, 41], [42, 43]))
    model.tok_embeddings.weight.data[41] = float("nan")
    finished(scheduler, good, bad)
    assert "logits are NaN or infinite" in str(bad.error)
