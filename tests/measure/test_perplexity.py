"""Perplexity against transformers, against numbers worked out by hand, and as a person measures it."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import cli
from engine.engine import Engine, build_engine
from eval import build_parser, main
from measure.perplexity import Window, batches, perplexity, split
from measure.scoring import token_logprobs
from model import ModelArgs, Transformer
from tests.tiny import ROOT, SIZES, ids_of, make_tiny_checkpoint, random_prompts, save_tiny
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = 16
TEXT = "The cat sat on the mat. The dog, who had seen all of it, went out into the garden and slept in the sun. " * 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same tiny random model in transformers and here, float32."""
    folder = tmp_path_factory.mktemp("llama")
    return save_tiny(LlamaConfig(**SIZES), folder), Engine(load_model(folder, dtype=torch.float32))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@torch.inference_mode()
def strided_nll(model, ids, window, stride):
    """Mean and count as the documentation of transformers sums them: labels hide what an earlier window scored."""
    total, count, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        labels = torch.tensor([ids[begin:end]])
        labels[:, : done - end] = -100
        scored = int((labels[:, 1:] != -100).sum())  # the model shifts them by one
        if scored:
            total += model(torch.tensor([ids[begin:end]]), labels=labels).loss.item() * scored
        count, done = count + scored, end
        if end == len(ids):
            break
    return total / count, count


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(
    "n, size, stride, windows",
    [
        (10, 4, 4, [(0, 1, 4), (4, 5, 8), (8, 9, 10)]),
        (9, 4, 4, [(0, 1, 4), (4, 5, 8)]),  # the last token is alone in its window
        (10, 4, 2, [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]),
        (9, 4, 3, [(0, 1, 4), (3, 4, 7), (6, 7, 9)]),
        (5, 4, 1, [(0, 1, 4), (1, 4, 5)]),
        (3, 4, 2, [(0, 1, 3)]),
        (2, 2, 2, [(0, 1, 2)]),
        (1, 4, 4, []),
        (0, 4, 4, []),
    ],
)
def test_windows(n, size, stride, windows):
    assert split(n, size, stride) == [Window(*window) for window in windows]


def test_batches_hold_windows_of_one_shape_in_order():
    windows = split(25, 4, 2)
    assert [len(batch) for batch in batches(windows, 4)] == [1, 4, 4, 2, 1]
    assert sum(batches(windows, 4), []) == windows


# ---------------------------------------------------------------- the number


@pytest.mark.parametrize(
    "n, stride, batch_size",
    [
        (107, None, 4),
        (107, WINDOW - 1, 1),
        (107, 5, 4),
        (107, 1, 1),
        (7 * WINDOW, None, 1),
        (7 * WINDOW, 5, 4),
        (7 * WINDOW + 1, None, 4),
        (7 * WINDOW + 1, WINDOW - 1, 1),
        (WINDOW, None, 1),
        (WINDOW, 1, 4),
        (9, 5, 1),
        (9, WINDOW - 1, 4),
    ],
)
def test_perplexity_equals_transformers(pair, stride, n, batch_size):
    theirs, ours = pair
    (ids,) = random_prompts(n)
    nll, count = strided_nll(theirs, ids, WINDOW, stride or WINDOW)
    result = perplexity(ours, ids, window=WINDOW, stride=stride, batch_size=batch_size)
    assert result.tokens == count
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-4)


@pytest.mark.parametrize("columns, stride", [(1, 4), (3, None), (7, 4)])
def test_chunks_change_nothing_and_bound_the_logits(pair, monkeypatch, columns, stride):
    _, engine = pair
    (ids,) = random_prompts(107)
    whole = perplexity(engine, ids, window=WINDOW, stride=stride, batch_size=4)
    seen = []
    hook = engine.model.output.register_forward_hook(
        lambda _module, _inputs, logits: seen.append(logits.shape[:2].numel())
    )
    monkeypatch.setattr("measure.scoring.LOGIT_BYTES", 4 * 4 * columns * SIZES["vocab_size"])
    chunked = perplexity(engine, ids, window=WINDOW, stride=stride, batch_size=4)
    hook.remove()
    assert chunked.nll == pytest.approx(whole.nll, rel=1e-5)
    assert max(seen) <= 4 * columns and sum(seen) == whole.tokens  # no logits but those that are scored


def make_counter(vocab_size, lead):
    """A model without layers to speak of, whose logit for the successor of a token is `lead`, for all others 0."""
    args = ModelArgs(vocab_size, 1, 2, 1, 4, 8, vocab_size, 128, norm_eps=1e-12)
    model = Transformer(args)
    with torch.no_grad():
        model.layers[0].attention.wo.weight.zero_()
        model.layers[0].feed_forward.w2.weight.zero_()
        model.tok_embeddings.weight.copy_(torch.eye(vocab_size))  # the norm makes it sqrt(V) times as long
        model.output.weight.copy_(lead / math.sqrt(vocab_size) * torch.eye(vocab_size).roll(1, dims=0))
    return Engine(model.requires_grad_(False))


@pytest.mark.parametrize("stride", [None, 3])
def test_a_model_that_counts(stride):
    engine = make_counter(10, lead=3.0)
    result = perplexity(engine, [i % 10 for i in range(50)], window=8, stride=stride)
    assert result.perplexity == pytest.approx((math.exp(3) + 9) / math.exp(3), rel=1e-5)
    backwards = perplexity(engine, [-i % 10 for i in range(50)], window=8, stride=stride)
    assert backwards.perplexity == pytest.approx(math.exp(3) + 9, rel=1e-5)


def test_a_model_that_knows_nothing_is_as_uncertain_as_its_vocabulary_is_large():
    result = perplexity(make_counter(48, lead=0.0), list(range(48)), window=20, batch_size=2)
    assert result.perplexity == pytest.approx(48, rel=1e-5) and (result.tokens, result.windows) == (45, 3)


def test_a_model_that_is_sure_and_wrong_has_no_finite_perplexity():
    result = perplexity(make_counter(10, lead=1e4), [5, 4, 3], window=8)
    assert result.nll == pytest.approx(1e4) and result.perplexity == math.inf


def test_logprobs_of_each_token(pair):
    theirs, ours = pair
    tokens = torch.tensor([random_prompts(12)[0], random_prompts(12, 12)[1]])
    with torch.inference_mode():
        log_probs = theirs(tokens).logits.log_softmax(-1)
    expected = log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    likeliest = log_probs[:, :-1].argmax(-1) == tokens[:, 1:]
    ours.reserve(2, 12)
    pos = torch.arange(11).repeat(2, 1)
    for skip in (0, 6, 10):
        found, best = token_logprobs(ours, tokens[:, :-1], pos, tokens[:, 1:], skip)
        torch.testing.assert_close(found, expected[:, skip:], atol=1e-4, rtol=1e-4)
        assert torch.equal(best, likeliest[:, skip:])
    token_logprobs(ours, tokens[:, :4], pos[:, :4], tokens[:, 1:5])
    ragged = torch.stack((tokens[0, 4:8], tokens[1, 2:6]))  # rows that go on from other places
    pos = torch.tensor([[4], [2]]) + torch.arange(4)
    found, _ = token_logprobs(ours, ragged, pos, torch.stack((tokens[0, 5:9], tokens[1, 3:7])))
    torch.testing.assert_close(found, torch.stack((expected[0, 4:8], expected[1, 2:6])), atol=1e-4, rtol=1e-4)


def test_compiled_equals_plain(pair):
    _, engine = pair
    (ids,) = random_prompts(107)
    compiled = build_engine(engine.model, compile_prefill=True)
    for batch_size, stride in ((1, None), (4, 4)):
        sizes = {"window": WINDOW, "stride": stride, "batch_size": batch_size}
        truth = perplexity(engine, ids, **sizes).nll
        assert perplexity(compiled, ids, **sizes).nll == pytest.approx(truth, rel=1e-5)


def test_the_model_can_be_used_afterwards(tiny):
    engine = Engine(load_model(tiny, dtype=torch.float32))
    perplexity(engine, list(range(40)), window=WINDOW)
    assert ids_of(engine, [[1, 2, 3]], 4) == ids_of(Engine(engine.model), [[1, 2, 3]], 4)
    engine.model(torch.tensor([[1]]), torch.tensor([[0]]))  # not in inference mode, as quantisation would


# ---------------------------------------------------------------- the command


def evaluate(*flags):
    main(**vars(build_parser().parse_args([str(flag) for flag in flags])))


def test_default_model(default_model_dir, tmp_path, capsys):
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_text(TEXT, encoding="utf-8")
    sizes = ("--max_seq_length", 32, "--stride", 16, "--batch_size", 2)
    evaluate("--checkpoint_path", default_model_dir, "--perplexity", text, *sizes, "--output_json", out)
    printed, facts = capsys.readouterr(), json.loads(out.read_text())
    assert printed.out == f"perplexity: {facts['perplexity']:.4f}\n"
    n = len(load_tokenizer(default_model_dir).encode(TEXT))
    assert [line.split("=")[0].split(": ")[0] for line in printed.err.splitlines()] == [
        "Using device",
        "Time to load model",
        f"Scored {n - 1} of {n} tokens in {facts['windows']} windows",
    ]
    assert printed.err.endswith(f" windows: {facts['seconds']:.2f} seconds\n")
    assert facts["args"]["stride"] == 16 and facts["args"]["perplexity"] == str(text)
    assert (facts["dtype"], facts["torch"], facts["tokens"]) == ("bfloat16", torch.__version__, n - 1)
    assert facts["perplexity"] == pytest.approx(math.exp(facts["nll"])) and facts["threads"] >= 1
    engine = Engine(load_model(default_model_dir, dtype=torch.float32))
    expected = perplexity(engine, load_tokenizer(default_model_dir).encode(TEXT), window=32, stride=16)
    assert facts["nll"] == pytest.approx(expected.nll, abs=0.02)  # bfloat16 against float32
    assert 5 < expected.perplexity < 30 and sorted(os.listdir(tmp_path)) == ["out.json", "text"]


def test_library_and_command_agree(tiny, tmp_path, capsys):
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    evaluate("--checkpoint_path", tiny, "--perplexity", text, "--dtype", "float32", "--max_seq_length", 100,
             "--device", "cpu", "--output_json", out)  # fmt: skip
    result = perplexity(Engine(load_model(tiny, dtype=torch.float32)), load_tokenizer(tiny).encode(TEXT), window=100)
    assert capsys.readouterr().out == f"perplexity: {result.perplexity:.4f}\n"
    facts = json.loads(out.read_text())
    assert {key: facts[key] for key in dataclasses.asdict(result)} == pytest.approx(dataclasses.asdict(result))


def test_bos_is_the_first_token_of_the_text_if_the_tokenizer_adds_one(tmp_path, capsys):
    path = make_tiny_checkpoint(tmp_path / "tiny")
    text, settings = tmp_path / "text", tmp_path / "tiny" / "tokenizer_config.json"
    text.write_text(TEXT)
    plain = load_tokenizer(path).encode(TEXT)
    settings.write_text(json.dumps({"bos_token": "<|endoftext|>", "add_bos_token": True}))
    bos = load_tokenizer(path).bos_id
    evaluate("--checkpoint_path", path, "--perplexity", text, "--dtype", "float32", "--max_seq_length", 32)
    expected = perplexity(Engine(load_model(path, dtype=torch.float32)), [bos, *plain], window=32)
    printed = capsys.readouterr()
    assert printed.out == f"perplexity: {expected.perplexity:.4f}\n"
    assert f"of {len(plain) + 1} tokens" in printed.err


def test_help_names_every_flag_and_its_default():
    text = build_parser().format_help()
    for action in build_parser()._actions:
        assert action.option_strings[-1] in text and action.help
        assert action.default in (None, "==SUPPRESS==") or "default" in action.help


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max_seq_length", "1"], "--max_seq_length is 1; a window needs at least 2"),
        (["--stride", "0"], "--stride is 0; it must be from 1 to the window of 512 tokens"),
        (["--stride", "513"], "--stride is 513; it must be from 1 to the window of 512 tokens"),
        (["--stride", "3", "--max_seq_length", "2"], "--stride is 3; it must be from 1 to the window of 2"),
        (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--threads", "0"], "--threads is 0"),
        (["--threads", "99999"], "--threads is 99999"),
        (["--device", "tpu"], "device 'tpu' is unknown; use one of cuda, mps, cpu"),
        (["--dtype", "int8"], "dtype 'int8' is unknown; use one of bfloat16"),
        (["--perplexity", "/no/such/file"], "cannot read the text /no/such/file: No such file"),
        (["--perplexity", "/tmp"], "cannot read the text /tmp: Is a directory"),
        (["--perplexity", "/dev/null"], "the text /dev/null is empty"),
        (["--output_json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--output_json", "/tmp"], "cannot write /tmp: it is a folder"),
    ],
)
def test_bad_input_is_found_before_the_model_is_loaded(tmp_path, capsys, flags, message):
    text = tmp_path / "text"
    text.write_text(TEXT)
    with pytest.raises(ValueError) as error:
        evaluate("--checkpoint_path", tmp_path / "none.pth", "--perplexity", text, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "") and os.listdir(tmp_path) == ["text"]


def test_a_text_of_one_token_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"d")
    with pytest.raises(ValueError, match=r"the text is too short \(tokens: 1\)"):
        evaluate("--checkpoint_path", tiny, "--perplexity", tmp_path / "text")
    assert capsys.readouterr().out == ""


def test_window_over_the_context(tiny, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    with pytest.raises(ValueError, match="--max_seq_length 513 is more than the model's context of 512"):
        evaluate("--checkpoint_path", tiny, "--perplexity", tmp_path / "text", "--max_seq_length", 513)


def test_token_that_the_model_does_not_have(tmp_path):
    path = make_tiny_checkpoint(tmp_path / "tiny")
    names = json.loads((path.parent / "tokenizer.json").read_text())
    names["added_tokens"].append({**names["added_tokens"][0], "id": 900, "content": "<|extra|>"})
    (path.parent / "tokenizer.json").write_text(json.dumps(names))
    (tmp_path / "text").write_text("the cat<|extra|>")
    with pytest.raises(ValueError, match="token 285, and the model has 285"):
        evaluate("--checkpoint_path", path, "--perplexity", tmp_path / "text")


def test_neither_a_text_nor_tasks():
    with pytest.raises(ValueError, match="^give either --tasks NAME ... or a text with --perplexity FILE$"):
        evaluate()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_and_a_name_too_long_are_one_line(tiny, tmp_path):
    (tmp_path / "text").write_text("the cat sat on the mat")
    command = [sys.executable, "eval.py", "--checkpoint_path", tiny, "--perplexity", tmp_path / "text"]
    with open("/dev/full", "w") as full:
        into_full = subprocess.run(list(map(str, command)), cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert into_full.returncode == 2 and "Traceback" not in into_full.stderr
    assert into_full.stderr.splitlines()[-1].startswith("error: ")
    for path in ("/dev/full", "/tmp/" + "a" * 300):
        with pytest.raises((ValueError, OSError)) as error:
            evaluate("--checkpoint_path", tiny, "--perplexity", tmp_path / "text", "--output_json", path)
        assert cli.in_words(error.value)
