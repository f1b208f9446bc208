"""Serve a language model over HTTP, in the interface of OpenAI: many requests share each step."""

if __name__ == "__main__":
    import cli

    cli.begin()

import argparse
import contextlib
import os
import socket
import sys
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import torch

import cli
from cli import say
from engine.cache import MOST_ROWS, context_length
from engine.compile import require_compiler
from engine.engine import Engine, build_engine
from engine.speculation.drafters import PromptLookup
from engine.speculation.guess_length import check_length
from engine.speculation.speculative import build_speculation
from flags import (
    budget_flag,
    cache_flag,
    check_counts,
    check_threads,
    memory_budget,
    model_flags,
    number_or_text,
    place_flags,
    say_device,
    stages_flag,
    template_flags,
)
from layers.quantized import GROUPSIZE_HELP, MODES, quant_spec
from ranks import Ranks, init_tp, shared, speaks
from serving.interface.fields import GENERATION, read_fields
from serving.interface.jobs import Served
from serving.scheduler import Scheduler
from text.chat import start_rendering
from text.settings import read_sampling
from text.tokenizer import Tokenizer, load_tokenizer
from weights.checkpoint import CHECKPOINTS, load_model
from weights.device import parse_cache_dtype, parse_dtype, pick_device

KEY = "GPT_FASTER_API_KEY"


def main(**flags) -> None:
    """Keyword arguments are the command line's flags; `build_parser` has their defaults."""
    require_packages()
    with init_tp(flags["pipeline_stages"]) as ranks:
        args = argparse.Namespace(**flags)
        device = check_run(args, ranks)
        bound = bind(args.host, args.port) if speaks(ranks) else None
        if args.threads:
            torch.set_num_threads(args.threads)
        say_device(device, ranks)
        if speaks(ranks):
            start_rendering()
        serve(args, device, ranks, bound)


def require_packages() -> None:
    """Refuse to begin without what only this command needs."""
    try:
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        install = f"pip install -r {cli.ROOT}/requirements-serve.txt"
        raise ValueError(f"serve.py needs {error.name}, which is not installed; use: {install}") from None


def check_run(args: argparse.Namespace, ranks: Ranks | None) -> torch.device:
    """The device; what is wrong with the flags is said before anything slow."""
    check_counts(vars(args), "max_batch", "max_seq_length", "threads", "max_body")
    check_threads(args.threads)
    if not args.host:
        raise ValueError("--host is empty; give an address, such as 127.0.0.1, or 0.0.0.0 for all of the machine's")
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port is {args.port}; it must be from 0, which picks a free one, to 65535")
    if args.max_queue < 0:
        raise ValueError(f"--max_queue is {args.max_queue}; it must be 0 or above")
    for origin in args.cors_origin:
        if origin != "*" and (not urlsplit(origin).netloc or urlsplit(origin).path):
            raise ValueError(f"--cors_origin is {origin}; it must be like https://chat.example, or * for any page")
    if args.api_key == "":
        raise ValueError(f"--api_key is empty; give one, or leave it out and unset {KEY}")
    device = pick_device(args.device, ranks)
    parse_dtype(args.dtype)
    quant_spec(args.quantize, args.groupsize)
    if args.speculate_k is not None:
        if args.speculate is None:
            raise ValueError("--speculate_k needs --speculate ngram")
        check_length(args.speculate_k, device)
    if args.compile:
        require_compiler(device)
    return device


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address, and no connections yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}; --port 0 picks a free one") from None
    return bound


def load(args: argparse.Namespace, device: torch.device, ranks: Ranks | None) -> tuple[Engine, Tokenizer]:
    dtype, spec = parse_dtype(args.dtype), quant_spec(args.quantize, args.groupsize)
    path = args.checkpoint_path
    budget = memory_budget(args, path, device, ranks, args.max_batch, sys.maxsize, args.speculate is not None)
    how = {"dequantize": args.dequantize, "adapter": args.adapter, "budget": budget}
    model = load_model(path, device, dtype, args.model_name, spec, ranks, **how)
    model.cache_dtype = parse_cache_dtype(args.cache_dtype)
    speculation = None
    if args.speculate is not None:
        speculation = build_speculation(model, PromptLookup(), args.speculate_k, args.compile)
    engine = build_engine(model, args.compile, speculation=speculation)
    return engine, load_tokenizer(args.checkpoint_path, model.args.vocab_size, args.chat_template, args.template_vars)


def serve(args: argparse.Namespace, device: torch.device, ranks: Ranks | None, bound: socket.socket | None) -> None:
    """Answer requests until Ctrl-C or SIGTERM; without a socket, as the first rank orders."""
    from serving.server import run_server
    from serving.worker import Worker

    worker = Worker(partial(prepare, args, device, ranks), args.max_queue, ranks)
    if bound is None:
        worker.load()
        with cli.undisturbed():  # the first rank obeys the signal
            return worker.follow()
    worker.start()
    worker.ready.result()
    key = args.api_key or os.environ.get(KEY)
    with contextlib.suppress(KeyboardInterrupt, cli.Terminated):  # sent again by uvicorn, which has obeyed them
        run_server(worker, bound, args.host, args.cors_origin, key, args.max_body)
    worker.stop()


def prepare(args: argparse.Namespace, device: torch.device, ranks: Ranks | None) -> tuple[Scheduler, Served]:
    """What runs the model, and what requests must know of it."""
    engine, tokenizer = load(args, device, ranks)
    model = engine.model
    context = context_length(model.args, args.max_seq_length)
    n_rows = args.max_batch or shared(ranks, lambda: engine.rows_that_fit(context))
    name = args.served_model_name or model_id(Path(args.checkpoint_path))
    defaults = read_fields(read_sampling(args.checkpoint_path), GENERATION)
    say(f"Serving {name} with {n_rows} rows of {context} tokens")
    return Scheduler(engine, n_rows, context), Served(name, tokenizer, context, model.args.vocab_size, defaults)


def model_id(path: Path) -> str:
    """OWNER/NAME of a model in checkpoints/, else the name of its file or folder."""
    path = path.resolve()
    if path.is_relative_to(CHECKPOINTS.resolve()):
        parts = path.relative_to(CHECKPOINTS.resolve()).parts
        return "/".join(parts[:2])
    return path.stem if path.is_file() else path.name


# ---------------------------------------------------------------- flags


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Serve a language model over HTTP, in the interface of OpenAI.")
    where = model_flags(parser, "a .pth or .gguf file, or a folder")
    where.add_argument("--quantize", choices=MODES, help="round the weights of a float model while loading it")
    where.add_argument("--groupsize", type=int, help=GROUPSIZE_HELP)
    place_flags(where)
    cache_flag(where)
    budget_flag(where)
    stages_flag(where)
    template_flags(where)
    server_flags(parser.add_argument_group("server"))
    speed_flags(parser.add_argument_group("speed"))
    return parser


def server_flags(group) -> None:
    add = group.add_argument
    text = "address to listen at; 0.0.0.0 is all that the machine has (default: %(default)s)"
    add("--host", default="127.0.0.1", help=text)
    add("--port", type=int, default=8000, help="0 picks a free one (default: %(default)s)")
    add("--api_key", metavar="KEY", help=f"what requests must bring; also from {KEY} (default: none needed)")
    text = "a page of another site that may use the server, such as https://chat.example; repeatable; * is any"
    add("--cors_origin", action="append", default=[], metavar="ORIGIN", help=text)
    add("--served_model_name", metavar="NAME", help="id of the model (default: OWNER/NAME, or the file's name)")
    add("--max_queue", type=int, default=256, help="answers that wait for a row, at most (default: %(default)s)")
    add("--max_body", type=int, default=4_000_000, help="bytes of a request, at most (default: %(default)s)")


def speed_flags(group) -> None:
    add = group.add_argument
    add("--max_batch", type=int, help=f"answers at a time (default: as memory allows, at most {MOST_ROWS})")
    add("--max_seq_length", type=int, help="context in tokens (default: the model's)")
    add("--compile", action="store_true", help="compile the decoding step")
    text = "for an answer that is made alone, guess what followed the same words before; the text is the same"
    add("--speculate", choices=["ngram"], help=text)
    text = "tokens to guess at a time, or auto: as many as pay (default: auto)"
    add("--speculate_k", type=number_or_text, metavar="K", help=text)


if __name__ == "__main__":
    cli.run(main, build_parser())
