"""Several ranks against one process, and what happens when one of them fails. All by gloo, on this machine."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import tensor

import tp
from compress.gptq import gptq_
from layers.quantized import QuantSpec, linear_table, quantize_weight
from measure.perplexity import perplexity
from measure.traffic import predicted
from model import ModelArgs
from tests.tiny import ENV, outcome, ran, torchrun
from tests.tp_cases import ARGS, EXPERTS, MODELS, TIED, cases, run
from weights.checkpoint import load_model, save_checkpoint
from weights.layout import expected_tensors
from weights.registry import args_from_name

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- the numbers


def random_tensors(args, seed):
    generator = torch.Generator().manual_seed(seed)
    expected = expected_tensors(args).items()
    weights = {name: torch.randn(like.shape, generator=generator) for name, like in expected}
    return {name: 0.15 * weight if weight.dim() > 1 else weight for name, weight in weights.items()}


def rounded(args, tensors, spec):
    """Tensors and table of the model rounded to nearest; the head as int8."""
    with torch.device("meta"):
        table = linear_table(tp.Transformer(args), spec, QuantSpec(8))
    state = {name: value for name, value in tensors.items() if name.removesuffix(".weight") not in table}
    for name, each in table.items():
        weight = tensors[f"{name}.weight" if f"{name}.weight" in tensors else "tok_embeddings.weight"]
        state |= {f"{name}.{key}": value for key, value in quantize_weight(weight, each, name).items()}
    return state, table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every file that the cases name."""
    folder = tmp_path_factory.mktemp("tp")
    floats = {name: random_tensors(args, seed) for seed, (name, args) in enumerate(MODELS.items(), 1)}
    for name, args in MODELS.items():
        save_checkpoint(folder / f"{name}.pth", args, floats[name])
    tensors, tied = floats["float"], floats["tied"]
    generator = torch.Generator().manual_seed(3)
    noisy = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    save_checkpoint(folder / "draft.pth", ARGS, noisy)
    for name, spec in (("int8", QuantSpec(8)), ("int4.g32", QuantSpec(4, 32)), ("int4.g64", QuantSpec(4, 64))):
        save_checkpoint(folder / f"{name}.pth", ARGS, *rounded(ARGS, tensors, spec))
    save_checkpoint(folder / "tied-int8.pth", TIED, *rounded(TIED, tied, QuantSpec(8)))
    experts = rounded(EXPERTS, floats["experts"], QuantSpec(4, 32))
    save_checkpoint(folder / "experts-int4.pth", EXPERTS, *experts)
    state, table = rounded(ARGS, tensors, QuantSpec(4, 32))
    model = load_model(folder / "float.pth", dtype=torch.float32)
    text = torch.randint(ARGS.vocab_size, (16, 64), generator=generator)
    with torch.no_grad():
        state |= gptq_(model, text, table, percdamp=0.01, blocksize=128, act_order=True)
    save_checkpoint(folder / "gptq.pth", ARGS, state, table)
    return folder


@functools.cache
def alone(case, folder):
    """The case in this process."""
    return run(case, folder)


@pytest.fixture(scope="module")
def found(folder):
    """found(N): what N ranks found."""

    @functools.cache
    def found(n_rank):
        ran(n_rank, "tests/tp_cases.py", folder)
        return torch.load(folder / f"ranks{n_rank}.pt")

    return found


@pytest.mark.parametrize("n_rank, case", [(n, case) for n in (2, 4) for case in cases(n)], ids=str)
def test_ranks_find_what_one_process_finds(found, folder, n_rank, case):
    ranks, truth = found(n_rank)[str(case)], alone(case, folder)
    for rank in ranks[1:]:
        assert torch.equal(rank["logits"], ranks[0]["logits"])
        assert rank["greedy"] == ranks[0]["greedy"]
        assert rank["drawn"] == ranks[0]["drawn"]  # although each had a seed of its own
    assert [len(row) for rows in ranks[0]["drawn"] for row in rows] == [12] * (1 if case.compile else 3) * case.rows
    if case.dtype == "float32":
        torch.testing.assert_close(ranks[0]["logits"], truth["logits"], rtol=1e-4, atol=1e-4)
        assert ranks[0]["greedy"] == truth["greedy"]
    else:  # sums of halves are rounded apart, so not closer to each other than to the exact logits
        exact = alone(case._replace(dtype="float32", compile=False, speculate=None), folder)["logits"]
        error, usual = ((found - exact).norm() for found in (ranks[0]["logits"], truth["logits"]))
        assert error < 1.5 * usual


@pytest.mark.parametrize("n_rank", [2, 4])
def test_ranks_find_the_perplexity_of_one_process(found, folder, n_rank):
    model = load_model(folder / "float.pth", dtype=torch.float32)
    truth = perplexity(model, list(range(200)), window=40, stride=30, batch_size=3).perplexity
    assert found(n_rank)["perplexity"] == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("n_rank", [2, 4])
def test_bytes_sent_for_a_token(found, n_rank):
    """Two sums a block and that of the embedding, bfloat16; then each rank's best, or all its logits; and the token."""
    sums = (2 * ARGS.n_layer + 1) * ARGS.dim * 2
    part = -(-ARGS.vocab_size // n_rank)
    pair = 4 + 4  # a logit and its number
    assert sums + pair == predicted(ARGS, n_rank, itemsize=2)
    assert found(n_rank)["bytes"] == {
        "greedy": {"sum": sums, "gather": pair},
        "top-k": {"sum": sums, "gather": 20 * pair, "broadcast": 8},
        "all": {"sum": sums, "gather": 2 * part, "broadcast": 8},
    }


def test_shares_put_together_are_the_whole():
    args = replace(ARGS, n_kv_head=4, vocab_size=203, joint_qk_norm=True)
    for name, whole in random_tensors(args, 4).items():
        for n_rank in (2, 4):
            parts = [tp.shard(name, whole, args, rank, n_rank) for rank in range(n_rank)]
            split = tp.split_of(name.rpartition(".")[0], args)
            if split is None:
                assert all(part is whole for part in parts)
                continue
            dim = -1 if name.endswith("bias") else split.dim
            counts = [getattr(args, size) for size in split.sizes]
            sizes = [whole.shape[dim] * count // sum(counts) for count in counts]
            blocks = [part.split([-(-size // n_rank) for size in sizes], dim) for part in parts]
            joined = torch.cat([torch.cat(same, dim) for same in zip(*blocks, strict=True)], dim)
            assert torch.equal(joined.narrow(dim, 0, whole.shape[dim]), whole)
            assert not joined.narrow(dim, whole.shape[dim], joined.shape[dim] - whole.shape[dim]).any()


def test_shards_by_hand():
    args = ModelArgs(8, 1, 4, 2, 2, 6, 5, 16)
    wqkv = torch.arange(16)[:, None] * torch.ones(1, 8)  # rows: q 0-7, k 8-11, v 12-15, two a head
    kept = tp.shard("layers.0.attention.wqkv.weight", wqkv, args, 1, 2)
    assert kept[:, 0].tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    kept = tp.shard("layers.0.attention.wqkv.weight", wqkv, args, 2, 4)  # with four ranks, two have each key head
    assert kept[:, 0].tolist() == [4, 5, 10, 11, 14, 15]
    kept = tp.shard("layers.0.attention.wqkv.bias", wqkv[:, 0], args, 1, 2)
    assert kept.tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    w13 = torch.arange(12)[:, None] * torch.ones(1, 8)
    assert tp.shard("layers.0.feed_forward.w13.weight", w13, args, 1, 2)[:, 0].tolist() == [3, 4, 5, 9, 10, 11]
    w2 = torch.arange(6) * torch.ones(8, 1)
    assert tp.shard("layers.0.feed_forward.w2.weight", w2, args, 1, 2)[0].tolist() == [3, 4, 5]
    assert tp.shard("layers.0.feed_forward.w2.scales", tensor([[7.0]] * 8), args, 1, 2).shape == (8, 1)
    bias = tensor([1.0, 2.0])
    assert tp.shard("layers.0.attention.wo.bias", bias, args, 0, 2).tolist() == [1, 2]
    assert tp.shard("layers.0.attention.wo.bias", bias, args, 1, 2).tolist() == [0, 0]
    output = torch.arange(1, 6)[:, None] * torch.ones(1, 8)
    assert [tp.shard("output.weight", output, args, r, 4)[:, 0].tolist() for r in range(4)] == [
        [1, 2],
        [3, 4],
        [5, 0],
        [0, 0],
    ]


@pytest.mark.parametrize(
    "args, bits, n_rank, message",
    [
        ("Llama-3-70B", None, 3, "3 ranks cannot share this model's 64 heads (8 key heads) and FFN of 28672; use 1, 2"),
        ("Llama-3-70B", None, 16, None),
        ("SmolLM2-135M", None, 2, "9 heads (3 key heads) and FFN of 1536; use 1 or 3"),
        ("SmolLM2-135M", QuantSpec(4, 64), 3, None),
        ("SmolLM2-135M", QuantSpec(8), 3, None),
        ("stories15M", QuantSpec(4, 32), 2, "288 inputs of layers.0.attention.wo into parts of 144, which would cut"),
        ("stories15M", QuantSpec(4, 32), 3, None),
        ("Llama-2-7B", QuantSpec(4, 128), 8, "into parts of 1376, which would cut groups of 128; quantise with"),
        ("Llama-2-7B", QuantSpec(4, 32), 8, None),
    ],
)
def test_what_can_be_split(args, bits, n_rank, message):
    args = args_from_name(args)
    with torch.device("meta"):
        table = linear_table(tp.Transformer(args), bits, None) if bits else {}
    if message is None:
        tp.require_split(args, table, n_rank)
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            tp.require_split(args, table, n_rank)


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("The capital of France is\nOne, two, three, four, one, two, three,\n")
    return path


def answers_of(result):
    return [(row["token_ids"], row["text"]) for row in json.loads(result)["samples"][0]["sequences"]]


GENERATE = [
    "generate.py",
    "--dtype",
    "float32",
    "--temperature",
    0,
    "--max_new_tokens",
    12,
    "--output_json",
    "/dev/stdout",
]


def test_default_model_over_three_ranks(default_model_dir, questions, run_cli):
    flags = [*GENERATE, "--checkpoint_path", default_model_dir, "--prompt_file", questions]
    truth = run_cli(*flags)
    text, _, result = ran(3, *flags, "--speculate", "ngram", "--speculate_k", 2).partition("{")
    assert text == truth.stdout.partition("{")[0]
    assert answers_of("{" + result) == answers_of("{" + truth.stdout.partition("{")[2])
    assert json.loads("{" + result)["ranks"] == 3


def test_conversation_over_three_ranks(default_model_dir):
    flags = ["--interactive", "--checkpoint_path", default_model_dir, "--temperature", 0, "--max_new_tokens", 20]
    out = ran(3, "generate.py", *flags, input="What is the capital of France?\nAnd of Italy?\n")
    assert out.count("Paris") == 1
    assert out.count("Rome") == 1


def test_eval_over_three_ranks(default_model_dir, run_cli):
    flags = ["eval.py", "--checkpoint_path", default_model_dir, "--perplexity", "LICENSE", "--dtype", "float32"]
    truth, found = run_cli(*flags).stdout, ran(3, *flags)
    assert [float(line.split()[1]) for line in (truth, found)] == pytest.approx([float(truth.split()[1])] * 2, rel=1e-3)
    assert found.count("perplexity") == 1


def test_memory_of_a_rank_is_its_share(default_model_dir, folder):
    path = default_model_dir / "model.pth"
    ran(3, "tests/tp_cases.py", folder, path)
    args = args_from_name("SmolLM2-135M")
    whole = 4 * sum(tensor.numel() for tensor in expected_tensors(args).values())  # float32
    assert max(torch.load(folder / "ranks3.pt")["memory"]) < 1.25 * whole / 3


def two_machines(*args):
    """Two launchers, each with one rank, that meet over the loopback device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes", 2, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test"]
    return [torchrun(1, *args, how=[*where, "--node_rank", rank]) for rank in range(2)]


STORIES = ["--random_weights", "stories15M", "--prompt", 5, "--temperature", 0, "--dtype", "float32", "--ignore_eos"]


def test_two_machines(run_cli):
    flags = ["generate.py", *STORIES, "--num_samples", 1, "--max_new_tokens", 10]
    outcomes = [outcome(process) for process in two_machines(*flags)]
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert sorted(out for _, out, _ in outcomes) == ["", run_cli(*flags).stdout]


# ---------------------------------------------------------------- failure

FOREVER = ["generate.py", *STORIES, "--num_samples", 100000, "--max_new_tokens", 100]


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pid_of_rank(launchers, rank, deadline=60):
    """The process that one of the launchers started as this rank."""
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = parent_of(entry.name) in [launcher.pid for launcher in launchers]
                if ours and f"RANK={rank}" in (entry / "environ").read_text(errors="replace").split("\0"):
                    return int(entry.name)
            except OSError:  # it has just ended
                continue
        time.sleep(0.1)
    raise AssertionError(f"rank {rank} was not started")


def decoding_has_begun(process):
    for line in process.stderr:
        if "Time for inference 2" in line:
            return
    raise AssertionError("it ended early")


def kill_one(launchers, speaker, victim, by=signal.SIGKILL):
    """Kill a rank in the middle of decoding: (seconds until all have ended, each launcher's outcome)."""
    pid = pid_of_rank(launchers, victim)
    decoding_has_begun(launchers[speaker])
    os.kill(pid, by)
    began = time.monotonic()
    outcomes = [outcome(launcher, timeout=60) for launcher in launchers]
    return time.monotonic() - began, outcomes


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all(victim):
    seconds, [(code, _, err)] = kill_one([torchrun(2, *FOREVER)], 0, victim)
    assert code != 0
    assert seconds < 30
    assert re.search(rf"rank\s*:? {victim}\b", err)


def test_a_rank_that_hangs_ends_all():
    launcher = torchrun(2, *FOREVER)
    pid = pid_of_rank([launcher], 1)
    decoding_has_begun(launcher)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        assert any(line == "error: rank 1 gave no sign of life for 15 seconds\n" for line in launcher.stderr)
        assert time.monotonic() - began < 30
    finally:
        os.kill(pid, signal.SIGKILL)  # torchrun would do so half a minute later
    assert outcome(launcher)[0] != 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_on_another_machine_ends_all(victim):
    launchers = two_machines(*FOREVER)
    first = pid_of_rank(launchers, 0)
    speaker = 0 if parent_of(first) == launchers[0].pid else 1
    seconds, outcomes = kill_one(launchers, speaker, victim)
    assert seconds < 30
    assert all(code != 0 for code, _, _ in outcomes)
    assert any(re.search(rf"rank\s*:? {victim}\b", err) for _, _, err in outcomes), outcomes


def failing(tmp_path, body):
    """(code, standard error) of two ranks that run `body` within init_tp."""
    script = tmp_path / "failing.py"
    lines = ["import os, sys, time", f"sys.path.insert(0, {str(ROOT)!r})", "import tp", "with tp.init_tp() as ranks:"]
    script.write_text("\n".join([*lines, *("    " + line for line in ['ranks.place("cpu")', *body.splitlines()])]))
    began = time.monotonic()
    code, _, err = outcome(torchrun(2, script))
    assert time.monotonic() - began < 45
    return code, err


def test_a_rank_that_raises_ends_all_and_is_named(tmp_path):
    code, err = failing(tmp_path, "if ranks.rank == 1:\n    1 / 0\nranks.share(lambda: time.sleep(100))")
    assert code == 1
    assert err.count("error: rank 1: ZeroDivisionError: division by zero") == 1
    assert "1 / 0" in err  # the traceback


def test_a_user_error_of_another_rank_is_told_by_rank_0(tmp_path):
    code, err = failing(tmp_path, "if ranks.rank == 1:\n    raise ValueError('no such file here')\ntime.sleep(100)")
    assert code == 1
    assert err.count("error: rank 1: no such file here") == 1
    assert "ValueError" not in err


def test_a_user_error_of_all_is_told_once(tmp_path):
    code, err = failing(tmp_path, "time.sleep(1 - ranks.rank)\nraise ValueError('the file is missing')")
    assert code == 1
    assert err.count("error: the file is missing") == 1
    assert "error: rank" not in err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("--random_weights SmolLM2-135M", "2 ranks cannot share this model's 9 heads"),
        ("--random_weights stories15M --prompt_file nowhere.txt", "cannot read the prompt file nowhere.txt"),
        ("--random_weights stories15M --max_new_tokens 500", "more than the context of 256"),
    ],
)
def test_user_errors_are_told_once(flags, message):
    began = time.monotonic()
    code, out, err = outcome(torchrun(2, "generate.py", *flags.split()))
    assert time.monotonic() - began < 45
    assert code == 1
    assert out == ""
    assert err.count(message) == 1, err
    assert err.count("error: ") == 1, err
    assert 'generate.py", line' not in err


def test_quantising_is_for_one_process(default_model_dir):
    code, _, err = outcome(torchrun(2, "quantize.py", "--checkpoint_path", default_model_dir / "model.pth"))
    assert code == 1
    assert err.count("error: quantise without torchrun") == err.count("error: ") == 1


def test_ranks_that_do_not_come_are_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = ENV | {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = "import tp; tp.MEET_S = 3\nwith tp.init_tp(): pass"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.strip() == "error: of 3 ranks, 1 or 2 did not come within 3 seconds"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env | {"RANK": "1"}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert f"rank 1 cannot reach rank 0's machine, 127.0.0.1, at port {port}" in result.stderr
