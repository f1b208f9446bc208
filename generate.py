"""One request from prompt to text, and the command line that talks."""

if __name__ == "__main__":
    import cli

    cli.quit_on_interrupt()  # before the slow imports


import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from cli import say
from engine.cache import check_fit, context_length, setup_caches, shared_prefix
from engine.compile import choose_functions, compile_step, warm_up
from engine.guess_length import check_length
from engine.request import Row, Timing, run_batch
from engine.sampling import Sampling
from engine.speculative import DraftModel, PromptLookup, Speculation, draft_one_token, verify
from flags import check_threads, number_or_text, say_device
from layers.quantized import GROUPSIZE_HELP, MODES, quant_spec
from measure.machine import run_facts
from measure.speed import by_each, rate, report, summarise
from model import Transformer
from ranks import Ranks, init_tp, shared, speaks
from text.prompts import IdTokenizer, checked_ids, encode_prompt, read_prompt_file
from text.tokenizer import Tokenizer, load_tokenizer, require_same_vocabulary
from weights.checkpoint import DEFAULT_CHECKPOINT, load_model, open_model, random_model
from weights.device import DTYPES, parse_dtype, pick_device
from weights.files import atomic_path, require_writable, write_json

DEFAULT_PROMPT = "Hello, my name is"


INTERACTIVE_CONTEXT = 8192  # cache slots in interactive mode, unless --max_seq_length says otherwise


def choose_speculation(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> Speculation | None:
    """The source of proposals that was asked for, and the function that verifies them, compiled as asked."""
    if args.draft_checkpoint_path is not None:
        source = load_draft(args, model, tokenizer)
    elif args.speculate == "ngram":
        source = PromptLookup()
    else:
        return None
    return Speculation(
        source, args.speculate_k or "auto", compile_step(verify, model.device) if args.compile else verify
    )


def load_draft(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> DraftModel:
    """The draft model, checked to have the tokenizer of the model."""
    device = model.device if args.draft_device is None else pick_device(args.draft_device)  # on every rank
    path = Path(args.draft_checkpoint_path)
    draft = load_model(path, device, parse_dtype(args.dtype))
    require_same_vocabulary(tokenizer, load_tokenizer(path, draft.args.vocab_size))
    functions = choose_functions(device, False, args.compile_prefill)
    step = compile_step(draft_one_token, device) if args.compile else draft_one_token
    return DraftModel(draft, step, functions["forward"])


def write(text: str) -> None:
    print(text, end="", flush=True)


def new_row(prompt: list[int], tokenizer: Tokenizer, args: argparse.Namespace) -> Row:
    return Row(prompt, tokenizer, args.max_new_tokens, args.stop, args.ignore_eos)


def run_sample(model, tokenizer, texts, batch_size, sampling, options, args) -> Timing:
    """Encode and generate every prompt, batch by batch; one row streams, several are printed whole."""
    timing = Timing()
    began = time.perf_counter()
    prompts = shared(model.ranks, lambda: [encode_prompt(tokenizer, text, args) for text in texts])
    for begin in range(0, len(prompts), batch_size):
        rows = [new_row(prompt, tokenizer, args) for prompt in prompts[begin : begin + batch_size]]
        stream = len(prompts) == 1
        run_batch(
            model,
            rows,
            sampling,
            timing,
            began,
            (lambda _, text: write(text)) if stream else lambda *_: None,
            **options,
        )
        if stream:
            write("\n")
        for index, row in enumerate([] if stream else rows, begin):
            write(f"[row {index}]\n{row.stream.text}\n")
    return timing


def check_request(args: argparse.Namespace) -> None:
    """Raise ValueError on arguments that cannot work, before anything slow."""
    for name in ("num_samples", "max_new_tokens", "batch_size", "threads", "max_seq_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    check_threads(args.threads)
    if args.prompt is not None and args.prompt_file is not None:
        raise ValueError("--prompt and --prompt_file are both given; give one")
    if isinstance(args.prompt, int) and args.prompt < 1:
        raise ValueError(f"--prompt is {args.prompt}; a number of random tokens must be at least 1")
    if args.interactive:
        for name in ("prompt", "prompt_file", "batch_size", "output_json", "profile"):
            if getattr(args, name) is not None:
                raise ValueError(f"--interactive reads its prompts from the keyboard; leave out --{name}")
    if args.random_weights and args.checkpoint_path is not None:
        raise ValueError("--random_weights and --checkpoint_path are both given; give one")
    if args.system is not None and not (args.chat or args.interactive):
        raise ValueError("--system needs --chat or --interactive")
    if "" in args.stop:
        raise ValueError("--stop is empty; give the text that ends a row")
    if not -1 <= args.seed < 1 << 63:
        raise ValueError(f"--seed is {args.seed}; it must be from 0 to 2^63 - 1, or -1 to draw one")
    check_speculation(args)
    if args.output_json is not None:
        require_writable(args.output_json, [args.prompt_file, args.checkpoint_path, args.draft_checkpoint_path])
    if args.profile is not None:
        require_writable(trace_path(args.profile))


def check_speculation(args: argparse.Namespace) -> None:
    """Raise ValueError on arguments of speculation that cannot work."""
    if args.draft_checkpoint_path is not None and args.speculate is not None:
        raise ValueError("--draft_checkpoint_path and --speculate are both given; give one source of guesses")
    if args.draft_checkpoint_path is not None and args.random_weights:
        raise ValueError(
            "--random_weights has no tokenizer that a draft could share; leave out --draft_checkpoint_path"
        )
    if args.draft_device is not None:
        if args.draft_checkpoint_path is None:
            raise ValueError("--draft_device needs --draft_checkpoint_path")
        pick_device(args.draft_device)
    if args.speculate_k is not None:
        if not speculates(args):
            raise ValueError("--speculate_k needs --draft_checkpoint_path or --speculate ngram")
        check_length(args.speculate_k)


def trace_path(profile: str) -> str:
    return profile.removesuffix(".json") + ".json"


def load(args: argparse.Namespace, device: torch.device, ranks: Ranks | None) -> tuple[Transformer, Tokenizer]:
    dtype, path = parse_dtype(args.dtype), args.checkpoint_path
    spec = quant_spec(args.quantize, args.groupsize)
    if args.random_weights:
        model = random_model(args.random_weights, device, dtype, quantize=spec, ranks=ranks)
        return model, IdTokenizer(model.args.vocab_size)
    path = DEFAULT_CHECKPOINT if path is None else Path(path)
    model = load_model(path, device, dtype, args.model_name, spec, ranks)
    return model, load_tokenizer(path, model.args.vocab_size)


def prepare(work: Callable, args: argparse.Namespace) -> float:
    """Do the warm-up work if it is needed, saying what it waits for; the seconds of compiling."""
    if not (args.compile or args.compile_prefill):
        if speculates(args) and args.speculate_k in (None, "auto"):
            work()  # what a round costs decides how many tokens are guessed
        return 0.0
    first, later = (60, 15) if speculates(args) else (20, 5)
    say(f"Compiling: about {first} seconds the first time, about {later} from then on ...")
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    say(f"Compilation time: {seconds:.2f} seconds")
    return seconds


def main(**flags) -> None:
    """Keyword arguments are the command line's flags; `build_parser` has their defaults."""
    with init_tp() as ranks:
        answer(flags, ranks)


def answer(flags: dict, ranks: Ranks | None) -> None:
    """Everything that the command line asks for, on each rank alike."""
    args = argparse.Namespace(**flags)
    check_request(args)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    device = pick_device(args.device, ranks)
    parse_dtype(args.dtype)
    quant_spec(args.quantize, args.groupsize)
    options = choose_functions(device, args.compile, args.compile_prefill)
    if args.draft_checkpoint_path is not None:
        open_model(args.draft_checkpoint_path)  # what is wrong with it is said before the long wait for the model
    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    texts = [prompt] if args.prompt_file is None else shared(ranks, lambda: read_prompt_file(args.prompt_file))
    if args.threads:
        torch.set_num_threads(args.threads)
    seed = args.seed if args.seed >= 0 else shared(ranks, lambda: int.from_bytes(os.urandom(4), "little"))
    if args.seed < 0:
        say(f"Seed: {seed}")

    say_device(device, ranks)
    began = time.perf_counter()
    model, tokenizer = load(args, device, ranks)
    load_s = time.perf_counter() - began
    say(f"Time to load model: {load_s:.2f} seconds")
    options["speculation"] = speculation = choose_speculation(args, model, tokenizer)
    context = context_length(model, args.max_seq_length)
    if args.interactive:
        torch.manual_seed(seed)
        context = min(context, args.max_seq_length or INTERACTIVE_CONTEXT)
        return interactive(model, tokenizer, context, sampling, options, args)

    batch_size = args.batch_size or len(texts)
    copies = batch_size if args.prompt_file is None else 1
    samples = args.num_samples if args.prompt_file is None else 1
    lengths = [text if isinstance(text, int) else len(encode_prompt(tokenizer, text, args)) for text in texts]
    length = check_fit(max(lengths), args.max_new_tokens, context)
    setup_caches(model, min(batch_size, copies * len(texts)), length, speculation)
    texts, lengths = texts * copies, lengths * copies
    batches = [lengths[begin : begin + batch_size] for begin in range(0, len(lengths), batch_size)]
    compile_s = prepare(lambda: warm_up(model, batches, args.max_new_tokens, sampling, **options), args)

    torch.manual_seed(seed)
    timings = []
    for index in range(1, samples + 1):
        traced = args.profile and index == samples and speaks(ranks)
        profiler = torch.profiler.profile() if traced else nullcontext()
        with profiler:
            timing = run_sample(model, tokenizer, texts, batch_size, sampling, options, args)
        timings.append(timing)
        report(index, timing, model, speculation)
    if args.profile and speaks(ranks):
        with atomic_path(trace_path(args.profile)) as path:
            profiler.export_chrome_trace(str(path))
    summary = summarise(timings, model, speculation)
    say(f"Average tokens/sec: {summary['decode_tok_s'] or 0:.2f}")
    bandwidth = "of this machine" if ranks is None else "that each rank can have"
    say(f"Bandwidth {bandwidth}: {summary['measured_bandwidth_gb_s'] or 0:.1f} GB/s (measured just now)")
    say(f"Memory used{by_each(model)}: {(summary['peak_memory_gb'] or 0):.2f} GB")
    if args.output_json and speaks(ranks):
        facts = run_facts(flags, device, ranks) | {"seed": seed, "load_s": load_s, "compile_s": compile_s}
        write_json(args.output_json, facts | summary)


class Conversation:
    """The turns so far, and which ids the cache already holds, so that a turn runs only what is new."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, context: int, args: argparse.Namespace):
        self.model, self.tokenizer, self.context, self.args = model, tokenizer, context, args
        self.reset()

    def reset(self) -> None:
        system = self.args.system
        self.messages = [{"role": "system", "content": system}] if system is not None else []
        self.history: list[int] = []  # the text so far as ids, where there is no template
        self.cached: list[int] = []

    def prompt_ids(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is not None:
            ids = self.tokenizer.encode_chat([*self.messages, {"role": "user", "content": text}])
        else:
            ids = self.history + self.tokenizer.encode(text, add_special_tokens=not self.history)
        return checked_ids(ids, self.tokenizer)

    def turn(self, text: str, sampling: Sampling, options: dict) -> None:
        """Answer one message, streaming. Raises ValueError if the context is full; the conversation stays as it was."""
        began = time.perf_counter()
        ids = self.prompt_ids(text)
        room = self.context - len(ids)
        if room < 1:
            raise ValueError(
                f"the context of {self.context} tokens is full (this turn needs {len(ids)}); /reset clears it"
            )
        start = min(shared_prefix(ids, self.cached), len(ids) - 1)
        row = Row(ids, self.tokenizer, min(self.args.max_new_tokens, room), self.args.stop, self.args.ignore_eos)
        self.cached = self.cached[:start]
        timing = Timing()
        try:
            run_batch(self.model, [row], sampling, timing, began, lambda _, text: write(text), start=start, **options)
        except KeyboardInterrupt:
            say("\n[interrupted]")
        else:
            write("\n")
            cut = ""
            if row.finish_reason == "length":
                full = row.max_new_tokens == room
                cut = "; the context is full, /reset clears it" if full else f"; cut at {row.max_new_tokens} tokens"
            say(f"[{rate(timing.decode_tok_s)}, first token after {timing.time_to_first_token_s:.2f} sec{cut}]")
        if row.token_ids:  # the last one drawn has not been through the model
            self.cached = ids + row.token_ids[:-1]
            self.history = ids + row.token_ids
            answer = {"role": "assistant", "content": row.stream.text}
            self.messages += [{"role": "user", "content": text}, answer]


def read_line() -> str | None:
    """The next line typed, None at the end of the input."""
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            import readline  # noqa: F401, gives input() its line editing

            return input("> ")
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    except EOFError:
        return None


def interactive(model, tokenizer, context: int, sampling: Sampling, options: dict, args: argparse.Namespace) -> None:
    """Talk until Ctrl-D or /exit."""
    if args.system is not None and tokenizer.chat_template is None:
        raise ValueError("--system needs a chat template, and this model has none; leave it out")
    setup_caches(model, 1, context, options["speculation"])
    length = min(-(-context // 2), 64)
    prepare(lambda: warm_up(model, [[length]], context - length, sampling, **options), args)
    if tokenizer.chat_template is None:
        say("This model has no chat template: it continues your text.")
    say("Type a message. /reset clears the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer.")
    conversation = Conversation(model, tokenizer, context, args)
    while (line := shared(model.ranks, read_line)) is not None and line.strip() != "/exit":
        if line.strip() == "/reset":
            conversation.reset()
            say("[conversation cleared]")
        elif line.strip():
            try:
                conversation.turn(line, sampling, options)
            except ValueError as error:
                say(f"error: {error}")


def speculates(args: argparse.Namespace) -> bool:
    return args.speculate is not None or args.draft_checkpoint_path is not None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Generate text from a language model.")
    where = parser.add_argument_group("model")
    where.add_argument("--checkpoint_path", help=f"a .pth or .gguf file, or a folder (default: {DEFAULT_CHECKPOINT})")
    where.add_argument("--model_name", help="registry name, for a gpt-fast file that does not say what it is")
    where.add_argument("--random_weights", metavar="NAME", help="no file: a registry model with random weights")
    where.add_argument("--quantize", choices=MODES, help="round the weights of a float model while loading it")
    where.add_argument("--groupsize", type=int, help=GROUPSIZE_HELP)
    where.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    where.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    where.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    what = parser.add_argument_group("prompt")
    what.add_argument(
        "--prompt", type=number_or_text, help=f"text; an integer N means N random tokens (default: {DEFAULT_PROMPT!r})"
    )
    what.add_argument(
        "--prompt_file", metavar="FILE", help="one prompt a line, or JSON Lines with a prompt field; - is stdin"
    )
    what.add_argument("--interactive", action="store_true", help="keep a conversation at the terminal")
    what.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    what.add_argument("--system", help="system message, with --chat or --interactive")
    how = parser.add_argument_group("generation")
    how.add_argument("--num_samples", type=int, default=5, help="times to answer (default: %(default)s)")
    how.add_argument("--max_new_tokens", type=int, default=200, help="tokens at most (default: %(default)s)")
    how.add_argument("--batch_size", type=int, help="rows at a time (default: 1; with --prompt_file all)")
    how.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)"
    )
    how.add_argument(
        "--top_k", type=int, default=200, help="draw from the k likeliest; 0 is off (default: %(default)s)"
    )
    how.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest that reach p (default: off)")
    how.add_argument("--min_p", type=float, default=0.0, help="drop those below p times the likeliest (default: off)")
    how.add_argument("--seed", type=int, default=1234, help="-1 draws one and prints it (default: %(default)s)")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    how.add_argument("--ignore_eos", action="store_true", help="go on after end-of-text")
    how.add_argument("--max_seq_length", type=int, help="context in tokens (default: the model's)")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--compile", action="store_true", help="compile the decoding step")
    speed.add_argument("--compile_prefill", action="store_true", help="compile the prefill too")
    speed.add_argument("--profile", metavar="PATH", help="write a Chrome trace of the last sample to PATH.json")
    speed.add_argument("--output_json", metavar="PATH", help="write texts, token ids and timings")
    guess = parser.add_argument_group(
        "speculation", "guess tokens ahead and check them in one go; the text is the same"
    )
    guess.add_argument("--draft_checkpoint_path", metavar="PATH", help="a smaller model that guesses; same tokenizer")
    guess.add_argument("--draft_device", help="where it runs (default: where the model does)")
    guess.add_argument(
        "--speculate", choices=["ngram"], help="guess what followed the same words before; no draft model"
    )
    guess.add_argument(
        "--speculate_k",
        type=number_or_text,
        metavar="K",
        help="tokens to guess at a time, or auto: 1 to 8, as long as it pays (default: auto)",
    )
    return parser


if __name__ == "__main__":
    cli.run(main, build_parser())
