"""Does everything work on this device, and how fast? Cases against float32 on the CPU, then tables of speeds.

    python scripts/check_device.py --device cuda --minutes 8

Random weights of a registry size: nothing is downloaded. Needs no pytest. The result file, and a Markdown file beside
it, are written after each row; the same command goes on where it was stopped. A side is measured in a process of its
own, so that an error on the device costs one row, and what no time is left for is named.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.begin()

import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import cli
from cli import say
from measure.machine import matrix_rate, measured_bandwidth
from scripts.bench.peers.protocol import SideProcess
from scripts.bench.report import ROOT, Report, open_report, take_turns
from scripts.bench.sides import start_side
from scripts.device_rows import INT8_CACHE, STEP, Row, document, rows_in_order
from weights.device import pick_device
from weights.files import atomic_path
from weights.registry import args_from_name

PARTS = ("checks", "limits", "rows", "left_out")
CASES = [sys.executable, "-m", "tests.device_cases"]
SHARE_OF_CASES = 0.4  # of the time
ROUNDS = 3


def main(
    *, device: str | None, model: str | None, minutes: float, no_checks: bool, output: str | None, fresh: bool
) -> None:
    deadline, place = time.monotonic() + 60 * minutes, pick_device(device)
    model = model or ("Llama-3.1-8B" if place.type == "cuda" else "stories15M")
    args, output = args_from_name(model), output or default_output(place)
    report = open_report(output, fresh, PARTS, {"device": str(place), "model": model})
    result, write = report.result, partial(write_markdown, report, args)
    result["left_out"] = {}
    if not no_checks and not result["checks"]:
        run_cases(report, place, SHARE_OF_CASES * 60 * minutes)
    write()
    report.once(result, "limits", partial(limits, place))
    side = partial(start_side, model, torch.get_num_threads(), device=str(place), deadline=deadline)
    missing = {row: row.missing(args) for row in rows_in_order() if row.name not in result["rows"]}
    result["left_out"] = {row.name: why for row, why in missing.items() if why}
    measure_rows(report, [row for row, why in missing.items() if not why], side, deadline, write)
    say(f"written: {output}, {Path(output).with_suffix('.md')}")
    failed = [name for name, words in (result["checks"] | result["left_out"]).items() if words.startswith("FAILED")]
    if failed:
        raise ValueError(f"{len(failed)} checks or rows FAILED, the first is {failed[0]}; {output} has all")


def default_output(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"benchmarks/device-{as_name(name)}.json"


def as_name(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower())


def run_cases(report: Report, device: torch.device, seconds: float) -> None:
    """Run the cases of tests/device_cases.py that are begun within the seconds, and note each verdict."""
    command = [*CASES, "--device", str(device), "--seconds", str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            say(line.rstrip())
            verdict, _, name = line.rstrip().partition(": ")
            if verdict in ("passed", "FAILED", "left out"):
                report.result["checks"][name] = verdict
                report.save()


def limits(device: torch.device) -> dict[str, float]:
    return {"gb_s": measured_bandwidth(device) or 0.0, "tflop_s": matrix_rate(device) / 1e12}


def measure_rows(report: Report, rows: list[Row], side: Callable, deadline: float, write: Callable) -> None:
    """Measure the rows in order. One that fails, or for which no time is left, is noted, and a new process begins."""
    result, serves = report.result, None
    with ExitStack() as stack:
        for row in rows:
            try:
                if time.monotonic() > deadline:
                    raise TimeoutError
                if serves != (row.side, row.precision, dict(row.environment)):
                    stack.close()
                    serves = row.side, row.precision, dict(row.environment)
                    process = stack.enter_context(side(*serves))
                trace = Path(report.output).resolve().with_suffix(f".{as_name(row.precision)}.trace.json.gz")
                report.once(result["rows"], row.name, partial(measure, process, row, trace))
            except TimeoutError:
                result["left_out"][row.name] = "no time was left"
                serves = None
            except ValueError as error:
                result["left_out"][row.name] = f"FAILED: {error}"
                say(f"{row.name}: FAILED: {error}")
                serves = None
            write()


def measure(process: SideProcess, row: Row, trace: Path) -> dict:
    """The runs of a row, the first of which compiles and counts apart; or the kernels of a step, and a trace file."""
    if row.case is None:
        return process.ask({"profile": str(trace)})
    ask, began = partial(process.ask, asdict(row.case)), time.perf_counter()
    ask()
    first = {"first_call_s": time.perf_counter() - began}
    facts = process.ask({"bandwidth": True}) if row.side in (STEP, INT8_CACHE) else {}
    return facts | first | take_turns(ROUNDS, {row.name: ask}, warm_up=False)[row.name]


def write_markdown(report: Report, args) -> None:
    report.save()
    with atomic_path(Path(report.output).with_suffix(".md")) as temporary:
        temporary.write_text(document(report.result, args) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = cli.Parser(description=__doc__, formatter_class=cli.argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--model", help="registry name (default: Llama-3.1-8B on CUDA, else stories15M)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all together (default: %(default)g)")
    parser.add_argument("--no_checks", action="store_true", help="only measure (default: check, then measure)")
    parser.add_argument("--output", help="result file (default: one named after the device in benchmarks/)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the result file has (default: go on)")
    cli.run(main, parser)
