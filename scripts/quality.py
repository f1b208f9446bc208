"""What each quantisation costs: size, perplexity, and the time to make it; write JSON and the README's table.

    python scripts/quality.py --output benchmarks/quality.json

The text is Python's own documentation of its language, pydoc_data.topics: the first half of its characters is what
GPTQ calibrates with, the second is measured. Activations are rounded as decoding rounds them, the head included.
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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

from scripts.reporting import ROOT, machine, markdown, update_readme
from weights.checkpoint import DEFAULT_CHECKPOINT
from weights.files import atomic_path, require_writable

GPTQ = ["int4-gptq", "--groupsize", "64", "--calibration_limit", "64", "--calibration_seq_length", "512"]
VARIANTS = {
    "bf16": None,
    "int8": ["int8"],
    "int4, groups of 32": ["int4", "--groupsize", "32"],
    "int4, groups of 64": ["int4", "--groupsize", "64"],
    "int4-gptq, groups of 64": GPTQ,
    "int4-gptq, groups of 64, --no-act_order": [*GPTQ, "--no-act_order"],
}


def run(command: list, folder: Path) -> dict:
    """Run a command of ours; what it wrote with --output_json, and the seconds that it took."""
    out, began = folder / "out.json", time.perf_counter()
    subprocess.run([str(part) for part in [sys.executable, *command, "--output_json", out]], check=True, cwd=ROOT)
    return json.loads(out.read_text()) | {"command_s": time.perf_counter() - began}


def measure(checkpoint: Path, how: list | None, threads: int, folder: Path) -> dict:
    """Quantise the model, if there is a way given, and measure the perplexity of the second half."""
    facts, path = {"args": how}, checkpoint
    if how:
        calibration = ["--calibration_file", folder / "first.txt"] if "gptq" in how[0] else []
        command = ["quantize.py", "--checkpoint_path", checkpoint, "--threads", threads, "--label", "quality", "--mode"]
        made = run([*command, *how, *calibration], folder)
        path = Path(made["target"])
        facts |= {"quantise_s": made["seconds"], "peak_memory_gb": made["peak_memory_gb"], "bytes": made["bytes_after"]}
        facts["bytes_before"] = made["bytes_before"]
    found = run(
        ["eval.py", "--checkpoint_path", path, "--perplexity", folder / "second.txt", "--threads", threads], folder
    )
    if how:
        path.unlink()
    return facts | {key: found[key] for key in ("perplexity", "tokens", "command_s")}


def table(result: dict) -> str:
    """The README's table."""
    variants = result["variants"]
    whole = next(facts["bytes_before"] for facts in variants.values() if facts["args"])
    rows = []
    for name, facts in variants.items():
        change = f"{100 * (facts['perplexity'] / variants['bf16']['perplexity'] - 1):+.1f} %" if facts["args"] else ""
        made = f"{facts['quantise_s']:.0f} s" if facts["args"] else ""
        size = f"{facts.get('bytes', whole) / 1e6:.0f} MB"
        rows.append([name, size, f"{facts['perplexity']:.3f}", change, made])
    return markdown(["SmolLM2-135M-Instruct", "size", "perplexity", "change", "time to make"], rows)


def main(*, checkpoint_path: str, threads: int, output: str) -> None:
    require_writable(output)
    text, variants = "\n".join(topics.values()), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "first.txt").write_text(text[: len(text) // 2], encoding="utf-8")
        (folder / "second.txt").write_text(text[len(text) // 2 :], encoding="utf-8")
        for variant, how in VARIANTS.items():
            variants[variant] = measure(Path(checkpoint_path), how, threads, folder)
            print(f"{variant}: {variants[variant]}", file=sys.stderr, flush=True)
    command = f"python scripts/quality.py --threads {threads} --output {output}"
    result = {"command": command, "machine": machine(("torch",)), "threads": threads, "variants": variants}
    with atomic_path(output) as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    update_readme(table(result), output)
    print(table(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure what each quantisation costs on the default model.")
    parser.add_argument("--checkpoint_path", default=str(DEFAULT_CHECKPOINT), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="benchmarks/quality.json", help="result file (default: %(default)s)")
    cli.run(main, parser)
