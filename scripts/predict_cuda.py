"""What decoding should take on a GPU, from the code that inductor writes for it: predicted, never measured.

    python scripts/predict_cuda.py

No GPU is needed, but Linux and requirements-dev.txt. The numbers of bytes and kernels go to a JSON file, --output, and
the tables to a Markdown file beside it; what the JSON file holds is not traced again, unless --fresh is given.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.begin()

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

import cli
from layers.quantized import QuantSpec
from scripts.bench.report import ROOT, markdown, open_report
from scripts.bench.sides import PRECISIONS
from scripts.device_rows import step
from weights.checkpoint import new_table
from weights.files import GB, atomic_path, read_json
from weights.layout import Layout, ModelFile
from weights.registry import args_from_name

MODELS = {"Llama-3.1-8B": 1, "Llama-3.1-70B": 8}  # and the ranks that share it
BATCHES = (1, 2, 8, 16, 32, 64)
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  # bytes/s, read and written, that a copy moves there
# The share of it that kernels reach, set before anything was traced. Published: GemLite's Triton kernels decode an 8B
# model at 73 % (16 bits), 68 % (8 bits) and 56 % (4 bits) of the nominal bandwidth, which is 1.12 times a copy's.
SHARE = {"bf16": 0.84, "cuBLAS": 0.84, "int8": 0.77, "int4": 0.62}
KERNEL_S = 1.3e-6  # of each kernel, beside its bytes, in a CUDA graph
PARTS = ("traced", "seconds")

METHOD = f"""\
**Predicted, not measured: no part of this has run on a GPU.** `{{command}}` has inductor write the code of a decoding
step for an imagined H100, and adds up its kernels: bytes of a kernel's arguments / (bandwidth x e) + 1.3 us.

- Bandwidth is what a copy moves: {" and ".join(f"{rate / 1e12} TB/s on an {gpu}" for gpu, rate in BANDWIDTH.items())}.
- e is {SHARE["bf16"]} for bf16 weights in rows and all other kernels, {SHARE["int8"]} for int8 codes and
  {SHARE["int4"]} for int4 codes. It was fixed beforehand. Published whole steps of GemLite's Triton kernels (73, 68 and
  56 % of the nominal bandwidth for 16, 8 and 4 bits) come to 0.82, 0.76 and 0.63 of a copy's.
- Of the embedding the rows that are looked up count, of the cache 512 slots a row. Tokens are the likeliest ones.
- `*`: cuBLAS multiplies these weights; it is counted by its bytes alone, which is too fast where it is not at the
  memory's limit. Prompts are limited by arithmetic, of which bytes say nothing: they are not predicted.
- Not seen: kernels with too few blocks to fill the GPU, and the host. Of 70B a rank's own work is counted, without its
  sums over the ranks.
"""


def main(*, output: str, fresh: bool) -> None:
    report = open_report(output, fresh, PARTS, {})
    result = report.result
    for model, ranks in MODELS.items():
        for precision in PRECISIONS:
            report.once(result["traced"], f"{model}, {precision}", partial(trace, model, precision, ranks, BATCHES))
    for precision in ("bf16", "int4"):
        layers = args_from_name("Llama-3.1-8B").n_layer
        whole = partial(trace, "Llama-3.1-8B", precision, 1, (1,), layers)
        report.once(result["seconds"], f"Llama-3.1-8B, {precision}, {layers} layers", whole)
    with atomic_path(Path(output).with_suffix(".md")) as temporary:
        temporary.write_text(document(result), encoding="utf-8")


def trace(model: str, precision: str, ranks: int, batches: tuple[int, ...], layers: int = 2) -> dict[str, dict]:
    """What `tests/cuda_offline/traffic.py` says of each batch."""
    words = [model, precision, "--ranks", ranks, "--layers", layers, "--batches", *batches]
    command = [sys.executable, "-m", "tests.cuda_offline.traffic", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{model} in {precision} cannot be traced: {done.stderr.strip().splitlines()[-1]}")
    found = map(json.loads, done.stdout.splitlines())
    return {str(each.pop("batch")): each for each in found}


def step_seconds(traced: dict, n_layer: int, bandwidth: float) -> float:
    """The sum over the kernels of a step."""

    def seconds(kernels: dict[str, list[int]]) -> float:
        return sum(size / (bandwidth * SHARE[kind]) + n * KERNEL_S for kind, (n, size) in kernels.items())

    return n_layer * seconds(traced["layer"]) + seconds(traced["rest"])


def step_bytes(traced: dict, n_layer: int) -> int:
    layer, rest = (sum(size for _, size in traced[part].values()) for part in ("layer", "rest"))
    return n_layer * layer + rest


def document(result: dict) -> str:
    parts = [METHOD.format(command=result["command"])]
    parts += [table(result, model, gpu) for model in MODELS for gpu in BANDWIDTH]
    return "\n".join([*parts, memory_table(), seconds_table(result)])


def table(result: dict, model: str, gpu: str) -> str:
    n_layer, measured, rows = args_from_name(model).n_layer, measured_on(gpu, model), []
    for precision in PRECISIONS:
        traced, cells = result["traced"][f"{model}, {precision}"], []
        for batch in BATCHES:
            found = traced[str(batch)]
            rate = f"{batch / step_seconds(found, n_layer, BANDWIDTH[gpu]):.0f}"
            mark = "*" if "cuBLAS" in found["layer"] else ""
            cells.append(measured.get(step(precision, batch).name, rate + mark))
        one = traced["1"]
        share = step_bytes(one, n_layer) / step_seconds(one, n_layer, BANDWIDTH[gpu]) / BANDWIDTH[gpu]
        rows.append([precision, *cells, f"{share:.0%}", str(sum(n for n, _ in one["layer"].values()))])
    ranks = f", a rank of {MODELS[model]}" if MODELS[model] > 1 else ""
    header = [f"predicted, {model}{ranks}, {gpu}, tok/s", *(f"batch {batch}" for batch in BATCHES)]
    return markdown([*header, "batch 1, of the bandwidth", "kernels a layer"], rows) + "\n"


def measured_on(gpu: str, model: str) -> dict[str, str]:
    """The rows that `scripts/check_device.py` measured on such a GPU, which take the place of predicted ones."""
    found = {}
    for path in ROOT.glob("benchmarks/device-*.json"):
        result = read_json(path)
        if gpu in result["machine"].get("gpu", "") and result["model"] == model:
            found |= {
                name: f"{row['median']['decode_tok_s']:.0f} (measured)"
                for name, row in result["rows"].items()
                if "median" in row
            }
    return found


def memory_table() -> str:
    rows = []
    for groupsize in (32, 128):
        sizes = [
            f"{model_bytes('Llama-3.1-70B', QuantSpec(4, groupsize), head) / GB:.1f} GB" for head in ("int8", "int4")
        ]
        rows.append([f"groups of {groupsize}", *sizes])
    return markdown(["Llama-3.1-70B in int4: weights and embedding as stored", "int8 head", "int4 head"], rows) + "\n"


def model_bytes(model: str, spec: QuantSpec, head: str) -> int:
    layout = Layout(args_from_name(model))
    return layout.quantized(new_table(ModelFile(layout, {}), spec, model, head)).loaded_bytes(torch.bfloat16)


def seconds_table(result: dict) -> str:
    rows = [[name, f"{found['1']['seconds']:.0f} s"] for name, found in result["seconds"].items()]
    return (
        markdown([f"to trace and write the code, on a CPU ({result['machine']['processor']})", "processor time"], rows)
        + "\n"
    )


if __name__ == "__main__":
    parser = cli.Parser(description=__doc__, formatter_class=cli.argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/cuda-predicted.json", help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="trace again what the file has (default: go on)")
    cli.run(main, parser)
