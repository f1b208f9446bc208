"""Flags that commands share, and their checks."""

import argparse
import json
import math
import os
from pathlib import Path

import torch

from cli import in_words, say
from engine.cache import planned_bytes
from engine.speculation.guess_length import look_ahead
from kernels import cpu
from measure.machine import disk_rate, measured_bandwidth
from model import ModelArgs
from ranks import Ranks
from weights.checkpoint import DEFAULT_CHECKPOINT, find_checkpoint
from weights.device import DTYPES, parse_cache_dtype, parse_dtype
from weights.files import GB
from weights.tiers.placement import MemoryBudget, parse_size

NEW_TOKENS = 200  # at most, unless --max_new_tokens says otherwise; an answer in interactive mode may fill the context

PLANNED_CONTEXT = 2048  # tokens of a row for which a plan of memory has room, unless --max_seq_length says otherwise


def model_flags(
    parser: argparse.ArgumentParser,
    checkpoint: str,
    default: Path | None = DEFAULT_CHECKPOINT,
    flag: str = "--checkpoint_path",
):
    """The group of flags that say which model is meant; `checkpoint` says what `flag` may read."""
    group = parser.add_argument_group("model")
    text = f"{checkpoint}, or OWNER/NAME in checkpoints/ (default: {DEFAULT_CHECKPOINT})"
    group.add_argument(flag, type=checkpoint_path, default=default and str(default), help=text)
    group.add_argument("--model_name", help="registry name, for a gpt-fast file that does not say what it is")
    text = "turn the codes of a quantised model into floats (default: they are kept)"
    group.add_argument("--dequantize", action="store_true", help=text)
    text = "a folder with a LoRA adapter of peft, which float weights take in, and which goes beside codes"
    group.add_argument("--adapter", type=checkpoint_path, metavar="PATH", help=text)
    return group


def checkpoint_path(argument: str) -> str:
    try:
        return str(find_checkpoint(argument))
    except OSError as error:  # a name that is too long
        raise argparse.ArgumentTypeError(in_words(error)) from None


def place_flags(group, dtype: str = "", threads: str = "") -> None:
    """Flags that say where a model runs and in what precision; the texts say more of it."""
    group.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    group.add_argument("--dtype", default="bfloat16", help=f"{dtype}{', '.join(DTYPES)} (default: %(default)s)")
    group.add_argument("--threads", type=int, help=f"CPU threads (default: PyTorch's choice{threads})")


def stages_flag(group) -> None:
    text = "under torchrun: groups of ranks that each have some of the layers, and hand rows on (default: 1)"
    group.add_argument("--pipeline_stages", type=int, metavar="N", help=text)


def cache_flag(group) -> None:
    text = "int8: keys and values in about half of the memory (default: the model's dtype)"
    group.add_argument("--cache_dtype", choices=["int8"], help=text)


def budget_flag(group) -> None:
    text = "such as 6GB or 6GiB: weights and caches in fast memory, at most; feed-forwards beyond it are computed on "
    text += "the CPU or, without a GPU, read from the disk (default: all has to fit)"
    group.add_argument("--memory_budget", type=memory_size, metavar="SIZE", help=text)


def memory_size(argument: str) -> int:
    try:
        return parse_size(argument)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def memory_budget(
    args: argparse.Namespace,
    path: str | Path,
    device: torch.device,
    ranks: Ranks | None,
    n_rows: int | None,
    length: int = PLANNED_CONTEXT,
    guesses: bool = False,
) -> MemoryBudget | None:
    """The budget asked for, with what this machine's tiers were measured to read.

    Prompts are not read yet: the caches of n_rows (1 if None) sequences are planned, of --max_seq_length or else
    `length` tokens, or of the model's context if that is less. guesses: whether --speculate_k are made ahead.
    """
    if args.memory_budget is None:
        return None
    if ranks is not None:
        raise ValueError("--memory_budget does not go with ranks yet; leave it out, or run one process")
    if device.type == "mps":
        raise ValueError("--memory_budget does not go with --device mps, which has no other memory; use --device cpu")
    dtype = parse_cache_dtype(args.cache_dtype) or parse_dtype(args.dtype)
    n_rows = (n_rows or 1) + (device.type == "cuda")  # where a scheduler has a row for padding
    length, k = args.max_seq_length or length, guesses and (args.speculate_k or "auto")

    def caches(sizes: ModelArgs) -> int:
        ahead = look_ahead(k, device, sizes.delta is not None) if k else 0
        return planned_bytes(sizes, dtype, n_rows, length, ahead)

    if not Path(path).exists():
        return MemoryBudget(args.memory_budget, caches)  # what is missing is said where it is opened
    second = None if device.type == "cpu" else torch.device("cpu")
    behind = disk_rate(Path(path)) if second is None else measured_bandwidth(second)
    return MemoryBudget(args.memory_budget, caches, second, (measured_bandwidth(device) * GB, behind * GB))


def template_flags(group) -> None:
    text = "one of the model's chat templates, by name, or a file with one (default: the model's default)"
    group.add_argument("--chat_template", metavar="NAME|FILE", help=text)
    text = 'variables of the chat template, such as {"enable_thinking": false}'
    group.add_argument("--template_vars", type=json_object, metavar="JSON", help=text)


def generation_flags(group) -> None:
    group.add_argument("--num_samples", type=int, default=5, help="times to answer (default: %(default)s)")
    text = f"tokens at most (default: {NEW_TOKENS}; with --interactive until the answer ends)"
    group.add_argument("--max_new_tokens", type=int, help=text)
    text = "rows at a time (default: 1; with --prompt_file as memory allows)"
    group.add_argument("--batch_size", type=int, help=text)
    text = "0 takes the likeliest token (default: %(default)s)"
    group.add_argument("--temperature", type=float, default=0.8, help=text)
    text = "draw from the k likeliest; 0 is off (default: %(default)s)"
    group.add_argument("--top_k", type=int, default=200, help=text)
    group.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest that reach p (default: off)")
    group.add_argument("--min_p", type=float, default=0.0, help="drop those below p times the likeliest (default: off)")
    group.add_argument("--seed", type=int, default=1234, help="-1 draws one and prints it (default: %(default)s)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--ignore_eos", action="store_true", help="go on after end-of-text")
    group.add_argument("--max_seq_length", type=int, help="context in tokens (default: the model's)")


def say_device(device: torch.device, ranks: Ranks | None) -> None:
    isa = f", isa={cpu.isa()}" if device.type == "cpu" else ""
    if ranks is None:
        return say(f"Using device={device}{isa}")
    stages = f" in {ranks.n_stage} pipeline stages" if ranks.n_stage > 1 else ""
    say(f"Using device={device.type}{isa} on {ranks.size} ranks{stages}")


def check_counts(flags: dict, *names: str) -> None:
    """Refuse a number below 1 in any of these flags that is given."""
    for name in names:
        if flags[name] is not None and flags[name] < 1:
            raise ValueError(f"--{name} is {flags[name]}; it must be at least 1")


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that cannot be started."""
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"--threads is {threads}; it must be from 1 to 1024 (processors here: {os.cpu_count()})")


def check_damping(percdamp: float) -> None:
    """Refuse a damping that does nothing, or is no number."""
    if not 0 < percdamp < math.inf:
        raise ValueError(f"--percdamp is {percdamp}; it must be above 0, and 0.01 is common")


def json_object(argument: str) -> dict:
    try:
        value = json.loads(argument)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{argument!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'{argument!r} is no JSON object; it must be like {{"enable_thinking": false}}'
        )
    return value


def number_or_text(argument: str) -> int | str:
    try:
        return int(argument)
    except ValueError:
        return argument
