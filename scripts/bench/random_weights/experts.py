"""A mixture of experts: decoding against the memory's rate, prefill against a dense model.

Random weights in the shape of Mixtral, scaled down: 8 experts of which each token uses 2, dim 2048, 8 layers. The dense
model has one feed-forward as wide as two experts, so as many weights act on each token.
"""

from dataclasses import replace
from functools import partial

import torch

from engine.engine import build_engine
from layers.quantized import quant_spec
from measure.machine import measured_bandwidth
from scripts.bench.peers.protocol import Case
from scripts.bench.report import Report, markdown, shared_flags, take_turns
from scripts.bench.sides import measure_case
from weights.checkpoint import random_model
from weights.device import pick_device
from weights.files import GB
from weights.layout import weight_bytes
from weights.registry import args_from_name

EXPERTS = replace(args_from_name("Mixtral-8x7B"), dim=2048, n_layer=8, n_head=16, n_kv_head=4, intermediate_size=7168)
DENSE = replace(EXPERTS, n_expert=None, n_expert_used=None, intermediate_size=2 * EXPERTS.intermediate_size)
PRECISIONS = {"bf16": None, "int8": "int8", "int4": "int4"}
PARTS, SAME = ("found",), ("threads", "device", "prompt", "new_tokens")


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/experts.json", rounds=5, model="")
    parser.add_argument("--device", help="cuda or cpu (default: the first there is)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=60, help="tokens decoded (default: %(default)s)")


def fill(report: Report, *, device: str | None, precisions: list[str], rounds: int, **sizes) -> None:
    cases = Case(1, 8, sizes["new_tokens"]), Case(1, sizes["prompt"], 2)
    for precision in precisions:
        report.once(report.result["found"], precision, partial(measure, pick_device(device), precision, cases, rounds))


def measure(device: torch.device, precision: str, cases: tuple[Case, Case], rounds: int) -> dict:
    """Decoding and its share of the memory's rate; prefill with experts, and its ratio to the dense model's."""
    models = (random_model(args, device, quantize=quant_spec(PRECISIONS[precision], None)) for args in (EXPERTS, DENSE))
    experts, dense = (build_engine(model, compile=True) for model in models)
    size = weight_bytes(experts.model) / GB

    def run() -> dict[str, float]:
        bandwidth = measured_bandwidth(device)
        decode = measure_case(experts, cases[0])["decode_tok_s"]
        prefill, other = (measure_case(engine, cases[1])["prefill_tok_s"] for engine in (experts, dense))
        ratios = {"share": decode * size / bandwidth, "prefill_ratio": prefill / other}
        return {"decode_tok_s": decode, "prefill_tok_s": prefill, "dense_tok_s": other, **ratios}

    return take_turns(rounds, {precision: run})[precision] | {"gb_per_token": size}


def table(result: dict) -> str:
    rows = []
    for precision, facts in result["found"].items():
        median, read = facts["median"], f"{facts['gb_per_token']:.2f} GB"
        decode, prefill, dense = (f"{median[f'{key}_tok_s']:.1f} tok/s" for key in ("decode", "prefill", "dense"))
        share, ratio = f"{median['share']:.0%}", f"(x{median['prefill_ratio']:.2f})"
        rows.append([precision, decode, read, share, prefill, f"{dense} {ratio}"])
    header = ["8 experts, 2 used", "decode", "read a token", "of the memory's rate", f"prefill {result['prompt']}"]
    return markdown([*header, "dense"], rows)
