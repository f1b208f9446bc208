"""How good a model is: the perplexity of a text, tasks of lm-evaluation-harness, and the command line for both."""

if __name__ == "__main__":
    import cli

    cli.quit_on_interrupt()  # before the slow imports


import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from cli import say
from engine.cache import context_length
from engine.compile import require_compiler
from engine.engine import Engine, build_engine
from flags import check_threads, say_device
from measure.machine import run_facts
from measure.perplexity import WINDOW, check_sizes, perplexity
from measure.tasks import require_harness
from ranks import Ranks, init_tp, shared, speaks
from text.prompts import checked_ids
from text.tokenizer import Tokenizer, load_tokenizer
from weights.checkpoint import DEFAULT_CHECKPOINT, load_model, open_model
from weights.device import DTYPES, parse_dtype, pick_device
from weights.files import read_text, require_writable, write_json

OF_A_TEXT, OF_TASKS = ("stride",), ("limit", "num_fewshot", "include_path", "apply_chat_template")  # flags


def check_request(args: argparse.Namespace) -> None:
    """Raise ValueError on arguments that cannot work, before anything slow."""
    if (args.perplexity is None) == (args.tasks is None):
        raise ValueError("give either --tasks NAME ... or a text with --perplexity FILE")
    for name in OF_A_TEXT if args.perplexity is None else OF_TASKS:
        if getattr(args, name) not in (None, False):
            wanted = "--perplexity" if args.perplexity is None else "--tasks"
            raise ValueError(f"--{name} goes with {wanted}; leave it out")
    if args.limit is not None and not (0 < args.limit < 1 or args.limit >= 1 and args.limit % 1 == 0):
        raise ValueError(f"--limit is {args.limit:g}; it must be a number of questions, or a part of them below 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(f"--num_fewshot is {args.num_fewshot}; it must be 0 or above")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise ValueError(f"--include_path {args.include_path} is no folder")
    check_sizes(
        WINDOW if args.max_seq_length is None else args.max_seq_length,
        args.stride,
        1 if args.batch_size is None else args.batch_size,
    )
    check_threads(args.threads)
    if args.output_json is not None:
        require_writable(args.output_json, [args.perplexity, args.checkpoint_path])


def main(**flags) -> None:
    """Keyword arguments are the command line's flags; `build_parser` has their defaults."""
    with init_tp() as ranks:
        evaluate(flags, ranks)


def evaluate(flags: dict, ranks: Ranks | None) -> None:
    """Everything that the command line asks for, on each rank alike."""
    args = argparse.Namespace(**flags)
    check_request(args)
    device = pick_device(args.device, ranks)
    dtype = parse_dtype(args.dtype)
    if args.compile:
        require_compiler(device)
    # what can go wrong goes wrong before the long wait for the model
    if args.tasks is None:
        text = shared(ranks, lambda: read_text(args.perplexity))
        measure = partial(measure_text, text)
    else:
        measure = partial(measure_tasks, find_tasks(args))
    if args.threads:
        torch.set_num_threads(args.threads)

    say_device(device, ranks)
    began = time.perf_counter()
    model = load_model(args.checkpoint_path, device, dtype, args.model_name, ranks=ranks)
    engine = build_engine(model, args.compile, args.compile)
    tokenizer = load_tokenizer(args.checkpoint_path, model.args.vocab_size)
    facts = run_facts(flags, device, ranks) | {"load_s": time.perf_counter() - began}
    say(f"Time to load model: {facts['load_s']:.2f} seconds")
    if args.compile:
        say("Compiling: about 10 seconds for each of a few shapes the first time, where it comes up")
    result, default = measure(engine, tokenizer, args, facts)
    if args.output_json and speaks(ranks):
        write_json(args.output_json, result, default)


def measure_text(
    text: str,
    engine: Engine,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    facts: dict,
) -> tuple[dict, None]:
    """Print the perplexity of a text; the report, and what JSON needs to write it."""
    ids = checked_ids(tokenizer.encode(text), tokenizer)
    began = time.perf_counter()
    sizes = {"window": args.max_seq_length or WINDOW, "stride": args.stride, "batch_size": args.batch_size or 1}
    result = perplexity(engine, ids, **sizes)
    seconds = time.perf_counter() - began
    say(f"Scored {result.tokens} of {len(ids)} tokens in {result.windows} windows: {seconds:.2f} seconds")
    print(f"perplexity: {result.perplexity:.4f}")
    return facts | {"seconds": seconds} | asdict(result), None


def find_tasks(args: argparse.Namespace):
    """The tasks asked for, as `harness.load_tasks`. Raises ValueError if lm-eval is missing too."""
    require_harness("--tasks", "measure a --perplexity FILE")
    from measure.harness import load_tasks

    return load_tasks(args.tasks, args.include_path)


def measure_tasks(
    tasks,
    engine: Engine,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    facts: dict,
) -> tuple[dict | None, Callable | None]:
    """Print the harness's table of tasks; its report with ours in it, and what JSON needs to write it."""
    from lm_eval.utils import handle_non_serializable, make_table

    from measure.harness import Adapter, run_tasks

    context = context_length(engine.model.args, args.max_seq_length)
    adapter = Adapter(engine, tokenizer, args.checkpoint_path, context, args.batch_size)
    began = time.perf_counter()
    result = run_tasks(
        adapter,
        tasks,
        args.seed,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
    )
    if result is None:  # the harness gives it to the first process of a machine only
        return None, None
    facts["seconds"] = time.perf_counter() - began
    kinds = {str(spec) for spec in open_model(args.checkpoint_path, args.model_name).table.values()}
    facts |= {"model": asdict(engine.model.args), "quantised": sorted(kinds), "lm_eval": version("lm_eval")}
    print(make_table(result))
    if result.get("groups"):
        print(make_table(result, "groups"))
    say(f"Time for tasks: {facts['seconds']:.1f} seconds")
    return result | {"gpt_faster": facts}, handle_non_serializable


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure how well a language model does tasks, or predicts a text.")
    where = parser.add_argument_group("model")
    where.add_argument(
        "--checkpoint_path",
        default=str(DEFAULT_CHECKPOINT),
        help="a .pth or .gguf file, or a folder (default: %(default)s)",
    )
    where.add_argument("--model_name", help="registry name, for a gpt-fast file that does not say what it is")
    where.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    where.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    where.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    where.add_argument(
        "--compile", action="store_true", help="compile the model; pays from some hundred questions on (default: off)"
    )
    what = parser.add_argument_group("evaluation")
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness, such as hellaswag")
    what.add_argument("--limit", type=float, help="questions of each task, or a part of them below 1 (default: all)")
    what.add_argument("--num_fewshot", type=int, help="examples before each question (default: as the task says)")
    what.add_argument("--include_path", metavar="DIR", help="a folder with task files of your own")
    what.add_argument(
        "--apply_chat_template", action="store_true", help="write each question as a chat message (default: plain text)"
    )
    what.add_argument("--seed", type=int, default=1234, help="of examples and samples (default: %(default)s)")
    what.add_argument("--perplexity", metavar="FILE", help="score this text (UTF-8)")
    what.add_argument(
        "--max_seq_length",
        type=int,
        help=f"tokens in a window (default: {WINDOW} for a text, the model's context for tasks)",
    )
    what.add_argument(
        "--stride", type=int, help="tokens from one window to the next; fewer give more context (default: the window)"
    )
    what.add_argument(
        "--batch_size",
        type=int,
        help="rows at a time (default: 1 for a text; for tasks chosen by their lengths, shorter ones together)",
    )
    what.add_argument("--output_json", metavar="PATH", help="write the result and the facts of the run")
    return parser


if __name__ == "__main__":
    cli.run(main, build_parser())
