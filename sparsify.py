"""Write a checkpoint that lacks weights or whole blocks, or skips small inputs; or count what a text uses."""

if __name__ == "__main__":
    import cli

    cli.begin()

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import cli
from cli import listed, say
from compress.activations import (
    Quality,
    compare_thresholds,
    find_thresholds,
    projection_sizes,
    require_projections,
    skippable_,
    with_thresholds,
)
from compress.calibration import calibration_text, calibration_windows, widest
from compress.hotness import count_uses, in_words
from compress.pruning import METHODS, by_magnitude, packed, parse_pattern, prune_, require_fit
from compress.student import block_influences, cut, require_cut, table_of
from compress.walk import require_walk
from engine.engine import Engine, generate
from engine.sampling import Sampling
from flags import check_counts, check_damping, check_threads, model_flags, place_flags
from layers.quantized import GROUPSIZE_HELP, QuantSpec, quant_spec
from measure.perplexity import WINDOW, Perplexity, perplexity
from model import ModelArgs, Transformer
from ranks import require_one_process
from text.prompts import ids_of, ids_to_measure
from text.tokenizer import tokenizer_saved
from weights.checkpoint import build, load_model, new_table, open_model, read_tensors, save_checkpoint
from weights.device import parse_dtype, pick_device
from weights.files import require_space, require_writable, size_text, write_json
from weights.layout import ModelFile
from weights.tiers.place import beside
from weights.tiers.placement import fingerprint

MOST = 0.9  # of a block's weights that can be skipped
TIMED = 48  # tokens that are decoded to time it
CPU = torch.device("cpu")


def main(**flags) -> None:
    """Keyword arguments are the command line's flags; `build_parser` has their defaults."""
    args = argparse.Namespace(**flags)
    require_one_process("sparsify")
    check_request(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    MODES[args.mode].run(open_job(args), args)


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
    ids: list[int] | None  # to measure perplexity on


def check_request(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot work, before anything slow."""
    default = build_parser().get_default
    for name in dict.fromkeys(flag for mode in MODES.values() for flag in mode.flags):
        takers = [mode for mode in MODES if name in MODES[mode].flags]
        if args.mode not in takers and getattr(args, name) != default(name):
            raise ValueError(f"--{name} is for --mode {listed(takers)}; leave it out of --mode {args.mode}")
    for name, example in NEEDED.items():
        if name in MODES[args.mode].flags and getattr(args, name) is None:
            raise ValueError(f"--mode {args.mode} needs --{name}, such as {example}")
    if args.sparsity is not None and not 0 <= args.sparsity <= MOST:
        raise ValueError(f"--sparsity is {args.sparsity}; it must be from 0 to {MOST}, and 0.25 to 0.5 is common")
    if args.pattern is not None:
        parse_pattern(args.pattern)
    quant_spec(args.quantize, args.groupsize)
    check_damping(args.percdamp)
    check_counts(vars(args), "drop", "calibration_limit", "calibration_seq_length")
    check_threads(args.threads)


def open_job(args: argparse.Namespace) -> Job:
    path, device, dtype = Path(args.checkpoint_path), pick_device(args.device), parse_dtype(args.dtype)
    source = open_model(path, args.model_name, args.dequantize, args.adapter)
    if source.beside:
        raise ValueError(f"{args.adapter} goes beside codes, which no file holds; leave it out, or give --dequantize")
    if any(spec.threshold is not None for spec in source.table.values()):
        raise ValueError(f"{path} skips inputs already; start from the file that it was made of")
    if source.table and args.mode in ("profile", *PRUNING):
        kind = "quantised" if any(spec.bits is not None for spec in source.table.values()) else "pruned"
        raise ValueError(f"{path} is {kind}; give --dequantize, or the file of floats that it was made of")
    target = Path(args.output) if args.output else default_target(path, args)
    inputs = [path, path / "model.pth", *(Path(each) for each in (args.calibration_file, args.check) if each)]
    if target.exists() and target.resolve() in (each.resolve() for each in inputs):
        raise ValueError(f"cannot write {target}: this run reads it")
    require_writable(target)
    if args.output_json is not None:
        require_writable(args.output_json, [target, *inputs])
    windows = read_windows(path, source.args, args)
    ids = None if args.check is None else ids_to_measure(args.check, path, source.args.vocab_size)
    return Job(path, source, windows, device, dtype, target, ids)


def read_windows(path: Path, sizes: ModelArgs, args: argparse.Namespace) -> Tensor:  # [n, S]
    """The windows of text to calibrate with: enough tokens for the Hessian of the widest layer, where one is made."""
    limit, length = MODES[args.mode].windows
    length = args.calibration_seq_length or min(length, sizes.max_seq_length)
    if length > sizes.max_seq_length:
        has = f"the model's context of {sizes.max_seq_length}"
        raise ValueError(f"--calibration_seq_length {length} is more than {has}")
    return calibration_windows(
        ids_of(calibration_text(args.calibration_file), path, sizes.vocab_size),
        limit=args.calibration_limit or limit,
        seq_length=length,
        needed=widest(sizes) if args.mode == "sparsegpt" else length,
        seed=args.seed,
    )


def default_target(path: Path, args: argparse.Namespace) -> Path:
    """Beside the checkpoint, called after it and what was done."""
    if args.mode == "profile":
        return beside(path, "profile.json")
    folder, stem = (path, "model") if path.is_dir() else (path.parent, path.stem)
    if args.mode in PRUNING:
        pattern, spec = str(parse_pattern(args.pattern)), quant_spec(args.quantize, args.groupsize)
        how = f"{args.mode}-{pattern.replace(':', '-')}{f'_{spec}' if spec else ''}"
    else:
        how = f"drop-{args.drop}" if args.mode == "layers" else f"sparse-{args.sparsity:g}"
    return folder / f"{stem}_{how}.pth"


def load(job: Job, args: argparse.Namespace, path: Path | None = None, apart: bool = False):
    """The model in the source, or in another file that was made of it. apart: see `layers.fastest.pack_`."""
    if path is not None:
        return load_model(path, job.device, job.dtype)
    how = {"dequantize": args.dequantize, "adapter": args.adapter, "apart": apart}
    return load_model(job.path, job.device, job.dtype, args.model_name, **how)


def save(job: Job, args: ModelArgs, tensors: dict[str, Tensor], table: dict[str, QuantSpec]) -> None:
    """Write the checkpoint and, from a GGUF file, the tokenizer."""
    with tokenizer_saved(job.source.gguf, job.target.parent):
        save_checkpoint(job.target, args, tensors, table)
    say(f"Wrote {job.target}: {size_text(job.target.stat().st_size)}")


# ---------------------------------------------------------------- weights or blocks that are taken out


def prune(job: Job, args: argparse.Namespace) -> None:
    """Prune the layers of all blocks, write the checkpoint, and say what that cost."""
    began, pattern, sizes = time.perf_counter(), parse_pattern(args.pattern), job.source.args
    require_walk(sizes, args.mode, "use quantize.py, with --mode int8 or int4")
    table, head = tables(job, quant_spec(args.quantize, args.groupsize))
    require_fit({name: job.source.layout.model.get_submodule(name).weight.shape[-1] for name in table}, pattern)
    require_space(job.target, job.source.layout.bytes(job.dtype))
    how = {"percdamp": args.percdamp} if args.mode == "sparsegpt" else {}
    pruned = prune_(load(job, args, apart=True), job.windows, table, args.mode, pattern, **how)
    dense = read_tensors(job.source, CPU, job.dtype, "Copying", head)
    own, made = packed({name: tensor.cpu() for name, tensor in pruned.items()}, table, pattern)
    save(job, sizes, dense | own, made | head)
    n_full = sum(name not in made or made[name].pattern is None for name in table)
    if n_full:
        packs = "only 2:4 of floats or int8, outside of experts, takes less room"
        say(f"The zeros of {n_full} layers of {len(table)} are stored as numbers; {packs}")
    n_bytes, seconds = sum(tensor.nbytes for tensor in (dense | own).values()), time.perf_counter() - began
    del pruned, own

    def by_magnitude_alone() -> Transformer:
        least = by_magnitude({name: dense[f"{name}.weight"] for name in table}, table, pattern)
        return build(sizes, {name: tensor.to(job.device) for name, tensor in (dense | least).items()}, table | head)

    models = {"dense": lambda: load(job, args), "magnitude": by_magnitude_alone}
    report(job, args, models | {args.mode: lambda: load(job, args, job.target)}, n_bytes, seconds)


def tables(job: Job, spec: QuantSpec | None) -> tuple[dict[str, QuantSpec], dict[str, QuantSpec]]:
    """What the layers of blocks become, which are pruned, and the layers outside of blocks, which are only rounded."""
    linear = new_table(job.source, spec or QuantSpec(8), job.path)
    inside = {name: spec or QuantSpec() for name in linear if name.startswith("layers.")}
    return inside, {name: each for name, each in linear.items() if spec is not None and name not in inside}


def drop_layers(job: Job, args: argparse.Namespace) -> None:
    """Write the checkpoint without the blocks that change their input least, and say which these are."""
    began, n_layer = time.perf_counter(), job.source.args.n_layer
    require_cut(job.source.args, "--mode layers", "use quantize.py, or --mode wanda")
    if args.drop >= n_layer:
        raise ValueError(f"--drop is {args.drop}; the model has {n_layer} blocks, of which 1 to {n_layer - 1} can go")
    influences = block_influences(load(job, args, apart=True), job.windows)
    order = sorted(range(n_layer), key=influences.__getitem__)
    dropped, kept = order[: args.drop], sorted(order[args.drop :])
    source = cut(job.source, kept, table_of(job.source.table, kept))
    require_space(job.target, source.layout.bytes(job.dtype))
    tensors = read_tensors(source, CPU, job.dtype, "Copying")
    save(job, source.args, tensors, source.table)
    n_bytes, seconds = sum(tensor.nbytes for tensor in tensors.values()), time.perf_counter() - began
    del tensors
    for i in sorted(dropped):
        print(f"without block {i:3}, of influence {influences[i]:.4f}")
    print(f"the least of a block that is left: {influences[order[args.drop]]:.4f}, of {order[args.drop]}")
    models = {"all blocks": lambda: load(job, args), f"{len(kept)} blocks": lambda: load(job, args, job.target)}
    report(job, args, models, n_bytes, seconds)


Models = dict[str, Callable[[], Transformer]]


def report(job: Job, args: argparse.Namespace, models: Models, n_bytes: int, seconds: float) -> None:
    """The table at the end, on standard output, and the report that is asked for.

    models: the first is the source, the last what was made, of n_bytes of weights in so many seconds.
    """
    before = job.source.layout.bytes(job.dtype)
    row("", models)
    row("weights", [size_text(before), *[""] * (len(models) - 2), size_text(n_bytes)])
    found = {} if job.ids is None else {name: quality_of(job, make()) for name, make in models.items()}
    if found:
        first, *others = (each.nll for each in found.values())
        row("perplexity", [f"{each.perplexity:.3f}" for each in found.values()])
        row("nats a token", [f"{first:.4f}", *(f"{nll - first:+.4f}" for nll in others)])
    print(f"Made in {seconds:.0f} seconds")
    if args.output_json is not None:
        facts = {"args": vars(args), "target": str(job.target), "device": str(job.device), "torch": torch.__version__}
        facts |= {"bytes_before": before, "bytes_after": n_bytes, "seconds": seconds}
        write_json(args.output_json, facts | {"perplexity": {name: each.perplexity for name, each in found.items()}})


def row(name: str, cells: Iterable[str]) -> None:
    print(f"{name:14}" + "".join(f"{cell:>14}" for cell in cells))


def quality_of(job: Job, model: Transformer) -> Perplexity:
    return perplexity(Engine(model), job.ids, window=min(WINDOW, model.args.max_seq_length))


# ---------------------------------------------------------------- inputs that are skipped, and uses that are counted


def activations(job: Job, args: argparse.Namespace) -> None:
    """Find thresholds, write the checkpoint that has them, and say what they cost and bring."""
    require_projections(job.source.args)
    require_space(job.target, job.source.layout.bytes(job.dtype))
    model = load(job, args, apart=True)
    layers = skippable_(model)
    found, uniform = find_thresholds(model, projection_sizes(job.source.layout), job.windows, args.sparsity)
    table = with_thresholds(job.source.table, found)
    save(job, job.source.args, read_tensors(job.source, CPU, job.dtype, "Copying"), table)
    quality = {} if job.ids is None else compare_thresholds(model, layers, found, uniform, job.ids)
    del model, layers
    report_skipping(quality, decode_rates(job, args), args.sparsity)


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


def report_skipping(quality: dict[str, Quality], rates: tuple[float, float], sparsity: float) -> None:
    """The table at the end, on standard output."""
    row("", ["all inputs", "uniform", f"sparse {sparsity:g}"])
    if quality:
        change = f"{100 * (quality['found'].perplexity / quality['all inputs'].perplexity - 1):+.2f} %"
        row("perplexity", [*(f"{each.perplexity:.4f}" for each in quality.values()), change])
        row("divergence", [*(f"{each.divergence:.4f}" for each in quality.values()), "nats a token"])
    row("decode tok/s", [f"{rates[0]:.1f}", "", f"{rates[1]:.1f}", f"{rates[1] / rates[0]:.2f} x"])


def profile(job: Job, args: argparse.Namespace) -> None:
    """Count the uses of experts and neurons, write them beside the checkpoint, and say whether hotness can pay."""
    found = count_uses(load(job, args, apart=True), job.windows)
    write_json(job.target, {"model": fingerprint(job.source.args), "tokens": job.windows.numel(), **found})
    say(f"Wrote {job.target}: {job.windows.numel()} tokens")
    for kind, layers in found.items():
        if layers:
            print(in_words(kind, layers))


@dataclass(frozen=True)
class Mode:
    """What a mode does, which of the flags that not all modes take it takes, and the text that is enough for it."""

    run: Callable[[Job, argparse.Namespace], None]
    flags: tuple[str, ...]
    windows: tuple[int, int]  # how many, and of how many tokens


FILE = ("output", "check")
MODES = {
    "activations": Mode(activations, ("sparsity", *FILE), (4, 256)),
    "wanda": Mode(prune, ("pattern", "quantize", "groupsize", *FILE, "output_json"), (64, 512)),
    "sparsegpt": Mode(prune, ("pattern", "percdamp", "quantize", "groupsize", *FILE, "output_json"), (64, 512)),
    "layers": Mode(drop_layers, ("drop", *FILE, "output_json"), (16, 256)),
    "profile": Mode(profile, (), (4, 256)),
}
PRUNING = tuple(METHODS)
NEEDED = {"sparsity": "0.4", "pattern": "2:4", "drop": "6"}  # with an example


# ---------------------------------------------------------------- flags


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description="Write a model without some of its weights (Wanda, SparseGPT) or blocks, or one whose decoding "
        "skips small inputs (TEAL), beside the one that it was made of: model_wanda-2-4.pth, model_drop-6.pth, "
        "model_sparse-0.4.pth, which every command reads like any other. Or count which experts and neurons a text "
        "uses: model.pth.profile.json."
    )
    where = model_flags(parser, "a .pth or .gguf file, or a folder")
    place_flags(where, dtype="of what is float: ")
    add = parser.add_argument_group("what is made").add_argument
    text = "skip small inputs, prune weights by one of two methods, drop whole blocks, or count what a text uses"
    add("--mode", choices=tuple(MODES), required=True, help=text)
    add("--sparsity", type=float, help=f"activations: the share of a block's weights not to read, from 0 to {MOST}")
    text = f"wanda, sparsegpt: 2:4, or the share of weights that become 0, from 0 to {MOST}"
    add("--pattern", metavar="2:4|X", help=text)
    add("--quantize", choices=("int8", "int4"), help="wanda, sparsegpt: round the weights that are kept")
    add("--groupsize", type=int, help=GROUPSIZE_HELP)
    add("--drop", type=int, metavar="N", help="layers: how many blocks to leave out")
    add("--output", metavar="PATH", help="the file to write (default: beside the model)")
    add = parser.add_argument_group("calibration").add_argument
    add("--calibration_file", metavar="FILE", required=True, help="a text (UTF-8, or JSON Lines with `text` fields)")
    limits, lengths = ([f"{mode.windows[i]} {name}" for name, mode in MODES.items()] for i in range(2))
    add("--calibration_limit", type=int, help=f"windows of text (default: {', '.join(limits)})")
    add("--calibration_seq_length", type=int, help=f"tokens in a window (default: {', '.join(lengths)})")
    add("--percdamp", type=float, default=0.01, help="sparsegpt: damping, as a part of the mean (default: %(default)s)")
    add("--seed", type=int, default=1234, help="draws the windows (default: %(default)s)")
    add = parser.add_argument_group("what it cost").add_argument
    add("--check", metavar="FILE", help="measure the perplexity of this text; skipping inputs, in every token")
    add("--output_json", metavar="PATH", help="wanda, sparsegpt, layers: write the sizes and the perplexities")
    return parser


if __name__ == "__main__":
    cli.run(main, build_parser())
