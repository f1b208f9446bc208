"""Weights that decoding does not read: of inactive neurons behind a ReLU, and of small inputs (TEAL), against all.

Feed-forwards alone, 90 %, 50 % and none of their neurons inactive; the decoding of models in TinyLlama's shape and in
Llama-2-7B's, of which half the layers fit in 24 GB twice; and of a checkpoint with thresholds found on a text: by
default the first half of Python's own documentation of its language, pydoc_data.topics, whose second half is measured.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

from layers.quantized import QuantSpec
from scripts.bench.report import Report, markdown, shared_flags
from scripts.bench.skipping import relu, teal
from text.files import read_text
from text.prompts import ids_of
from weights.checkpoint import open_model
from weights.registry import args_from_name

UNITS = {  # what feed-forwards have beside the sizes of a known model
    "TinyLlama-1.1B": ("TinyLlama-1.1B", {}),
    "Llama-2-7B": ("Llama-2-7B", {}),
    "OPT-1.3B (no gate)": ("TinyLlama-1.1B", {"intermediate_size": 8192, "gated": False, "ffn_bias": True}),
    "Nemotron-Mini-4B (no gate)": ("Llama-3.2-3B", {"intermediate_size": 9216, "gated": False}),
}
MODELS = {
    "TinyLlama-1.1B": args_from_name("TinyLlama-1.1B"),
    "Llama-2-7B, 16 of 32 layers": replace(args_from_name("Llama-2-7B"), n_layer=16),
}
PRECISIONS = {"bf16": None, "int8": QuantSpec(8), "int4": QuantSpec(4, 32)}
SPARSITIES = (0.25, 0.4)
HELD_OUT = 8192  # tokens whose perplexity is measured
PARTS, SAME = ("units", "decode", "quality", "thresholds"), ("threads", "model", "new_tokens")


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/sparse.json", rounds=7)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    parser.add_argument("--new_tokens", type=int, default=100, help="tokens decoded (default: %(default)s)")
    text = "half of it finds thresholds, the other is measured (default: see above)"
    parser.add_argument("--text", metavar="FILE", help=text)


def fill(report: Report, *, model: str, precisions: list[str], rounds: int, new_tokens: int, text: str | None, **_):
    path = Path(model)
    ids = ids_of(read_text(text) if text else "\n".join(topics.values()), path, open_model(path).args.vocab_size)
    for precision in precisions:
        spec = PRECISIONS[precision]
        for name, (shape, others) in UNITS.items():
            args = replace(args_from_name(shape), activation="relu", **others)
            report.once(report.result["units"], f"{name}, {precision}", partial(relu.measure_units, args, spec, rounds))
        for name, args in MODELS.items():
            how = partial(relu.measure_decode, args, spec, 0.9, new_tokens, rounds)
            report.once(report.result["decode"], f"{name}, {precision}", how)
    fill_thresholds(report, path, precisions, rounds, new_tokens, ids)


def fill_thresholds(
    report: Report, path: Path, precisions: list[str], rounds: int, new_tokens: int, ids: list[int]
) -> None:
    calibration, held_out = ids[: len(ids) // 2], ids[len(ids) // 2 :][:HELD_OUT]
    quality = report.result["quality"]
    for sparsity in SPARSITIES:
        report.once(quality, f"{sparsity:.0%}", partial(teal.measure_quality, path, sparsity, calibration, held_out))
    thresholds = {name: quality[name]["thresholds"] for name in quality}
    for precision in precisions:
        how = (path, PRECISIONS[precision], thresholds, held_out[: teal.PROMPT], new_tokens, rounds)
        report.once(report.result["thresholds"], precision, partial(teal.measure_decode, *how))


def table(result: dict) -> str:
    return "\n\n".join(part for part in (table_of_relu(result), table_of_thresholds(result)) if part)


def table_of_relu(result: dict) -> str:
    """Times and rates with a ReLU, and how many times faster than dense they are and could be."""
    rows = []
    for name, shares in result["units"].items():
        for share, facts in shares.items():
            dense, sparse = (f"{facts[side]['median']['us']:.0f} us" for side in ("dense", "sparse"))
            rows.append([f"feed-forward of {name}, {share}", dense, sparse, *gains(facts)])
    for name, facts in result["decode"].items():
        dense, sparse = (f"{facts[side]['median']['tok_s']:.1f} tok/s" for side in ("dense", "sparse"))
        rows.append([f"decoding of {name}, 90% inactive", dense, sparse, *gains(facts)])
    header = ["units with a ReLU", "dense", "sparse", "gain", "the bytes allow", "of that"]
    return markdown(header, rows) if rows else ""


def gains(facts: dict) -> list[str]:
    return [f"x{facts['ratio']:.2f}", f"x{facts['allowed']:.2f}", f"{facts['ratio'] / facts['allowed']:.0%}"]


def table_of_thresholds(result: dict) -> str:
    """Perplexity and rates with thresholds, beside those of all inputs."""
    if not result["quality"]:
        return ""
    rows, precisions = [], result["thresholds"]
    whole = next(iter(result["quality"].values()))["all inputs"]["perplexity"]
    rates = {name: {side: each["median"]["tok_s"] for side, each in of.items()} for name, of in precisions.items()}
    rows.append(["all inputs", f"{whole:.3f}", "", *(f"{of['all inputs']:.1f} tok/s" for of in rates.values())])
    for name, facts in result["quality"].items():
        losses = []
        for side in ("found", "uniform"):
            perplexity, divergence = facts[side]["perplexity"], facts[side]["divergence"]
            losses.append(f"{perplexity:.3f} ({100 * (perplexity / whole - 1):+.1f} %), {divergence:.3f} nats")
        faster = [f"{of[name]:.1f} tok/s (x{of[name] / of['all inputs']:.2f})" for of in rates.values()]
        rows.append([f"{name} of each block's weights skipped", *losses, *faster])
    return markdown([result["model"], "perplexity, KL divergence", "of uniform thresholds", *precisions], rows)
