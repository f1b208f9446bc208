"""Does everything work on this device, and how fast? Correctness against float32 on the CPU, then a table of speeds.

    python scripts/check_device.py --device cuda --models SmolLM2-135M Llama-3.1-8B

Random weights: nothing is downloaded. Needs no pytest.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.begin()

import subprocess
import sys
from itertools import product

import torch

from engine.engine import build_engine
from layers.quantized import QuantSpec
from measure.machine import measured_bandwidth, median_seconds
from model import Transformer
from scripts.bench.report import ROOT, markdown
from scripts.bench.sides import Case, measure_case
from weights.checkpoint import random_model
from weights.device import parse_dtype, pick_device
from weights.files import GB
from weights.layout import Layout, weight_bytes

PRECISIONS = {  # of the linear layers, and of the output head
    "float": (None, "float"),
    "int8": (QuantSpec(8), "int8"),
    "int4.g32": (QuantSpec(4, 32), "int8"),
    "int4.g32, head too": (QuantSpec(4, 32), "int4"),
}
NEW_TOKENS = 200
HEADER = "model, weights, step, decode tok/s, batch 32 tok/s, prefill tok/s, of bandwidth, of matrix rate"


def main(*, device: str | None, dtype: str, models: list[str], no_checks: bool) -> None:
    place, kind = pick_device(device), parse_dtype(dtype)
    command = [sys.executable, "-m", "tests.device_cases", "--device", str(place), "--dtype", dtype]
    passed = no_checks or subprocess.run(command, cwd=ROOT).returncode == 0
    bandwidth, matrices = measured_bandwidth(place) or 0.0, matrix_rate(place, kind)
    print(f"\nmeasured bandwidth: {bandwidth:.0f} GB/s; product of matrices: {matrices / 1e12:.2f} TFLOP/s\n")
    print(markdown(HEADER.split(", "), []))
    for name, precision, compiled in product(models, PRECISIONS, (False, True)):
        spec, head = PRECISIONS[precision]
        try:
            cells = speeds(random_model(name, place, kind, quantize=spec, head=head), compiled, bandwidth, matrices)
        except Exception as error:
            cells = [in_words(error)]
        print(f"| {' | '.join([name, precision, 'compiled' if compiled else 'eager', *cells])} |", flush=True)
        torch._dynamo.reset()
        if place.type == "cuda":
            torch.cuda.empty_cache()
    if not passed:
        raise ValueError("some of the checks above FAILED")


def speeds(model: Transformer, compiled: bool, bandwidth: float, matrices: float) -> list[str]:
    """Decoding alone and in a batch, the prefill of a long prompt, and their shares of what the device can.

    matrices: operations/s of a product of two large matrices.
    """
    engine, cells, rates = build_engine(model, compiled, compiled), [], []
    short, prompt = (Case(n_row, 8, NEW_TOKENS) for n_row in (1, 32)), min(2048, model.args.max_seq_length - 2)
    for case, figure in zip((*short, Case(1, prompt, 2)), ("decode", "decode", "prefill"), strict=True):
        try:
            runs = [measure_case(engine, case)[f"{figure}_tok_s"] for _ in range(4)]  # the first compiles
            rates.append(sorted(runs[1:])[1])
            cells.append(f"{rates[-1]:.1f}")
        except Exception as error:
            rates.append(0.0)
            cells.append(in_words(error))
    layers = {key: tensor for key, tensor in Layout(model.args).tensors.items() if key.startswith("layers.")}
    operations = 2 * sum(tensor.numel() for tensor in layers.values())  # a token
    share = rates[0] * weight_bytes(model) / GB / bandwidth if bandwidth else 0.0
    return [*cells, f"{share:.0%}", f"{rates[2] * operations / matrices:.0%}"]


def in_words(error: Exception) -> str:
    """An error as a cell of the table, so that one failure does not hide the others."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations/s of a product of two square matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: (a @ b)[0, 0].item(), 5)


if __name__ == "__main__":
    parser = cli.Parser(description="Check a device against float32 on the CPU and time it.")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--dtype", default="bfloat16", help="weights (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=["stories15M"], metavar="NAME", help="registry sizes to time")
    parser.add_argument("--no_checks", action="store_true", help="only time (default: check, then time)")
    cli.run(main, parser)
