"""How well a model predicts a text: perplexity, and the command line that measures it."""

if __name__ == "__main__":
    import command_line

    command_line.quit_on_interrupt()  # before the slow imports

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import DEFAULT_CHECKPOINT, DTYPES, load_model, parse_dtype, pick_device, require_writable, write_json
from decoding import PREFILL_CHUNK
from generate import check_threads, checked_ids, context_length, run_facts, say, setup_caches
from model import Transformer
from tokenizer import load_tokenizer
from tp import Ranks, full_logits, init_tp, shared, speaks

LOGIT_BYTES = 400_000_000  # at most, for the logits of one forward and what is computed from them


@dataclass(frozen=True)
class Perplexity:
    """What a text scored. perplexity is exp(nll)."""

    perplexity: float
    nll: float  # mean negative log-likelihood of the scored tokens, in nats
    tokens: int  # scored
    windows: int


class Window(NamedTuple):
    """Tokens `begin` to `end` of a text, of which those from `first` on are scored."""

    begin: int
    first: int
    end: int


def perplexity(
    model: Transformer, ids: list[int], *, window: int, stride: int | None = None, batch_size: int = 1
) -> Perplexity:
    """Perplexity per token of a text, read in windows of `window` tokens that begin `stride` (None: window) apart.

    Each token is scored at most once, in the first window that holds context for it. Replaces the model's caches.
    Raises ValueError on sizes that do not fit each other or the model, a text of one token, or logits that are NaN.
    """
    check_sizes(window, stride, batch_size)
    windows = split(len(ids), context_length(model, window), stride or window)
    if not windows:
        raise ValueError(f"the text is too short (tokens: {len(ids)}); the first is not scored, so 2 are needed")
    n_tokens = sum(end - first for _, first, end in windows)
    text = torch.tensor(ids, device=model.device)
    setup_caches(model, min(batch_size, len(windows)), min(window, len(ids)))
    total = 0.0
    with tqdm(total=n_tokens, desc="Scoring", unit="token", disable=None, leave=False) as progress:
        for batch in batches(windows, batch_size):
            tokens = torch.stack([text[begin:end] for begin, _, end in batch])
            nll = token_nll(model, tokens, batch[0].first - batch[0].begin)
            total += nll.sum().item()
            progress.update(nll.numel())
    mean = total / n_tokens
    if math.isnan(mean):
        raise ValueError("the model's logits are NaN; use --dtype float32, or another checkpoint")
    value = torch.tensor(mean, dtype=torch.float64).exp().item()  # math.exp would overflow
    return Perplexity(value, mean, n_tokens, len(windows))


def split(n_tokens: int, size: int, stride: int) -> list[Window]:
    """The windows of a text that score at least one token: of those no earlier one scored, and never their first."""
    windows, done = [], 0
    for begin in range(0, n_tokens, stride):
        first, end = max(done, begin + 1), min(begin + size, n_tokens)
        if first < end:
            windows.append(Window(begin, first, end))
        done = end
    return windows


def batches(windows: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Neighbouring windows of one length that score as many tokens, at most batch_size together."""
    for _, alike in groupby(windows, lambda window: (window.end - window.begin, window.first - window.begin)):
        while batch := list(islice(alike, batch_size)):
            yield batch


@torch.inference_mode()
def token_nll(model: Transformer, tokens: Tensor, first: int) -> Tensor:  # tokens [B, S] -> [B, S - first] float32
    """-log p, in nats, of the tokens from column `first` (1 or above) on, each given all before it in its row.

    The rows go through the cache in chunks, as a prompt does, which bounds logits, mask and activations.
    """
    n_rows, length = tokens.shape
    element = 10  # bytes: bfloat16 logits, and in float32 they and their log-softmax
    size = max(1, min(PREFILL_CHUNK, LOGIT_BYTES // (element * n_rows * model.args.vocab_size)))
    scores = []
    for begin in range(0, length - 1, size):
        end = min(begin + size, length - 1)
        skip = max(first - 1 - begin, 0)  # columns that are only context
        pos = torch.arange(begin, end, device=tokens.device).repeat(n_rows, 1)
        logits = model(tokens[:, begin:end], pos, rows=pos[:, skip:] - begin, slots=model.slots[:end])
        logits = full_logits(model, logits)
        targets = tokens[:, begin + 1 : end + 1][:, skip:]
        nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        scores.append(nll.view(targets.shape))
    return torch.cat(scores, dim=1)


# ---------------------------------------------------------------- command line


def check_sizes(window: int, stride: int | None, batch_size: int) -> None:
    """Raise ValueError on numbers that cannot work with any model."""
    if window < 2:
        raise ValueError(f"--max_seq_length is {window}; a window needs at least 2 tokens, one to score the other")
    if stride is not None and not 1 <= stride <= window:
        raise ValueError(f"--stride is {stride}; it must be from 1 to the window of {window} tokens")
    if batch_size < 1:
        raise ValueError(f"--batch_size is {batch_size}; it must be at least 1")


def check_request(args: argparse.Namespace) -> None:
    """Raise ValueError on arguments that cannot work, before anything slow."""
    if args.perplexity is None:
        raise ValueError("there is nothing to measure; give a text with --perplexity FILE")
    check_sizes(args.max_seq_length, args.stride, args.batch_size)
    check_threads(args.threads)
    if args.output_json is not None:
        require_writable(args.output_json, [args.perplexity, args.checkpoint_path])


def read_text(path: str) -> str:
    """The text in a file. Raises ValueError if it cannot be read, is not UTF-8 or is empty."""
    try:
        text = Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"the text {path} is not UTF-8: byte {error.start} is {byte:#x}") from None
    if not text:
        raise ValueError(f"the text {path} is empty")
    return text


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
    text = shared(ranks, lambda: read_text(args.perplexity))
    if args.threads:
        torch.set_num_threads(args.threads)

    say(f"Using device={device}")
    began = time.perf_counter()
    model = load_model(args.checkpoint_path, device, dtype, args.model_name, ranks=ranks)
    tokenizer = load_tokenizer(args.checkpoint_path, model.args.vocab_size)
    load_s = time.perf_counter() - began
    say(f"Time to load model: {load_s:.2f} seconds")
    ids = checked_ids(tokenizer.encode(text), tokenizer)

    began = time.perf_counter()
    result = perplexity(model, ids, window=args.max_seq_length, stride=args.stride, batch_size=args.batch_size)
    seconds = time.perf_counter() - began
    say(f"Scored {result.tokens} of {len(ids)} tokens in {result.windows} windows: {seconds:.2f} seconds")
    print(f"perplexity: {result.perplexity:.4f}")
    if args.output_json and speaks(ranks):
        facts = run_facts(flags, device, ranks) | {"load_s": load_s, "seconds": seconds}
        write_json(args.output_json, facts | asdict(result))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure how well a language model predicts a text.")
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
    what = parser.add_argument_group("evaluation")
    what.add_argument("--perplexity", metavar="FILE", help="score this text (UTF-8)")
    what.add_argument("--max_seq_length", type=int, default=512, help="tokens in a window (default: %(default)s)")
    what.add_argument(
        "--stride", type=int, help="tokens from one window to the next; fewer give more context (default: the window)"
    )
    what.add_argument("--batch_size", type=int, default=1, help="windows at a time (default: %(default)s)")
    what.add_argument("--output_json", metavar="PATH", help="write the result and the facts of the run")
    return parser


if __name__ == "__main__":
    command_line.run(main, build_parser())
