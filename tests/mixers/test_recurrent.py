"""Gated DeltaNet's two forms against each other; what keeps, takes back and copies the states of layers with one."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Lfm2Config, Qwen3_5TextConfig

import engine.decode
from engine.cache import allocate, holds, row_bytes
from engine.conversation import Conversation, Limits
from engine.engine import Engine, build_engine, generate
from engine.request import Request
from engine.speculation.drafters import DraftModel, PromptLookup
from engine.speculation.speculative import Speculation, build_speculation
from measure.scoring import questions_of, score
from mixers.recurrent.delta_net import CHUNK, DeltaSizes, chunks, steps
from mixers.recurrent.short_conv import ConvSizes
from serving.scheduler import Scheduler, Task
from tests.tiny import GREEDY, SIZES, continuation, ids_of, make_tiny_checkpoint, save_tiny, tiny_model
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
DELTA = DeltaSizes((0, 2), n_key_head=2, n_value_head=4, key_dim=16, value_dim=24, n_tap=4)
FIELDS = {"n_layer": 3, "delta": DELTA, "attention_gate": True}
SIZE = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
N_NEW = 12


@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK + 7])
def test_chunks_of_a_prompt_equal_single_steps(length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, n, dtype=torch.float64) for n in (8, 8, 5))
    k = k / k.norm(dim=-1, keepdim=True)
    beta, decay = torch.rand(2, 3, length, dtype=torch.float64), -torch.rand(2, 3, length, dtype=torch.float64)
    beta[1, :, -3:], decay[1, :, -3:] = 0, 0  # padding
    state = torch.randn(2, 3, 8, 5, dtype=torch.float64)
    (found, last), (wanted, states) = (form(state, q, k, v, beta, decay) for form in (chunks, steps))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(last, states[:, -1:])
    assert torch.equal(states[1, max(length - 4, 0)], states[1, -1]) or length < 4


MODELS = {  # whose values are of a size that the operator takes, or not
    "plain": FIELDS,
    "operator": FIELDS | {"delta": replace(DELTA, value_dim=32)},
    "short convolutions": {"n_layer": 3, "short_conv": ConvSizes((0, 2), 48, n_tap=4, bias=True)},
}


@pytest.fixture(scope="module", params=MODELS)
def tiny(tmp_path_factory, request):
    """A model of ours with a tokenizer."""
    path = make_tiny_checkpoint(tmp_path_factory.mktemp("states"), template=None, **MODELS[request.param])
    return SimpleNamespace(model=load_model(path, dtype=torch.float32), tokenizer=load_tokenizer(path))


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(SIZES["vocab_size"], (n,), generator=generator).tolist() for n in (150, 1, 61, 97)]
    return [*texts, 9 * [5, 9, 7]]


@pytest.fixture(scope="module")
def answers(tiny, prompts):
    """Each prompt alone, with nothing kept from token to token."""
    rows = [list(ids) for ids in prompts]
    with torch.inference_mode():
        for row in rows:
            for _ in range(N_NEW):
                row.append(int(tiny.model(torch.tensor([row]), torch.arange(len(row))[None])[0, -1].argmax()))
    return [row[-N_NEW:] for row in rows]


def new_ids(engine, prompts):
    rows = [[] for _ in prompts]
    for chunk in generate(engine, prompts, N_NEW, GREEDY):
        for row, ids in zip(rows, chunk, strict=True):
            row += ids
    return rows


CONFIGS = {
    "qwen3_5": Qwen3_5TextConfig(**{**SIZES, **SIZE, "head_dim": 16, "num_hidden_layers": 4}),
    "lfm2": Lfm2Config(**{**SIZES, "num_hidden_layers": 4, "full_attn_idxs": [1, 3], "conv_bias": True}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.inference_mode()
def test_prompts_in_chunks_of_a_ragged_batch_equal_transformers(config, tmp_path, prompts, monkeypatch):
    """Rows that end in an earlier chunk, in rows of a cache that held other texts before."""
    monkeypatch.setattr(engine.decode, "PREFILL_CHUNK", 48)
    theirs, ours = save_tiny(config, tmp_path), load_model(tmp_path, dtype=torch.float32)
    cache = ours.new_cache(len(prompts), 256)
    for order in (prompts, prompts[::-1]):
        for ids, new in zip(order, continuation(ours, cache, order, N_NEW).tolist(), strict=True):
            assert theirs(torch.tensor([ids + new])).logits[0, -N_NEW - 1 : -1].argmax(-1).tolist() == new


@pytest.mark.parametrize("k", [1, 5, "auto"])
def test_rounds_of_guesses_that_are_taken_back_equal_plain_decoding(tiny, prompts, answers, k):
    tiny_engine = Engine(tiny.model, speculation=build_speculation(tiny.model, PromptLookup(), k))
    assert new_ids(tiny_engine, prompts) == answers
    most = 8 if tiny.model.args.delta else 32  # of one matrix a head for each token, or of some inputs
    assert tiny_engine.cache.rewind == (k if k != "auto" else most) + 1


def test_compiled_steps_and_prompts_equal_plain_ones(tiny, prompts, answers):
    with_prompts = tiny.model.args.short_conv is None
    assert new_ids(build_engine(tiny.model, True, with_prompts), prompts) == answers
    if not with_prompts:
        with pytest.raises(ValueError, match="--compile_prefill does not go with short convolutions"):
            build_engine(tiny.model, True, True)


def test_compiled_rounds_equal_plain_decoding(tiny, prompts, answers):
    speculation = build_speculation(tiny.model, PromptLookup(), 2, compile=True)
    assert new_ids(Engine(tiny.model, speculation=speculation), prompts[-1:]) == answers[-1:]


@pytest.mark.parametrize("speculation", [None, Speculation(PromptLookup(), 3)], ids=["plain", "ngram"])
def test_tasks_that_come_and_go_find_what_each_finds_alone(tiny, prompts, answers, speculation):
    scheduler = Scheduler(Engine(tiny.model, speculation=speculation), 2, 300)
    tasks = [Task(Request(ids, tiny.tokenizer, N_NEW, [], True), GREEDY) for ids in prompts * 2]
    for task in tasks:
        scheduler.submit(task)
    while scheduler.has_work:
        scheduler.step()
    assert [task.request.token_ids for task in tasks] == answers * 2


@pytest.mark.parametrize("speculation", [None, Speculation(PromptLookup(), 3)], ids=["plain", "ngram"])
def test_a_conversation_goes_on_where_its_state_stands_or_begins_again(tiny, speculation):
    """The second turn adds to what was read; from the third one the first is left out."""
    conversation = Conversation(
        Engine(tiny.model, speculation=speculation), tiny.tokenizer, Limits(512, 20), GREEDY, None
    )
    read = []
    for text in ("the cat sat", "on the mat", "and the dog"):
        if text == "and the dog":
            del conversation.turns[0]
        ids = conversation.prompt_ids(text)
        list(conversation.turn(text))
        assert conversation.request.token_ids == ids_of(tiny.model, [ids], 20)[0][: len(conversation.request.token_ids)]
        read.append(len(ids) - conversation.timing.prompt_tokens)
    assert read[0] == read[2] == 0 < read[1]


def test_continuations_of_one_prompt_are_scored_after_copies_of_its_state(tiny):
    requests = [([5, 9, 7, 5], [9, 7, 5, 9]), ([5, 9, 7, 5], [3, 1]), ([8], [2, 4, 6])]
    scoring = Engine(tiny.model)
    scoring.reserve(6, 64)
    found = {number: logprob for number, logprob, _ in score(scoring, questions_of(requests, 64), 3)}
    for number, (prompt, own) in enumerate(requests):
        ids = torch.tensor([prompt + own])
        logprobs = tiny.model(ids, torch.arange(ids.shape[1])[None])[0].log_softmax(-1)
        wanted = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(own)[:, None]).sum()
        assert found[number] == pytest.approx(wanted.item(), abs=1e-4)


@torch.inference_mode()
def test_which_prefixes_a_row_can_go_on_from_after_gated_deltanet():
    model = tiny_model(**FIELDS)
    cache = model.new_cache(2, 64, rewind=2)
    ids, pos = torch.arange(9)[None], torch.arange(9)[None]
    model(ids, pos, cache.view())
    assert [n for n in range(12) if holds(cache, 0, n)] == [0, 9]  # of a prompt the last state
    model(ids[:, :3], pos[:, -1:] + torch.arange(1, 4), cache.view())
    assert [n for n in range(14) if holds(cache, 0, n)] == [0, 10, 11, 12]  # and of few tokens each
    model(ids[:, :1], torch.tensor([[10]]), cache.view())
    assert [n for n in range(14) if holds(cache, 0, n)] == [0, 10, 11]  # one was taken back
    model(ids[:, :1], torch.tensor([[0]]), cache.view())
    assert [n for n in range(14) if holds(cache, 0, n)] == [0, 1]
    with pytest.raises(ValueError, match="no state of the first 5 tokens is kept"):
        engine.decode.read_prompts(model, cache, [[1, 2]], start=5)


@torch.inference_mode()
def test_which_prefixes_a_row_can_go_on_from_after_short_convolutions():
    """Those of which the last three inputs are kept."""
    model = tiny_model(**MODELS["short convolutions"])
    cache = model.new_cache(2, 64, rewind=2)
    ids, pos = torch.arange(9)[None], torch.arange(9)[None]
    model(ids, pos, cache.view())
    assert [n for n in range(12) if holds(cache, 0, n)] == [0, 7, 8, 9]
    model(ids[:, :2], torch.tensor([[9, 10]]), cache.view(counts=torch.tensor([1])))
    assert [n for n in range(14) if holds(cache, 0, n)] == [0, 8, 9, 10]  # the other was padding
    model(ids[:, :1], torch.tensor([[8]]), cache.view())
    assert [n for n in range(14) if holds(cache, 0, n)] == [0, 8, 9]  # two were taken back
    model(ids[:, :4], torch.tensor([[48, 49, 50, 51]]), cache.view(counts=torch.tensor([0])))
    assert [n for n in range(14) if holds(cache, 0, n)] == [0, 8, 9]  # of a row that has ended
    model(ids[:, :1], torch.tensor([[0]]), cache.view())
    assert [n for n in range(14) if holds(cache, 0, n)] == [0, 1]


def test_bytes_of_a_row_and_a_draft_that_is_refused(tiny):
    if tiny.model.args.delta:
        n_value = 4 * tiny.model.args.delta.value_dim
        floats = 16 * n_value + 3 * (2 * 2 * 16 + n_value)  # a state, and the inputs of three tokens
        stands = 1
    else:
        floats, stands = 3 * 48, 3
    keys = 2 * 2 * 16 * 100
    assert row_bytes(tiny.model, 100) == 4 * (2 * floats + keys) + 2 * 8 * stands
    cache = allocate(tiny.model, 3, 100, rewind=4)
    assert 3 * row_bytes(tiny.model, 100, 4) == sum(each.nbytes for each in cache.layers.buffers())
    with pytest.raises(ValueError, match="DeltaNet.*ngram"):
        DraftModel(tiny.model)


@torch.inference_mode()
def test_the_text_part_of_a_file_with_vision_and_a_layer_of_guesses(tmp_path):
    config = Qwen3_5TextConfig(**{**SIZES, **SIZE, "head_dim": 16, "num_hidden_layers": 4})
    theirs, ids = save_tiny(config, tmp_path), torch.arange(9)[None]
    tensors = {f"model.language_{name}": each for name, each in load_file(tmp_path / "model.safetensors").items()}
    head = {"lm_head.weight": tensors.pop("model.language_lm_head.weight")}
    others = {name: torch.ones(2) for name in ("model.visual.patch_embed.weight", "mtp.fc.weight")}
    save_file(tensors | head | others, tmp_path / "model.safetensors")
    whole = {"model_type": "qwen3_5", "text_config": config.to_dict(), "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    found = load_model(tmp_path, dtype=torch.float32)(ids, ids)
    torch.testing.assert_close(found, theirs(ids).logits, atol=1e-4, rtol=1e-4)
