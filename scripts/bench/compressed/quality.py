"""What each quantisation costs: size, perplexity, and the time to make it.

The text is Python's own documentation of its language, pydoc_data.topics: the first half of its characters is what
GPTQ calibrates with, the second is measured. Activations are rounded as decoding rounds them, the head included.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch

from scripts.bench.report import Report, markdown, run_command, shared_flags
from weights.checkpoint import open_model
from weights.layout import Layout

GPTQ = ["int4-gptq", "--groupsize", "64", "--calibration_limit", "64", "--calibration_seq_length", "512"]
VARIANTS = {
    "bf16": None,
    "int8": ["int8"],
    "int4, groups of 32": ["int4", "--groupsize", "32"],
    "int4, groups of 64": ["int4", "--groupsize", "64"],
    "int4-gptq, groups of 64": GPTQ,
    "int4-gptq, groups of 64, --no-act_order": [*GPTQ, "--no-act_order"],
}
PARTS, SAME = ("variants",), ("threads", "model")


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/quality.json")


def fill(report: Report, *, model: str, threads: int) -> None:
    fill_variants(report, VARIANTS, measure, model, threads)


def fill_variants(
    report: Report, variants: dict, measure: Callable[..., dict], model: str, threads: int, most: int | None = None
) -> None:
    """Measure each variant by measure(model, how it is made, threads, folder).

    The folder has first.txt, to calibrate with, and second.txt, to measure: `most` characters of the second half.
    """
    text = "\n".join(topics.values())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "first.txt").write_text(text[: len(text) // 2], encoding="utf-8")
        (folder / "second.txt").write_text(text[len(text) // 2 :][:most], encoding="utf-8")
        for variant, how in variants.items():
            report.once(report.result["variants"], variant, partial(measure, Path(model), how, threads, folder))


def measure(checkpoint: Path, how: list | None, threads: int, folder: Path) -> dict:
    """Quantise the model, if there is a way given, and measure the perplexity of the second half."""
    facts, path = {"args": how, "bytes": Layout(open_model(checkpoint).args).bytes(torch.bfloat16)}, checkpoint
    shared = ["--threads", threads, "--checkpoint_path"]
    if how:
        calibration = ["--calibration_file", folder / "first.txt"] if "gptq" in how[0] else []
        command = [sys.executable, "quantize.py", *shared, checkpoint, "--label", "quality", "--mode", *how]
        made = run_command([*command, *calibration])
        path = Path(made["target"])
        facts |= {"quantise_s": made["seconds"], "peak_memory_gb": made["peak_memory_gb"], "bytes": made["bytes_after"]}
    found = run_command([sys.executable, "eval.py", *shared, path, "--perplexity", folder / "second.txt"])
    if how:
        path.unlink()
    return facts | {key: found[key] for key in ("perplexity", "tokens", "seconds")}


def table(result: dict) -> str:
    rows, base = [], result["variants"]["bf16"]["perplexity"]
    for name, facts in result["variants"].items():
        change = f"{100 * (facts['perplexity'] / base - 1):+.1f} %" if facts["args"] else ""
        made = f"{facts['quantise_s']:.0f} s" if facts["args"] else ""
        rows.append([name, f"{facts['bytes'] / 1e6:.0f} MB", f"{facts['perplexity']:.3f}", change, made])
    return markdown([result["model"], "size", "perplexity", "change", "time to make"], rows)
