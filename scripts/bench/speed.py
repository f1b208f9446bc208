"""The speed of gpt-faster and its peers on the same weights: JSON, Markdown and a chart.

    pip install -r requirements-bench.txt
    python scripts/bench/run.py speed --quick    # batch 1, prompts of 8 and 512 tokens: a quarter of an hour
    python scripts/bench/run.py speed --quick --batches    # also batches of 4 and 16: 20 minutes more
    python scripts/bench/run.py speed            # batches 1, 4, 16, prompts 8, 512, 2048, the waterfall: over two hours

Every engine has its own process, which is stopped while another is timed. They take turns (A B C A B C ...), so that a
machine whose speed drifts is fair to all; medians count. The first run installs OpenVINO and ik_llama.cpp, each in an
environment of its own, and writes their files; one that cannot be installed is named and left out.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache, partial

from cli import in_words, say
from scripts.bench.peers.llama import gguf_of
from scripts.bench.peers.protocol import Case, SideProcess
from scripts.bench.peers.table import PEERS, peer_command
from scripts.bench.report import ROOT, Report, shared_flags, take_turns
from scripts.bench.sides import start_side
from scripts.bench.speed_tables import COMPARED, GRID, PRECISIONS, QUICK, SHORT, headline, key_of, write_files
from weights.registry import REGISTRY

PARTS, SAME = ("engines", "left_out", "cases", "in_turn", "waterfall", "start_up"), ("threads", "model")
COMPILED_PEER = "transformers, static cache + compile"
SIDES = ["gpt-faster", *PEERS, "transformers", COMPILED_PEER]
MORE_ROUNDS = 2  # of cases that take seconds, and scatter most
LONGEST = 8192  # prompt tokens in all: of more, transformers takes minutes, and ik_llama.cpp, whose rows share a cache
NO_KERNELS = {"XDG_CACHE_HOME": "/dev/null"}  # where they would be built
# one technique a row: what it is called, the side, the precision, the environment
WATERFALL = {
    "eager": ("eager", "bf16", NO_KERNELS),
    "+ torch.compile": ("gpt-faster", "bf16", NO_KERNELS),
    "+ C++ operators": ("gpt-faster", "bf16", {}),
    "+ int8": ("gpt-faster", "int8", {}),
    "+ int4": ("gpt-faster", "int4", {}),
}
table = headline


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/cpu.json", rounds=3, model="a checkpoint or a registry name")
    text = "default: all; with --quick not transformers compiled, which takes minutes"
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="SIDE", help=f"of {'; '.join(SIDES)} ({text})")
    parser.add_argument("--quick", action="store_true", help="batch 1, prompts of 8 and 512 tokens (default: the grid)")
    parser.add_argument("--batches", action="store_true", help="with --quick, prompts of 8 in batches of 4 and 16 too")


def fill(
    report: Report, *, model: str, sides: list[str] | None, quick: bool, batches: bool, rounds: int, threads: int
) -> None:
    if sides is None:
        sides = [side for side in SIDES if side != COMPILED_PEER or not quick]
    if "gpt-faster" not in sides:
        raise ValueError("--sides lacks gpt-faster, which the others are compared with")
    if batches and not quick:
        raise ValueError("--batches is for --quick; without it every batch is measured")
    if sides != ["gpt-faster"]:
        gguf_of(model)
    start, result = partial(start_side, model, threads), report.result
    result["left_out"] = missing_peers(sides, model, threads)
    sides = [side for side in sides if side not in result["left_out"]]
    cases = [*QUICK, *(SHORT[1:] if batches else [])] if quick else GRID
    for precision in PRECISIONS:
        fill_cases(report, precision, cases, sides, rounds, start)
    for precision in PRECISIONS:
        own = COMPARED[:1] if quick else COMPARED
        if (
            not {key_of(precision, case) for case in own}
            <= result["in_turn"].get(precision, {}).get("cases", {}).keys()
        ):
            result["in_turn"][precision] = in_turn(precision, own, rounds, start)
            report.save()
    report.once(result, "start_up", partial(start_up, model))
    if not quick:
        report.once(result, "waterfall", partial(waterfall, rounds, start))
    write_files(report)


def missing_peers(sides: list[str], model: str, threads: int) -> dict[str, str]:
    """Why a side cannot be had, after all that can be is installed and made."""
    found = {}
    for side in (side for side in sides if side in PEERS):
        try:
            for precision in PRECISIONS:
                peer_command(side, precision, model, threads)
        except (ValueError, OSError) as error:
            found[side] = in_words(error)
            say(f"{side} is left out: {found[side]}")
    return found


def fill_cases(report: Report, precision: str, cases: list[Case], sides: list[str], rounds: int, start) -> None:
    """Measure the cases of one precision that the result lacks, or in which it lacks a side."""
    with ExitStack() as stack:

        @cache
        def process(side: str) -> SideProcess:
            begun = stack.enter_context(start(side, precision))
            report.result["engines"][f"{side}, {precision}"] = begun.facts
            return begun

        for case in cases:
            key, wanted = key_of(precision, case), sides_of(precision, case, sides)
            if not set(wanted) <= report.result["cases"].get(key, {}).keys():
                say(key)
                count = rounds + MORE_ROUNDS if case in QUICK else rounds
                report.result["cases"][key] = compare({side: process(side) for side in wanted}, case, count)
                report.save()


def sides_of(precision: str, case: Case, sides: list[str]) -> list[str]:
    """Those that run the case: transformers has the weights as they are, and compiles each shape for minutes."""
    here = [side for side in sides if precision == "bf16" or not side.startswith("transformers")]
    if case.batch * case.prompt > LONGEST:
        here = [side for side in here if side not in ("transformers", "ik_llama.cpp")]
    return [side for side in here if side != COMPILED_PEER or case == QUICK[0]]


def compare(processes: dict[str, SideProcess], case: Case, rounds: int) -> dict[str, dict]:
    """The case on each of the processes, in turn."""
    return take_turns(rounds, {name: partial(process.ask, asdict(case)) for name, process in processes.items()})


def in_turn(precision: str, cases: list[Case], rounds: int, start) -> dict:
    """Our own speed in cases that are compared with each other, and the memory's rate: all of them in every round."""
    say(f"{precision}, in turn")
    with start("gpt-faster", precision) as process:
        runs = {key_of(precision, case): partial(process.ask, asdict(case)) for case in cases}
        runs["bandwidth"] = partial(process.ask, {"bandwidth": True})
        found = take_turns(rounds + MORE_ROUNDS, runs)
    return {"bandwidth": found.pop("bandwidth")["median"], "cases": found}


def waterfall(rounds: int, start) -> dict:
    """Each technique added to those before it: decoding after a short prompt."""
    with ExitStack() as stack:
        return compare({name: stack.enter_context(start(*how)) for name, how in WATERFALL.items()}, QUICK[0], rounds)


def start_up(model: str) -> dict:
    """Seconds from process start to the first byte of text, with an empty inductor cache and then with a full one."""
    weights = ["--random_weights" if model in REGISTRY else "--checkpoint_path", model]
    command = [sys.executable, "generate.py", *weights, "--compile", "--num_samples", "1", "--temperature", "0"]
    result = {}
    with tempfile.TemporaryDirectory() as inductor:
        options = {"cwd": ROOT, "env": os.environ | {"TORCHINDUCTOR_CACHE_DIR": inductor}, "text": True}
        for name in ("cold", "warm"):
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
            process.stdout.read(1)
            result[f"{name}_first_token_s"] = time.perf_counter() - began
            log = process.communicate()[1]
            if process.returncode:
                raise ValueError(f"generate.py failed:\n{log.strip()}")
            line = next(line for line in log.splitlines() if line.startswith("Compilation time:"))
            result[f"{name}_compile_s"] = float(line.split()[2])
    return result
