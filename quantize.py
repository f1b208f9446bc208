"""Write a checkpoint whose linear layers have int8 or int4 weights, and say what that cost."""

if __name__ == "__main__":
    import cli

    cli.begin()

import argparse
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import cli
from cli import say
from compress.calibration import calibration_text, calibration_windows, task_texts, widest
from compress.gptq import gptq_
from compress.walk import require_walk
from engine.engine import Engine
from flags import check_counts, check_damping, check_threads, model_flags, place_flags
from layers.quantized import GROUPSIZE_HELP, LAYERS, QuantSpec, quant_spec
from measure.machine import peak_memory
from measure.perplexity import WINDOW, perplexity
from ranks import require_one_process
from text.files import require_utf8
from text.prompts import ids_of, ids_to_measure
from text.tokenizer import tokenizer_saved
from weights.checkpoint import load_model, new_table, open_model, read_tensors, save_checkpoint
from weights.device import parse_dtype, pick_device, require_memory
from weights.files import GB, dropping_page_cache, require_space, require_writable, size_text, write_json
from weights.layout import Layout, ModelFile

GPTQ = "int4-gptq"
GPTQ_FLAGS = ("calibration_tasks", "calibration_file", "calibration_limit", "calibration_seq_length", "include_path")
GPTQ_FLAGS += ("percdamp", "blocksize", "act_order", "seed")
PART = 1 << 20  # weights compared at a time


def main(**flags) -> None:
    """Keyword arguments are the command line's flags; `build_parser` has their defaults."""
    began, args = time.perf_counter(), argparse.Namespace(**flags)
    require_one_process("quantise")
    check_request(args)
    job = open_job(args)
    check_job(job, args)
    text = None if args.check is None else ids_to_measure(args.check, job.path, job.source.args.vocab_size)
    windows = read_windows(job, args) if args.mode == GPTQ else None
    n_thread = args.threads or torch.get_num_threads()
    # rounding waits for memory: more threads gain little, and on a busy machine they wait for each other
    torch.set_num_threads(n_thread if args.mode == GPTQ else args.threads or 1)
    say(f"Using device={job.device}")
    tensors = rounded_tensors(job, windows, args)
    write(job, tensors)
    layers = layer_facts(job, tensors)
    read = {"model_name": job.model_name, "dequantize": args.dequantize, "adapter": args.adapter}
    seconds, peak = time.perf_counter() - began, peak_memory(job.device)
    torch.set_num_threads(n_thread)
    facts = {
        "args": flags,
        "target": str(job.target),
        "device": str(job.device),
        "torch": torch.__version__,
        "bytes_before": job.bytes_before,
        "bytes_after": job.bytes_after,
        "file_before": sum(path.stat().st_size for path in job.source.paths),
        "file_after": job.target.stat().st_size,
        "layers": layers,
        "perplexity_before": None if text is None else perplexity_of(job.path, text, job, **read),
        "perplexity_after": None if text is None else perplexity_of(job.target, text, job),
        "seconds": seconds,
        "peak_memory_gb": peak / GB if peak else None,
    }
    report(facts)
    if args.output_json is not None:
        write_json(args.output_json, facts)


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Job:
    """A model's file, and the quantised file that is made from it."""

    path: Path
    model_name: str | None
    source: ModelFile
    layout: Layout  # of the target
    target: Path
    device: torch.device
    dtype: torch.dtype
    bytes_before: int
    bytes_after: int


def check_request(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot work, before anything slow."""
    if args.mode != GPTQ:
        defaults = build_parser().get_default
        for name in GPTQ_FLAGS:
            if getattr(args, name) != defaults(name):
                raise ValueError(f"--{name} is for --mode {GPTQ}; --mode {args.mode} needs no calibration")
    if args.mode == "int8" and args.head == "int4":
        raise ValueError("--head int4 needs --mode int4 or int4-gptq; with int8 use --head int8 or float")
    for name in ("calibration_tasks", "include_path"):
        if args.calibration_file is not None and getattr(args, name) is not None:
            raise ValueError(f"--calibration_file and --{name} are both given; give one")
    check_counts(vars(args), "calibration_limit", "calibration_seq_length", "blocksize")
    check_damping(args.percdamp)
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed is {args.seed}; it must be from 0 to 2^63 - 1")
    check_threads(args.threads)
    if args.adapter is not None and args.label is None:
        raise ValueError("--adapter needs --label, which tells the file from the base model's")
    require_utf8(args.label or "", "--label")
    if args.label and Path(args.label).name != args.label:
        raise ValueError(f"--label is {args.label!r}; it becomes part of a file's name, so it cannot be a path")


def open_job(args: argparse.Namespace) -> Job:
    path, device, dtype = Path(args.checkpoint_path), pick_device(args.device), parse_dtype(args.dtype)
    spec = quant_spec(args.mode, args.groupsize)
    source = open_model(path, args.model_name, args.dequantize, args.adapter)
    source = replace(source, tensors=dropping_page_cache(source.tensors, source.paths))
    layout = source.layout.quantized(new_table(source, spec, path, args.head))
    target = target_path(path, args.mode, spec.groupsize, args.label)
    sizes = source.layout.bytes(dtype), layout.bytes(dtype)
    return Job(path, args.model_name, source, layout, target, device, dtype, *sizes)


def target_path(path: Path, mode: str, groupsize: int | None, label: str | None) -> Path:
    """Where the quantised file goes: beside the source, called after it and what was done."""
    folder, stem = (path, "model") if path.is_dir() else (path.parent, path.stem)
    label = f"_{label}" if label else ""
    return folder / f"{stem}{label}_{mode}{f'.g{groupsize}' if groupsize else ''}.pth"


def check_job(job: Job, args: argparse.Namespace) -> None:
    """Refuse what cannot be done with this model or written here, or would replace a file that this run needs."""
    path, target = job.path, job.target
    if target.exists() and target.resolve() in (path.resolve(), (path / "model.pth").resolve()):
        raise ValueError(f"cannot write {target}: the model is read from it")
    require_writable(target)
    require_space(target, job.bytes_after)
    if args.output_json is not None:
        if Path(args.output_json).resolve() == target.resolve():
            raise ValueError(f"cannot write {args.output_json}: the quantised model goes there")
        require_writable(args.output_json, [path, args.check, args.calibration_file])
    size = job.bytes_after + (job.bytes_before if args.mode == GPTQ else 0)
    require_memory(size, job.device, f"the weights of {path}", "use a smaller model")
    if args.mode == GPTQ:
        require_walk(job.source.args, GPTQ, "use --mode int4")
    if args.mode == GPTQ and any(spec.threshold is not None for spec in job.source.table.values()):
        raise ValueError(f"{path} skips inputs; --mode {GPTQ} the file that it was made of, then use sparsify.py")
    length, context = args.calibration_seq_length, job.source.args.max_seq_length
    if args.mode == GPTQ and length > context:
        raise ValueError(f"--calibration_seq_length {length} is more than the model's context of {context}")


def read_windows(job: Job, args: argparse.Namespace) -> Tensor:  # [n, S]
    """The windows of text to calibrate with."""
    if args.calibration_file is not None:
        text = calibration_text(args.calibration_file)
    else:
        tasks = args.calibration_tasks or ["wikitext"]
        say(f"Reading the calibration text: {', '.join(tasks)} ...")
        text = "\n\n".join(task_texts(tasks, args.include_path))
    return calibration_windows(
        ids_of(text, job.path, job.source.args.vocab_size),
        limit=args.calibration_limit,
        seq_length=args.calibration_seq_length,
        needed=widest(job.source.args),
        seed=args.seed,
    )


# ---------------------------------------------------------------- what is made


def rounded_tensors(job: Job, windows: Tensor | None, args: argparse.Namespace) -> dict[str, Tensor]:
    """Every tensor of the quantised file: the layers in the table rounded to nearest or, with windows, by GPTQ."""
    if windows is None:
        return read_tensors(job.source, job.device, job.dtype, "Quantising", job.layout.table)
    read = {"dequantize": args.dequantize, "adapter": args.adapter, "apart": True}
    model = load_model(job.path, job.device, job.dtype, job.model_name, **read)
    how = {name: getattr(args, name) for name in ("percdamp", "blocksize", "act_order")}
    state = model.state_dict() | gptq_(model, windows, job.layout.table, **how)
    return {name: state[name] for name in job.layout.tensors}


def write(job: Job, tensors: dict[str, Tensor]) -> None:
    """Write the quantised file and, from a GGUF file, the tokenizer."""
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    with tokenizer_saved(job.source.gguf, job.target.parent):
        save_checkpoint(job.target, job.source.args, on_cpu, job.layout.table)
    say(f"Wrote {job.target}: {size_text(job.target.stat().st_size)}")


# ---------------------------------------------------------------- what it cost


def layer_facts(job: Job, tensors: dict[str, Tensor]) -> list[dict]:
    """Name, bits, groupsize and relative error of each quantised layer, whose tensors are taken out of `tensors`.

    The original weights are read once more, one at a time.
    """
    facts = []
    for name, spec in job.layout.table.items():
        rounded = [tensors.pop(f"{name}.{leaf}") for leaf in spec.leaves]
        read = job.source.tensors[f"{job.source.layout.weight_source(name)}.weight"]
        error = relative_error(read().to(rounded[0].device), rounded, spec.bits)
        facts.append({"name": name, **asdict(spec), "relative_error": error})
    return facts


def relative_error(weight: Tensor, rounded: list[Tensor], bits: int) -> float:
    """||rounded - weight|| / ||weight|| of a layer [out, in], or of experts [E, out, in], some rows at a time."""
    weight, *rounded = (tensor.flatten(0, -2) for tensor in (weight, *rounded))
    n_rows = max(1, PART // weight.shape[1])
    error = total = 0.0
    for rows, *parts in zip(weight.split(n_rows), *(tensor.split(n_rows) for tensor in rounded), strict=True):
        back, rows = LAYERS[bits](*parts).dequantize(), rows.float()
        error += (back - rows).square().sum().item()
        total += rows.square().sum().item()
    return math.sqrt(error / total) if total else 0.0


def perplexity_of(path: Path, ids: list[int], job: Job, **how) -> float:
    """The perplexity of a text for the model in `path`; how: of `load_model`."""
    say(f"Measuring the perplexity of {path} ...")
    model = load_model(path, job.device, job.dtype, **how)
    return perplexity(Engine(model), ids, window=min(WINDOW, model.args.max_seq_length)).perplexity


def report(facts: dict) -> None:
    """The table at the end, on standard output."""
    print(f"{'':12}{'before':>12}{'after':>12}")
    report_size("weights", facts["bytes_before"], facts["bytes_after"])
    report_size("file", facts["file_before"], facts["file_after"])
    before, after = facts["perplexity_before"], facts["perplexity_after"]
    if before is not None:
        print(f"{'perplexity':12}{before:12.4f}{after:12.4f}   {100 * (after / before - 1):+.2f} %")
    worst = sorted(facts["layers"], key=lambda layer: -layer["relative_error"])[:5]
    width = max(len(layer["name"]) for layer in worst)
    print(f"\nthe {len(worst)} of {len(facts['layers'])} layers that changed most, by ||new - old|| / ||old||:")
    for layer in worst:
        spec = QuantSpec(layer["bits"], layer["groupsize"])
        print(f"  {layer['name']:{width}}  {str(spec):9}{100 * layer['relative_error']:6.2f} %")
    print(f"\n{facts['seconds']:.1f} seconds, peak memory {facts['peak_memory_gb'] or 0:.2f} GB")


def report_size(what: str, before: int, after: int) -> None:
    change = f"{before / after:.2f} x smaller" if after <= before else f"{after / before:.2f} x larger"
    print(f"{what:12}{size_text(before):>12}{size_text(after):>12}   {change}")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description="Write a model with int8 or int4 weights beside the float one: model_int8.pth, model_int4.g32.pth, "
        "model_int4-gptq.g32.pth. Every command reads it like any other."
    )
    where = model_flags(parser, "a float .pth or .gguf file, or a folder")
    place_flags(where, dtype="of what stays float: ", threads=", 1 to round to nearest")
    quantisation_flags(parser.add_argument_group("quantisation"))
    calibration_flags(parser.add_argument_group(f"calibration, with --mode {GPTQ}"))
    group = parser.add_argument_group("what it cost")
    group.add_argument("--check", metavar="FILE", help="measure the perplexity of this text (UTF-8) before and after")
    group.add_argument("--output_json", metavar="PATH", help="write the sizes, the error of each layer, the perplexity")
    return parser


def quantisation_flags(group) -> None:
    add = group.add_argument
    text = "round to nearest, or by GPTQ, which looks at how the layers are used in a text (default: %(default)s)"
    add("--mode", choices=("int8", "int4", GPTQ), default="int8", help=text)
    add("--groupsize", type=int, help=GROUPSIZE_HELP)
    add("--head", choices=("int8", "int4", "float"), default="int8", help="the output layer (default: %(default)s)")
    add("--label", help="goes into the file's name: model_LABEL_int8.pth")


def calibration_flags(group) -> None:
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add("--calibration_tasks", nargs="+", metavar="TASK", help="lm-eval tasks whose text to use (default: wikitext)")
    add("--include_path", metavar="FOLDER", help="lm-eval tasks of your own")
    add("--calibration_file", metavar="FILE", help="use this text (UTF-8) instead")
    add("--calibration_limit", type=int, default=64, help="windows of text (default: %(default)s)")
    add("--calibration_seq_length", type=int, default=512, help="tokens in a window (default: %(default)s)")
    add("--percdamp", type=float, default=0.01, help="damping, as a fraction of the mean (default: %(default)s)")
    add("--blocksize", type=int, default=128, help="columns rounded at a time (default: %(default)s)")
    add("--act_order", action=switch, default=True, help="round the most used inputs first (default: on)")
    add("--seed", type=int, default=1234, help="draws the windows (default: %(default)s)")


if __name__ == "__main__":
    cli.run(main, build_parser())
