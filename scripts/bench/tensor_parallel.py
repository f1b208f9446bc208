"""Decoding of one model shared by several ranks, and the bytes that they give each other for a token.

    python scripts/bench/run.py tensor_parallel            # the default model over 1 and 3 processes of this CPU
    python scripts/bench/run.py tensor_parallel --device cuda --ranks 1 2 4 8 --model Llama-2-7B

Every round runs each number of ranks once, as three samples of `generate.py --compile`; medians count.
torchrun starts this file, to count the bytes, as `-m scripts.bench.tensor_parallel MODEL DEVICE --output_json PATH`.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial

import torch

from engine.decode import decode_one_token
from engine.sampling import Sampling
from model import ModelArgs, Transformer
from ranks import Ranks, init_tp
from scripts.bench.report import Report, markdown, run_command, shared_flags, take_turns
from tp import require_split
from weights.checkpoint import load_model, open_model, random_model
from weights.files import write_json
from weights.registry import REGISTRY, args_from_name

QUANTIZE = {"bf16": [], "int8": ["--quantize", "int8"], "int4": ["--quantize", "int4"]}
PARTS, SAME = ("precisions", "bytes"), ("threads", "model", "device", "ranks", "new_tokens")
KEPT = ("decode_tok_s", "weight_bytes_per_token", "peak_memory_gb", "compile_s")


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/tensor_parallel.json", rounds=3, model="a checkpoint or a registry name")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 3], help="how many (default: %(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=QUANTIZE, default=["bf16"], help="default: %(default)s")
    parser.add_argument("--new_tokens", type=int, default=100, help="tokens decoded (default: %(default)s)")


def fill(report: Report, *, model: str, device: str, ranks: list[int], precisions: list[str], **flags) -> None:
    args = args_from_name(model) if model in REGISTRY else open_model(model).args
    if min(ranks) < 1:
        raise ValueError(f"--ranks has {min(ranks)}; each must be at least 1")
    for n_rank in ranks:  # or a run of minutes would end with the first that fails
        require_split(args, {}, n_rank)
    weights = ["--random_weights" if model in REGISTRY else "--checkpoint_path", model]
    common = ["generate.py", *weights, "--device", device, "--max_new_tokens", flags["new_tokens"]]
    for precision in precisions:
        command = [*common, *QUANTIZE[precision]]
        sides = {f"ranks: {n_rank}": partial(run, n_rank, command, flags["threads"]) for n_rank in ranks}
        report.once(report.result["precisions"], precision, partial(take_turns, flags["rounds"], sides, False))
    for n_rank in ranks:
        report.once(report.result["bytes"], f"ranks: {n_rank}", partial(bytes_sent, model, args, device, n_rank))


def launch(n_rank: int) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_rank)]
    return [sys.executable, *(torchrun if n_rank > 1 else [])]


def run(n_rank: int, command: list, threads: int) -> dict[str, float]:
    """The figures of one run of generate.py."""
    how = ["--compile", "--temperature", 0, "--ignore_eos", "--prompt", 8, "--num_samples", 3]
    figures = run_command([*launch(n_rank), *command, *how, "--threads", max(1, threads // n_rank)])
    return {key: figures[key] for key in KEPT}


def bytes_sent(model: str, args: ModelArgs, device: str, n_rank: int) -> dict:
    """What one rank gives to the others in a step: counted, and by hand."""
    command = [*launch(n_rank), "-m", "scripts.bench.tensor_parallel", model, device]
    counted = run_command(command) if n_rank > 1 else {}
    expected = predicted(args, n_rank, itemsize=2)
    return {"counted": sum(counted.values()), "predicted": expected, "of_each_kind": counted}


def table(result: dict) -> str:
    names, rows = list(result["bytes"]), []
    for precision, found in result["precisions"].items():
        medians = [found[name]["median"] for name in names]
        speeds = [f"{median['decode_tok_s']:.1f} tok/s" for median in medians]
        rows.append([f"decode, {result['new_tokens']} tokens, {precision}", *speeds])
        weights = [f"{median['weight_bytes_per_token'] / 1e6:.0f} MB" for median in medians]
        rows.append([f"weights that a rank reads for a token, {precision}", *weights])
    sent = [f"{result['bytes'][name]['counted']:,}".replace(",", " ") for name in names]
    rows.append(["bytes that a rank gives to the others for a token", *sent])
    where = f"{result['threads']} CPU cores" if result["device"] == "cpu" else result["machine"]["gpu"]
    return markdown([f"{result['model']}, {where}, batch 1", *names], rows)


@dataclass(frozen=True, eq=False)
class CountingRanks(Ranks):
    """Ranks that note how many bytes this one gives to each kind of collective."""

    sent: Counter = field(default_factory=Counter)

    @classmethod
    def of(cls, ranks: Ranks) -> "CountingRanks":
        return cls(*(getattr(ranks, each.name) for each in fields(Ranks)))

    def sum(self, x):
        self.sent["sum"] += x.nbytes
        return super().sum(x)

    def broadcast(self, x, source=0):
        self.sent["broadcast"] += x.nbytes
        return super().broadcast(x, source)

    def gather(self, x):
        self.sent["gather"] += x.nbytes
        return super().gather(x)

    def hand_on(self, x):
        self.sent["to the next stage"] += x.nbytes
        return super().hand_on(x)


@torch.inference_mode()
def bytes_of_a_step(model: Transformer, sampling: Sampling) -> dict[str, int]:
    """Bytes that this rank gives to each kind of collective in one decoding step of one row. Its ranks must count."""
    token, pos = torch.zeros(2, 1, 1, dtype=torch.long, device=model.device)
    before = Counter(model.ranks.sent)
    decode_one_token(model, token, pos, model.new_cache(1, 16).view(), sampling)
    return dict(model.ranks.sent - before)


def predicted(args: ModelArgs, n_rank: int, itemsize: int) -> int:
    """The same by hand, greedy: two sums a block and the embedding's, of `dim` values; the best logit and its id."""
    return 0 if n_rank == 1 else (2 * args.n_layer + 1) * args.dim * itemsize + 4 + 4


def count_bytes(model: str, device: str, output: str) -> None:
    with init_tp() as ranks:
        ranks = CountingRanks.of(ranks)
        load = random_model if model in REGISTRY else load_model
        sent = bytes_of_a_step(load(model, ranks.place(device), ranks=ranks), Sampling(temperature=0))
        if ranks.is_first:
            write_json(output, sent)


if __name__ == "__main__":
    count_bytes(*sys.argv[1:3], sys.argv[4])
