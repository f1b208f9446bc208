"""Time decoding of one model shared by several ranks, and count the bytes they give each other for a token.

    python scripts/tensor_parallel.py                      # the default model over 1 and 3 processes of this CPU
    python scripts/tensor_parallel.py --device cuda --ranks 1 2 4 8 --model Llama-2-7B --precisions bf16 int8 int4

Every round runs each number of ranks once (A B A B ...), as `generate.py --compile`; medians count. A model that is no
file is one of the registry's sizes, with random weights.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.quit_on_interrupt()  # before the slow imports

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from engine.decode import decode_one_token, used_slots
from engine.sampling import Sampling
from model import ModelArgs, Transformer
from ranks import Ranks, init_tp
from scripts.reporting import ROOT, machine, markdown, medians, update_readme
from tp import require_split
from weights.checkpoint import DEFAULT_CHECKPOINT, load_model, open_model, random_model
from weights.files import require_writable, write_json
from weights.registry import REGISTRY, args_from_name

NEW_TOKENS, REPEATS = 100, 3
QUANTIZE = {"bf16": [], "int8": ["--quantize", "int8"], "int4": ["--quantize", "int4"]}


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

    def broadcast(self, x):
        self.sent["broadcast"] += x.nbytes
        return super().broadcast(x)

    def gather(self, x):
        self.sent["gather"] += x.nbytes
        return super().gather(x)


def bytes_of_a_step(model: Transformer, sampling: Sampling) -> dict[str, int]:
    """Bytes that this rank gives to each kind of collective in one decoding step of one row. Its ranks must count."""
    token, pos = torch.zeros(1, 1, dtype=torch.long, device=model.device).repeat(2, 1, 1)
    before = Counter(model.ranks.sent)
    with torch.inference_mode():
        decode_one_token(model, token, pos, used_slots(model, 1), sampling)
    return dict(model.ranks.sent - before)


def predicted(args: ModelArgs, n_rank: int, itemsize: int) -> int:
    """The same by hand, greedy: two sums a block and the embedding's, of `dim` values; the best logit and its id."""
    return 0 if n_rank == 1 else (2 * args.n_layer + 1) * args.dim * itemsize + 4 + 4


def count_bytes(model: str, device: str, output: str) -> None:
    """What each rank that torchrun started does to count."""
    with init_tp() as ranks:
        ranks = CountingRanks.of(ranks)
        load = random_model if model in REGISTRY else load_model
        shared = load(model, ranks.place(device), torch.bfloat16, ranks=ranks)
        shared.setup_caches(1, 16)
        sent = bytes_of_a_step(shared, Sampling(temperature=0))
        if ranks.is_first:
            write_json(output, sent)


def run_json(command: list) -> dict:
    """What a command of ours writes with --output_json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        command = [str(part) for part in [*command, "--output_json", path]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        return json.loads(path.read_text())


def launch(n_rank: int) -> list[str]:
    if n_rank == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_rank)]


def sizes(model: str) -> ModelArgs:
    return args_from_name(model) if model in REGISTRY else open_model(model).args


def table(result: dict) -> str:
    """The README's table."""
    ranks = sorted(map(int, next(iter(result["median"].values()))))
    rows = []
    for precision, of in result["median"].items():
        speeds = [f"{of[str(n)]['decode_tok_s']:.1f} tok/s" for n in ranks]
        weights = [f"{of[str(n)]['weight_bytes_per_token'] / 1e6:.0f} MB" for n in ranks]
        rows.append([f"decode, {NEW_TOKENS} tokens, {precision}", *speeds])
        rows.append([f"weights that a rank reads for a token, {precision}", *weights])
    sent = [f"{result['bytes'][str(n)]['counted']:,}".replace(",", " ") for n in ranks]
    rows.append(["bytes that a rank gives to the others for a token", *sent])
    return markdown([f"{result['model']}, {result['device']}, batch 1", *(f"ranks: {n}" for n in ranks)], rows)


def main(*, model: str, device: str, ranks: list[int], precisions: list[str], rounds: int, output: str, count: bool):
    if count:
        return count_bytes(model, device, output)
    require_writable(output)
    args = sizes(model)
    if min(ranks) < 1:
        raise ValueError(f"--ranks has {min(ranks)}; each must be at least 1")
    for n_rank in ranks:  # or a run of minutes would end with the first that fails
        require_split(args, {}, n_rank)
    weights = ["--random_weights" if model in REGISTRY else "--checkpoint_path", model]
    runs = {precision: {str(n): [] for n in ranks} for precision in precisions}
    for number in range(1, rounds + 1):
        for precision in precisions:
            for n_rank in ranks:
                threads = ["--threads", max(1, os.cpu_count() // n_rank)] if device == "cpu" else []
                command = [*launch(n_rank), "generate.py", *weights, *QUANTIZE[precision], "--device", device, *threads]
                command += ["--compile", "--temperature", 0, "--ignore_eos", "--prompt", 8]
                figures = run_json([*command, "--num_samples", REPEATS, "--max_new_tokens", NEW_TOKENS])
                kept = ("decode_tok_s", "weight_bytes_per_token", "peak_memory_gb", "compile_s")
                runs[precision][str(n_rank)].append({key: figures[key] for key in kept})
                print(f"round {number}, {precision}, ranks: {n_rank}: {figures['decode_tok_s']:.1f} tok/s", flush=True)
    result = {
        "command": shlex.join(["python", "scripts/tensor_parallel.py", *sys.argv[1:]]),
        "machine": machine(("torch",)),
        "model": model if model in REGISTRY else Path(model).parent.name,
        "device": f"{os.cpu_count()} CPU cores" if device == "cpu" else torch.cuda.get_device_name(),
        "median": {precision: {n: medians(of) for n, of in sides.items()} for precision, sides in runs.items()},
        "bytes": {str(n): bytes_sent(model, args, device, n) for n in ranks},
        "runs": runs,
    }
    write_json(output, result)
    update_readme(table(result), output)
    print(table(result))


def bytes_sent(model: str, args: ModelArgs, device: str, n_rank: int) -> dict:
    counted = {}
    if n_rank > 1:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bytes.json"
            command = [
                *launch(n_rank),
                __file__,
                "--count",
                "--model",
                model,
                "--device",
                device,
                "--output",
                str(path),
            ]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
            counted = json.loads(path.read_text())
    expected = predicted(args, n_rank, itemsize=2)
    return {"counted": sum(counted.values()), "predicted": expected, "of_each_kind": counted}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time a model shared by several ranks, and count what they send.")
    parser.add_argument(
        "--model", default=str(DEFAULT_CHECKPOINT), help="a checkpoint or a registry name (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 3], help="how many (default: %(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=QUANTIZE, default=["bf16"], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="times each runs (default: %(default)s)")
    parser.add_argument(
        "--output", default="benchmarks/tensor_parallel.json", help="result file (default: %(default)s)"
    )
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    cli.run(main, parser)
