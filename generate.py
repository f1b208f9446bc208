"""One request from prompt to text, and the command line that talks."""

if __name__ == "__main__":
    import command_line

    command_line.quit_on_interrupt()  # before the slow imports

import argparse
import json
import os
import shutil
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from checkpoint import (
    DEFAULT_CHECKPOINT,
    DTYPES,
    GB,
    atomic_path,
    load_model,
    open_source,
    parse_dtype,
    pick_device,
    random_model,
    require_memory,
    require_writable,
    weight_bytes,
    write_json,
)
from decoding import Sampling, compile_step, decode, decode_one_token, forward_chunk, prefill, used_slots
from kernels import cpu
from model import Transformer
from qlinear import GROUPSIZE_HELP, MODES, quant_spec
from speculative import DraftModel, PromptLookup, Speculation, check_length, draft_one_token, speculate, verify
from tokenizer import TextStream, Tokenizer, load_tokenizer, require_same_vocabulary
from tp import Ranks, init_tp, shared, speaks

DEFAULT_PROMPT = "Hello, my name is"
INTERACTIVE_CONTEXT = 8192  # cache slots in interactive mode, unless --max_seq_length says otherwise


# ---------------------------------------------------------------- from prompt to ids


def generate(model: Transformer, prompts: list[list[int]], *args, **options) -> Iterator[list[list[int]]]:
    """Yield, for each row of a batch, the ids that are new since the last time. The arguments are those of `chunks`."""
    for tokens, counts in chunks(model, prompts, *args, **options):
        yield [ids[:n] for ids, n in zip(tokens, counts, strict=True)]


def chunks(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    start: int = 0,
    step: Callable = decode_one_token,
    forward: Callable = forward_chunk,
    speculation: Speculation | None = None,
) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Yield tokens [B][n] and counts [B], the first counts[b] of row b being new; max_new_tokens of each row in all.

    prompts: the ids of each row, of any lengths, of which the first `start` are in the cache. The model's caches must
    hold the longest prompt and max_new_tokens, with speculation also its look-ahead. Every round of speculation yields
    its k tokens proposed and one more. End-of-text is the caller's business: stop reading.
    """
    token, pos = prefill(model, [ids[start:] for ids in prompts], sampling, start, forward)
    if speculation is not None:  # a draft model's prefill belongs to ours
        speculation.source.begin(model, prompts, start)
    yield token.tolist(), [1] * len(prompts)
    if speculation is None:
        stream = islice(decode(model, token, pos, sampling, step), max_new_tokens - 1)
        for tokens, counts in read_behind(stream, 1 if model.device.type == "cuda" else 0):
            yield tokens.tolist(), counts.tolist()
    else:
        yield from speculate(model, prompts, token, pos, max_new_tokens - 1, sampling, speculation)


def read_behind(chunks: Iterator, distance: int) -> Iterator:
    """The same chunks, each after `distance` more have been launched, so that reading one never stalls the device."""
    launched = []
    for chunk in chunks:
        launched.append(chunk)
        if len(launched) > distance:
            yield launched.pop(0)
    yield from launched


class Row:
    """One sequence in the making: its new ids, its text so far, and why it ended."""

    def __init__(self, prompt: list[int], tokenizer: Tokenizer, max_new_tokens: int, stop: list[str], ignore_eos: bool):
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.eos_ids = frozenset() if ignore_eos else tokenizer.eos_ids
        self.stream = TextStream(tokenizer, stop)
        self.token_ids: list[int] = []
        self.rounds: list[tuple[int, int]] = []  # of speculation: tokens proposed and accepted in each
        self.finish_reason: str | None = None

    @property
    def length(self) -> int:
        """Positions it takes at most."""
        return len(self.prompt) + self.max_new_tokens

    def push(self, ids: list[int]) -> str:
        """Take new ids up to the one that ends the row; return the text that can be printed now."""
        text = ""
        for token in ids:
            if self.finish_reason:
                break
            self.token_ids.append(token)
            if token in self.eos_ids:
                self.finish_reason = "eos"
            else:
                text += self.stream.push([token])
                if self.stream.stopped:
                    self.finish_reason = "stop"
                elif len(self.token_ids) == self.max_new_tokens:
                    self.finish_reason = "length"
            if self.finish_reason:
                text += self.stream.finish()
        return text

    def to_json(self) -> dict:
        return {
            "prompt_tokens": len(self.prompt),
            "new_tokens": len(self.token_ids),
            "token_ids": self.token_ids,
            "accept_lengths": [accepted for _, accepted in self.rounds],
            "text": self.stream.text,
            "finish_reason": self.finish_reason,
        }


@dataclass
class Timing:
    """Seconds and counts of one sample; a sample of several batches adds them up."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    time_to_first_token_s: float | None = None
    prompt_tokens: int = 0
    decoded_tokens: int = 0  # without each row's first, which prefill draws
    steps: int = 0
    step_tokens: int = 0  # that the steps read, guesses too
    draft_steps: int = 0
    rows: list[Row] = field(default_factory=list)

    @property
    def decode_tok_s(self) -> float | None:
        return self.decoded_tokens / self.decode_s if self.decoded_tokens else None

    @property
    def prefill_tok_s(self) -> float:
        return self.prompt_tokens / self.prefill_s

    def to_json(self) -> dict:
        return {
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "time_to_first_token_s": self.time_to_first_token_s,
            "prefill_tok_s": self.prefill_tok_s,
            "decode_tok_s": self.decode_tok_s,
            "sequences": [row.to_json() for row in self.rows],
        }


def run_batch(
    model: Transformer, rows: list[Row], sampling: Sampling, timing: Timing, began: float, show: Callable, **options
) -> None:
    """Generate until every row has ended; show(row, text) gets each piece of text as it is made."""
    budget = max(row.max_new_tokens for row in rows)
    before = time.perf_counter()
    first = None
    for tokens, counts in chunks(model, [row.prompt for row in rows], budget, sampling, **options):
        now, proposed = time.perf_counter(), len(tokens[0]) - 1
        if first is None:
            first = now
            timing.prefill_s += now - before
            if timing.time_to_first_token_s is None:
                timing.time_to_first_token_s = now - began
        else:
            timing.steps += 1
            timing.step_tokens += len(rows) * (1 + proposed)
            timing.draft_steps += proposed
            for row, count in zip(rows, counts, strict=True):
                if options.get("speculation") and not row.finish_reason:
                    row.rounds.append((proposed, count - 1))
        for row, ids, count in zip(rows, tokens, counts, strict=True):
            text = row.push(ids[:count])
            if text:
                show(row, text)
        if all(row.finish_reason for row in rows):
            break
    timing.decode_s += now - first
    timing.prompt_tokens += sum(len(row.prompt) - options.get("start", 0) for row in rows)
    timing.decoded_tokens += sum(len(row.token_ids) - 1 for row in rows)
    timing.rows += rows


# ---------------------------------------------------------------- prompts


class IdTokenizer:
    """Stands in where random weights have no tokenizer: bytes go in as ids, ids come out as numbers."""

    bos_id, eos_ids, chat_template = None, frozenset(), None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [byte % self.vocab_size for byte in text.encode()]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        raise ValueError("random weights have no chat template; leave out --chat")

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def skips(self, token: int) -> bool:
        return False

    def byte(self, token: int) -> int | None:
        return None


def read_prompt_file(path: str) -> list[str]:
    """The prompts in a file, `-` for standard input: JSON Lines if it begins with {, else one prompt a line."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(f"cannot read the prompt file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file {path} is not UTF-8: byte {error.start} is {data[error.start]:#x}") from None
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"the prompt file {path} has no prompt in it")
    if not lines[0][1].startswith("{"):
        return [line for _, line in lines]
    return [_prompt_field(line, f"{path}, line {number}") for number, line in lines]


def _prompt_field(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    except (KeyError, TypeError):
        raise ValueError(f'{where} has no "prompt" field') from None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f'{where}: "prompt" must be a text that is not empty')
    return prompt


def chat_messages(prompt: str, system: str | None) -> list[dict]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return [*messages, {"role": "user", "content": prompt}]


def encode_prompt(tokenizer: Tokenizer, prompt: str | int, args: argparse.Namespace) -> list[int]:
    """Ids of one prompt; an integer N means N random ids. Raises ValueError on an empty one."""
    if isinstance(prompt, int):
        return torch.randint(tokenizer.vocab_size, (prompt,)).tolist()
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not valid UTF-8") from None
    if not prompt:
        raise ValueError("the prompt is empty; give a text, or a number of random tokens")
    ids = tokenizer.encode_chat(chat_messages(prompt, args.system)) if args.chat else tokenizer.encode(prompt)
    return checked_ids(ids, tokenizer)


def checked_ids(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The same ids. Raises ValueError if there are none, or one that the model does not have."""
    if not ids:
        raise ValueError("the prompt encodes to no tokens; give a longer text")
    if max(ids) >= tokenizer.vocab_size:
        raise ValueError(
            f"the prompt encodes to token {max(ids)}, and the model has {tokenizer.vocab_size}; "
            "its tokenizer files belong to another model"
        )
    return ids


# ---------------------------------------------------------------- compiling


def require_compiler(device: torch.device) -> None:
    """Raise ValueError that names the packages, if torch.compile cannot work here."""
    if device.type != "cpu":
        return
    missing = []
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # where PyTorch looks
    if shutil.which(compiler) is None:
        missing.append(f"the C++ compiler {compiler} (Debian, Ubuntu: apt-get install g++, and leave CXX unset)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python's headers (Debian, Ubuntu: apt-get install python3-dev)")
    if missing:
        raise ValueError(f"--compile on a CPU needs {' and '.join(missing)}; or leave out --compile")


@torch.inference_mode()  # as decode does: a tensor made outside would be another form
def warm_up(
    model: Transformer, batches: list[list[int]], budget: int, sampling: Sampling, step, forward, speculation=None
) -> None:
    """Call the compiled functions in every form this run will need, so that nothing compiles once text flows.

    batches: the lengths of the prompts in each. The cache slots written here are written again before anything looks
    at them.
    """
    times = 3 if model.device.type == "cuda" else 1  # a CUDA graph warms up, is captured, then replayed
    longest = [max(lengths) for lengths in batches]
    ahead = speculation.look_ahead if speculation else 0
    counts = range(min(longest) + 1, max(longest) + budget + ahead + 1)
    sizes = {len(used_slots(model, count)): count for count in counts}
    for n_rows in {len(lengths) for lengths in batches}:
        prompts = [[0] * max(longest)] * n_rows
        if forward is not forward_chunk:
            prefill(model, prompts, sampling, 0, forward)
        token = torch.zeros(n_rows, 1, dtype=torch.long, device=model.device)
        if speculation:
            speculation.source.begin(model, prompts)
        for count in sizes.values():
            if speculation:
                filled = min(count, len(model.slots) - ahead - 1)
                pos = token + filled - 1
                speculation.measure(model, token.repeat(1, 2), pos, pos + budget, filled, sampling)
            elif step is not decode_one_token:
                for _ in range(times):
                    step(model, token, token + count - 1, used_slots(model, count), sampling)


def choose_functions(device: torch.device, compile: bool, compile_prefill: bool) -> dict[str, Callable]:
    """The step and the prefill, compiled as asked."""
    if compile or compile_prefill:
        require_compiler(device)
    return {
        "step": compile_step(decode_one_token, device) if compile else decode_one_token,
        "forward": compile_step(forward_chunk, device, any_length=True) if compile_prefill else forward_chunk,
    }


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


# ---------------------------------------------------------------- memory and bandwidth


def setup_caches(model: Transformer, batch_size: int, length: int, speculation: Speculation | None = None) -> None:
    """Caches for `length` positions, and what speculation looks ahead; those of a draft model too.

    Sizes go in powers of two, so that few forms of the step are ever compiled. Raises ValueError if they do not fit, or
    a draft model's context is shorter.
    """
    models = [model]
    if speculation is not None and speculation.source.model is not None:
        models.append(speculation.source.model)
        require_context(models[-1], length)
    slots = min(max(512, 1 << (length - 1).bit_length()), max(model.args.max_seq_length, length))
    slots += 0 if speculation is None else speculation.look_ahead
    for each in models:
        args = each.args
        size = 2 * args.n_layer * batch_size * args.n_kv_head * slots * args.head_dim * each.dtype.itemsize
        what = f"the caches of {batch_size} x {slots} positions"
        require_memory(size, each.device, what, "use a smaller --max_seq_length, --max_new_tokens or --batch_size")
        each.setup_caches(batch_size, slots)


def require_context(draft: Transformer, length: int) -> None:
    """Raise ValueError if the draft model was made for fewer positions."""
    if length > draft.args.max_seq_length:
        raise ValueError(
            f"the draft's context of {draft.args.max_seq_length} is shorter than the {length} positions asked for; "
            "use a smaller --max_new_tokens or --max_seq_length, or another draft"
        )


def peak_memory(device: torch.device) -> int | None:
    """Bytes, at most, that this process has held: of the device on CUDA, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:  # ru_maxrss would count the parent's peak too
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@torch.inference_mode()
def measured_bandwidth(device: torch.device) -> float | None:
    """GB/s this machine moves: the median of five reads of 256 MiB on a CPU, of copies (read + write) on CUDA."""
    if device.type not in ("cpu", "cuda"):
        return None
    size = 256 << 20
    buffer = torch.ones(size // 8192, 4096, dtype=torch.bfloat16, device=device)
    other = torch.empty_like(buffer) if device.type == "cuda" else torch.ones(1, 4096, dtype=torch.bfloat16)
    if device.type == "cuda":
        moved, work = 2 * size, lambda: (other.copy_(buffer), torch.cuda.synchronize(device))
    elif cpu.has_bf16():
        moved, work = size, lambda: torch.ops.gpt_faster.linear_bf16(other, buffer, None)
    else:
        moved, work = size, lambda: buffer.view(torch.int64).sum()
    return moved / median_seconds(work, 5) / GB


def median_seconds(work: Callable, times: int) -> float:
    work()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# ---------------------------------------------------------------- command line


def say(*parts) -> None:
    print(*parts, file=sys.stderr, flush=True)


def say_device(device: torch.device, ranks: Ranks | None) -> None:
    say(f"Using device={device}" if ranks is None else f"Using device={device.type} on {ranks.size} ranks")


def write(text: str) -> None:
    print(text, end="", flush=True)


def _median(values) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def rate(tok_s: float | None) -> str:
    return "no tokens to time" if tok_s is None else f"{tok_s:.1f} tokens/sec"


def by_each(model: Transformer) -> str:
    return "" if model.ranks is None else " by each rank"


def report(index: int, timing: Timing, model: Transformer, speculation: Speculation | None) -> None:
    """The lines after one sample, on standard error."""
    total = timing.prefill_s + timing.decode_s
    say(
        f"Time for inference {index}: {total:.2f} sec total, {rate(timing.decode_tok_s)} decoding, "
        f"{timing.prefill_tok_s:.1f} tokens/sec prefill, first token after {timing.time_to_first_token_s:.3f} sec"
    )
    if timing.steps:
        read = bytes_read([timing], model, speculation)
        a_step = f"{read / timing.steps / GB:.3f} GB a {'round' if speculation else 'step'}"
        say(f"Bandwidth achieved{by_each(model)}: {read / timing.decode_s / GB:.1f} GB/s (weights only, {a_step})")
    if speculation is not None:
        report_acceptance(timing)


def report_acceptance(timing: Timing) -> None:
    """How many of the proposed tokens were accepted, as gpt-fast prints it, and what share of all."""
    lengths = [accepted for row in timing.rows for _, accepted in row.rounds]
    if lengths:
        shares = [lengths.count(n) / len(lengths) for n in range(max(lengths) + 1)]
        say(f"Acceptance probs: [{', '.join(f'{share:.3f}' for share in shares)}]")
        facts = acceptance([timing])
        rate = facts["acceptance_rate"]
        say(
            f"Mean Accepted: {facts['mean_accepted']:.2f}"
            + (f", {rate:.0%} of those proposed" if rate is not None else "")
        )


def acceptance(timings: list[Timing]) -> dict[str, float | None]:
    """Tokens accepted in a round on average, and accepted / proposed; None where there were none."""
    rounds = [each for timing in timings for row in timing.rows for each in row.rounds]
    proposed, accepted = (sum(column) for column in zip(*rounds, strict=True)) if rounds else (0, 0)
    return {
        "mean_accepted": accepted / len(rounds) if rounds else None,
        "acceptance_rate": accepted / proposed if proposed else None,
    }


def bytes_read(timings: list[Timing], model: Transformer, speculation: Speculation | None) -> int:
    """Bytes of weights that decoding has read: of the model in every step, of a draft model for each token it drew."""
    draft = speculation.source.model if speculation else None
    draft_size = 0 if draft is None else weight_bytes(draft)
    own = sum(each.steps * weight_bytes(model, each.step_tokens / each.steps) for each in timings if each.steps)
    return own + sum(each.draft_steps * draft_size for each in timings)


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


def check_threads(threads: int | None) -> None:
    """Raise ValueError on a number of threads that cannot be started."""
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"--threads is {threads}; this machine has {os.cpu_count()} processors")


def trace_path(profile: str) -> str:
    return profile.removesuffix(".json") + ".json"


def context_length(model: Transformer, asked: int | None) -> int:
    """Positions a row may take. Raises ValueError if more are asked for than the model was made for."""
    if asked is not None and asked > model.args.max_seq_length:
        raise ValueError(f"--max_seq_length {asked} is more than the model's context of {model.args.max_seq_length}")
    return asked or model.args.max_seq_length


def check_fit(longest: int, max_new_tokens: int, context: int) -> int:
    """The longest prompt and its budget in positions. Raises ValueError if the context does not hold them."""
    if longest + max_new_tokens > context:
        fits = max(context - longest, 0)
        advice = f"use --max_new_tokens {fits} or less" if fits else f"shorten the prompt below {context}"
        raise ValueError(
            f"the prompt's {longest} tokens and {max_new_tokens} new ones are more than the context of {context}; "
            f"{advice}"
        )
    return longest + max_new_tokens


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
        open_source(args.draft_checkpoint_path)  # what is wrong with it is said before the long wait for the model
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


def run_facts(flags: dict, device: torch.device, ranks: Ranks | None) -> dict:
    """What every report says of the run it comes from."""
    return {
        "args": flags,
        "device": str(device),
        "ranks": 1 if ranks is None else ranks.size,
        "dtype": flags["dtype"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def summarise(timings: list[Timing], model: Transformer, speculation: Speculation | None) -> dict:
    """What --output_json says of all samples together; null where something does not apply."""
    peak = peak_memory(model.device)  # before the bandwidth buffers
    read, decode_s = bytes_read(timings, model, speculation), sum(timing.decode_s for timing in timings)
    return {
        "samples": [timing.to_json() for timing in timings],
        "decode_tok_s": _median(timing.decode_tok_s for timing in timings),
        "prefill_tok_s": _median(timing.prefill_tok_s for timing in timings),
        "time_to_first_token_s": _median(timing.time_to_first_token_s for timing in timings),
        "weight_bytes_per_token": weight_bytes(model),
        "bandwidth_gb_s": read / decode_s / GB if read else None,
        "measured_bandwidth_gb_s": measured_bandwidth(model.device),
        "peak_memory_gb": peak / GB if peak else None,
        **acceptance(timings),
    }


# ---------------------------------------------------------------- interactive mode


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


def shared_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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


def number_or_text(argument: str) -> int | str:
    try:
        return int(argument)
    except ValueError:
        return argument


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
    command_line.run(main, build_parser())
