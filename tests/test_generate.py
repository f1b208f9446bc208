"""The library behind the command: streams of ids, rows that end, prompt files, conversations."""

import argparse
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import generate as program
from checkpoint import load_model, save_checkpoint
from decoding import Sampling
from generate import Conversation, Row, Timing, generate, read_prompt_file, run_batch, setup_caches
from model import ModelArgs, Transformer
from tokenizer import TextStream, load_tokenizer

GREEDY = Sampling(temperature=0)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_checkpoint(folder, context=512, seed=0, template=CHATML):
    """A checkpoint of ours that runs in no time: random float32 weights, a byte-level vocabulary, ChatML."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ate the hat, he said"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "add_bos_token": False, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    args = ModelArgs(
        dim=64,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=tokenizer.get_vocab_size(),
        max_seq_length=context,
        tie_embeddings=True,
    )
    shapes = Transformer(args).state_dict()
    torch.manual_seed(seed)
    state = {name: torch.randn(t.shape) * 0.2 for name, t in shapes.items()}
    save_checkpoint(folder / "model.pth", args, {k: v for k, v in state.items() if k != "output.weight"})
    return folder / "model.pth"


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
        from checkpoint import load_model
        from decoding import Sampling
        from generate import generate
        from tokenizer import TextStream, load_tokenizer
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
            layer.attention.kv_cache = cache
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


@pytest.mark.parametrize("a, b, n", [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3, 4], 1)])
def test_shared_prefix(a, b, n):
    assert program.shared_prefix(a, b) == n
