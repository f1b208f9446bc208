"""What all tables share: flags, rounds in turn, the result file, Markdown and the README."""

import argparse
import datetime
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import torch

from cli import say
from kernels import cpu
from weights.checkpoint import DEFAULT_CHECKPOINT
from weights.files import GB, atomic_path, read_json, require_writable, write_json
from weights.registry import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "llama-cpp-python", "lm_eval")  # whose versions are noted


def shared_flags(parser: argparse.ArgumentParser, output: str, rounds: int = 0, model: str = "a checkpoint") -> None:
    """The flags that tables share. rounds: by default; 0: it has no such flag. model: what may be given; "": none."""
    if model:
        parser.add_argument("--model", default=str(DEFAULT_CHECKPOINT), help=f"{model} (default: %(default)s)")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help="times each side runs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default=output, help="result file (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the result file has (default: go on)")


@dataclass
class Report:
    """A result file: what it holds is not measured again, and what is new is written at once."""

    output: str
    result: dict

    def once(self, where: dict, key: str, measure: Callable[[], dict]) -> None:
        """Measure what `where`, a dictionary of the result, lacks under this key."""
        if not where.get(key):
            say(key)
            where[key] = measure()
            self.save()

    def save(self) -> None:
        write_json(self.output, self.result)

    def publish(self, table: str) -> None:
        """Print the table and put it where the README has one from this file."""
        print(table)
        path, begin, end = ROOT / "README.md", f"<!-- table: {self.output} -->", "<!-- end -->"
        before, _, rest = path.read_text(encoding="utf-8").partition(begin)
        if rest:
            after = rest.partition(end)[2]
            with atomic_path(path) as temporary:
                temporary.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def open_report(output: str, fresh: bool, parts: tuple[str, ...], facts: dict) -> Report:
    """The result so far, or one whose parts are empty. Raises ValueError if it was measured in other circumstances."""
    require_writable(output)
    facts = {"machine": machine()} | {key: name_of(fact) if key == "model" else fact for key, fact in facts.items()}
    noted = {"command": shlex.join(["python", *sys.argv])} | facts
    if fresh or not Path(output).exists():
        return Report(output, noted | {part: {} for part in parts})
    before = read_json(output)
    if not set(parts) <= before.keys():
        raise ValueError(f"{output} is no result of this version; use --fresh or another --output")
    for key, now in facts.items():
        then = before.get(key)
        if key == "machine":  # a package that the file does not tell of may be there now
            now = {name: now.get(name) for name in then} | {"date": then.get("date")}
        if then != now:
            raise ValueError(f"{output} was measured with another {key} ({then}); use --fresh or another --output")
    return Report(output, before | noted)


def name_of(model: str) -> str:
    return model if model in REGISTRY else Path(model).resolve().parent.name


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    facts = {"processor": model, "isa": cpu.isa_of(cpu.level() or cpu.PLAIN), "python": platform.python_version()}
    facts["date"] = str(datetime.date.today())
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / GB, 1)
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(asked, capture_output=True, text=True).stdout.partition("\n")[0]
    there = {each.name: each.version for each in distributions()}
    return facts | {name: there[name] for name in PACKAGES if name in there}


def take_turns(
    rounds: int,
    sides: dict[str, Callable[[], dict[str, float]]],
    warm_up: bool = True,
    failed: dict[str, ValueError] | None = None,
) -> dict[str, dict]:
    """Run every side once a round (A B A B ...), so that a machine whose speed drifts is fair to all.

    For each side its runs and their medians. warm_up: run each once before, which compiles. failed: takes the errors of
    sides that raise ValueError, which are then left out; None: they end all.
    """
    runs = {name: [] for name in sides}
    for run in sides.values() if warm_up else ():
        run()
    for number in range(1, rounds + 1):
        for name in list(runs):
            try:
                runs[name].append(sides[name]())
            except ValueError as error:
                if failed is None:
                    raise
                failed[name] = error
                del runs[name]
                continue
            figures = ", ".join(f"{key} {value:.4g}" for key, value in runs[name][-1].items())
            say(f"  {number} of {rounds}, {name}: {figures}")
    return {name: {"runs": each, "median": medians(each)} for name, each in runs.items()}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def run_command(command: list) -> dict:
    """Run a command of ours: what it writes with --output_json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        words = [str(part) for part in [*command, "--output_json", path]]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{shlex.join(words)} failed:\n{done.stderr.strip()}")
        return read_json(path)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
