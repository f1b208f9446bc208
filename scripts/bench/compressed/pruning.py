"""What pruning costs: perplexity of a text after half of the weights, or some blocks, are taken out by `sparsify.py`.

The text is that of the table `quality`: pruning calibrates with the first half, and of the second half the first 60,000
characters are measured. Magnitude is the baseline that looks at no text: the least weights of each row, or each four.
"""

import math
import sys
from pathlib import Path

import torch

from compress.pruning import Pattern, by_magnitude, parse_pattern
from engine.engine import Engine
from layers.quantized import QuantSpec, linear_table
from measure.perplexity import WINDOW, perplexity
from scripts.bench.compressed.quality import fill_variants
from scripts.bench.report import Report, markdown, run_command, shared_flags
from text.prompts import ids_to_measure
from weights.checkpoint import build, open_model, read_tensors

MEASURED = 60_000  # characters
TWO_FOUR, HALF = ("--pattern", "2:4"), ("--pattern", "0.5")
VARIANTS = {
    "bf16": None,
    "2:4, magnitude": TWO_FOUR,
    "2:4, Wanda": ("--mode", "wanda", *TWO_FOUR),
    "2:4, SparseGPT": ("--mode", "sparsegpt", *TWO_FOUR),
    "2:4, SparseGPT, int8": ("--mode", "sparsegpt", *TWO_FOUR, "--quantize", "int8"),
    "2:4, SparseGPT, int4 (stored in full)": ("--mode", "sparsegpt", *TWO_FOUR, "--quantize", "int4"),
    "2:4, Wanda, int8": ("--mode", "wanda", *TWO_FOUR, "--quantize", "int8"),
    "0.5, magnitude (stored in full)": HALF,
    "0.5, Wanda (stored in full)": ("--mode", "wanda", *HALF),
    "0.5, SparseGPT (stored in full)": ("--mode", "sparsegpt", *HALF),
    "24 of 30 blocks": ("--mode", "layers", "--drop", "6"),
}
PARTS, SAME = ("variants",), ("threads", "model")


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/pruning.json")


def fill(report: Report, *, model: str, threads: int) -> None:
    fill_variants(report, VARIANTS, measure, model, threads, MEASURED)


def measure(checkpoint: Path, how: tuple[str, ...] | None, threads: int, folder: Path) -> dict:
    """Prune the model, if there is a way given, and measure the perplexity."""
    if how in (TWO_FOUR, HALF):
        return magnitude(checkpoint, parse_pattern(how[1]), folder / "second.txt")
    facts, path = {"bytes": open_model(checkpoint).layout.bytes(torch.bfloat16)}, checkpoint
    shared = ["--threads", threads, "--checkpoint_path"]
    if how:
        path = checkpoint.parent / "model_pruning.pth" if checkpoint.is_file() else checkpoint / "model_pruning.pth"
        command = [sys.executable, "sparsify.py", *shared, checkpoint, *how, "--output", path]
        made = run_command([*command, "--calibration_file", folder / "first.txt"])
        facts = {"args": how, "bytes": made["bytes_after"], "made_s": made["seconds"]}
    found = run_command([sys.executable, "eval.py", *shared, path, "--perplexity", folder / "second.txt"])
    if how:
        path.unlink()
    return facts | {key: found[key] for key in ("perplexity", "tokens", "seconds")}


def magnitude(checkpoint: Path, pattern: Pattern, text: Path) -> dict:
    """Of the model without the least weights of its blocks, in this process."""
    source = open_model(checkpoint)
    table = dict.fromkeys(linear_table(source.layout.model, QuantSpec(8), None), QuantSpec())
    state = read_tensors(source, torch.device("cpu"), torch.bfloat16, "Loading")
    state |= by_magnitude({name: state[f"{name}.weight"] for name in table}, table, pattern)
    ids = ids_to_measure(text, checkpoint, source.args.vocab_size)
    found = perplexity(Engine(build(source.args, state)), ids, window=WINDOW)
    return {"perplexity": found.perplexity, "tokens": found.tokens}


def table(result: dict) -> str:
    rows, dense = [], math.log(result["variants"]["bf16"]["perplexity"])
    for name, facts in result["variants"].items():
        size = f"{facts['bytes'] / 1e6:.0f} MB" if "bytes" in facts else ""
        made = f"{facts['made_s']:.0f} s" if "made_s" in facts else ""
        change = math.log(facts["perplexity"]) - dense
        rows.append([name, size, f"{facts['perplexity']:.2f}", f"{change:+.2f}" if name != "bf16" else "", made])
    return markdown([result["model"], "size", "perplexity", "nats a token", "time to make"], rows)
