"""Conversations on a kept cache against fresh runs, with and without speculation, interrupted, and at their limits."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.cache import shared_prefix
from engine.conversation import Conversation, Limits, Turn
from engine.decode import forward_chunk, prefill
from engine.engine import Engine
from engine.request import Request, Timing, run_batch
from engine.speculation.guess_length import Costs
from engine.speculation.speculative import Text
from tests.tiny import CHATML, GREEDY, SOURCES, ids_of, make_tiny_checkpoint, speculation_of
from text.thinking import THINK, Thoughts
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model


@pytest.fixture(scope="module")
def default(default_model_dir):
    path = default_model_dir / "model.pth"
    return SimpleNamespace(path=path, model=load_model(path, dtype=torch.float32), tokenizer=load_tokenizer(path))


def conversation_of(it, context, budget=16, system=None, speculation=None):
    engine = Engine(it.model, speculation=speculation)
    return Conversation(engine, it.tokenizer, Limits(context, budget), GREEDY, system)


def text_of(conversation):
    """All ids so far, after an answer."""
    return conversation.request.prompt + conversation.request.token_ids


def interrupted(conversation, text, at):
    """A turn whose reader gives up after so many pieces, as Ctrl-C makes it do."""
    pieces = conversation.turn(text)
    for _ in range(at):
        next(pieces)
    pieces.close()


def assert_turns_equal_fresh_runs(it, turns, context, budget):
    """Each answer, made on top of the kept cache, is what the whole conversation in an empty cache gives."""
    conversation = conversation_of(it, context, budget, system="You are a helpful assistant.")
    reused = 0
    for text in turns:
        ids = conversation.prompt_ids(text)
        reused += shared_prefix(ids, conversation.cached)
        text = "".join(conversation.turn(text))
        fresh = Request(ids, it.tokenizer, budget, [], False)
        assert text == "".join(piece for _, piece in run_batch(Engine(it.model), [fresh], GREEDY, Timing()))
        assert text_of(conversation)[len(ids) :] == fresh.token_ids
        assert conversation.messages[-1] == {"role": "assistant", "content": fresh.stream.text}
    assert len(conversation.messages) == 1 + 2 * len(turns)
    assert reused > len(conversation.cached) // 2
    return conversation


def test_conversation_on_the_kept_cache_equals_fresh_prefills(default):
    turns = ["What is the capital of France?", "And of Spain?", "Thanks 😀"]
    conversation = assert_turns_equal_fresh_runs(default, turns, 1024, 12)
    assert "Paris" in conversation.messages[2]["content"]


def test_conversation_whose_answers_are_bytes_in_pieces_equals_fresh_prefills(tiny):
    assert_turns_equal_fresh_runs(tiny, ["hello", "the cat", "a", "sat on the mat"], 512, 12)


def test_conversation_after_an_interrupted_answer_equals_a_fresh_prefill(tiny):
    conversation = conversation_of(tiny, 512)
    interrupted(conversation, "the cat", 4)
    ids = conversation.prompt_ids("the dog")
    list(conversation.turn("the dog"))
    assert text_of(conversation)[len(ids) :] == ids_of(tiny.model, [ids], 16)[0]


def test_message_that_does_not_fit_changes_nothing(tiny):
    conversation = conversation_of(tiny, 64, budget=200)
    list(conversation.turn("hat"))
    before = (conversation.messages, list(conversation.cached))
    with pytest.raises(ValueError, match=r"the message takes \d+ tokens; the context has 64; shorten it"):
        list(conversation.turn("the dog ate the hat " * 10))
    assert before == (conversation.messages, conversation.cached)


@pytest.mark.parametrize("template", [CHATML, None])
def test_full_context_drops_the_oldest_turns_and_keeps_the_system_message(tmp_path, template):
    path = make_tiny_checkpoint(tmp_path, template=template)
    it = SimpleNamespace(model=load_model(path, dtype=torch.float32), tokenizer=load_tokenizer(path))
    conversation, n_fit = conversation_of(it, 256, budget=8, system="he said"), 0
    while conversation.fit("sat")[1] == 0:
        n_fit = len(conversation.fit("sat")[0])
        text = f"hat {len(conversation.turns)}"
        conversation.turns.append(Turn(text, "mat", it.tokenizer.encode("mat", add_special_tokens=False)))
    n_turn, turns = len(conversation.turns), conversation.messages
    assert 256 - 8 - 30 < n_fit <= 256 - 8
    list(conversation.turn("sat"))
    prompt, dropped = conversation.request.prompt, conversation.dropped
    text = it.tokenizer.backend.tokenizer.decode(prompt, skip_special_tokens=False)
    assert 128 - 30 < len(prompt) <= 128 and 0 < dropped < n_turn
    assert ("he said" in text) == (template is not None)
    assert f"hat {dropped}" in text and f"hat {dropped - 1}" not in text
    assert conversation.messages[1:-2] == turns[1 + 2 * dropped :]
    assert conversation.request.token_ids == ids_of(it.model, [prompt], 8)[0]


def test_later_turns_do_not_see_thoughts(tmp_path):
    """The template begins to think, and what the tiny model writes then has no end of it."""
    opened = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%") + "{# </think> #}"
    path = make_tiny_checkpoint(tmp_path, template=opened)
    it = SimpleNamespace(model=load_model(path, dtype=torch.float32), tokenizer=load_tokenizer(path))
    for hidden in (False, True):
        conversation = conversation_of(it, 256, budget=8)
        conversation.limits = replace(conversation.limits, thoughts=Thoughts(THINK, hidden))
        text = "".join(conversation.turn("the cat"))
        assert text == conversation.request.stream.text and text.startswith("<think>\n") is not hidden
        assert conversation.messages[1] == {"role": "assistant", "content": ""} and bool(text) is not hidden


def test_saved_messages_are_restored(tiny):
    conversation, other = conversation_of(tiny, 512, system="he said"), conversation_of(tiny, 512)
    list(conversation.turn("the cat"))
    other.restore(conversation.messages)
    assert other.messages == conversation.messages
    assert "".join(other.turn("the dog")) == "".join(conversation.turn("the dog"))


@pytest.mark.parametrize(
    "messages",
    [
        None,
        ["he"],
        [{"role": "user"}],
        [{"role": "user", "content": "he"}],
        [{"role": "assistant", "content": "he"}, {"role": "user", "content": "he"}],
        [{"role": "user", "content": "he"}, {"role": "assistant", "content": None}],
    ],
)
def test_messages_that_are_no_conversation(tiny, messages):
    conversation = conversation_of(tiny, 512)
    list(conversation.turn("the cat"))
    with pytest.raises(ValueError, match="texts of user and assistant in turn"):
        conversation.restore(messages)
    assert len(conversation.turns) == 1


def test_answer_that_fills_the_context_says_so(tiny):
    conversation = conversation_of(tiny, 40, budget=200)
    list(conversation.turn("hat"))
    assert len(text_of(conversation)) == 40 and conversation.is_full


def test_without_a_template_a_conversation_continues_the_text(tmp_path):
    path = make_tiny_checkpoint(tmp_path, template=None)
    it = SimpleNamespace(model=load_model(path, dtype=torch.float32), tokenizer=load_tokenizer(path))
    conversation = conversation_of(it, 256, budget=8)
    list(conversation.turn("the cat"))
    first = text_of(conversation)
    list(conversation.turn(" sat"))
    prompt = first + it.tokenizer.encode(" sat")
    assert text_of(conversation) == prompt + ids_of(it.model, [prompt], 8)[0]


def answers(it, turns, speculation, context=512, budget=16):
    """The text after each turn, as ids, and what the cache is said to hold; "/reset" clears the conversation."""
    conversation = conversation_of(it, context, budget, speculation=speculation)
    texts = []
    for text in turns:
        if text == "/reset":
            conversation.reset()
        else:
            list(conversation.turn(text))
        texts.append((text_of(conversation), conversation.cached, list(conversation.messages)))
    return texts


@pytest.mark.parametrize("source", SOURCES)
def test_conversation_with_speculation_equals_one_without(tiny, drafts, source):
    turns = ["the cat sat", "the dog", "a", "/reset", "hat", "the cat sat on the mat"]
    for k in (3, "auto"):
        assert answers(tiny, turns, speculation_of(drafts, source, k)) == answers(tiny, turns, None)


@pytest.mark.parametrize("source", ["ngram", "near"])
def test_conversation_with_speculation_fills_the_context(tiny, drafts, source):
    plain = answers(tiny, ["hat"], None, context=40, budget=200)
    assert answers(tiny, ["hat"], speculation_of(drafts, source), context=40, budget=200) == plain
    assert len(plain[0][0]) == 40


@pytest.mark.parametrize("source, at", [*zip(SOURCES, [1, 2, 3, 1], strict=True), ("same", 3), ("near", 1)])
def test_conversation_with_speculation_after_an_interrupted_answer(tiny, drafts, source, at):
    conversation = conversation_of(tiny, 512, budget=40, speculation=speculation_of(drafts, source, 3))
    interrupted(conversation, "the cat", at)
    assert len(text_of(conversation)) < 40
    ids = conversation.prompt_ids("the dog")
    assert shared_prefix(ids, conversation.cached) > 5
    list(conversation.turn("the dog"))
    assert text_of(conversation)[len(ids) :] == ids_of(tiny.model, [ids], 40)[0]


@pytest.mark.parametrize("source", SOURCES[1:])
@pytest.mark.parametrize("k", [3, "auto"])
def test_draft_holds_the_conversation_and_reads_only_what_is_new(tiny, drafts, source, k):
    speculation, read = speculation_of(drafts, source, k), []
    speculation.costs[1] = Costs({0: 1.0, 1: 1.1, 2: 1.2, 4: 1.4, 8: 1.8}, 0.1)  # not measured: always the same rounds
    draft = speculation.drafter

    def forward(model, tokens, *others):
        read.append(tokens.shape[1])
        return forward_chunk(model, tokens, *others)

    draft.forward = forward
    tokenizer = copy.copy(tiny.tokenizer)
    tokenizer.chat_template = None  # so that the text is never encoded anew
    conversation = conversation_of(SimpleNamespace(model=tiny.model, tokenizer=tokenizer), 512, speculation=speculation)
    conversation.engine.reserve(1, 512)
    turns = [
        ("the dog ate the hat", 11),
        ("a cat", 12),
        ("/reset", 0),
        ("the hat", 1),
        ("the cat sat", 20),
        ("he ate", 9),
    ]
    for text, budget in turns:
        if text == "/reset":
            conversation.reset()
            continue
        ids, conversation.limits = conversation.prompt_ids(text), Limits(512, budget)
        start = min(shared_prefix(ids, conversation.cached), len(ids) - 1, draft.filled)
        read.clear()
        list(conversation.turn(text))
        assert read[0] == len(ids) - start
        assert len(ids) <= draft.filled < len(text_of(conversation))
        assert_holds(draft, text_of(conversation))


def assert_holds(draft, text):
    """The draft's cache is what its model, reading the text anew, puts there."""
    fresh = draft.model.new_cache(1, 512)
    draft.model(torch.tensor([text[: draft.filled]]), torch.arange(draft.filled)[None], fresh.view())
    for ours, truth in zip(draft.cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(ours.k[:, :, : draft.filled], truth.k[:, :, : draft.filled])


@torch.inference_mode()
def test_measuring_rounds_leaves_the_text_in_the_cache_of_the_draft(tiny, drafts):
    speculation, text = speculation_of(drafts, "same", "auto"), [5, 6, 7, 8, 9]
    engine = Engine(tiny.model, speculation=speculation)
    engine.reserve(1, 64)
    drafter = speculation.drafter
    token, pos = prefill(tiny.model, engine.cache, [text], GREEDY)
    drafter.begin(tiny.model, [text])
    drafter.extend(token.tolist())
    text = [*text, token.item()]
    at = Text(torch.tensor([text[-2:]]), pos, pos + 20, len(text))
    speculation.measure(tiny.model, engine.cache, at, GREEDY)
    assert drafter.filled == len(text)
    assert_holds(drafter, text)


@pytest.mark.parametrize("a, b, n", [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3, 4], 1)])
def test_shared_prefix(a, b, n):
    assert shared_prefix(a, b) == n
