"""Write a checkpoint whose decoding skips small inputs, or count which experts and neurons a text uses."""

if __name__ == "__main__":
    import cli

    cli.begin()

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import cli
from cli import say
from compress.activations import (
    PROJECTIONS,
    find_thresholds,
    projection_sizes,
    require_projections,
    set_thresholds,
    skippable_,
    with_thresholds,
)
from compress.calibration import calibration_text, calibration_windows
from compress.hotness import count_uses, in_words
from engine.engine import Engine, generate
from engine.sampling import Sampling
from flags import check_counts, check_threads, model_flags, place_flags
from measure.perplexity import WINDOW, perplexity
from ranks import init_tp
from text.prompts import ids_of, ids_to_measure
from text.tokenizer import tokenizer_saved
from weights.checkpoint import load_model, open_model, read_tensors, save_checkpoint
from weights.device import parse_dtype, pick_device
from weights.files import require_space, require_writable, size_text, write_json
from weights.layout import ModelFile
from weights.tiers.place import beside
from weights.tiers.placement import fingerprint

MOST = 0.9  # of a block's weights that can be skipped
TIMED = 48  # tokens that are decoded to time it


def main(**flags) -> None:
    """Keyword arguments are the command line's flags; `build_parser` has their defaults."""
    args = argparse.Namespace(**flags)
    with init_tp() as ranks:  # so that one of them says it
        if ranks is not None:
            raise ValueError("sparsify without torchrun, in one process: the file serves any number of ranks")
    check_request(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    MODES[args.mode](open_job(args), args)


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Job:
    """A model's file, and the text to look at it with."""

    path: Path
    source: ModelFile
    windows: Tensor  # [n, S]
    device: torch.device
    dtype: torch.dtype
    target: Path


def check_request(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot work, before anything slow."""
    if args.mode == "activations" and args.sparsity is None:
        raise ValueError("--mode activations needs --sparsity, such as 0.4")
    if args.sparsity is not None and not 0 <= args.sparsity <= MOST:
        raise ValueError(f"--sparsity is {args.sparsity}; it must be from 0 to {MOST}, and 0.25 to 0.5 is common")
    for name in ("sparsity", "output", "check"):
        if args.mode == "profile" and getattr(args, name) is not None:
            raise ValueError(
                f"--{name} is for --mode activations; --mode profile writes a profile beside the checkpoint"
            )
    check_counts(vars(args), "calibration_limit", "calibration_seq_length")
    check_threads(args.threads)


def open_job(args: argparse.Namespace) -> Job:
    path, device, dtype = Path(args.checkpoint_path), pick_device(args.device), parse_dtype(args.dtype)
    source = open_model(path, args.model_name, args.dequantize, args.adapter)
    if source.beside:
        raise ValueError(f"{args.adapter} goes beside codes, which no file holds; leave it out, or give --dequantize")
    if any(spec.threshold is not None for spec in source.table.values()):
        raise ValueError(f"{path} skips inputs already; start from the file that it was made of")
    if args.mode == "profile" and source.table:
        raise ValueError(f"{path} is quantised; give --dequantize, and its profile stands beside it")
    target = Path(args.output) if args.output else default_target(path, args)
    inputs = [path, path / "model.pth", *(Path(each) for each in (args.calibration_file, args.check) if each)]
    if target.exists() and target.resolve() in (each.resolve() for each in inputs):
        raise ValueError(f"cannot write {target}: this run reads it")
    require_writable(target)
    length, context = args.calibration_seq_length, source.args.max_seq_length
    if length > context:
        raise ValueError(f"--calibration_seq_length {length} is more than the model's context of {context}")
    windows = calibration_windows(
        ids_of(calibration_text(args.calibration_file), path, source.args.vocab_size),
        limit=args.calibration_limit, seq_length=length, needed=length, seed=args.seed,
    )  # fmt: skip
    return Job(path, source, windows, device, dtype, target)


def default_target(path: Path, args: argparse.Namespace) -> Path:
    """Beside the checkpoint, called after it and what was done."""
    if args.mode == "profile":
        return beside(path, "profile.json")
    folder, stem = (path, "model") if path.is_dir() else (path.parent, path.stem)
    return folder / f"{stem}_sparse-{args.sparsity:g}.pth"


def load(job: Job, args: argparse.Namespace, path: Path | None = None, apart: bool = False):
    """The model in the source, or in another file that was made of it. apart: see `layers.fastest.pack_`."""
    if path is not None:
        return load_model(path, job.device, job.dtype)
    how = {"dequantize": args.dequantize, "adapter": args.adapter, "apart": apart}
    return load_model(job.path, job.device, job.dtype, args.model_name, **how)


# ---------------------------------------------------------------- modes


def activations(job: Job, args: argparse.Namespace) -> None:
    """Find thresholds, write the checkpoint that has them, and say what they cost and bring."""
    require_projections(job.source.args)
    require_space(job.target, job.source.layout.bytes(job.dtype))
    ids = None if args.check is None else ids_to_measure(args.check, job.path, job.source.args.vocab_size)
    model = load(job, args, apart=True)
    layers = skippable_(model)
    found, uniform = find_thresholds(model, projection_sizes(job.source.layout), job.windows, args.sparsity)
    write(job, found)
    forms = {"all inputs": [[0.0] * len(PROJECTIONS)] * len(found), "uniform": uniform, "found": found}
    quality = {} if ids is None else {name: perplexity_of(model, layers, each, ids) for name, each in forms.items()}
    del model, layers
    report(quality, decode_rates(job, args), args.sparsity)


def write(job: Job, thresholds: list[list[float]]) -> None:
    table = with_thresholds(job.source.table, thresholds)
    tensors = read_tensors(job.source, torch.device("cpu"), job.dtype, "Copying")
    with tokenizer_saved(job.source.gguf, job.target.parent):
        save_checkpoint(job.target, job.source.args, tensors, table)
    say(f"Wrote {job.target}: {size_text(job.target.stat().st_size)}")


def perplexity_of(model, layers: list, thresholds: list[list[float]], ids: list[int]) -> float:
    """Of a model that skips in every token, as decoding does."""
    set_thresholds(layers, thresholds)
    return perplexity(Engine(model), ids, window=min(WINDOW, model.args.max_seq_length)).perplexity


def decode_rates(job: Job, args: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second of the source and of what was written, not compiled, in turns."""
    engines = [Engine(load(job, args, path)) for path in (None, job.target)]
    prompt = job.windows[0, :8].tolist()
    n_new = min(TIMED, job.source.args.max_seq_length - len(prompt))
    rates: list[list[float]] = [[], []]
    for _ in range(5):
        for engine, each in zip(engines, rates, strict=True):
            began = time.perf_counter()
            for _ in generate(engine, [prompt], n_new, Sampling(temperature=0)):
                pass
            each.append(n_new / (time.perf_counter() - began))
    return tuple(statistics.median(each) for each in rates)


def report(quality: dict[str, float], rates: tuple[float, float], sparsity: float) -> None:
    """The table at the end, on standard output."""
    print(f"{'':12}{'all inputs':>14}{'uniform':>14}{f'sparse {sparsity:g}':>14}")
    if quality:
        whole, uniform, found = quality.values()
        print(f"{'perplexity':12}{whole:14.4f}{uniform:14.4f}{found:14.4f}   {100 * (found / whole - 1):+.2f} %")
    print(f"{'decode tok/s':12}{rates[0]:14.1f}{'':14}{rates[1]:14.1f}   {rates[1] / rates[0]:.2f} x")


def profile(job: Job, args: argparse.Namespace) -> None:
    """Count the uses of experts and neurons, write them beside the checkpoint, and say whether hotness can pay."""
    found = count_uses(load(job, args, apart=True), job.windows)
    write_json(job.target, {"model": fingerprint(job.source.args), "tokens": job.windows.numel(), **found})
    say(f"Wrote {job.target}: {job.windows.numel()} tokens")
    for kind, layers in found.items():
        if layers:
            print(in_words(kind, layers))


MODES = {"activations": activations, "profile": profile}


# ---------------------------------------------------------------- flags


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description="Write a model whose decoding skips small inputs of its layers, beside the one that takes all: "
        "model_sparse-0.4.pth, which every command reads like any other. Prompts of more than 16 tokens take all. Or "
        "count which experts and neurons a text uses: model.pth.profile.json."
    )
    where = model_flags(parser, "a .pth or .gguf file, or a folder")
    place_flags(where, dtype="of what is float: ")
    add = parser.add_argument_group("what is made").add_argument
    add("--mode", choices=tuple(MODES), required=True, help="skip small inputs (TEAL), or count what a text uses")
    add("--sparsity", type=float, help=f"the share of a block's weights not to read, from 0 to {MOST}")
    add("--output", metavar="PATH", help="the file to write (default: beside the model)")
    add = parser.add_argument_group("calibration").add_argument
    add("--calibration_file", metavar="FILE", required=True, help="a text (UTF-8, or JSON Lines with `text` fields)")
    add("--calibration_limit", type=int, default=4, help="windows of text (default: %(default)s)")
    add("--calibration_seq_length", type=int, default=256, help="tokens in a window (default: %(default)s)")
    add("--seed", type=int, default=1234, help="draws the windows (default: %(default)s)")
    add = parser.add_argument_group("what it cost").add_argument
    add("--check", metavar="FILE", help="measure the perplexity of this text, skipping in every token")
    return parser


if __name__ == "__main__":
    cli.run(main, build_parser())
