"""Measure how good a model is: the perplexity of a text, or tasks of lm-evaluation-harness."""

if __name__ == "__main__":
    import cli

    cli.begin()

import argparse
import time
from dataclasses import asdict
from importlib.metadata import version

import torch

import cli
from cli import say
from engine.cache import context_length
from engine.compile import require_compiler
from engine.engine import Engine, build_engine
from flags import (
    budget_flag,
    cache_flag,
    check_counts,
    check_threads,
    memory_budget,
    model_flags,
    place_flags,
    say_device,
    stages_flag,
    template_flags,
)
from measure.machine import run_facts
from measure.perplexity import WINDOW, perplexity
from measure.tasks import Tasks, load_tasks, require_harness, run_tasks
from ranks import Ranks, init_tp, shared, speaks
from text.files import read_text
from text.prompts import checked_ids
from text.tokenizer import Tokenizer, load_tokenizer
from weights.checkpoint import load_model, open_model
from weights.device import parse_cache_dtype, parse_dtype, pick_device
from weights.files import require_writable, write_json

TEXT_FLAGS, TEMPLATE_FLAGS = ("stride",), ("chat_template", "template_vars")
TASK_FLAGS = ("limit", "num_fewshot", "include_path", "apply_chat_template", *TEMPLATE_FLAGS)


def main(**flags) -> None:
    """Keyword arguments are the command line's flags; `build_parser` has their defaults."""
    with init_tp(flags["pipeline_stages"]) as ranks:
        args = argparse.Namespace(**flags)
        device = check_run(args, ranks)
        asked = read_text_or_tasks(args, ranks)
        if args.threads:
            torch.set_num_threads(args.threads)
        say_device(device, ranks)
        began = time.perf_counter()
        path, dtype = args.checkpoint_path, parse_dtype(args.dtype)
        budget = memory_budget(args, path, device, ranks, args.batch_size)
        how = {"dequantize": args.dequantize, "adapter": args.adapter, "budget": budget}
        model = load_model(path, device, dtype, args.model_name, ranks=ranks, **how)
        model.cache_dtype = parse_cache_dtype(args.cache_dtype)
        engine = build_engine(model, args.compile, args.compile)
        tokenizer = load_tokenizer(path, model.args.vocab_size, args.chat_template, args.template_vars)
        facts = run_facts(flags, device, ranks) | {"load_s": time.perf_counter() - began}
        say(f"Time to load model: {facts['load_s']:.2f} seconds")
        if args.compile:
            say("Compiling goes on during the run: about 10 seconds for each of a few shapes, the first time")
        measure = measure_text if args.tasks is None else measure_tasks
        report = measure(args, engine, tokenizer, asked, facts)
        if args.output_json and speaks(ranks):
            write_json(args.output_json, report)


def check_run(args: argparse.Namespace, ranks: Ranks | None) -> torch.device:
    """The device; arguments that cannot work are refused before anything slow."""
    if (args.perplexity is None) == (args.tasks is None):
        raise ValueError("give either --tasks NAME ... or a text with --perplexity FILE")
    other, flags = ("perplexity", TEXT_FLAGS) if args.perplexity is None else ("tasks", TASK_FLAGS)
    for name in flags:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name} goes with --{other}; leave it out")
    for name in TEMPLATE_FLAGS:
        if getattr(args, name) is not None and not args.apply_chat_template:
            raise ValueError(f"--{name} needs --apply_chat_template")
    if args.limit is not None and not (0 < args.limit < 1 or args.limit >= 1 and args.limit % 1 == 0):
        raise ValueError(f"--limit is {args.limit:g}; it must be a number of questions, or a part of them below 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(f"--num_fewshot is {args.num_fewshot}; it must be 0 or above")
    window = WINDOW if args.max_seq_length is None else args.max_seq_length
    if window < 2:
        raise ValueError(f"--max_seq_length is {window}; a window needs at least 2 tokens")
    if args.stride is not None and not 1 <= args.stride <= window:
        raise ValueError(f"--stride is {args.stride}; it must be from 1 to the window of {window} tokens")
    check_counts(vars(args), "batch_size")
    check_threads(args.threads)
    if args.output_json is not None:
        require_writable(args.output_json, [args.perplexity, args.checkpoint_path])
    device = pick_device(args.device, ranks)
    parse_dtype(args.dtype)
    if args.compile:
        require_compiler(device)
    return device


def read_text_or_tasks(args: argparse.Namespace, ranks: Ranks | None) -> str | Tasks:
    """What is measured; what can go wrong here goes wrong before the long wait for the model."""
    if args.tasks is None:
        return shared(ranks, lambda: read_text(args.perplexity))
    require_harness("--tasks", "measure a --perplexity FILE")
    return load_tasks(args.tasks, args.include_path)


def measure_text(args: argparse.Namespace, engine: Engine, tokenizer: Tokenizer, text: str, facts: dict) -> dict:
    """Print the perplexity of a text; the report of it, with the facts of the run."""
    ids = checked_ids(tokenizer.encode(text), tokenizer)
    window = args.max_seq_length or min(WINDOW, engine.model.args.max_seq_length)
    began = time.perf_counter()
    result = perplexity(engine, ids, window=window, stride=args.stride, batch_size=args.batch_size or 1)
    seconds = time.perf_counter() - began
    say(f"Scored {result.tokens} of {len(ids)} tokens in {result.windows} windows: {seconds:.2f} seconds")
    print(f"perplexity: {result.perplexity:.4f}")
    return facts | {"seconds": seconds} | asdict(result)


def measure_tasks(
    args: argparse.Namespace, engine: Engine, tokenizer: Tokenizer, tasks: Tasks, facts: dict
) -> dict | None:
    """Print the harness's tables of tasks and groups; its report, in the first process of a machine only."""
    from lm_eval.utils import make_table

    from measure.harness import Adapter

    length = context_length(engine.model.args, args.max_seq_length)
    adapter = Adapter(engine, tokenizer, args.checkpoint_path, length, args.batch_size)
    options = {name: getattr(args, name) for name in ("num_fewshot", "limit", "apply_chat_template")}
    began = time.perf_counter()
    report = run_tasks(adapter, tasks, args.seed, **options)
    if report is None:
        return None
    seconds = time.perf_counter() - began
    opened = open_model(args.checkpoint_path, args.model_name, args.dequantize, args.adapter)
    specs = {str(spec) for spec in opened.table.values()}
    facts |= {"model": asdict(engine.model.args), "quantised": sorted(specs), "lm_eval": version("lm_eval")}
    print(make_table(report))
    if report.get("groups"):
        print(make_table(report, "groups"))
    say(f"Time for tasks: {seconds:.1f} seconds")
    return report | {"gpt_faster": facts | {"seconds": seconds}}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Measure how well a language model does tasks, or predicts a text.")
    where = model_flags(parser, "a .pth or .gguf file, or a folder")
    place_flags(where)
    cache_flag(where)
    budget_flag(where)
    stages_flag(where)
    text = "compile the model; pays from some hundred questions on (default: off)"
    where.add_argument("--compile", action="store_true", help=text)
    evaluation_flags(parser.add_argument_group("evaluation"))
    return parser


def evaluation_flags(group) -> None:
    add = group.add_argument
    add("--tasks", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness, such as hellaswag")
    add("--limit", type=float, help="questions of each task, or a part of them below 1 (default: all)")
    add("--num_fewshot", type=int, help="examples before each question (default: as the task says)")
    add("--include_path", metavar="DIR", help="a folder with task files of your own")
    text = "write each question as a chat message (default: plain text)"
    add("--apply_chat_template", action="store_true", help=text)
    template_flags(group)
    add("--seed", type=int, default=1234, help="of examples and samples (default: %(default)s)")
    add("--perplexity", metavar="FILE", help="score this text (UTF-8)")
    text = f"tokens in a window (default: {WINDOW} for a text, the model's context for tasks)"
    add("--max_seq_length", type=int, help=text)
    add("--stride", type=int, help="tokens from one window to the next; fewer give more context (default: the window)")
    text = "rows at a time (default: 1 for a text; for tasks chosen by their lengths, shorter ones together)"
    add("--batch_size", type=int, help=text)
    add("--output_json", metavar="PATH", help="write the result and the facts of the run")


if __name__ == "__main__":
    cli.run(main, build_parser())
