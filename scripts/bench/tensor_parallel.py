"""Decoding of one model shared by several ranks, and the bytes that they give each other for a token.

    python scripts/bench/run.py tensor_parallel            # the default model over 1 and 3 processes of this CPU
    python scripts/bench/run.py tensor_parallel --device cuda --ranks 1 2 4 8 --model Llama-2-7B

Every round runs each number of ranks once, as three samples of `generate.py --compile`; medians count.
"""

import sys
from functools import partial

from measure.traffic import predicted
from model import ModelArgs
from scripts.bench.report import Report, markdown, run_command, shared_flags, take_turns
from tp import require_split
from weights.checkpoint import open_model
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
    command = [*launch(n_rank), "-m", "measure.traffic", model, device]
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
