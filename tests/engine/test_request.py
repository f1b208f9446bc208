"""The library behind the command: streams of ids, rows that end, prompt files, conversations."""

import argparse
import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import generate as program
from engine.cache import setup_caches
from engine.decode import prefill
from engine.guess_length import Costs
from engine.request import Row, Timing, generate, run_batch
from engine.sampling import Sampling
from engine.speculative import DraftModel, PromptLookup, Speculation
from generate import Conversation
from tests.tiny import make_tiny_checkpoint
from text.prompts import read_prompt_file
from text.stream import TextStream
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return SimpleNamespace(path=path, model=load_model(path, dtype=torch.float32), tokenizer=load_tokenizer(path))


@pytest.fixture(scope="module")
def default(default_model_dir):
    path = default_model_dir / "model.pth"
    return SimpleNamespace(path=path, model=load_model(path, dtype=torch.float32), tokenizer=load_tokenizer(path))


def ids_of(model, prompts, budget, **options):
    """The new ids of each row."""
    setup_caches(model, len(prompts), max(map(len, prompts)) + budget + options.get("start", 0))
    rows = [[] for _ in prompts]
    for chunk in generate(model, prompts, budget, GREEDY, **options):
        for row, ids in zip(rows, chunk, strict=True):
            assert ids
            row += ids
    return rows


# ---------------------------------------------------------------- as a library


def test_ten_lines_stream_text_from_the_default_model(default):
    script = f"""
        from weights.checkpoint import load_model
        from engine.sampling import Sampling
        from engine.request import generate
        from text.stream import TextStream
        from text.tokenizer import load_tokenizer
        model, tokenizer = load_model({str(default.path)!r}), load_tokenizer({str(default.path)!r})
        prompt = tokenizer.encode_chat([{{"role": "user", "content": "What is the capital of France?"}}])
        model.setup_caches(1, len(prompt) + 100)
        stream = TextStream(tokenizer)
        for [ids] in generate(model, [prompt], 100, Sampling(temperature=0)):
            print(stream.push(ids), end="", flush=True)
            if tokenizer.eos_ids & set(ids):
                break
    """
    lines = "\n".join(line.strip() if "    print" not in line and "  if " not in line else line[8:]
                      for line in script.splitlines()).replace("\nbreak", "\n        break")  # fmt: skip
    result = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "The capital of France is Paris."), result.stderr


@pytest.mark.parametrize("budget", [1, 2, 3, 17])
def test_budget_is_exact(tiny, budget):
    assert [len(row) for row in ids_of(tiny.model, [[5, 6], [7, 8, 9]], budget)] == [budget, budget]


def test_prompt_and_budget_may_fill_the_cache_exactly(tiny):
    prompt = list(range(10, 50))
    (free,) = ids_of(tiny.model, [prompt], 60)
    tiny.model.setup_caches(1, 100)
    filled = [ids for (chunk,) in generate(tiny.model, [prompt], 60, GREEDY) for ids in chunk]
    assert filled == free


def test_one_token_more_than_the_context_is_an_error():
    assert program.check_fit(12, 500, 512) == 512
    with pytest.raises(ValueError, match=r"13 tokens and 500 new .* context of 512; use --max_new_tokens 499 or less"):
        program.check_fit(13, 500, 512)
    with pytest.raises(ValueError, match="shorten the prompt below 512"):
        program.check_fit(512, 1, 512)


def test_rows_of_a_ragged_batch_equal_each_row_alone(tiny):
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in (1, 2, 40, 7, 120)]
    together = ids_of(tiny.model, prompts, 40)
    assert together == [ids_of(tiny.model, [prompt], 40)[0] for prompt in prompts]
    assert len({tuple(row) for row in together}) == len(prompts)


@pytest.mark.parametrize("distance", [0, 1, 3])
def test_reading_behind_keeps_order_and_loses_nothing(distance):
    launched = []
    source = (launched.append(i) or i for i in range(6))
    read = []
    for chunk in program.read_behind(source, distance):
        read.append(chunk)
        assert len(launched) == min(len(read) + distance, 6)
    assert read == list(range(6))


# ---------------------------------------------------------------- how a row ends


def row_of(tiny, budget=100, stop=(), ignore_eos=False):
    return Row([1], tiny.tokenizer, budget, list(stop), ignore_eos)


def test_row_ends_at_end_of_text_whose_id_is_counted(tiny):
    row, ids = row_of(tiny), tiny.tokenizer.encode("the cat")
    (eos,) = tiny.tokenizer.encode("<|im_end|>")
    assert row.push(ids) + row.push([eos, *ids]) == "the cat"
    assert row.to_json() == {
        "prompt_tokens": 1,
        "new_tokens": len(ids) + 1,
        "token_ids": [*ids, eos],
        "accept_lengths": [],
        "text": "the cat",
        "finish_reason": "eos",
    }
    assert row.push(ids) == "" and len(row.token_ids) == len(ids) + 1


def test_every_end_of_text_token_ends_a_row(tiny):
    for eos in tiny.tokenizer.eos_ids:
        row = row_of(tiny)
        row.push([eos])
        assert (row.finish_reason, row.token_ids, row.stream.text) == ("eos", [eos], "")
    assert len(tiny.tokenizer.eos_ids) == 2


def test_row_that_ignores_end_of_text_goes_on(tiny):
    row, ids = row_of(tiny, budget=9, ignore_eos=True), tiny.tokenizer.encode("the cat<|im_end|> sat on the mat")
    row.push(ids[:8])
    assert row.finish_reason is None
    row.push(ids[8:] + ids)
    assert (row.finish_reason, len(row.token_ids)) == ("length", 9)


def test_row_stops_before_the_first_stop_string_and_counts_the_id_that_completed_it(tiny):
    ids = [tiny.tokenizer.encode(piece)[0] for piece in ("s", "a", "i", "d", " ", "h", "e")]
    row = row_of(tiny, stop=["d h", "id", "xyz"])
    assert row.push(ids) == "sa"
    assert (row.finish_reason, row.token_ids, row.stream.text) == ("stop", ids[:4], "sa")


def test_text_held_back_for_a_stop_string_that_never_comes_is_given_out_at_the_end(tiny):
    ids = [tiny.tokenizer.encode(letter)[0] for letter in "said"]
    row = row_of(tiny, budget=4, stop=["idle"])
    assert [row.push([token]) for token in ids] == ["s", "a", "", "id"]
    assert (row.finish_reason, row.stream.text) == ("length", "said")


def test_budget_and_end_on_the_same_id(tiny):
    (eos,), (letter,) = tiny.tokenizer.encode("<|im_end|>"), tiny.tokenizer.encode("d")
    ends, stops, runs_out = row_of(tiny, 2), row_of(tiny, 2, stop=["dd"]), row_of(tiny, 2)
    ends.push([letter, eos])
    stops.push([letter, letter])
    runs_out.push([letter, letter])
    assert [row.finish_reason for row in (ends, stops, runs_out)] == ["eos", "stop", "length"]
    assert [row.stream.text for row in (ends, stops, runs_out)] == ["d", "", "dd"]


def test_batch_goes_on_until_its_last_row_ends_and_the_others_stay_as_they_ended(tiny):
    prompts = [[5, 6], [7, 8, 9]]
    plain = ids_of(tiny.model, prompts, 30)
    at = next(i for i in range(3, 30) if plain[0][i] not in plain[0][:i])  # row 0 is to end there
    stub = SimpleNamespace(eos_ids=frozenset([plain[0][at]]) - set(plain[1]))
    assert stub.eos_ids, "choose another seed"
    rows = [Row(prompt, tiny.tokenizer, 30, [], True) for prompt in prompts]
    rows[0].eos_ids = stub.eos_ids
    timing, pieces = Timing(), {0: "", 1: ""}
    setup_caches(tiny.model, 2, 33)

    def show(row, text):
        pieces[rows.index(row)] += text

    run_batch(tiny.model, rows, GREEDY, timing, 0.0, show)
    assert rows[0].token_ids == plain[0][: at + 1] and rows[1].token_ids == plain[1]
    assert [row.finish_reason for row in rows] == ["eos", "length"]
    assert list(pieces.values()) == [row.stream.text for row in rows]
    assert (timing.prompt_tokens, timing.decoded_tokens, timing.steps) == (5, at + 29, 29)


def test_streamed_text_of_random_ids_equals_the_decoded_whole(tiny):
    ids = torch.randint(320, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    stream = TextStream(tiny.tokenizer)
    text = "".join(stream.push([token]) for token in ids) + stream.finish()
    assert text == tiny.tokenizer.decode(ids)


# ---------------------------------------------------------------- speculation

SOURCES = ["ngram", "same", "near", "other"]  # the text itself; drafts that always, sometimes and never agree
PROMPTS = [[50, 60, 70], [7, 8, 9, 7, 8, 9, 7, 8], [40]]


@pytest.fixture(scope="module")
def drafts(tiny, tmp_path_factory):
    other = make_tiny_checkpoint(tmp_path_factory.mktemp("other"), seed=1)
    paths = {"same": tiny.path, "near": tiny.path, "other": other}
    drafts = {name: load_model(path, dtype=torch.float32) for name, path in paths.items()}
    torch.manual_seed(0)
    for parameter in drafts["near"].parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return drafts


def speculation_of(drafts, source, k=5):
    return Speculation(PromptLookup() if source == "ngram" else DraftModel(drafts[source]), k)


def finished(it, prompts, speculation=None, budget=24, stop=(), eos_ids=frozenset()):
    """The rows of a batch, ended, of which the first knows eos_ids, and the timing."""
    rows = [Row(prompt, it.tokenizer, budget, list(stop), True) for prompt in prompts]
    rows[0].eos_ids = eos_ids
    shown, timing = [""] * len(rows), Timing()
    setup_caches(it.model, len(prompts), max(map(len, prompts)) + budget, speculation)

    def show(row, text):
        shown[rows.index(row)] += text

    run_batch(it.model, rows, GREEDY, timing, 0.0, show, speculation=speculation)
    assert shown == [row.stream.text for row in rows]
    return rows, timing


def ends(rows):
    return [(row.token_ids, row.stream.text, row.finish_reason) for row in rows]


@pytest.mark.parametrize("k", [1, 5, "auto"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("reason", ["length", "stop", "eos"])
def test_rows_end_as_without_speculation(tiny, drafts, source, k, reason):
    plain, _ = finished(tiny, PROMPTS)
    how = {
        "length": {},
        "stop": {"stop": [plain[0].stream.text[3:5]]},
        "eos": {"eos_ids": frozenset([new_id_at(plain[0].token_ids, 3)])},
    }[reason]
    expected = ends(finished(tiny, PROMPTS, **how)[0])
    assert expected[0][2] == reason
    rows, timing = finished(tiny, PROMPTS, speculation_of(drafts, source, k), **how)
    assert ends(rows) == expected
    for row in rows:
        taken = [1 + accepted for _, accepted in row.rounds]
        assert all(0 <= accepted <= proposed <= (8 if k == "auto" else k) for proposed, accepted in row.rounds)
        assert sum(taken) - taken[-1] < len(row.token_ids) - 1 <= sum(taken)  # none after the one that ended it
        assert len(row.rounds) <= timing.steps
    assert max(len(row.rounds) for row in rows) == timing.steps


def new_id_at(ids, least):
    """An id that first comes at place `least` or a later one."""
    return next(token for at, token in enumerate(ids) if at >= least and token not in ids[:at])


def test_rounds_of_a_row_that_ends_within_a_chunk(tiny, drafts):
    """A draft with the model's own weights is always right, so each round of k = 5 brings 6 tokens."""
    plain, _ = finished(tiny, PROMPTS[:2])
    end = new_id_at(plain[0].token_ids, 8)
    at = plain[0].token_ids.index(end)
    assert at in range(8, 12), "choose another prompt: the row is to end within the second round, places 7 to 12"
    rows, timing = finished(tiny, PROMPTS[:2], speculation_of(drafts, "same"), eos_ids=frozenset([end]))
    assert [len(row.token_ids) for row in rows] == [at + 1, 24]
    assert rows[0].rounds == [(5, 5)] * 2
    assert rows[1].rounds == [(5, 5)] * 3 + [(5, 4)]  # 1 + 3 x 6 = 19, and the last five
    assert (timing.steps, timing.draft_steps, timing.decoded_tokens) == (4, 20, at + 23)


def test_drafts_agree_as_their_names_say(tiny, drafts):
    def accepted(source):
        rows, _ = finished(tiny, PROMPTS, speculation_of(drafts, source, 3))
        return [accepted for row in rows for _, accepted in row.rounds]

    assert {*accepted("near")} >= {0, 1, 2, 3}, "tests of partly right drafts test nothing"
    assert sum(accepted("other")) < sum(accepted("near")) < sum(accepted("same"))


@pytest.mark.parametrize("source", SOURCES)
def test_generate_yields_the_same_ids_with_speculation(tiny, drafts, source):
    speculation, rows = speculation_of(drafts, source, 4), [[] for _ in PROMPTS]
    setup_caches(tiny.model, len(PROMPTS), 8 + 30, speculation)
    for chunk in generate(tiny.model, PROMPTS, 30, GREEDY, speculation=speculation):
        assert any(chunk) and max(map(len, chunk)) <= 5
        for row, ids in zip(rows, chunk, strict=True):
            row += ids
    assert rows == ids_of(tiny.model, PROMPTS, 30)


@pytest.mark.parametrize("source", ["ngram", "same"])
@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("length", [480, 250], ids=["fills the context", "crosses a size of the cache"])
def test_speculation_at_the_ends_of_caches(tiny, drafts, source, k, length):
    """480 and 32 more make 512, what model and draft were made for; a step attends to 256 slots, then to 512."""
    prompt = torch.randint(256, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    (plain,), _ = finished(tiny, [prompt], budget=32)
    (row,), _ = finished(tiny, [prompt], speculation_of(drafts, source, k), budget=32)
    assert row.token_ids == plain.token_ids and len(row.token_ids) == 32


def test_draft_with_a_shorter_context_is_refused(tiny, tmp_path):
    draft = load_model(make_tiny_checkpoint(tmp_path, context=64), dtype=torch.float32)
    speculation = Speculation(DraftModel(draft), 5)
    setup_caches(tiny.model, 1, 64, speculation)
    with pytest.raises(ValueError, match="the draft's context of 64 is shorter than the 65 positions asked for; use"):
        setup_caches(tiny.model, 1, 65, speculation)


@pytest.mark.parametrize(
    "rounds, mean, rate, printed",
    [
        ([], None, None, ""),
        ([[(4, 4), (4, 0)], [(4, 2)]], 2.0, 0.5, "[0.333, 0.000, 0.333, 0.000, 0.333]\nMean Accepted: 2.00, 50%"),
        ([[(2, 1), (0, 0)], [(2, 0), (0, 0)]], 0.25, 0.25, "[0.750, 0.250]\nMean Accepted: 0.25, 25%"),
        ([[(0, 0)]], 0.0, None, "[1.000]\nMean Accepted: 0.00"),
    ],
)
def test_acceptance(tiny, capsys, rounds, mean, rate, printed):
    timing = Timing(rows=[row_of(tiny) for _ in rounds])
    for row, pairs in zip(timing.rows, rounds, strict=True):
        row.rounds = pairs
        assert row.to_json()["accept_lengths"] == [accepted for _, accepted in pairs]
    assert program.acceptance([timing, Timing()]) == {"mean_accepted": mean, "acceptance_rate": rate}
    assert program.acceptance([timing, timing]) == program.acceptance([timing])
    program.report_acceptance(timing)
    assert printed in capsys.readouterr().err


def test_bytes_read(tiny):
    """The tiny model by hand: wqkv, wo, w13, w2 and two norms a layer; the last norm and the tied head."""
    layer = 8 * 16 * 64 + 64 * 64 + 2 * 96 * 64 + 96 * 64 + 2 * 64
    size = 2 * layer + 64 + tiny.tokenizer.vocab_size * 64
    draft = DraftModel(load_model(tiny.path, dtype=torch.bfloat16))
    timings = [Timing(steps=3, draft_steps=12), Timing(steps=1, draft_steps=5)]
    assert program.bytes_read(timings, tiny.model, None) == 4 * (4 * size)
    assert program.bytes_read(timings, tiny.model, Speculation(PromptLookup(), 4)) == 4 * (4 * size)
    assert program.bytes_read(timings, tiny.model, Speculation(draft, 4)) == 4 * (4 * size) + 17 * (2 * size)


# ---------------------------------------------------------------- prompt files


@pytest.mark.parametrize(
    "data, prompts",
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b"\n\n  \none\n\t\n two \n\n", ["one", " two "]),
        ("a\u2028b\x0bc\x85d\ne".encode(), ["a\u2028b\x0bc\x85d", "e"]),
        (b"a\rb\n", ["a\rb"]),
        (b"42\n", ["42"]),
        ("Grüße 😀\n日本".encode(), ["Grüße 😀", "日本"]),
        (b'{"prompt": "one"}\n\n{"id": 7, "prompt": "two\\nlines"}\n', ["one", "two\nlines"]),
        ('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "\\ud83d\\ude00"}'.encode(), ["a\u2028b", "😀"]),
        (b'say {"prompt": 1}\n{"prompt": "x"}', ['say {"prompt": 1}', '{"prompt": "x"}']),
    ],
)
def test_prompt_file(tmp_path, data, prompts):
    path = tmp_path / "prompts"
    path.write_bytes(data)
    assert read_prompt_file(str(path)) == prompts


@pytest.mark.parametrize(
    "data, message",
    [
        (b"good\nbad \xff\n", "is not UTF-8: byte 9 is 0xff"),
        ("text".encode("utf-16"), "is not UTF-8: byte 0 is 0xff"),
        (b"", "has no prompt in it"),
        (b" \n\r\n", "has no prompt in it"),
        (b'{"prompt": "a"}\nplain\n', "line 2 is not valid JSON"),
        (b'{"prompt": "a"\n', "line 1 is not valid JSON"),
        (b'{"text": "a"}\n', 'line 1 has no "prompt" field'),
        (b'{"prompt": "a"}\n[1]\n', 'line 2 has no "prompt" field'),
        (b'{"prompt": 5}\n', 'line 1: "prompt" must be a text'),
        (b'{"prompt": ""}\n', 'line 1: "prompt" must be a text that is not empty'),
        (b'{"prompt": ' + b"[" * 100_000, "line 1 is not valid JSON"),
    ],
)
def test_prompt_file_that_cannot_be_read(tmp_path, data, message):
    path = tmp_path / "prompts"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompt_file(str(path))


def test_prompt_file_that_is_not_there(tmp_path):
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"cannot read the prompt file {path}: {reason}"):
            read_prompt_file(str(path))


@pytest.mark.parametrize("prompt, message", [("", "the prompt is empty"), ("\udcff", "not valid UTF-8")])
def test_prompt_that_cannot_be_encoded(tiny, prompt, message):
    with pytest.raises(ValueError, match=message):
        program.encode_prompt(tiny.tokenizer, prompt, SimpleNamespace(chat=False))


# ---------------------------------------------------------------- conversations

PLAIN = {"step": program.decode_one_token, "forward": program.forward_chunk}


def conversation_of(it, context, budget=16, system=None):
    it.model.setup_caches(1, context)
    options = argparse.Namespace(system=system, max_new_tokens=budget, stop=[], ignore_eos=False)
    return Conversation(it.model, it.tokenizer, context, options)


def assert_turns_equal_fresh_runs(it, turns, context, budget):
    """Each answer, made on top of the kept cache, is what the whole conversation in an empty cache gives."""
    conversation = conversation_of(it, context, budget, system="You are a helpful assistant.")
    reused = 0
    for text in turns:
        ids = conversation.prompt_ids(text)
        reused += program.shared_prefix(ids, conversation.cached)
        conversation.turn(text, GREEDY, PLAIN)
        answer = conversation.history[len(ids) :]
        kept = [layer.attention.kv_cache for layer in it.model.layers]
        fresh = Row(ids, it.tokenizer, budget, [], False)
        setup_caches(it.model, 1, len(ids) + budget)
        run_batch(it.model, [fresh], GREEDY, Timing(), 0.0, lambda *_: None)
        assert answer == fresh.token_ids
        assert conversation.messages[-1] == {"role": "assistant", "content": fresh.stream.text}
        it.model.setup_caches(1, context)
        for layer, cache in zip(it.model.layers, kept, strict=True):
            layer.attention.kv_cache.k.copy_(cache.k)
            layer.attention.kv_cache.v.copy_(cache.v)
    assert len(conversation.messages) == 1 + 2 * len(turns)
    assert reused > len(conversation.cached) // 2


def test_conversation_on_the_kept_cache_equals_fresh_prefills(default, capsys):
    turns = ["What is the capital of France?", "And of Spain?", "Count to five.", "Thanks 😀"]
    assert_turns_equal_fresh_runs(default, turns, 1024, 24)
    assert "Paris" in capsys.readouterr().out


def test_conversation_whose_answers_are_bytes_in_pieces_equals_fresh_prefills(tiny):
    assert_turns_equal_fresh_runs(tiny, ["hello", "the cat", "a", "sat on the mat"], 512, 12)


def test_conversation_after_an_interrupted_answer_equals_a_fresh_prefill(tiny, monkeypatch, capsys):
    conversation, whole = conversation_of(tiny, 512), program.write
    pieces = []

    def interrupt(text):
        pieces.append(text)
        if len(pieces) == 4:
            raise KeyboardInterrupt
        whole(text)

    monkeypatch.setattr(program, "write", interrupt)
    conversation.turn("the cat", GREEDY, PLAIN)
    assert "[interrupted]" in capsys.readouterr().err
    monkeypatch.setattr(program, "write", whole)
    ids = conversation.prompt_ids("the dog")
    conversation.turn("the dog", GREEDY, PLAIN)
    assert conversation.history[len(ids) :] == ids_of(tiny.model, [ids], 16)[0]


def test_turn_that_does_not_fit_changes_nothing(tiny):
    conversation = conversation_of(tiny, 64, budget=200)
    conversation.turn("hat", GREEDY, PLAIN)
    before = (list(conversation.messages), list(conversation.cached), list(conversation.history))
    with pytest.raises(ValueError, match=r"the context of 64 tokens is full \(this turn needs \d+\); /reset clears it"):
        conversation.turn("the dog ate the hat " * 10, GREEDY, PLAIN)
    assert before == (conversation.messages, conversation.cached, conversation.history)


def test_answer_that_fills_the_context_says_so(tiny, capsys):
    conversation = conversation_of(tiny, 40, budget=200)
    conversation.turn("hat", GREEDY, PLAIN)
    assert len(conversation.history) == 40
    assert "the context is full, /reset clears it" in capsys.readouterr().err


def test_without_a_template_a_conversation_continues_the_text(tmp_path):
    path = make_tiny_checkpoint(tmp_path, template=None)
    it = SimpleNamespace(model=load_model(path, dtype=torch.float32), tokenizer=load_tokenizer(path))
    conversation = conversation_of(it, 256, budget=8)
    conversation.turn("the cat", GREEDY, PLAIN)
    first = list(conversation.history)
    conversation.turn(" sat", GREEDY, PLAIN)
    prompt = first + it.tokenizer.encode(" sat")
    assert conversation.history == prompt + ids_of(it.model, [prompt], 8)[0]


def answers(it, turns, speculation, context=512, budget=16):
    """The text after each turn, as ids, and what the cache is said to hold; "/reset" clears the conversation."""
    conversation = conversation_of(it, context, budget)
    setup_caches(it.model, 1, context, speculation)
    texts = []
    for text in turns:
        if text == "/reset":
            conversation.reset()
        else:
            conversation.turn(text, GREEDY, PLAIN | {"speculation": speculation})
        texts.append((conversation.history, conversation.cached, list(conversation.messages)))
    return texts


@pytest.mark.parametrize("source", SOURCES)
def test_conversation_with_speculation_equals_one_without(tiny, drafts, source):
    turns = ["the cat sat", "the dog", "a", "/reset", "hat", "the cat sat on the mat"]
    for k in (3, "auto"):
        assert answers(tiny, turns, speculation_of(drafts, source, k)) == answers(tiny, turns, None)


@pytest.mark.parametrize("source", ["ngram", "near"])
def test_conversation_with_speculation_fills_the_context(tiny, drafts, source, capsys):
    plain = answers(tiny, ["hat"], None, context=40, budget=200)
    assert answers(tiny, ["hat"], speculation_of(drafts, source), context=40, budget=200) == plain
    assert len(plain[0][0]) == 40
    assert capsys.readouterr().err.count("the context is full, /reset clears it") == 2


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_conversation_with_speculation_after_an_interrupted_answer(tiny, drafts, source, at, monkeypatch, capsys):
    conversation, whole, pieces = conversation_of(tiny, 512, budget=40), program.write, []
    speculation = speculation_of(drafts, source, 3)
    setup_caches(tiny.model, 1, 512, speculation)

    def interrupt(text):
        pieces.append(text)
        if len(pieces) == at:
            raise KeyboardInterrupt
        whole(text)

    monkeypatch.setattr(program, "write", interrupt)
    conversation.turn("the cat", GREEDY, PLAIN | {"speculation": speculation})
    assert "[interrupted]" in capsys.readouterr().err and len(conversation.history) < 40
    monkeypatch.setattr(program, "write", whole)
    ids = conversation.prompt_ids("the dog")
    assert program.shared_prefix(ids, conversation.cached) > 5
    conversation.turn("the dog", GREEDY, PLAIN | {"speculation": speculation})
    answer = conversation.history[len(ids) :]
    assert answer == ids_of(tiny.model, [ids], 40)[0]


@pytest.mark.parametrize("source", SOURCES[1:])
@pytest.mark.parametrize("k", [3, "auto"])
def test_draft_holds_the_conversation_and_reads_only_what_is_new(tiny, drafts, source, k):
    speculation, read = speculation_of(drafts, source, k), []
    speculation.costs[1] = Costs({0: 1.0, 1: 1.1, 2: 1.2, 4: 1.4, 8: 1.8}, 0.1)  # not measured: always the same rounds
    draft = speculation.source

    def forward(model, tokens, *others):
        read.append(tokens.shape[1])
        return program.forward_chunk(model, tokens, *others)

    draft.forward = forward
    tokenizer = copy.copy(tiny.tokenizer)
    tokenizer.chat_template = None  # so that the text is never encoded anew
    conversation = conversation_of(SimpleNamespace(model=tiny.model, tokenizer=tokenizer), 512)
    setup_caches(tiny.model, 1, 512, speculation)
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
        ids, conversation.args.max_new_tokens = conversation.prompt_ids(text), budget
        start = min(program.shared_prefix(ids, conversation.cached), len(ids) - 1, draft.filled)
        read.clear()
        conversation.turn(text, GREEDY, PLAIN | {"speculation": speculation})
        assert read[0] == len(ids) - start
        assert len(ids) <= draft.filled < len(conversation.history)
        assert_holds(draft, conversation.history)


def assert_holds(draft, text):
    """The draft's cache is what its model, reading the text anew, puts there."""
    fresh = copy.deepcopy(draft.model)
    fresh(torch.tensor([text[: draft.filled]]), torch.arange(draft.filled)[None])
    for ours, truth in zip(draft.model.layers, fresh.layers, strict=True):
        ours, truth = (layer.attention.kv_cache.k[:, :, : draft.filled] for layer in (ours, truth))
        torch.testing.assert_close(ours, truth)


@torch.inference_mode()
def test_measuring_rounds_leaves_the_text_in_the_cache_of_the_draft(tiny, drafts):
    speculation, text = speculation_of(drafts, "same", "auto"), [5, 6, 7, 8, 9]
    setup_caches(tiny.model, 1, 64, speculation)
    token, pos = prefill(tiny.model, [text], GREEDY)
    speculation.source.begin(tiny.model, [text])
    speculation.source.extend(token.tolist())
    text = [*text, token.item()]
    speculation.measure(tiny.model, torch.tensor([text[-2:]]), pos, pos + 20, len(text), GREEDY)
    assert speculation.source.filled == len(text)
    assert_holds(speculation.source, text)


@pytest.mark.parametrize("a, b, n", [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3, 4], 1)])
def test_shared_prefix(a, b, n):
    assert program.shared_prefix(a, b) == n
