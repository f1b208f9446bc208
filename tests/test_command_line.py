"""generate.py as a person runs it: what lands on which stream, files, bad input, Ctrl-C, pipes and terminals.

What is about text, numbers or JSON calls main in this process; a process is started where one is the subject.
"""

import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading

import pytest
import torch

import cli
import eval as evaluation
import generate as generation
import quantize
from answers import Answers
from engine.engine import Engine
from generate import NEW_TOKENS, build_parser, main
from kernels import cpu
from layers.quantized import QuantSpec
from tests.tiny import GREEDY_FLAGS as GREEDY
from tests.tiny import ROOT, greedy_text, make_tiny_checkpoint, start
from text.prompts import read_standard_input
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model, open_model, random_model

FOREVER = ("--prompt", "he", "--num_samples", 100_000, "--ignore_eos")


def bash(command, **options):
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=120, **options)


# ---------------------------------------------------------------- what goes where


def test_text_alone_goes_to_stdout_and_gpt_fasts_lines_to_stderr(run_cli, tiny):
    flags = ("--prompt", "the cat", "--num_samples", 2, "--max_new_tokens", 12, *GREEDY)
    result = run_cli("generate.py", "--checkpoint_path", tiny, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "".join(f"[sample {i}]\n{greedy_text(tiny, 'the cat')}\n" for i in (1, 2))
    sample = ["Time for inference", "Bandwidth achieved"]
    end = ["Average tokens/sec", "Bandwidth of this machine", "Memory used"]
    advice = "This model has a chat template"
    expected = ["Using device", advice, "Time to load model", *sample, *sample, *end]
    assert [re.match(r"[^:=\d]+(?<! )", line)[0] for line in result.stderr.splitlines()] == expected
    assert result.stderr.startswith(f"Using device=cpu, isa={cpu.isa()}\n")


def test_logprobs_penalties_and_a_schema(talk, tmp_path):
    """Greedy tokens are the likeliest, none repeats where that costs everything, and the text follows the schema."""
    path, schema = tmp_path / "out.json", tmp_path / "schema.json"
    flags = ("--prompt", "he", "--num_samples", 2, "--output_json", path, "--logprobs", 2, *GREEDY)
    talk(*flags, "--repetition_penalty", 1e6, "--presence_penalty", 0.5)
    for sample in json.loads(path.read_text())["samples"]:
        (row,) = sample["sequences"]
        assert len(set(row["token_ids"])) == 12 == len(row["logprobs"])
        assert row["logprobs"][0] == {"logprob": row["logprobs"][0]["top"][0][1], "top": row["logprobs"][0]["top"]}
    schema.write_text('{"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}')
    out = talk("--prompt", "he", "--batch_size", 2, "--num_samples", 1, "--max_new_tokens", 99, "--json_schema", schema)
    answers = out.out.replace("[row 1]\n", "").split("[row 2]\n")
    assert [set(json.loads(answer)) <= {"a", "b"} for answer in answers] == [True, True]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--logprobs", 1), "output_json"),
        (("--repetition_penalty", 0), "above 0"),
        (("--presence_penalty", 1, "--interactive"), "interactive"),
        (("--json_schema", "no-such.json"), "no-such.json is missing"),
        (("--json_schema", "benchmarks/cpu.json", "--ignore_eos"), "ignore_eos"),
    ],
)
def test_flags_about_logits_that_cannot_work(talk, flags, message):
    with pytest.raises(ValueError, match=message):
        talk(*flags)


def test_defaults_are_gpt_fasts():
    args = build_parser().parse_args([])
    assert (args.num_samples, NEW_TOKENS, args.top_k, args.temperature) == (5, 200, 200, 0.8)
    assert (args.seed, args.dtype, args.top_p, args.min_p) == (1234, "bfloat16", 1.0, 0.0)


def test_output_json(talk, tiny, tmp_path):
    path, prompts = tmp_path / "out.json", tmp_path / "prompts.txt"
    prompts.write_text("the cat sat\n\nhe\nthe dog ate\n")
    talk("--prompt_file", prompts, "--batch_size", 2, "--output_json", path, *GREEDY)
    out = json.loads(path.read_text())
    assert out["args"]["prompt_file"] == str(prompts) and out["args"]["max_new_tokens"] == 12
    assert (out["device"], out["dtype"], out["torch"]) == ("cpu", "float32", torch.__version__)
    assert out["threads"] >= 1 and out["load_s"] > 0 and out["compile_s"] == 0
    (sample,) = out["samples"]
    assert {*sample} == {"prefill_s", "decode_s", "time_to_first_token_s", "prefill_tok_s", "decode_tok_s", "sequences"}
    tokenizer = load_tokenizer(tiny)
    rows = [(1, "the cat sat"), (3, "he"), (4, "the dog ate")]  # by the number of the line
    for sequence, (row, text) in zip(sample["sequences"], rows, strict=True):
        fields = {
            "row",
            "prompt",
            "prompt_tokens",
            "new_tokens",
            "token_ids",
            "accept_lengths",
            "text",
            "finish_reason",
        }
        assert {*sequence} == fields | {"finish_reason"} and sequence["accept_lengths"] == []
        assert (sequence["row"], sequence["prompt"]) == (row, text)
        assert sequence["prompt_tokens"] == len(tokenizer.encode(text))
        assert sequence["new_tokens"] == len(sequence["token_ids"]) <= 12
        assert sequence["text"] == tokenizer.decode(sequence["token_ids"]) == greedy_text(tiny, text)
        assert sequence["finish_reason"] in ("length", "eos")
    news = [sequence["new_tokens"] for sequence in sample["sequences"]]
    assert sample["decode_tok_s"] == pytest.approx(sum(n - 1 for n in news) / sample["decode_s"])
    prompt_tokens = sum(sequence["prompt_tokens"] for sequence in sample["sequences"])
    assert sample["prefill_tok_s"] == pytest.approx(prompt_tokens / sample["prefill_s"])
    for name in ("decode_tok_s", "prefill_tok_s", "time_to_first_token_s"):
        assert out[name] == sample[name]
    model = load_model(tiny, dtype=torch.float32)
    whole = sum(4 * p.numel() for p in model.parameters())  # also the tied head
    assert out["weight_bytes_per_token"] == whole
    # each prompt is read beside a step of the others, the third once one of the first two has ended
    firsts = [1, 2, max(3, min(news[0], news[1] + 1) + 1)]
    steps = len(set().union(*(range(first + 1, first + n) for first, n in zip(firsts, news, strict=True))))
    assert out["bandwidth_gb_s"] == pytest.approx(whole * steps / sample["decode_s"] / 1e9)
    assert out["measured_bandwidth_gb_s"] > 0.1 and 0.1 < out["peak_memory_gb"] < 8


def test_output_jsonl_goes_on_where_it_stopped(talk, tiny, tmp_path, monkeypatch, capsys):
    texts = ["he", "the cat sat", "the dog ate the hat, he said", "a", "the mat"]
    prompts, out, report = tmp_path / "prompts.txt", tmp_path / "out.jsonl", tmp_path / "out.json"
    prompts.write_text("\n".join(texts))
    flags = ("--prompt_file", prompts, "--batch_size", 2, "--output_jsonl", out, "--output_json", report, *GREEDY)
    end, write_report, count = Answers.end, Answers.write_report, itertools.count(1)

    def interrupted(answers, row, request):
        end(answers, row, request)
        if next(count) == 3:
            raise KeyboardInterrupt

    def interrupted_again(*arguments):
        signal.raise_signal(signal.SIGINT)
        write_report(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Answers, "end", interrupted)
        patch.setattr(Answers, "write_report", interrupted_again)
        talk(*flags)
    done = [json.loads(line) for line in out.read_text().splitlines()]
    (sample,) = json.loads(report.read_text())["samples"]
    rows = sorted(line["index"] for line in done)
    assert len(done) == 3 and [sequence["row"] for sequence in sample["sequences"]] == rows
    assert 0 < sample["time_to_first_token_s"] <= sample["prefill_s"]
    capsys.readouterr()  # the rows before the interruption
    printed = talk(*flags).out
    assert [int(n) for n in re.findall(r"\[row (\d)\]", printed)] == [n for n in range(1, 6) if n not in rows]
    lines = {line["index"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert len(lines) == 5
    for number, text in enumerate(texts, 1):
        answer = lines[number]
        assert (answer["prompt"], answer["text"]) == (text, greedy_text(tiny, text))
        assert answer["finish_reason"] in ("length", "eos") and len(answer["token_ids"]) <= 12
    assert talk(*flags).err == f"Nothing to do: {out} has an answer to every prompt\n"


def test_output_json_has_medians_of_the_samples_and_null_where_nothing_was_decoded(talk, tmp_path):
    path = tmp_path / "out.json"
    talk("--num_samples", 4, "--output_json", path)
    out = json.loads(path.read_text())
    assert len(out["samples"]) == 4
    for name in ("decode_tok_s", "prefill_tok_s", "time_to_first_token_s"):
        assert out[name] == pytest.approx(statistics.median(sample[name] for sample in out["samples"]))
    talk("--num_samples", 1, "--max_new_tokens", 1, "--output_json", path)
    out = json.loads(path.read_text())
    assert out["decode_tok_s"] is out["bandwidth_gb_s"] is out["samples"][0]["decode_tok_s"] is None
    assert out["samples"][0]["sequences"][0]["new_tokens"] == 1 and os.listdir(tmp_path) == ["out.json"]


def test_rows_are_printed_whole_and_in_order(talk, tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    texts = ["the cat sat", "he", "and the dog ate the hat"]
    prompts.write_text("\n\n".join(texts))
    answers = [greedy_text(tiny, text) for text in texts]
    expected = "".join(f"[row {i}]\n{answer}\n" for i, answer in zip((1, 3, 5), answers, strict=True))
    together = talk("--prompt_file", prompts, "--num_samples", 3, *GREEDY)
    assert together.out == expected and together.err.count("Time for inference") == 1
    assert talk("--prompt_file", "-", "--batch_size", 2, *GREEDY, input="\n\n".join(texts)).out == expected
    array = json.dumps([texts[0], *({"prompt": text} for text in texts[1:])], indent=1)
    expected = "".join(f"[row {i}]\n{answer}\n" for i, answer in enumerate(answers, 1))
    assert talk("--prompt_file", "-", "--batch_size", 1, *GREEDY, input=array).out == expected
    batch = talk("--prompt", "he", "--batch_size", 2, "--num_samples", 1, *GREEDY)
    assert batch.out == f"[row 1]\n{answers[1]}\n[row 2]\n{answers[1]}\n"


DEFAULT, CHAT = "Hello, my name is", [{"role": "user", "content": "42"}]


@pytest.mark.parametrize(
    "flags, input, prompt",
    [
        ("", "the cat\nhe\n", "the cat\nhe"),
        ("--chat", "42\r\n", CHAT),
        ("", "42", "42"),
        ("", "", DEFAULT),
        ("", "\n", DEFAULT),
        ("--prompt he", "the cat", "he"),
        ("--prompt -", "the cat", "the cat"),
        ("--prompt 42 --chat", "", CHAT),
    ],
)
def test_the_prompt_is_the_flag_or_standard_input(talk, tiny, flags, input, prompt):
    assert talk(*flags.split(), "--num_samples", 1, *GREEDY, input=input).out == greedy_text(tiny, prompt) + "\n"


@pytest.mark.parametrize(
    "flags, says", [("--random_prompt 16", ""), ("--prompt 16", "--prompt 16 means 16 random tokens")]
)
def test_random_prompts(talk, tmp_path, flags, says):
    printed = talk(*flags.split(), "--num_samples", 1, "--output_json", tmp_path / "out.json", input="he")
    (sequence,) = json.loads((tmp_path / "out.json").read_text())["samples"][0]["sequences"]
    assert (sequence["prompt_tokens"], sequence["prompt"]) == (16, None) and says in printed.err


def test_waiting_for_standard_input_is_said(talk, tiny, capsys, monkeypatch):
    read, write = map(os.fdopen, os.pipe(), "rw")
    monkeypatch.setattr(sys, "stdin", read)
    monkeypatch.setattr("text.files.PATIENCE", 0.01)
    threading.Timer(0.2, write.close).start()
    assert read_standard_input() == ""
    assert (
        capsys.readouterr().err == "Waiting for the end of the prompt from standard input (Ctrl-D at a terminal) ...\n"
    )


def test_stop_strings_end_a_row(talk, tiny, tmp_path):
    text = greedy_text(tiny, "the cat")
    first, second = text[5:7], text[3:5]
    path = tmp_path / "out.json"
    stops = ("--stop", first, "--stop", second, "--stop", "never seen")
    result = talk("--prompt", "the cat", *stops, "--num_samples", 1, "--output_json", path, *GREEDY)
    expected = text[: min(text.index(first), text.index(second))]
    (sequence,) = json.loads(path.read_text())["samples"][0]["sequences"]
    assert result.out == expected + "\n"
    assert (sequence["text"], sequence["finish_reason"]) == (expected, "stop")
    assert expected + second in load_tokenizer(tiny).decode(sequence["token_ids"])


def test_end_of_text_and_ignore_eos(talk, default_model_dir, tmp_path):
    path = tmp_path / "out.json"
    flags = ("--checkpoint_path", default_model_dir, "--chat", "--prompt", "What is the capital of France?", *GREEDY)
    flags += ("--num_samples", 1, "--max_new_tokens", 30, "--output_json", path)
    assert talk(*flags).out == "The capital of France is Paris.\n"
    (sequence,) = json.loads(path.read_text())["samples"][0]["sequences"]
    assert (sequence["finish_reason"], sequence["token_ids"][-1]) == ("eos", 2)
    assert talk(*flags, "--ignore_eos").out.startswith("The capital of France is Paris.")
    (sequence,) = json.loads(path.read_text())["samples"][0]["sequences"]
    assert (sequence["finish_reason"], sequence["new_tokens"]) == ("length", 30)


def test_seed_repeats_the_text(talk):
    first = talk("--num_samples", 2).out
    assert talk("--num_samples", 2).out == first != talk("--num_samples", 2, "--seed", 5).out
    drawn = talk("--seed", -1, "--num_samples", 2)
    (seed,) = re.findall(r"^Seed: (\d+)$", drawn.err, re.MULTILINE)
    assert talk("--seed", seed, "--num_samples", 2).out == drawn.out


def test_chat_with_a_system_message(talk, tiny, tmp_path):
    messages = [{"role": "system", "content": "said he"}, {"role": "user", "content": "the cat"}]
    flags = ("--chat", "--system", "said he", "--prompt", "the cat", "--num_samples", 1, *GREEDY)
    assert talk(*flags).out == greedy_text(tiny, messages) + "\n"
    (tmp_path / "plain.jinja").write_text("{{ messages[1].content }}")
    assert talk(*flags, "--chat_template", tmp_path / "plain.jinja").out == greedy_text(tiny, "the cat") + "\n"


def test_a_profile_that_the_disk_has_no_room_for_leaves_nothing(talk, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ValueError, match="cannot write .*trace.json: the disk is full"):
            talk("--num_samples", 1, "--profile", tmp_path / "trace")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_random_weights_with_random_prompt_and_profile(talk, tmp_path):
    out, trace = tmp_path / "out.json", tmp_path / "trace"
    flags = ("--random_weights", "stories15M", "--random_prompt", 16, "--max_new_tokens", 8, "--num_samples", 2)
    printed = talk(*flags, "--profile", trace, "--output_json", out)
    assert [len(line.split()) for line in printed.out.splitlines()[1::2]] == [8, 8]
    samples = json.loads(out.read_text())["samples"]
    assert [sample["sequences"][0]["prompt_tokens"] for sample in samples] == [16, 16]
    events = json.loads(trace.with_suffix(".json").read_text())["traceEvents"]
    assert any("linear" in event.get("name", "") for event in events)


def test_max_seq_length_is_the_context(talk):
    flags = ("--random_prompt", 20, "--max_seq_length", 30, "--num_samples", 1)
    talk(*flags, "--max_new_tokens", 10)
    with pytest.raises(ValueError, match="context of 30; use --max_new_tokens 10 or less"):
        talk(*flags, "--max_new_tokens", 11)


def test_help_names_every_flag_and_its_default():
    parser = build_parser()
    text = parser.format_help()
    for action in parser._actions:
        assert action.option_strings[-1] in text and action.help
        assert action.default in (None, False, "==SUPPRESS==") or "default" in action.help or action.default == []


# ---------------------------------------------------------------- compiled


COMPILING = ("--compile", "--compile_prefill")


def test_compiled_text_equals_plain(talk, default_model_dir, tmp_path):
    prompt = ("--prompt", "Once upon a time", "--max_new_tokens", 40, "--num_samples", 1)
    flags = ("--checkpoint_path", default_model_dir, *GREEDY, *prompt, "--output_json", tmp_path / "out.json")
    plain, compiled = talk(*flags), talk(*flags, *COMPILING)
    assert compiled.out == plain.out != ""
    lines = compiled.err.splitlines()
    announced, took = (next(i for i, x in enumerate(lines) if x.startswith(y)) for y in ("Compiling: ", "Compilat"))
    assert announced < took and " seconds" in lines[announced]
    facts = json.loads((tmp_path / "out.json").read_text())
    assert lines[took].startswith(f"Compilation time: {facts['compile_s']:.2f} seconds")
    assert len(facts["samples"]) == 1


@pytest.mark.parametrize(
    "flags, compiling, input",
    [
        ("--prompt_file - --batch_size 2", COMPILING, "the cat sat\nhe\nand the dog ate the hat"),  # batches of 2 and 1
        ("--interactive", ("--compile",), "the cat\nthe dog\n"),
    ],
)
def test_compiled_batches_and_turns_equal_plain(talk, flags, compiling, input):
    flags = (*flags.split(), *GREEDY)
    compiled = talk(*flags, *compiling, input=input)
    assert compiled.out == talk(*flags, input=input).out != "" and "Compilation time: " in compiled.err


def test_without_a_compiler_the_packages_are_named(talk, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for name in ("g++", "no-such-compiler"):
        with pytest.raises(ValueError, match=re.escape(f"--compile on a CPU needs the C++ compiler {name}")) as error:
            talk("--compile")
        assert "install g++" in str(error.value)
        monkeypatch.setenv("CXX", "no-such-compiler")


# ---------------------------------------------------------------- speculation


@pytest.mark.parametrize("flags", ["--speculate ngram", "--draft_checkpoint_path OTHER --speculate_k 3"])
def test_speculation_in_batches_gives_the_same_ids(talk, tiny, tmp_path, flags):
    prompts, out, plain_out = tmp_path / "prompts.txt", tmp_path / "out.json", tmp_path / "plain.json"
    prompts.write_text("the cat sat\nhe\nthe dog ate\n")
    stop = greedy_text(tiny, "he")[4:6]
    request = ("--prompt_file", prompts, "--batch_size", 2, "--stop", stop, *GREEDY)
    expected = talk(*request, "--output_json", plain_out).out
    result = talk(*request, *flags.split(), "--output_json", out)
    assert result.out == expected
    plain, facts = (json.loads(path.read_text()) for path in (plain_out, out))
    assert plain["mean_accepted"] is plain["acceptance_rate"] is None
    lengths = []
    for theirs, ours in zip(plain["samples"][0]["sequences"], facts["samples"][0]["sequences"], strict=True):
        assert theirs.pop("accept_lengths") == []
        accepted = ours.pop("accept_lengths")
        assert ours == theirs
        assert sum(accepted) + len(accepted) >= ours["new_tokens"] - 1
        lengths += accepted
    reasons = [sequence["finish_reason"] for sequence in facts["samples"][0]["sequences"]]
    assert "stop" in reasons and "length" in reasons, "choose another stop"
    assert facts["mean_accepted"] == pytest.approx(statistics.mean(lengths))
    if "--speculate_k" in flags:
        assert facts["acceptance_rate"] == pytest.approx(sum(lengths) / (3 * len(lengths)))
    assert f"Acceptance probs: [{lengths.count(0) / len(lengths):.3f}" in result.err
    assert f"Mean Accepted: {statistics.mean(lengths):.2f}" in result.err


@pytest.mark.parametrize("flags", ["--speculate ngram", "--draft_checkpoint_path SAME --speculate_k 3"])
def test_conversation_with_speculation_equals_plain(talk, flags):
    turns = "the cat\nthe dog\n/reset\nthe cat\nhe said\n"
    plain = talk("--interactive", *GREEDY, input=turns)
    result = talk("--interactive", *GREEDY, *flags.split(), input=turns)
    assert result.out == plain.out and result.err.count("tokens/sec") == 4


@pytest.mark.parametrize(
    "flags", ["--speculate ngram --speculate_k auto", "--draft_checkpoint_path SAME --speculate_k 2"]
)
def test_compiled_speculation_gives_the_same_text(talk, tiny, flags, monkeypatch):
    monkeypatch.setattr("engine.speculation.speculative.LENGTHS", (1, 4))  # each is a form that auto compiles
    result = talk("--prompt", "the cat", "--num_samples", 1, "--compile", *flags.split(), *GREEDY)
    assert result.out == greedy_text(tiny, "the cat") + "\n"
    assert "Compilation time: " in result.err and "Mean Accepted: " in result.err


def test_speculation_draws_the_same_with_the_same_seed(talk):
    for flags in ("--speculate ngram", "--draft_checkpoint_path SAME"):
        flags = (*flags.split(), "--speculate_k", 3, "--num_samples", 2)
        first = talk(*flags).out
        assert talk(*flags).out == first != talk(*flags, "--seed", 5).out


def test_prompt_lookup_needs_no_tokenizer(talk):
    flags = ("--random_weights", "stories15M", "--prompt", 4, "--num_samples", 1, *GREEDY)
    plain, guessed = talk(*flags), talk(*flags, "--speculate", "ngram", "--speculate_k", 2)
    assert guessed.out == plain.out and len(plain.out.split()) == 12
    assert "Mean Accepted" in guessed.err and "Mean Accepted" not in plain.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_draft_on_a_device_that_is_not_there(talk):
    with pytest.raises(ValueError, match="device 'cuda' is not on this machine; use "):
        talk("--draft_checkpoint_path", "OTHER", "--draft_device", "cuda")


def test_draft_whose_context_just_fits(talk):
    flags = ("--prompt", 20, "--max_new_tokens", 44, "--num_samples", 1, "--ignore_eos", *GREEDY)
    for k in (2, "auto"):
        draft = ("--draft_checkpoint_path", "SHORT", "--speculate_k", k)
        assert talk(*flags, *draft).out == talk(*flags).out != ""


# ---------------------------------------------------------------- bad input


BAD_FLAGS = {  # and what the error says
    "--prompt 0": "--prompt is 0",
    "--random_prompt 0": "--random_prompt is 0; it must be at least 1",
    "--max_new_tokens 0": "--max_new_tokens is 0; it must be at least 1",
    "--max_new_tokens many": "invalid int value",
    "--num_samples 0": "--num_samples is 0",
    "--batch_size -1": "--batch_size is -1",
    "--threads 0": "--threads is 0",
    "--temperature -0.1": "temperature is -0.1",
    "--temperature nan": "temperature is nan",
    "--top_k -1": "top_k is -1",
    "--top_p 0": "top_p is 0.0",
    "--min_p 2": "min_p is 2.0",
    "--seed -2": "--seed is -2",
    "--seed 99999999999999999999": "--seed is 99999999999999999999",
    "--device tpu": "device 'tpu' is unknown; use one of cuda, mps, cpu",
    "--dtype int8": "dtype 'int8' is unknown; use one of bfloat16",
    "--stop ''": "--stop is empty",
    "--memory_budget 1GB --speculate mtp": "goes with one model in a file; leave out --random_weights, draft models",
    "--system x": "--system needs --chat",
    "--chat_template x": "--chat_template needs --chat",
    "--hide_thinking": "--hide_thinking needs --chat",
    "--template_vars {}": "--template_vars needs --chat",
    "--template_vars [1]": "'[1]' is no JSON object; it must be like",
    "--template_vars {": "'{' is not JSON",
    "--chat --system x\udcff": "--system is not valid UTF-8",
    "--stop x\udcff": "--stop is not valid UTF-8",
    "--prompt a --prompt_file b": "argument --prompt_file: not allowed with argument --prompt",
    "--prompt_file ''": "cannot read the prompt file",
    "--prompt_file /no/such/file": "cannot read the prompt file /no/such/file: No such file",
    "--random_weights stories15M --checkpoint_path x": "both given",
    "--output_json /no/such/folder/x.json": "there is no folder /no/such/folder",
    "--output_json /tmp": "it is a folder",
    "--profile /no/such/folder/x": "there is no folder /no/such/folder",
    "--prompt x --interactive": "argument --interactive: not allowed with argument --prompt",
    "--interactive --output_json /tmp/x.json": "--output_json does not go with --interactive; leave it out",
    "--no_such_flag": "unrecognized arguments",
    "--speculate ngram --speculate_k 33": "speculate_k is 33; on cpu it must be from 1 to 32, or auto",
    "--speculate ngram --speculate_k foo": "speculate_k is foo",
    "--speculate_k 5": "--speculate_k needs --draft_checkpoint_path or --speculate ngram",
    "--speculate mtp": "has no layer of guesses, which --speculate mtp needs",
    "--speculate bigram": "invalid choice: 'bigram'",
    "--cache_dtype int4": "--cache_dtype: invalid choice: 'int4'",
    "--speculate ngram --draft_checkpoint_path OTHER": "both given; give one source of guesses",
    "--draft_device cpu": "--draft_device needs --draft_checkpoint_path",
    "--random_weights stories15M --draft_checkpoint_path OTHER": "no tokenizer that a draft could share",
    "--random_weights stories15M --dequantize": "--random_weights are floats",
    "--draft_checkpoint_path OTHER --output_json OTHER": "this run reads it",
    "--draft_checkpoint_path nowhere.pth": "there is no checkpoint at nowhere.pth",
    "--draft_checkpoint_path /proc": "/proc holds no model",
    "--draft_checkpoint_path OTHER --draft_device tpu": "device 'tpu' is unknown; use one of cuda, mps, cpu",
}
BAD_FOR_THE_MODEL = {  # found once it is being loaded
    "--prompt ''": "the prompt is empty",
    "--prompt -": "the prompt is empty",
    "--prompt 99999999999": "99999999999 tokens and 12 new ones are more than the context of 512",
    "--max_new_tokens 512": "more than the context of 512",
    "--batch_size 100000000": "GB free; use fewer rows",
    "--cache_dtype int8 --batch_size 100000000": "the int8 caches of 100000000 x 520 positions need",
    "--max_seq_length 513": "--max_seq_length 513 is more than the model's context of 512",
    "--model_name Llama-2-7B": "Llama-2-7B",
    "--draft_checkpoint_path FOREIGN": "another tokenizer: its token 1 is '<|start|>', the model's is '<|im_start",
    "--draft_checkpoint_path SHORT --prompt 20 --max_new_tokens 45": "context of 64 is shorter than the 65 positions",
    "--draft_checkpoint_path SHORT --interactive": "draft's context of 64 is shorter than the 512 positions",
    "--draft_checkpoint_path SHORT --interactive --max_seq_length 65": "context of 64 is shorter than the 65 positions",
}


@pytest.mark.parametrize("flags, message", [*BAD_FLAGS.items(), *BAD_FOR_THE_MODEL.items()])
def test_bad_input_is_an_error_that_says_what_to_do(talk, tmp_path, capsys, flags, message):
    out = () if "--output_json" in flags or "--interactive" in flags else ("--output_json", tmp_path / "out.json")
    with pytest.raises(ValueError) as error:
        talk(*shlex.split(flags), *out)
    printed = capsys.readouterr()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert printed.out == "" and os.listdir(tmp_path) == []
    assert ("Using device" in printed.err) == (flags in BAD_FOR_THE_MODEL)


@pytest.mark.parametrize("path", ["/no/such/model.pth", "generate.py", "tests", "/dev/null"])
def test_no_checkpoint_there(talk, path):
    with pytest.raises(ValueError, match=f"^[^\n]*{path}[^\n]*$"):
        talk("--checkpoint_path", path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("Llama-9", "'Llama-9'.*stories15M"),  # the names there are
        ("Llama-3.1-405B", r"the weights of Llama-3.1-405B need 811\.\d* GB.*GB free"),
    ],
)
def test_random_weights_that_cannot_be_had(talk, name, message):
    with pytest.raises(ValueError, match=message):
        talk("--random_weights", name)


REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("flags", ["", f"--checkpoint_path {REPO}", f"--checkpoint_path checkpoints/{REPO}"])
def test_a_checkpoint_is_found_by_its_name_in_any_folder(tiny, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr("weights.checkpoint.CHECKPOINTS", tmp_path / "clone" / "checkpoints")
    monkeypatch.chdir(tmp_path)
    flags = [*flags.split(), "--prompt", "he", "--max_new_tokens", "12", "--num_samples", "1", *map(str, GREEDY)]
    with pytest.raises(ValueError, match=f"; fetch it with: {tmp_path}/clone/scripts/prepare.sh {REPO}$"):
        main(**vars(build_parser().parse_args(flags)))
    shutil.copytree(tiny.parent, tmp_path / "clone" / "checkpoints" / REPO)
    main(**vars(build_parser().parse_args(flags)))
    assert capsys.readouterr().out == greedy_text(tiny, "he") + "\n"


@pytest.mark.parametrize(
    "refused",
    [
        lambda _: QuantSpec(4, 32).groups(48, "a"),
        lambda _: random_model("Llama-3.1-405B"),
        lambda path: Engine(load_model(path)).reserve(1 << 40, 64),
        lambda _: open_model("nowhere"),
        lambda path: load_tokenizer(make_tiny_checkpoint(path.parent / "plain", template=None)).render_chat([]),
    ],
)
def test_advice_from_below_the_commands_names_only_flags_that_each_has(tiny, refused):
    with pytest.raises(ValueError, match="; ") as error:
        refused(tiny)
    named = {*re.findall(r"--\w+", str(error.value))}
    for command in (generation, quantize, evaluation):
        assert named <= command.build_parser()._option_string_actions.keys()


# ---------------------------------------------------------------- what cli.run does for every command


def test_long_work_is_a_line_now_and_then_where_no_bar_is_drawn(tiny, monkeypatch, capsys):
    load_model(tiny)
    assert capsys.readouterr().err == ""  # it takes less than 10 seconds
    monkeypatch.setattr(cli, "SILENCE", 0)
    load_model(tiny, quantize=QuantSpec(8))
    lines = capsys.readouterr().err.splitlines()
    said = [re.match(r"(\w+): (\d+) of (\d+)$", line).groups() for line in lines]
    assert {what for what, done, total in said if done == total} == {"Loading", "Packing"}


def test_output_json_alone_is_on_standard_output(run_cli, tiny):
    flags = ("--checkpoint_path", tiny, *GREEDY, "--num_samples", 1, "--max_new_tokens", 12, "--output_json", "-")
    done = run_cli("generate.py", *flags, input="he")
    assert done.returncode == 0, done.stderr
    text = json.loads(done.stdout)["samples"][0]["sequences"][0]["text"]
    assert text == greedy_text(tiny, "he") and f"{text}\n" in done.stderr


# ---------------------------------------------------------------- Ctrl-C


def wait_for(process, text):
    """Standard error up to the line that has the text."""
    lines = []
    while not lines or text not in lines[-1]:
        lines.append(process.stderr.readline().decode())
        assert lines[-1], "".join(lines)
    return "".join(lines)


def interrupted(process, seen=""):
    """Press Ctrl-C, which goes to the whole group: the process must end with 130, and say nothing of it."""
    os.killpg(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    errors = seen + rest.decode()
    assert process.returncode == 130, errors
    assert not re.search("Traceback|Interrupt|Exception ignored", errors), errors


IMPORTS = ("-X", "importtime")  # a line on standard error after each import
MOMENTS = {
    "the first slow import": ([], IMPORTS, " torch._C\n"),
    "the last imports": ([], IMPORTS, " text.prompts\n"),
    "loading": (FOREVER, (), "Using device"),
    "decoding": (FOREVER, (), "Time for inference 2"),
    "tracing for the compiler": (["--compile", "--prompt", "he"], (), "Compiling"),
    "waiting for a message": (["--interactive"], (), "Type a message"),
    "writing": (
        ["--prompt", "he", "--num_samples", 1, "--output_json", "FIFO"],
        (),
        "Memory used",
    ),  # which waits for a reader
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupt_while(tiny, tmp_path, moment):
    flags, python, text = MOMENTS[moment]
    os.mkfifo(tmp_path / "fifo")
    flags = [tmp_path / "fifo" if flag == "FIFO" else flag for flag in flags]
    process = start("--checkpoint_path", tiny, "--max_new_tokens", 12, *flags, python=python)
    interrupted(process, wait_for(process, text))


def test_interrupt_while_the_cpp_compiler_runs(tiny, tmp_path):
    (tmp_path / "g++").write_text(
        f'#!/bin/sh\ncase "$*" in *-c*|*-shared*) echo compiling >{tmp_path}/fifo; sleep 60;; esac\n'
        f'exec {shutil.which("g++")} "$@"\n'
    )
    (tmp_path / "g++").chmod(0o755)
    os.mkfifo(tmp_path / "fifo")
    env = os.environ | {"CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start("--checkpoint_path", tiny, "--prompt", "he", "--compile", env=env)
    assert (tmp_path / "fifo").read_text().startswith("compiling")
    interrupted(process)


def test_interrupt_at_exit(tiny):
    late = (
        "import atexit, runpy, sys, time; atexit.register(lambda: (print('leaving', file=sys.stderr), time.sleep(60)))"
    )
    script = f"{late}; sys.argv[0] = 'generate.py'; runpy.run_path('generate.py', run_name='__main__')"
    flags = ("--checkpoint_path", tiny, "--num_samples", 1, "--max_new_tokens", 2)
    command = [sys.executable, "-c", script, *map(str, flags)]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    interrupted(process, wait_for(process, "leaving"))
