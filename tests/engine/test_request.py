"""The library behind the command: streams of ids, and requests that end."""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

import engine.engine
from engine.cache import ALIGNED, check_fit
from engine.decode import Chunk
from engine.engine import Engine, generate, read_behind
from engine.request import Request, Timing, run_batch
from engine.sampling import Sampling
from engine.speculation.drafters import DraftModel, PromptLookup
from engine.speculation.speculative import Speculation
from measure.speed import acceptance, bytes_read, report_acceptance
from tests.tiny import GREEDY, SOURCES, ids_of, make_tiny_checkpoint, pairwise, speculation_of, tiny_model
from text.stream import TextStream
from weights.checkpoint import load_model

# ---------------------------------------------------------------- as a library


def test_the_example_of_generate_streams_text(default_model_dir, capsys):
    """The lines in its docstring, run as they stand there, with the imports that they need."""
    example = [line[8:] for line in engine.engine.generate.__doc__.splitlines() if line.startswith("        ")]
    path = default_model_dir / "model.pth"
    lines = ["from engine.engine import generate, load", "from engine.sampling import Sampling"]
    lines += ["from text.stream import TextStream", *example]
    exec("\n".join(lines).replace("load()", f"load({str(path)!r})"), {})
    assert capsys.readouterr().out.startswith(" Paris")


@pytest.mark.parametrize("budget", [1, 2, 3, 17])
def test_budget_is_exact(tiny, budget):
    assert [len(row) for row in ids_of(tiny.model, [[5, 6], [7, 8, 9]], budget)] == [budget, budget]


def test_prompt_and_budget_may_fill_the_context_exactly():
    prompt, engine = list(range(10, 50)), Engine(tiny_model(max_seq_length=100))
    assert ids_of(engine, [prompt], 60) == ids_of(tiny_model(), [prompt], 60) and engine.cache.n_slots == 100 + ALIGNED


def test_one_token_more_than_the_context_is_an_error():
    assert check_fit(12, 500, 512) == 512
    with pytest.raises(ValueError, match=r"13 tokens and 500 new .* context of 512; use --max_new_tokens 499 or less"):
        check_fit(13, 500, 512)
    with pytest.raises(ValueError, match="shorten the prompt below 512"):
        check_fit(512, 1, 512)


def test_rows_of_a_ragged_batch_equal_each_row_alone(tiny):
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in (1, 2, 40, 7, 120)]
    together = ids_of(tiny.model, prompts, 40)
    assert together == [ids_of(tiny.model, [prompt], 40)[0] for prompt in prompts]
    assert len({tuple(row) for row in together}) == len(prompts)


@pytest.mark.parametrize("distance", [0, 1, 3])
def test_reading_behind_keeps_order_and_loses_nothing(distance):
    launched = []
    source = (launched.append(i) or Chunk(torch.tensor([[i]]), torch.ones(1)) for i in range(6))
    read = []
    for chunk in read_behind(source, distance):
        read.append(int(chunk.tokens))
        assert len(launched) == min(len(read) + distance, 6)
    assert read == list(range(6))


def test_a_step_is_read_while_the_next_one_runs(monkeypatch):
    """The order in which a GPU gets its work: the copy of a step and its event stand before the next step."""
    queue = []

    class Tokens:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, n):
            self.n = n
            queue.append(f"step {n}")

        def to(self, device, non_blocking):
            assert (device, non_blocking) == ("cpu", True)
            queue.append(f"copy {self.n}")
            return torch.tensor([[self.n]])

    class Event:
        def record(self, stream):
            self.after = queue[-1]

        def synchronize(self):
            queue.append(f"wait for {self.after}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    for chunk in read_behind((Chunk(Tokens(n), torch.ones(1)) for n in range(3)), 1):
        queue.append(f"read {chunk.tokens.item()}")
    steps = ["step 0", "copy 0", "step 1", "copy 1", "wait for copy 0", "read 0"]
    steps += ["step 2", "copy 2", "wait for copy 1", "read 1", "wait for copy 2", "read 2"]
    assert queue == steps


# ---------------------------------------------------------------- how a row ends


def row_of(tiny, budget=100, stop=(), ignore_eos=False):
    return Request([1], tiny.tokenizer, budget, list(stop), ignore_eos)


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


def test_a_special_token_that_is_a_stop_string_ends_the_row(tiny):
    start, *ids = tiny.tokenizer.encode("<|im_start|>said")
    row, other = row_of(tiny, stop=["<|im_start|>"]), row_of(tiny)
    assert row.push([*ids, start, *ids]) == other.push(ids)
    assert (row.finish_reason, row.token_ids, row.stream.text) == ("stop", [*ids, start], "said")


@pytest.mark.parametrize(
    "proposed, ids, end, noted",
    [
        (5, "abcdef", None, (5, 5)),
        (5, "abc", None, (5, 2)),
        (5, "abcdef", "b", (2, 2)),  # the guesses a and b, and none after them
        (5, "abc", "c", (3, 2)),  # c is the model's own, drawn in place of the third guess
        (5, "abcdef", "f", (5, 5)),
        (0, "a", "a", (0, 0)),
    ],
)
def test_guesses_after_the_end_of_a_row_do_not_count(tiny, proposed, ids, end, noted):
    row = row_of(tiny)
    row.eos_ids = {ord(end)} if end else frozenset()
    row.push_round([ord(letter) for letter in ids], proposed)
    assert row.rounds == [noted]


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
    rows = [Request(prompt, tiny.tokenizer, 30, [], True) for prompt in prompts]
    rows[0].eos_ids = stub.eos_ids
    timing, pieces = Timing(), {0: "", 1: ""}
    for row, text in run_batch(Engine(tiny.model), rows, GREEDY, timing):
        pieces[rows.index(row)] += text
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

PROMPTS = [[50, 60, 70], [7, 8, 9, 7, 8, 9, 7, 8], [40]]


def finished(it, prompts, speculation=None, budget=24, stop=(), eos_ids=frozenset()):
    """The rows of a batch, ended, of which the first knows eos_ids, and the timing."""
    rows = [Request(prompt, it.tokenizer, budget, list(stop), True) for prompt in prompts]
    rows[0].eos_ids = eos_ids
    shown, timing = [""] * len(rows), Timing()
    for row, text in run_batch(Engine(it.model, speculation=speculation), rows, GREEDY, timing):
        shown[rows.index(row)] += text
    assert shown == [row.stream.text for row in rows]
    return rows, timing


def ends(rows):
    return [(row.token_ids, row.stream.text, row.finish_reason) for row in rows]


@pytest.mark.parametrize(*pairwise(source=SOURCES, k=[1, 5, "auto"], reason=["length", "stop", "eos"]))
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
        assert all(0 <= accepted <= proposed <= (32 if k == "auto" else k) for proposed, accepted in row.rounds)
        assert sum(taken) - taken[-1] < len(row.token_ids) - 1 <= sum(taken)  # none after the one that ended it
        assert len(row.rounds) <= timing.steps
    assert max(len(row.rounds) for row in rows) == timing.steps


@pytest.mark.parametrize("source", [None, *SOURCES])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)], ids=["greedy", "sampled"])
def test_logits_that_are_nan_end_the_run_with_the_dtypes_that_would_do(tiny, drafts, source, sampling):
    """A token whose embedding is NaN is drawn, or guessed, by and by; the text before is given out."""
    speculation, model = source and speculation_of(drafts, source, 3), deepcopy(tiny.model)
    torch.manual_seed(0)
    plain = [
        token for [ids] in generate(Engine(model, speculation=speculation), PROMPTS[:1], 24, sampling) for token in ids
    ]
    bad = new_id_at([*PROMPTS[0], *plain], 9)
    model.output = deepcopy(model.output)  # tied
    model.tok_embeddings.weight.data[bad] = math.nan
    torch.manual_seed(0)
    engine, ids = Engine(model, speculation=speculation), []
    with pytest.raises(ValueError, match="logits are NaN or infinite in float32; its weights or its config are damag"):
        for [new] in generate(engine, PROMPTS[:1], 24, sampling):
            ids += new
    assert ids == plain[: len(ids)] and (source or ids[-1] == bad) and bad not in ids[:-1]


@pytest.mark.parametrize("k", [3, "auto"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)], ids=["greedy", "sampled"])
def test_logits_of_a_draft_that_are_nan_end_the_run(tiny, drafts, sampling, k):
    draft = deepcopy(drafts["same"])
    draft.norm.weight.data[0] = math.nan
    engine = Engine(tiny.model, speculation=Speculation(DraftModel(draft), k))
    with pytest.raises(ValueError, match="^the draft model's logits are NaN or infinite in float32; its weights"):
        list(generate(engine, PROMPTS, 24, sampling))


def test_a_model_that_float16_cannot_hold(tiny):
    model = deepcopy(tiny.model)
    for block in model.layers:
        block.feed_forward.w13.weight.data *= 100
        block.feed_forward.w2.weight.data *= 1e4
    with pytest.raises(ValueError, match="NaN or infinite in float16; use --dtype bfloat16 or float32$"):
        ids_of(deepcopy(model).half(), PROMPTS, 4)
    ids_of(model.bfloat16(), PROMPTS, 4)


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
    guessed = min(5, at - 6)  # up to the one that ended the row
    assert rows[0].rounds == [(5, 5), (guessed, guessed)]
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
    for chunk in generate(Engine(tiny.model, speculation=speculation), PROMPTS, 30, GREEDY):
        assert any(chunk) and max(map(len, chunk)) <= 5
        for row, ids in zip(rows, chunk, strict=True):
            row += ids
    assert rows == ids_of(tiny.model, PROMPTS, 30)


@pytest.mark.parametrize(*pairwise(k=[1, 8, 32], source=["ngram", "same"], length=[480, 250]))
def test_speculation_at_the_ends_of_caches(tiny, drafts, source, k, length):
    """480 and 32 more make 512, what model and draft were made for; a step attends to 256 slots, then to 512."""
    prompt = torch.randint(256, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    (plain,), _ = finished(tiny, [prompt], budget=32)
    (row,), _ = finished(tiny, [prompt], speculation_of(drafts, source, k), budget=32)
    assert row.token_ids == plain.token_ids and len(row.token_ids) == 32


def test_draft_with_a_shorter_context_is_refused(tiny, tmp_path):
    draft = load_model(make_tiny_checkpoint(tmp_path, context=64), dtype=torch.float32)
    speculation = Speculation(DraftModel(draft), 5)
    engine = Engine(tiny.model, speculation=speculation)
    engine.reserve(1, 64)
    with pytest.raises(ValueError, match="the draft's context of 64 is shorter than the 65 positions asked for; use"):
        engine.reserve(1, 65)


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
    timing = Timing(requests=[row_of(tiny) for _ in rounds])
    for row, pairs in zip(timing.requests, rounds, strict=True):
        row.rounds = pairs
        assert row.to_json()["accept_lengths"] == [accepted for _, accepted in pairs]
    assert acceptance([timing, Timing()]) == {"mean_accepted": mean, "acceptance_rate": rate}
    assert acceptance([timing, timing]) == acceptance([timing])
    report_acceptance(timing)
    assert printed in capsys.readouterr().err


def test_bytes_read(tiny):
    """The tiny model by hand: wqkv, wo, w13, w2 and two norms a layer; the last norm and the tied head."""
    layer = 8 * 16 * 64 + 64 * 64 + 2 * 96 * 64 + 96 * 64 + 2 * 64
    size = 2 * layer + 64 + tiny.tokenizer.vocab_size * 64
    draft = DraftModel(load_model(tiny.path, dtype=torch.bfloat16))
    timings = [Timing(steps=3, draft_steps=12), Timing(steps=1, draft_steps=5)]
    assert bytes_read(timings, Engine(tiny.model)) == 4 * (4 * size)
    assert bytes_read(timings, Engine(tiny.model, speculation=Speculation(PromptLookup(), 4))) == 4 * (4 * size)
    assert bytes_read(timings, Engine(tiny.model, speculation=Speculation(draft, 4))) == 4 * (4 * size) + 17 * (
        2 * size
    )
