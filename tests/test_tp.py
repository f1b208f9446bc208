"""Several ranks against one process, and what happens when one of them fails. All by gloo, on this machine."""

import functools
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
from layers.fastest import pack_
from layers.quantized import QuantSpec, linear_table, quantize_, quantize_weight
from model import ModelArgs, Transformer
from scripts.bench.tensor_parallel import predicted
from tests.tiny import ENV, outcome, ran, torchrun
from tests.tp_cases import ARGS, MODELS, TIED, cases, commands_on, printed, run, score
from weights.checkpoint import load_model, save_checkpoint
from weights.layout import Layout
from weights.registry import args_from_name

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- the numbers


def random_tensors(args, seed):
    generator = torch.Generator().manual_seed(seed)
    expected = Layout(args).tensors.items()
    weights = {name: torch.randn(like.shape, generator=generator) for name, like in expected}
    return {name: 0.15 * weight if weight.dim() > 1 else weight for name, weight in weights.items()}


def rounded(args, tensors, spec):
    """Tensors and table of the model rounded to nearest; the head as int8."""
    with torch.device("meta"):
        table = linear_table(Transformer(args), spec, QuantSpec(8))
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
    for name in ("experts", "delta", "convs"):
        save_checkpoint(
            folder / f"{name}-int4.pth", MODELS[name], *rounded(MODELS[name], floats[name], QuantSpec(4, 32))
        )
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
        ran(n_rank, "tests/tp_cases.py", "cases", folder)
        return torch.load(folder / f"cases{n_rank}.pt")

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


@pytest.mark.parametrize("n_rank, part", [(2, 102), (4, 51)])  # part: of the vocabulary of 203
def test_perplexity_and_bytes_sent(found, folder, n_rank, part):
    """A token costs two sums a block and the embedding's, of bfloat16; each rank's best, or all its logits; its id."""
    assert found(n_rank)["perplexity"] == pytest.approx(score(folder), rel=1e-4)
    sums = (2 * 2 + 1) * 128 * 2
    pair = 4 + 4  # a logit and its id
    assert sums + pair == predicted(ARGS, n_rank, itemsize=2)
    assert found(n_rank)["bytes"] == {
        "greedy": {"sum": sums, "gather": pair},
        "top-k": {"sum": sums, "gather": 20 * pair, "broadcast": 8},
        "all": {"sum": sums, "gather": 2 * part, "broadcast": 8},
    }


class OneRank:
    """All ranks, where they are one."""

    rank, size, is_first = 0, 1, True

    def sum(self, x):
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [None, QuantSpec(8), QuantSpec(4, 32)])
@pytest.mark.parametrize("name", ["float", "joint", "experts"])
def test_ranks_join_before_packing_or_after(name, spec, dtype):
    args, found = MODELS[name], []
    x = torch.randn(5, args.dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    steps = [pack_, lambda model: tp.apply_tp(model, args, OneRank())]
    for order in (steps, steps[::-1]):
        model = Transformer(args).requires_grad_(False)
        model.load_state_dict(random_tensors(args, 1))
        quantize_(model, linear_table(model, spec, None) if spec else {})
        model.to(dtype)
        for step in order:
            step(model)
        block = model.layers[0]
        found.append((str(model), block.feed_forward(x[None]), block.attention.wo(x.repeat(1, 2)), model.output(x)))
    for one, other in zip(*found, strict=True):
        assert one == other if isinstance(one, str) else torch.equal(one, other)


@pytest.mark.parametrize("n_rank", [2, 4])
def test_every_weight_is_on_one_rank_and_every_norm_on_all(n_rank):
    args = replace(ARGS, n_kv_head=4, joint_qk_norm=True, n_expert=2, n_expert_used=1, shared_size=64)
    for name, like in Layout(args).tensors.items():
        whole = torch.arange(1, like.numel() + 1).view(like.shape)
        parts = [tp.shard(name, whole, args, rank, n_rank) for rank in range(n_rank)]
        assert len({part.shape for part in parts}) == 1
        if name.endswith("norm.weight") and ".q_" not in name and ".k_" not in name or "gate.weight" in name:
            assert all(torch.equal(part, whole) for part in parts)
        else:
            kept = torch.cat([part.flatten() for part in parts])
            assert torch.equal(kept[kept > 0].sort().values, whole.flatten())  # 0: the padded vocabulary


def test_shards_by_hand():
    args = ModelArgs(8, 1, 4, 2, 2, 6, 5, 16)
    wqkv = torch.arange(16)[:, None] * torch.ones(1, 8)  # rows: q 0-7, k 8-11, v 12-15, two a head
    kept = tp.shard("layers.0.attention.wqkv.weight", wqkv, args, 1, 2)
    assert kept[:, 0].tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    kept = tp.shard("layers.0.attention.wqkv.weight", wqkv, args, 2, 4)  # with four ranks, two have each key head
    assert kept[:, 0].tolist() == [4, 5, 10, 11, 14, 15]
    kept = tp.shard("layers.0.attention.wqkv.bias", wqkv[:, 0], args, 1, 2)
    assert kept.tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    in_turn = replace(args, n_layer=2, sliding_window=4, full_layers=(0,), full_kv_head=1, keys_as_values=True)
    kept = tp.shard("layers.0.attention.wqkv.weight", wqkv[:10], in_turn, 1, 2)  # q 0-7 and one key head, on both ranks
    assert kept[:, 0].tolist() == [4, 5, 6, 7, 8, 9]
    reusing = replace(args, n_layer=2, n_reusing_layer=1)
    assert tp.shard("layers.1.attention.wqkv.weight", wqkv[:8], reusing, 1, 2)[:, 0].tolist() == [4, 5, 6, 7]
    w13 = torch.arange(12)[:, None] * torch.ones(1, 8)
    assert tp.shard("layers.0.feed_forward.w13.weight", w13, args, 1, 2)[:, 0].tolist() == [3, 4, 5, 9, 10, 11]
    w2 = torch.arange(6) * torch.ones(8, 1)
    assert tp.shard("layers.0.feed_forward.w2.weight", w2, args, 1, 2)[0].tolist() == [3, 4, 5]
    assert tp.shard("layers.0.feed_forward.w2.scales", tensor([[7.0]] * 8), args, 1, 2).shape == (8, 1)
    bias = tensor([1.0, 2.0])
    assert tp.shard("layers.0.attention.wo.bias", bias, args, 0, 2).tolist() == [1, 2]
    assert tp.shard("layers.0.attention.wo.bias", bias, args, 1, 2).tolist() == [0, 0]
    output = torch.arange(1, 6)[:, None] * torch.ones(1, 8)
    kept = [tp.shard("output.weight", output, args, rank, 4)[:, 0].tolist() for rank in range(4)]
    assert kept == [[1, 2], [3, 4], [5, 0], [0, 0]]


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
        table = linear_table(Transformer(args), bits, None) if bits else {}
    if message is None:
        tp.require_split(args, table, n_rank)
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            tp.require_split(args, table, n_rank)


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def on_three(default_model_dir, folder):
    """What three ranks find on the default model."""
    ran(3, "tests/tp_cases.py", "commands", folder, default_model_dir)
    return torch.load(folder / "commands3.pt")


def test_commands_over_three_ranks_print_the_same(on_three, default_model_dir, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", sys.stdin)  # to be restored
    answers, talk, perplexity = on_three["printed"]
    generating, _, evaluating = (
        functools.partial(printed, None, *each) for each in commands_on(default_model_dir, folder)
    )
    assert answers == generating() and answers.count("[row ") == 2
    assert talk.count("Paris") == talk.count("Rome") == 1
    found, truth = (float(line.split()[1]) for line in (perplexity, evaluating()))
    assert found == pytest.approx(truth, rel=1e-3) and perplexity.count("perplexity") == 1


def test_memory_of_a_rank_is_a_third(on_three):
    tensors = Layout(args_from_name("SmolLM2-135M")).tensors.values()
    assert max(on_three["memory"]) < 1.25 * 4 * sum(tensor.numel() for tensor in tensors) / 3  # float32


def test_every_rank_refuses_what_one_would(on_three):
    expected = ["3 ranks cannot share this model's 32 heads", "500 new ones are more than the context of 256"]
    for messages, words in zip(on_three["refused"], expected, strict=True):
        assert words in messages[0] and len(set(messages)) == 1


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_machines(*args):
    """Two launchers, each with one rank, that meet over the loopback device."""
    where = ["--nnodes", 2, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "x"]
    return [torchrun(1, *args, how=[*where, "--node_rank", rank]) for rank in range(2)]


STORIES = ["--random_weights", "stories15M", "--prompt", 5, "--temperature", 0, "--dtype", "float32", "--ignore_eos"]


def test_two_machines():
    flags = [*STORIES, "--num_samples", 1, "--max_new_tokens", 10]
    outcomes = [outcome(process) for process in two_machines("generate.py", *flags)]
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert sorted(out for _, out, _ in outcomes) == ["", printed(None, "generate", flags)]


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


STAGES = ("--pipeline_stages", 2)


@pytest.mark.parametrize(
    "n_machine, victim, flags", [(1, 0, ()), (1, 1, ()), (2, 0, ()), (2, 1, ()), (1, 0, STAGES), (2, 1, STAGES)]
)
def test_a_rank_killed_while_decoding_ends_all(n_machine, victim, flags):
    command = [*FOREVER, *flags]
    launchers = [torchrun(2, *command)] if n_machine == 1 else two_machines(*command)
    first, pid = (pid_of_rank(launchers, rank) for rank in (0, victim))
    decoding_has_begun(next(launcher for launcher in launchers if launcher.pid == parent_of(first)))
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    outcomes = [outcome(launcher, timeout=60) for launcher in launchers]
    assert time.monotonic() - began < 30
    assert all(code != 0 for code, _, _ in outcomes)
    assert any(re.search(rf"rank\s*:? {victim}\b", err) for _, _, err in outcomes), outcomes


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


def ranks_alone(code, *numbers, size=2):
    """(exit code, standard error) of ranks that run `code`, each started by hand, without torchrun."""
    where = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code]
    began = time.monotonic()
    started = [
        subprocess.Popen(command, cwd=ROOT, env=ENV | where | {"RANK": str(number)}, **pipes) for number in numbers
    ]
    outcomes = [outcome(process, timeout=60) for process in started]
    assert time.monotonic() - began < 45
    return [code for code, _, _ in outcomes], "".join(err for _, _, err in outcomes)


def failing(body):
    lines = ["import time", "import ranks", "with ranks.init_tp() as ranks:", "    ranks.place('cpu')"]
    return ranks_alone("\n".join([*lines, *(f"    {line}" for line in body.splitlines())]), 0, 1)


def test_a_rank_that_raises_ends_all_and_is_named():
    codes, err = failing("if ranks.rank == 1:\n    1 / 0\nranks.share(lambda: time.sleep(100))")
    assert codes == [1, 1]
    assert err.count("error: rank 1: ZeroDivisionError: division by zero") == 1
    assert "Traceback" in err


def test_a_user_error_of_another_rank_is_told_by_rank_0():
    codes, err = failing("if ranks.rank == 1:\n    raise ValueError('no such file here')\ntime.sleep(100)")
    assert codes == [2, 2]
    assert err.count("error: rank 1: no such file here\n") == err.count("error: ") == 1


def test_a_user_error_of_all_is_told_once():
    codes, err = failing("time.sleep(1 - ranks.rank)\nraise ValueError('the file is missing')")
    assert codes == [2, 2]
    assert err.count("error: the file is missing\n") == err.count("error: ") == 1


def test_ranks_that_do_not_come_are_named():
    code = "import ranks; ranks.MEET_S = 3\nwith ranks.init_tp(): pass"
    error = "error: of 3 ranks, 1 or 2 did not come within 3 seconds\n"
    assert ranks_alone(code, 0, size=3) == ([2], error)
    codes, err = ranks_alone(code, 1, size=3)
    assert codes == [2] and "rank 1 cannot reach rank 0's machine, 127.0.0.1, at port " in err


@pytest.mark.parametrize(
    "command, message",
    [
        ("generate.py --no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("generate.py --random_weights stories15M --prompt_file none.txt", "cannot read the prompt file none.txt"),
        ("generate.py --random_weights stories15M --pipeline_stages 3", "3 pipeline stages cannot share 2 ranks"),
        ("quantize.py --checkpoint_path none.pth", "quantise without torchrun"),
    ],
)
def test_user_errors_are_told_once(command, message):
    began = time.monotonic()
    code, out, err = outcome(torchrun(2, *command.split()))
    assert time.monotonic() - began < 45
    assert (code, out) == (1, "")
    assert err.count(message) == err.count("error: ") == 1, err
    assert '.py", line' not in err.partition("error: ")[0]
