"""Time a mixture of experts on this machine: decoding against the memory, prefill against a dense model.

    python scripts/experts.py

Random weights in the shape of Mixtral, scaled down: 8 experts of which each token uses 2, dim 2048, 8 layers. The dense
model has one feed-forward as wide as two experts, so the same weights act on each token. The ways take turns.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.quit_on_interrupt()  # before the slow imports

import argparse
import statistics
import time
from dataclasses import replace

import torch

from engine.cache import setup_caches
from engine.compile import compile_step, warm_up
from engine.decode import decode_one_token, forward_chunk
from engine.request import generate
from engine.sampling import Sampling
from layers.quantized import quant_spec
from measure.machine import measured_bandwidth
from model import ModelArgs
from scripts.check_device import rate
from scripts.reporting import machine, markdown, require_rounds, update_readme
from weights.checkpoint import random_model
from weights.device import parse_dtype, pick_device
from weights.files import GB, require_writable, write_json
from weights.layout import weight_bytes
from weights.registry import args_from_name

EXPERTS = replace(args_from_name("Mixtral-8x7B"), dim=2048, n_layer=8, n_head=16, n_kv_head=4, intermediate_size=7168)
DENSE = replace(EXPERTS, n_expert=None, n_expert_used=None, intermediate_size=2 * EXPERTS.intermediate_size)
PRECISIONS = {"bf16": None, "int8": "int8", "int4": "int4"}
GREEDY = Sampling(temperature=0)


def load(args: ModelArgs, device: torch.device, dtype: torch.dtype, precision: str, prompt: int, new: int):
    """A model with random weights and room for the prompt and what follows."""
    model = random_model(args, device, dtype, quantize=quant_spec(PRECISIONS[precision], None))
    setup_caches(model, 1, prompt + new)
    return model


def prefill_rate(model, prompt: int) -> float:
    began = time.perf_counter()
    next(generate(model, [[token % 1000 for token in range(prompt)]], 1, GREEDY))
    return prompt / (time.perf_counter() - began)


def measure(device, dtype, precision: str, *, prompt: int, new: int, rounds: int, step) -> dict:
    """Medians: tok/s of decoding, prefill with experts and without, and the share of the measured bandwidth."""
    experts, dense = (load(args, device, dtype, precision, prompt, new) for args in (EXPERTS, DENSE))
    warm_up(experts, [[8]], new, GREEDY, step, forward_chunk)
    runs = []
    for _ in range(rounds):
        bandwidth = measured_bandwidth(device)
        decode = rate(generate(experts, [list(range(8))], new, GREEDY, step=step))
        rates = [prefill_rate(model, prompt) for model in (experts, dense)]
        runs.append((decode, decode * weight_bytes(experts) / GB / bandwidth, *rates, rates[0] / rates[1]))
    names = ("decode_tok_s", "share", "prefill_tok_s", "dense_prefill_tok_s", "prefill_ratio")
    facts = {name: statistics.median(run) for name, run in zip(names, zip(*runs, strict=True), strict=True)}
    return facts | {"gb_per_token": weight_bytes(experts) / GB}


def main(
    *, device: str | None, dtype: str, precisions: list[str], prompt: int, new: int, rounds: int, output: str
) -> None:
    require_rounds(rounds)
    require_writable(output)
    target = pick_device(device)
    step = compile_step(decode_one_token, target)
    found = {}
    for precision in precisions:
        print(f"{precision} ...", flush=True)
        how = {"prompt": prompt, "new": new, "rounds": rounds, "step": step}
        found[precision] = measure(target, parse_dtype(dtype), precision, **how)
    write_json(output, {"machine": machine(("torch",)), "sizes": EXPERTS.to_dict(), "found": found})
    header = ["8 experts, 2 used", "decode", "read a token", "of the memory's rate", f"prefill {prompt}", "dense"]
    rows = [
        [
            precision,
            f"{facts['decode_tok_s']:.1f} tok/s",
            f"{facts['gb_per_token']:.2f} GB",
            f"{facts['share']:.0%}",
            f"{facts['prefill_tok_s']:.0f} tok/s",
            f"{facts['dense_prefill_tok_s']:.0f} tok/s (x{facts['prefill_ratio']:.2f})",
        ]
        for precision, facts in found.items()
    ]
    table = markdown(header, rows)
    print(table)
    update_readme(table, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time a mixture of experts with random weights.")
    parser.add_argument("--device", help="cuda or cpu (default: the first there is)")
    parser.add_argument("--dtype", default="bfloat16", help="floats (default: %(default)s)")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="weights (default: all)"
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=60, help="tokens decoded (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="times each is measured (default: %(default)s)")
    parser.add_argument("--output", default="benchmarks/experts.json", help="result file (default: %(default)s)")
    cli.run(main, parser)
