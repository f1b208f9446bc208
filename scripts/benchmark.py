"""Time gpt-faster and its peers on the same weights; write JSON, a Markdown table and a chart.

    pip install -r requirements-bench.txt
    python scripts/benchmark.py --quick          # batch 1, prompts of 8 and 512 tokens: under 10 minutes
    python scripts/benchmark.py                  # batches 1, 4, 16, prompts 8, 512, 2048, the waterfall: over an hour
    python scripts/benchmark.py --quick --model TinyLlama-1.1B --sides gpt-faster --output benchmarks/cpu-1.1B.json

Every engine has its own process, which is stopped while another is timed. They take turns (A B C A B C ...), so that a
machine whose speed drifts is fair to all; medians count. What is finished is in the result file, and is not run again.
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
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from flags import check_threads
from scripts.reporting import ROOT, machine, markdown, medians, require_rounds, update_readme
from scripts.sides import SIDES, Case, gguf_of
from weights.checkpoint import DEFAULT_CHECKPOINT
from weights.files import atomic_path, read_json, require_writable, write_json
from weights.registry import REGISTRY

PEERS = [side for side in SIDES if side != "eager"]
PRECISIONS = ("bf16", "int8", "int4")
PEER_PRECISION = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
NEW_TOKENS = 200
QUICK = [Case(1, 8, NEW_TOKENS), Case(1, 512, NEW_TOKENS)]
GRID = [Case(batch, prompt, NEW_TOKENS) for batch in (1, 4, 16) for prompt in (8, 512, 2048)]
OF_ONE_SIDE = [QUICK[0], Case(1, 2048, NEW_TOKENS), Case(16, 8, NEW_TOKENS)]  # which targets compare with each other
MORE_ROUNDS = 2  # of cases that take seconds, and scatter most
COMPILED_PEER = "transformers, static cache + compile"
LONGEST_EAGER = 8192  # prompt tokens in all, of which transformers takes minutes
NO_KERNELS = {"XDG_CACHE_HOME": "/dev/null"}  # where they would be built
SHARES = {"bf16": 0.85, "int8": 0.75, "int4": 0.65}  # of the memory's rate, that a model of gigabytes should reach
# one technique a row: what it is called, the side, the precision, the environment
WATERFALL = {
    "eager": ("eager", "bf16", NO_KERNELS),
    "+ torch.compile": ("gpt-faster", "bf16", NO_KERNELS),
    "+ C++ operators": ("gpt-faster", "bf16", {}),
    "+ int8": ("gpt-faster", "int8", {}),
    "+ int4": ("gpt-faster", "int4", {}),
}


class Engine:
    """A process of sides.py, stopped but for the time of a question."""

    def __init__(self, side: str, precision: str, model: str, threads: int, environment: dict[str, str]):
        self.name = f"{side}, {precision}"
        command = [sys.executable, ROOT / "scripts" / "sides.py", side, precision, "--model", model]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            [*map(str, command), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )
        self.load_s = self.answer()["load_s"]

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def ask(self, question: dict) -> dict:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        """Its next answer, after which it is stopped. Raises ValueError with its last words if it ended."""
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            words = self.log.read().strip().splitlines() or ["none"]
            code = self.process.wait()
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise ValueError(f"{self.name} ended {how}; its last words: {words[-1]}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)


def take_turns(engines: dict[str, Engine], case: Case, rounds: int) -> dict[str, dict]:
    """For each engine its runs, their medians, and how far they spread: (largest - smallest) / median of decoding."""
    found = {name: {"runs": []} for name in engines}
    for number in range(1, rounds + 1):
        for name, engine in engines.items():
            answer = engine.ask(asdict(case))
            first_s = answer.pop("first_s", None)
            if first_s is not None:
                found[name]["first_s"] = first_s
            found[name]["runs"].append(answer)
            speeds = f"decode {answer['decode_tok_s']:.1f}, prefill {answer['prefill_tok_s']:.0f} tok/s"
            print(f"  {number} of {rounds}, {engine.name}: {speeds}", file=sys.stderr, flush=True)
    for side in found.values():
        decode = [run["decode_tok_s"] for run in side["runs"]]
        side["median"] = medians(side["runs"])
        side["spread"] = (max(decode) - min(decode)) / statistics.median(decode)
    return found


def key_of(precision: str, case: Case) -> str:
    return f"{precision}, batch {case.batch}, prompt {case.prompt}"


def measure(result: dict, cases: list[Case], sides: list[str], rounds: int, model: str, threads: int) -> Iterator[None]:
    """Fill in the cases that the result lacks; yields after each."""
    for precision in PRECISIONS:
        missing = {}
        for case in cases:
            wanted = sides_of(precision, case, sides)
            if not set(wanted) <= set(result["cases"].get(key_of(precision, case), {})):
                missing[case] = wanted
        if not missing:
            continue
        with ExitStack() as stack:
            engines = {}
            for side in dict.fromkeys(side for wanted in missing.values() for side in wanted):
                engines[side] = stack.enter_context(Engine(side, precision, model, threads, {}))
            result["load_s"][precision] = {side: engine.load_s for side, engine in engines.items()}
            for case, wanted in missing.items():
                print(key_of(precision, case), file=sys.stderr, flush=True)
                some = {side: engines[side] for side in wanted}
                count = rounds + MORE_ROUNDS if case in QUICK else rounds
                result["cases"][key_of(precision, case)] = take_turns(some, case, count)
                yield


def sides_of(precision: str, case: Case, sides: list[str]) -> list[str]:
    """Those that run the case: transformers has the weights as they are, and compiles each shape for minutes."""
    fits = precision == "bf16" and case.batch * case.prompt <= LONGEST_EAGER
    here = [side for side in sides if fits or not side.startswith("transformers")]
    return [side for side in here if side != COMPILED_PEER or case == QUICK[0]]


def in_turn(precision: str, cases: list[Case], rounds: int, model: str, threads: int) -> dict:
    """Our own speed in cases that are compared with each other, and the memory's rate: all of them in every round."""
    runs, reads = {key_of(precision, case): [] for case in cases}, []
    with Engine("gpt-faster", precision, model, threads, {}) as engine:
        for number in range(1, rounds + MORE_ROUNDS + 1):
            for case in cases:
                answer = engine.ask(asdict(case))
                runs[key_of(precision, case)].append({"decode_tok_s": answer["decode_tok_s"]})
            reads.append(engine.ask({"bandwidth": True}))
            print(f"  {number} of {rounds + MORE_ROUNDS}, {precision}, in turn", file=sys.stderr, flush=True)
    found = {key: {"runs": each, "median": medians(each)} for key, each in runs.items()}
    return {"cases": found, "bandwidth": medians(reads)}


def waterfall(rounds: int, model: str, threads: int) -> dict:
    """Each technique added to those before it: decoding after a short prompt."""
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(Engine(side, precision, model, threads, environment))
            for name, (side, precision, environment) in WATERFALL.items()
        }
        print("waterfall", file=sys.stderr, flush=True)
        return take_turns(engines, QUICK[0], rounds)


def start_up(model: str) -> dict:
    """Seconds from process start to the first byte of text, with an empty inductor cache and then with a full one."""
    weights = ["--random_weights" if model in REGISTRY else "--checkpoint_path", model]
    command = [sys.executable, "generate.py", *weights, "--compile", "--num_samples", "1", "--temperature", "0"]
    result = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            began = time.perf_counter()
            process = subprocess.Popen(
                [*command, "--prompt", "Once upon a time"],
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


# ---------------------------------------------------------------- what is written


def headline(result: dict) -> str:
    """The README's table: batch 1."""
    sides = list(result["cases"][key_of("bf16", QUICK[0])])
    rows = []
    for case, rate, label in (
        (QUICK[0], "decode_tok_s", f"decode, {NEW_TOKENS} tokens"),
        (QUICK[1], "prefill_tok_s", f"prefill, {QUICK[1].prompt} tokens"),
    ):
        for precision in PRECISIONS:
            rows.append([f"{label}, {precision}", *speeds(result["cases"][key_of(precision, case)], sides, rate)])
    return markdown([f"{result['model']}, {result['threads']} CPU threads, batch 1", *sides], rows)


def speeds(found: dict[str, dict], sides: list[str], rate: str) -> list[str]:
    """A cell for each side: its speed, and how many times as fast gpt-faster is."""
    ours = found["gpt-faster"]["median"][rate]
    cells = []
    for side in sides:
        if side not in found:
            cells.append("-")
        else:
            speed = found[side]["median"][rate]
            cells.append(f"{speed:.0f} tok/s" + (f" (x{ours / speed:.2f})" if side != "gpt-faster" else ""))
    return cells


def full_table(result: dict) -> str:
    """Every case: the tokens of all rows of a batch together."""
    sides = list(result["cases"][key_of("bf16", QUICK[0])])
    what = f"{result['model']}, {result['threads']} CPU threads"
    names = [key_of(precision, case) for precision in PRECISIONS for case in GRID]
    cases = {name: result["cases"][name] for name in names if name in result["cases"]}
    parts = []
    for rate, label in (("decode_tok_s", "decode"), ("prefill_tok_s", "prefill")):
        rows = [[name, *speeds(found, sides, rate)] for name, found in cases.items()]
        parts.append(markdown([f"{label}, {what}", *sides], rows))
    for key, unit, label in (("time_to_first_token_s", "s", "first token"), ("peak_memory_gb", "GB", "memory so far")):
        rows = [
            [name, *(f"{found[side]['median'][key]:.2f} {unit}" if side in found else "-" for side in sides)]
            for name, found in cases.items()
        ]
        parts.append(markdown([f"{label}, {what}", *sides], rows))
    rows = [[name, f"{found['median']['decode_tok_s']:.0f} tok/s"] for name, found in result["waterfall"].items()]
    if rows:
        parts.append(markdown(["one technique after the other", f"decode, {what}"], rows))
    return "\n\n".join(parts)


def targets(result: dict) -> str:
    """What was promised, what came, and whether it was kept; ratios of one run."""
    found = {key: {side: each["median"] for side, each in sides.items()} for key, sides in result["cases"].items()}
    rows = []

    def row(what: str, value: float, limit: float, least: bool = True, unit: str = "x") -> None:
        kept = value >= limit if least else value <= limit
        rows.append(
            [what, f"{'>=' if least else '<='} {limit:g} {unit}", f"{value:.2f} {unit}", "" if kept else "missed"]
        )

    for precision, limit in (("bf16", 1.05), ("int8", 1.25), ("int4", 1.2)):
        sides = found[key_of(precision, QUICK[0])]
        if "llama.cpp" in sides:
            ratio = sides["gpt-faster"]["decode_tok_s"] / sides["llama.cpp"]["decode_tok_s"]
            row(f"{precision} decode against llama.cpp {PEER_PRECISION[precision]}", ratio, limit)
    for precision in PRECISIONS:
        sides = found[key_of(precision, QUICK[1])]
        if "llama.cpp" in sides:
            ratio = sides["gpt-faster"]["prefill_tok_s"] / sides["llama.cpp"]["prefill_tok_s"]
            row(f"{precision} prefill of 512 against llama.cpp {PEER_PRECISION[precision]}", ratio, 1.5)
    for precision, own in result["in_turn"].items():
        reads, rates = own["bandwidth"], {key: each["median"]["decode_tok_s"] for key, each in own["cases"].items()}
        rate, far, many = (rates.get(key_of(precision, case)) for case in OF_ONE_SIDE)
        if result["in_turn"]["bf16"]["bandwidth"]["weight_bytes_per_token"] > 1e9:
            share = rate * reads["weight_bytes_per_token"] / 1e9 / reads["measured_bandwidth_gb_s"]
            row(
                f"{precision} decode, of the rate at which our operator reads one large matrix",
                share,
                SHARES[precision],
            )
        if far:
            late, early = (reads["weight_bytes_per_token"] + n * reads["kv_bytes_per_position"] for n in (2148, 108))
            slower = rate / far / (late / early)
            row(f"{precision} step at position 2148 against 108, over that of their bytes", slower, 1.2, False)
        if many and precision == "bf16":
            row("bf16 decode at batch 16 against batch 1", many / rate, 6)
    row("cold compile", result["start_up"]["cold_compile_s"], 12, False, "s")
    row("first token of a second process", result["start_up"]["warm_first_token_s"], 7, False, "s")
    return markdown(["target", "wanted", "measured", ""], rows)


def chart(result: dict, path: Path) -> None:
    """Decoding at batch 1: each precision beside its peers, and one technique after the other."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    sides = list(result["cases"][key_of("bf16", QUICK[0])])
    for i, side in enumerate(sides):
        cases = [result["cases"][key_of(precision, QUICK[0])] for precision in PRECISIONS]
        places = [j + i * 0.8 / len(sides) for j, found in enumerate(cases) if side in found]
        values = [found[side]["median"]["decode_tok_s"] for found in cases if side in found]
        left.bar_label(left.bar(places, values, 0.8 / len(sides), label=side, align="edge"), fmt="%.0f")
    left.set_xticks([j + 0.4 for j in range(len(PRECISIONS))], PRECISIONS)
    left.set_ylabel("tokens/s")
    left.set_title(f"decode, {result['model']}, batch 1, {result['threads']} CPU threads")
    left.legend(frameon=False)
    steps = {name: found["median"]["decode_tok_s"] for name, found in result["waterfall"].items()}
    right.bar_label(right.barh(list(steps), list(steps.values())), fmt="%.0f")
    right.invert_yaxis()
    right.set_title("one technique after the other, tokens/s")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def begin(output: str, facts: dict, fresh: bool) -> dict:
    """The result so far, or an empty one. Raises ValueError if the file tells of other circumstances."""
    empty = {"cases": {}, "load_s": {}, "in_turn": {}, "waterfall": {}, "start_up": {}}
    if fresh or not Path(output).exists():
        return facts | empty
    before = read_json(output)
    if not {"cases", "in_turn"} <= before.keys():
        raise ValueError(f"{output} is no result of this version; use --fresh or another --output")
    for key in ("model", "threads", "machine"):
        then, now = (
            {k: v for k, v in each[key].items() if k != "date"} if key == "machine" else each.get(key)
            for each in ({"machine": {}} | before, facts)
        )
        if then != now:
            raise ValueError(f"{output} was measured with another {key} ({then}); use --fresh or another --output")
    return before | facts


def main(*, model: str, sides: list[str], quick: bool, fresh: bool, rounds: int, threads: int, output: str) -> None:
    require_writable(output)
    if sides is None:
        sides = [side for side in PEERS if side != COMPILED_PEER or not quick]
    require_rounds(rounds)
    check_threads(threads)
    if "gpt-faster" not in sides:
        raise ValueError("--sides lacks gpt-faster, which the others are compared with")
    if sides != ["gpt-faster"]:
        gguf_of(model)
    packages = ("torch", "transformers", "llama-cpp-python") if len(sides) > 1 else ("torch",)
    facts = {
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "machine": machine(packages),
        "model": model if model in REGISTRY else Path(model).resolve().parent.name,
        "threads": threads,
    }
    result = begin(output, facts, fresh)
    for _ in measure(result, QUICK if quick else GRID, sides, rounds, model, threads):
        write_json(output, result)
    own = QUICK[:1] if quick else OF_ONE_SIDE
    for precision in PRECISIONS:
        there = result["in_turn"].get(precision, {}).get("cases", {})
        if not {key_of(precision, case) for case in own} <= there.keys():
            result["in_turn"][precision] = in_turn(precision, own, rounds, model, threads)
            write_json(output, result)
    if not result["start_up"]:
        result["start_up"] = start_up(model)
        write_json(output, result)
    if not quick and not result["waterfall"]:
        result["waterfall"] = waterfall(rounds, model, threads)
        write_json(output, result)
    text = f"{headline(result)}\n\n{targets(result)}\n\n{full_table(result)}\n"
    with atomic_path(Path(output).with_suffix(".md")) as path:
        path.write_text(f"`{result['command']}`, {result['machine']['date']}\n\n{text}")
    chart(result, Path(output).with_suffix(".svg"))
    update_readme(headline(result), output)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time gpt-faster against llama.cpp and transformers, same weights.")
    parser.add_argument(
        "--model", default=str(DEFAULT_CHECKPOINT), help="a checkpoint or a registry name (default: %(default)s)"
    )
    parser.add_argument(
        "--sides", nargs="+", choices=PEERS, help="default: all; --quick leaves out transformers compiled, for minutes"
    )
    parser.add_argument("--quick", action="store_true", help="batch 1, prompts of 8 and 512 tokens (default: the grid)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the result file has (default: go on)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="times each side runs; short cases run twice more (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="benchmarks/cpu.json", help="result file (default: %(default)s)")
    cli.run(main, parser)
