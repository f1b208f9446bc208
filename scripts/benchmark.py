"""Time gpt-faster and its peers on the same weights, in turn, each in its own process; write JSON and a table.

    pip install -r requirements-bench.txt
    python scripts/benchmark.py --output benchmarks/cpu.json

Every round runs each side once at each precision (A B C A B C ...), so that a machine whose speed drifts is fair to
all; medians count.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import command_line

    command_line.quit_on_interrupt()  # before the slow imports

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from checkpoint import DEFAULT_CHECKPOINT, atomic_path, require_writable

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS, LONG_PROMPT, REPEATS = 200, 512, 3
SHORT_PROMPT = "Once upon a time"


# our file, and the number of llama.cpp's file type
PRECISIONS = {"bf16": ("model.pth", 32), "int8": ("model_int8.pth", 7), "int4": ("model_int4.g32.pth", 2)}


def ours(folder: Path, threads: int, precision: str) -> dict:
    """generate.py as a user runs it; the prefill from a second run with a long prompt."""
    path = folder / PRECISIONS[precision][0]
    if not path.exists():
        quantise = ["quantize.py", "--checkpoint_path", folder / "model.pth", "--mode", precision]
        subprocess.run([sys.executable, *quantise], check=True, capture_output=True, cwd=ROOT)
    command = [sys.executable, "generate.py", "--checkpoint_path", path, "--threads", threads]
    command += ["--compile", "--temperature", 0, "--ignore_eos", "--num_samples", REPEATS]
    short = run_json([*command, "--prompt", SHORT_PROMPT, "--max_new_tokens", NEW_TOKENS])
    long = run_json([*command, "--compile_prefill", "--prompt", LONG_PROMPT, "--max_new_tokens", 2])
    kept = ("weight_bytes_per_token", "bandwidth_gb_s", "measured_bandwidth_gb_s", "peak_memory_gb", "compile_s")
    return {"decode_tok_s": short["decode_tok_s"], "prefill_tok_s": long["prefill_tok_s"]} | {k: short[k] for k in kept}


def run_json(command: list) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        command = [str(part) for part in [*command, "--output_json", path]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        return json.loads(path.read_text())


def transformers_eager(folder: Path, threads: int, precision: str) -> dict:
    """transformers' own generate on the weights of the GGUF file, bfloat16, uncompiled."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    name = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)

    def seconds(length: int, new_tokens: int) -> float:
        ids = torch.randint(1000, 40000, (1, length))
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - began

    seconds(4, 4)
    decode = [(NEW_TOKENS - 1) / (seconds(4, NEW_TOKENS) - seconds(4, 1)) for _ in range(REPEATS)]
    prefill = [LONG_PROMPT / seconds(LONG_PROMPT, 1) for _ in range(REPEATS)]
    return {"decode_tok_s": statistics.median(decode), "prefill_tok_s": statistics.median(prefill)}


def peer_file(folder: Path, precision: str) -> Path:
    """The GGUF requantised by llama.cpp itself: BF16 (int8: Q8_0, int4: Q4_0 made from that)."""
    import llama_cpp

    target = folder / f"peer-{precision}.bin"
    if not target.exists():
        source = next(folder.glob("*.gguf")) if precision == "bf16" else peer_file(folder, "bf16")
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.allow_requantize, parameters.ftype = True, PRECISIONS[precision][1]
        assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters) == 0
    return target


def llama_cpp(folder: Path, threads: int, precision: str) -> dict:
    """llama.cpp with flash attention, its faster setting here."""
    import llama_cpp
    import numpy as np

    target = peer_file(folder, precision)
    n_batch = {"n_ctx": 1024, "n_batch": LONG_PROMPT, "n_ubatch": LONG_PROMPT}
    threading = {"n_threads": threads, "n_threads_batch": threads}
    model = llama_cpp.Llama(str(target), **n_batch, **threading, flash_attn=True, verbose=False)

    def decode() -> float:
        model.reset()
        model.eval(model.tokenize(SHORT_PROMPT.encode()))
        began = time.perf_counter()
        for _ in range(NEW_TOKENS - 1):
            logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
            model.eval([int(logits.argmax())])
        return (NEW_TOKENS - 1) / (time.perf_counter() - began)

    def prefill() -> float:
        model.reset()
        began = time.perf_counter()
        model.eval(list(range(1000, 1000 + LONG_PROMPT)))
        return LONG_PROMPT / (time.perf_counter() - began)

    decode(), prefill()
    decodes, prefills = [decode() for _ in range(REPEATS)], [prefill() for _ in range(REPEATS)]
    return {"decode_tok_s": statistics.median(decodes), "prefill_tok_s": statistics.median(prefills)}


SIDES = {"gpt-faster": ours, "llama.cpp": llama_cpp, "transformers": transformers_eager}
RUNS = [
    (side, precision) for precision in PRECISIONS for side in SIDES if side != "transformers" or precision == "bf16"
]


def start_up(folder: Path) -> dict:
    """Seconds from process start to the first byte of text, with an empty inductor cache and then with a full one."""
    command = [sys.executable, "generate.py", "--checkpoint_path", str(folder / "model.pth"), "--compile"]
    command += ["--prompt", SHORT_PROMPT, "--num_samples", "1", "--temperature", "0"]
    result = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            began = time.perf_counter()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            process.stdout.read(1)
            result[f"{name}_first_token_s"] = time.perf_counter() - began
            _, log = process.communicate()
            line = next(line for line in log.splitlines() if line.startswith("Compilation time:"))
            result[f"{name}_compile_s"] = float(line.split()[2])
    return result


def machine(packages: tuple[str, ...]) -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    facts = {"processor": model, "python": platform.python_version(), "date": str(datetime.date.today())}
    return facts | {name: version(name) for name in packages}


def table(result: dict) -> str:
    """The README's table."""
    lines = [f"| SmolLM2-135M-Instruct, {result['threads']} CPU threads, batch 1 | {' | '.join(SIDES)} |"]
    lines.append("|---" * (len(SIDES) + 1) + "|")
    for key, label in (("decode_tok_s", "decode, 200 tokens"), ("prefill_tok_s", "prefill, 512 tokens")):
        for precision, sides in result["median"].items():
            base = sides["gpt-faster"][key]
            cells = [f"{base:.0f} tok/s"]
            for peer in list(SIDES)[1:]:
                cells.append(f"{sides[peer][key]:.0f} tok/s (x{base / sides[peer][key]:.2f})" if peer in sides else "-")
            lines.append(f"| {label}, {precision} | {' | '.join(cells)} |")
    return "\n".join(lines)


def update_readme(table: str, source: str) -> None:
    """Put the table where the README has one from this file."""
    path = ROOT / "README.md"
    begin, end = f"<!-- table: {source} -->", "<!-- end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    if rest:
        path.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def main(*, checkpoint_dir: str, rounds: int, threads: int, output: str, side: str | None, precision: str) -> None:
    folder = Path(checkpoint_dir)
    if not (folder / "model.pth").exists() or not any(folder.glob("*.gguf")):
        raise ValueError(f"{folder} needs model.pth and the .gguf file it came from; run scripts/quickstart.sh first")
    if side is not None:
        return print(json.dumps(SIDES[side](folder, threads, precision)))
    require_writable(output)
    runs = {precision: {} for precision in PRECISIONS}
    for number in range(1, rounds + 1):
        for name, precision in RUNS:
            command = [sys.executable, __file__, "--side", name, "--precision", precision]
            command += ["--threads", threads, "--checkpoint_dir", folder]
            finished = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            if finished.returncode:
                raise ValueError(f"{name} failed: {finished.stderr.strip().splitlines()[-1]}")
            figures = json.loads(finished.stdout.splitlines()[-1])
            runs[precision].setdefault(name, []).append(figures)
            print(f"round {number} of {rounds}, {precision}, {name}: {figures}", file=sys.stderr, flush=True)
    result = {
        "command": f"python scripts/benchmark.py --rounds {rounds} --threads {threads} --output {output}",
        "machine": machine(("torch", "transformers", "llama-cpp-python")),
        "threads": threads,
        "median": {p: {name: medians(of) for name, of in sides.items()} for p, sides in runs.items()},
        "start_up": start_up(folder),
        "runs": runs,
    }
    with atomic_path(output) as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    update_readme(table(result), output)
    print(table(result))
    print(result["start_up"])


def medians(runs: list[dict]) -> dict:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time gpt-faster against llama.cpp and transformers, same weights.")
    parser.add_argument("--checkpoint_dir", default=str(DEFAULT_CHECKPOINT.parent), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="times each side runs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="benchmarks/cpu.json", help="result file (default: %(default)s)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help=argparse.SUPPRESS)
    command_line.run(main, parser)
