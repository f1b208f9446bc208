"""Generate text from a language model, or talk with it at the terminal."""

if __name__ == "__main__":
    import cli

    cli.begin()

import argparse
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import cli
from answers import Answers, Row, batches_of, check_logits, limits_of, logits_flags, needs_tasks, read_processors
from cli import say, write
from engine.cache import check_fit, context_length
from engine.compile import require_compiler
from engine.conversation import Conversation
from engine.engine import Engine, build_engine
from engine.sampling import Sampling
from engine.speculation.drafters import PromptLookup
from flags import (
    NEW_TOKENS,
    PLANNED_CONTEXT,
    budget_flag,
    cache_flag,
    check_counts,
    check_threads,
    generation_flags,
    memory_budget,
    model_flags,
    number_or_text,
    place_flags,
    say_device,
    stages_flag,
    template_flags,
)
from guesses import check_speculation, choose_speculation, speculates, speculation_flags
from interactive import talk
from layers.quantized import GROUPSIZE_HELP, MODES, quant_spec
from measure.machine import run_facts
from measure.speed import report, say_summary, summarise
from ranks import Ranks, init_tp, shared, speaks
from serving.scheduler import Scheduler
from text.chat import start_rendering
from text.files import require_utf8
from text.prompts import IdTokenizer, encode_prompt, has_standard_input, read_prompt_file, read_standard_input
from text.results import Results
from text.tokenizer import Tokenizer, load_tokenizer
from weights.checkpoint import DEFAULT_CHECKPOINT, find_checkpoint, load_model, open_model, random_model
from weights.device import parse_cache_dtype, parse_dtype, pick_device
from weights.files import atomic_path, require_writable

DEFAULT_PROMPT = "Hello, my name is"
INTERACTIVE_CONTEXT = 8192  # cache slots in interactive mode, unless --max_seq_length says otherwise


def main(**flags) -> None:
    """Keyword arguments are the command line's flags; `build_parser` has their defaults."""
    with init_tp(flags["pipeline_stages"]) as ranks:
        args = argparse.Namespace(**flags)
        if args.max_new_tokens is None and not args.interactive:
            args.max_new_tokens = NEW_TOKENS
        sampling, device = check_run(args, ranks)
        prompts, results = shared(ranks, lambda: read_prompts(args))
        if results is not None and not prompts:
            return say(f"Nothing to do: {args.output_jsonl} has an answer to every prompt")
        seed = choose_seed(args.seed, ranks)
        if args.threads:
            torch.set_num_threads(args.threads)
        say_device(device, ranks)
        if (args.chat or args.interactive) and speaks(ranks):
            start_rendering()
        began = time.perf_counter()
        engine, tokenizer = load(args, device, ranks)
        facts = run_facts(vars(args), device, ranks) | {"seed": seed, "load_s": time.perf_counter() - began}
        say(f"Time to load model: {facts['load_s']:.2f} seconds")
        engine.speculation = choose_speculation(args, model_path(args), engine.model, tokenizer)
        torch.manual_seed(seed)
        if args.interactive:
            converse(engine, tokenizer, sampling, args)
        else:
            answer(engine, tokenizer, sampling, prompts, results, args, facts)


# ---------------------------------------------------------------- what is asked for


def check_run(args: argparse.Namespace, ranks: Ranks | None) -> tuple[Sampling, torch.device]:
    """How tokens are drawn, and where; what is wrong with the flags is said before anything slow."""
    check_request(args)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    device = pick_device(args.device, ranks)
    check_speculation(args, model_path(args), device, ranks)
    parse_dtype(args.dtype)
    quant_spec(args.quantize, args.groupsize)
    if args.compile or args.compile_prefill:
        require_compiler(device)
    if args.draft_checkpoint_path is not None:
        open_model(args.draft_checkpoint_path)
    return sampling, device


def check_request(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot work, before anything slow."""
    counts = ("num_samples", "max_new_tokens", "batch_size", "threads", "max_seq_length", "random_prompt")
    check_counts(vars(args), *counts)
    check_threads(args.threads)
    if args.interactive:
        for name in ("batch_size", "output_json", "output_jsonl", "profile"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} does not go with --interactive; leave it out")
    check_logits(args)
    if args.output_jsonl is not None and args.prompt_file is None:
        raise ValueError("--output_jsonl needs --prompt_file; for a single prompt use --output_json")
    if args.random_weights and args.checkpoint_path is not None:
        raise ValueError("--random_weights and --checkpoint_path are both given; give one")
    others = (args.random_weights, args.draft_checkpoint_path, args.speculate == "mtp")
    if args.memory_budget is not None and any(others):
        what = "--random_weights, draft models and --speculate mtp"
        raise ValueError(f"--memory_budget goes with one model in a file; leave out {what}")
    if args.random_weights and (args.dequantize or args.adapter is not None):
        raise ValueError("--random_weights are floats of no trained model; leave out --dequantize and --adapter")
    for name in ("system", "chat_template", "template_vars", "hide_thinking"):
        if getattr(args, name) not in (None, False) and not (args.chat or args.interactive):
            raise ValueError(f"--{name} needs --chat or --interactive")
    require_utf8(args.system or "", "--system")
    require_utf8("".join(args.stop), "--stop")
    if "" in args.stop:
        raise ValueError("--stop is empty; give the text that ends a row")
    if not -1 <= args.seed < 1 << 63:
        raise ValueError(f"--seed is {args.seed}; it must be from 0 to 2^63 - 1, or -1 to draw one")
    inputs = [args.prompt_file, model_path(args), args.draft_checkpoint_path]
    if args.output_json is not None:
        require_writable(args.output_json, inputs)
    if args.output_jsonl is not None:
        if args.output_jsonl == "-" or (os.path.exists(args.output_jsonl) and not os.path.isfile(args.output_jsonl)):
            raise ValueError(f"--output_jsonl is {args.output_jsonl}; it must be a file, which a second run reads")
        require_writable(args.output_jsonl, [*inputs, args.output_json])
    if args.profile is not None:
        require_writable(trace_path(args.profile))


def model_path(args: argparse.Namespace) -> Path:
    return Path(args.checkpoint_path or find_checkpoint(DEFAULT_CHECKPOINT))


def trace_path(profile: str) -> str:
    return profile.removesuffix(".json") + ".json"


def read_prompts(args: argparse.Namespace) -> tuple[dict[int, str | int], Results | None]:
    """The prompts by number from 1, texts or numbers of random tokens; of --output_jsonl, those not yet answered."""
    if args.interactive:
        return {}, None
    if args.prompt_file is None:
        return {1: read_prompt(args)}, None
    prompts = read_prompt_file(args.prompt_file)
    if args.output_jsonl is None:
        return prompts, None
    results = Results(args.output_jsonl, prompts)
    return results.missing, results


def read_prompt(args: argparse.Namespace) -> str | int:
    """The single prompt."""
    if args.random_prompt is not None:
        return args.random_prompt
    if args.prompt is None:
        return has_standard_input() and read_standard_input() or DEFAULT_PROMPT
    if args.prompt == "-":
        return read_standard_input()
    prompt = args.prompt if args.chat else number_or_text(args.prompt)
    if isinstance(prompt, int):
        if prompt < 1:
            raise ValueError(f"--prompt is {prompt}; a number of random tokens must be at least 1")
        say(f"--prompt {prompt} means {prompt} random tokens, as --random_prompt does; with --chat it is text")
    return prompt


def choose_seed(seed: int, ranks: Ranks | None) -> int:
    if seed < 0:
        seed = shared(ranks, lambda: int.from_bytes(os.urandom(4), "little"))
        say(f"Seed: {seed}")
    return seed


# ---------------------------------------------------------------- the engine


def load(args: argparse.Namespace, device: torch.device, ranks: Ranks | None) -> tuple[Engine, Tokenizer]:
    dtype, spec = parse_dtype(args.dtype), quant_spec(args.quantize, args.groupsize)
    if args.random_weights:
        model = random_model(args.random_weights, device, dtype, quantize=spec, ranks=ranks)
        tokenizer = IdTokenizer(model.args.vocab_size)
    else:
        path = model_path(args)
        sizes = (args.batch_size, INTERACTIVE_CONTEXT if args.interactive else PLANNED_CONTEXT)
        budget = memory_budget(args, path, device, ranks, *sizes, speculates(args))
        how = {"dequantize": args.dequantize, "adapter": args.adapter, "budget": budget}
        model = load_model(path, device, dtype, args.model_name, spec, ranks, **how)
        tokenizer = load_tokenizer(path, model.args.vocab_size, args.chat_template, args.template_vars)
        if tokenizer.templates and not args.chat and not args.interactive:
            say("This model has a chat template: with --chat it answers, without it continues the text")
    model.cache_dtype = parse_cache_dtype(args.cache_dtype)
    return build_engine(model, args.compile, args.compile_prefill), tokenizer


def prepare(warm_up: Callable[[], None], engine: Engine, args: argparse.Namespace) -> float:
    """Warm up if that is needed, saying what it waits for; the seconds of compiling."""
    if not (args.compile or args.compile_prefill):
        if speculates(args) and args.speculate_k in (None, "auto"):
            warm_up()  # what a round costs decides how many tokens are guessed
        return 0.0
    first, later = (60, 15) if speculates(args) else (20, 5)
    timed = f"about {first} seconds the first time, about {later} from then on"
    say(f"Compiling: {timed if engine.model.device.type == 'cpu' else 'some minutes the first time'} ...")
    began = time.perf_counter()
    warm_up()
    seconds = time.perf_counter() - began
    say(f"Compilation time: {seconds:.2f} seconds")
    return seconds


# ---------------------------------------------------------------- prompts and their answers


def answer(
    engine: Engine,
    tokenizer: Tokenizer,
    sampling: Sampling,
    prompts: dict[int, str | int],
    results: Results | None,
    args: argparse.Namespace,
    facts: dict,
) -> None:
    """Answer every prompt, as often as asked, and report; `facts` are what the report says of the run."""
    ranks, context = engine.model.ranks, context_length(engine.model.args, args.max_seq_length)
    batches, scheduler = plan(engine, tokenizer, prompts, args, context)
    limits, seed = limits_of(args, tokenizer, context), facts["seed"]
    how = (scheduler, read_processors(args, tokenizer, engine.model), args.logprobs)
    answers = Answers(engine, tokenizer, limits, sampling, batches, seed, *how, results if speaks(ranks) else None)
    facts["compile_s"] = prepare(answers.warm_up, engine, args)
    torch.manual_seed(seed)
    try:
        run_samples(answers, args)
    except (KeyboardInterrupt, cli.Terminated):
        if args.output_json is not None:
            with cli.undisturbed():
                answers.write_report(args.output_json, facts | summarise(answers.timings, engine))
        raise
    summary = summarise(answers.timings, engine)
    say_summary(summary, engine)
    if args.output_json is not None:
        answers.write_report(args.output_json, facts | summary)


def plan(
    engine: Engine, tokenizer: Tokenizer, prompts: dict[int, str | int], args: argparse.Namespace, context: int
) -> tuple[list[list[Row]], Scheduler | None]:
    """The rows in batches, for which the engine then has a cache, or for a scheduler."""
    ranks, texts = engine.model.ranks, prompts.values()
    # a number of random tokens is checked before they are drawn
    check_fit(max(text if isinstance(text, int) else 0 for text in texts), args.max_new_tokens, context)
    encoded = shared(ranks, lambda: [encode_prompt(tokenizer, text, args.chat, args.system) for text in texts])
    length = check_fit(max(map(len, encoded)), args.max_new_tokens, context)
    rows = list(map(Row, prompts, texts, encoded))
    if args.prompt_file is None:  # a single prompt fills the batch, made only where the cache has memory for it
        n_rows = args.batch_size or 1
        scheduler = Scheduler(engine, n_rows, length) if needs_tasks(args) else None
        if scheduler is None:
            engine.reserve(n_rows, length)
        return [[replace(rows[0], number=number) for number in range(1, n_rows + 1)]], scheduler
    n_rows = min(args.batch_size or shared(ranks, lambda: engine.rows_that_fit(length)), len(rows))
    if engine.speculation is None or isinstance(engine.speculation.drafter, PromptLookup):
        return [rows], Scheduler(engine, n_rows, length)
    engine.reserve(n_rows, length)
    return batches_of(rows, n_rows), None


def run_samples(answers: Answers, args: argparse.Namespace) -> None:
    """Answer every prompt as often as asked, and trace the last time if asked."""
    n_samples, engine = args.num_samples if args.prompt_file is None else 1, answers.engine
    profiles = args.profile is not None and speaks(engine.model.ranks)
    for index in range(1, n_samples + 1):
        if n_samples > 1:
            write(f"[sample {index}]\n")
        with torch.profiler.profile() if profiles and index == n_samples else nullcontext() as profiler:
            answers.sample()
        report(index, answers.timings[-1], engine)
    if profiles:
        with atomic_path(trace_path(args.profile)) as path:
            profiler.export_chrome_trace(str(path))
            if not path.exists():  # all that the profiler tells of a full disk
                raise OSError("the disk is full")


def converse(engine: Engine, tokenizer: Tokenizer, sampling: Sampling, args: argparse.Namespace) -> None:
    """Make room for a conversation, and keep it until the person ends it."""
    if args.system is not None or args.chat_template is not None or tokenizer.templates:
        tokenizer.require_template()
    context = context_length(engine.model.args, args.max_seq_length)
    context = min(context, args.max_seq_length or INTERACTIVE_CONTEXT)
    engine.reserve(1, context)
    length = min(-(-context // 2), 64)
    prepare(partial(engine.warm_up, [[length]], context - length, sampling), engine, args)
    limits = limits_of(args, tokenizer, context)
    talk(Conversation(engine, tokenizer, limits, sampling, args.system), [model_path(args)])


# ---------------------------------------------------------------- flags


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Generate text from a language model.")
    where = model_flags(parser, "a .pth or .gguf file, or a folder", default=None)
    where.add_argument("--random_weights", metavar="NAME", help="no file: a registry model with random weights")
    where.add_argument("--quantize", choices=MODES, help="round the weights of a float model while loading it")
    where.add_argument("--groupsize", type=int, help=GROUPSIZE_HELP)
    place_flags(where)
    cache_flag(where)
    budget_flag(where)
    stages_flag(where)
    prompt_flags(parser.add_argument_group("prompt"))
    generation = parser.add_argument_group("generation")
    generation_flags(generation)
    logits_flags(generation)
    speed_flags(parser.add_argument_group("speed"))
    text = "guess tokens ahead and check them in one go; the text is the same"
    speculation_flags(parser.add_argument_group("speculation", text))
    return parser


def prompt_flags(group) -> None:
    one = group.add_mutually_exclusive_group()
    text = f"text; - reads standard input, as a pipe or file there does without a prompt (default: {DEFAULT_PROMPT!r})"
    one.add_argument("--prompt", metavar="TEXT", help=text)
    text = "one prompt a line, JSON Lines with a prompt field, or a JSON array; - is standard input"
    one.add_argument("--prompt_file", metavar="FILE", help=text)
    one.add_argument("--random_prompt", type=int, metavar="N", help="N random tokens, for timing")
    one.add_argument("--interactive", action="store_true", help="keep a conversation at the terminal")
    group.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    group.add_argument("--system", help="system message, with --chat or --interactive")
    template_flags(group)
    group.add_argument("--hide_thinking", action="store_true", help="print answers without the thoughts before them")


def speed_flags(group) -> None:
    group.add_argument("--compile", action="store_true", help="compile the decoding step")
    group.add_argument("--compile_prefill", action="store_true", help="compile the prefill too")
    group.add_argument("--profile", metavar="PATH", help="write a Chrome trace of the last sample to PATH.json")
    group.add_argument("--output_json", metavar="PATH", help="write prompts, texts, token ids and timings; - is stdout")
    text = "append a line for each prompt of --prompt_file that ends; a second run goes on where the first stopped"
    group.add_argument("--output_jsonl", metavar="PATH", help=text)


if __name__ == "__main__":
    cli.run(main, build_parser())
