"""Write a checkpoint whose linear layers have int8 or int4 weights, and say what that cost."""

if __name__ == "__main__":
    import cli

    cli.quit_on_interrupt()  # before the slow imports


import argparse
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from cli import say
from compress.calibration import calibration_text, calibration_windows, task_texts
from compress.gptq import gptq_
from engine.engine import Engine
from flags import check_threads
from layers.quantized import GROUPSIZE_HELP, LAYERS, QuantSpec, quant_spec
from measure.machine import peak_memory
from measure.perplexity import perplexity
from model import ModelArgs
from ranks import init_tp
from text.prompts import checked_ids
from text.tokenizer import load_tokenizer, save_tokenizer
from weights.checkpoint import DEFAULT_CHECKPOINT, load_model, new_table, open_model, read_tensors, save_checkpoint
from weights.device import DTYPES, parse_dtype, pick_device, require_memory
from weights.files import GB, dropping_page_cache, read_text, require_space, require_writable, write_json
from weights.layout import Layout, ModelFile

GPTQ = "int4-gptq"


GPTQ_FLAGS = ("calibration_tasks", "calibration_file", "calibration_limit", "calibration_seq_length", "include_path")


GPTQ_FLAGS += ("percdamp", "blocksize", "act_order", "seed")


CHECK_WINDOW = 512


PART = 1 << 20  # weights compared at a time


def encode(text: str, path: Path, vocab_size: int) -> list[int]:
    """The ids of a text with the tokenizer of the model. Raises ValueError if they are not all its own."""
    tokenizer = load_tokenizer(path, vocab_size)
    return checked_ids(tokenizer.encode(text), tokenizer)


def calibration_windows_of(args: argparse.Namespace, sizes: ModelArgs) -> Tensor:  # [n, S]
    """The windows of text to calibrate with. Raises ValueError if they cannot be had or are too few."""
    if args.calibration_seq_length > sizes.max_seq_length:
        raise ValueError(
            f"--calibration_seq_length {args.calibration_seq_length} is more than the model's context of "
            f"{sizes.max_seq_length}"
        )
    if args.calibration_file is not None:
        text = calibration_text(args.calibration_file)
    else:
        tasks = args.calibration_tasks or ["wikitext"]
        say(f"Reading the calibration text: {', '.join(tasks)} ...")
        text = "\n\n".join(task_texts(tasks, args.include_path))
    return calibration_windows(
        encode(text, Path(args.checkpoint_path), sizes.vocab_size),
        limit=args.calibration_limit,
        seq_length=args.calibration_seq_length,
        needed=max(sizes.dim, sizes.intermediate_size, sizes.n_head * sizes.head_dim),  # the widest layer input
        seed=args.seed,
    )


def gptq_tensors(args: argparse.Namespace, layout: Layout, device: torch.device, windows: Tensor) -> dict[str, Tensor]:
    """Every tensor of the quantised file: those of its quantised layers by GPTQ, the others as they are."""
    model = load_model(args.checkpoint_path, device, parse_dtype(args.dtype), args.model_name)
    how = {"percdamp": args.percdamp, "blocksize": args.blocksize, "act_order": args.act_order}
    state = model.state_dict() | gptq_(model, windows, layout.table, **how)
    return {name: state[name] for name in layout.tensors}


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


def layer_facts(opened: ModelFile, tensors: dict[str, Tensor], table: dict[str, QuantSpec]) -> list[dict]:
    """Name, bits, groupsize and relative error of each quantised layer, whose tensors are taken out of `tensors`.

    The original weights are read once more, and only one at a time is there.
    """
    facts = []
    for name, spec in table.items():
        keys = ("weight", "scales") if spec.bits == 8 else ("weight", "scales", "zeros")
        rounded = [tensors.pop(f"{name}.{key}") for key in keys]
        read = opened.tensors[f"{opened.layout.weight_source(name)}.weight"]
        error = relative_error(read().to(rounded[0].device), rounded, spec.bits)
        facts.append({"name": name, **asdict(spec), "relative_error": error})
    return facts


def measure(path: Path, model_name: str | None, ids: list[int], device: torch.device, dtype: torch.dtype) -> float:
    """The perplexity of a text for the model in `path`."""
    say(f"Measuring the perplexity of {path} ...")
    model = load_model(path, device, dtype, model_name)
    return perplexity(Engine(model), ids, window=min(CHECK_WINDOW, model.args.max_seq_length)).perplexity


def report(facts: dict) -> None:
    """The table at the end, on standard output."""
    before, after = facts["bytes_before"], facts["bytes_after"]
    print(f"{'':12}{'before':>12}{'after':>12}")
    print(f"{'size':12}{before / 1e6:9.1f} MB{after / 1e6:9.1f} MB   {before / after:.2f} x smaller")
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


def check_request(args: argparse.Namespace) -> None:
    """Raise ValueError on arguments that cannot work, before anything slow."""
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
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise ValueError(f"--include_path {args.include_path} is no folder")
    for name in ("calibration_limit", "calibration_seq_length", "blocksize"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not 0 < args.percdamp < math.inf:
        raise ValueError(f"--percdamp is {args.percdamp}; it must be above 0, and 0.01 is common")
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed is {args.seed}; it must be from 0 to 2^63 - 1")
    check_threads(args.threads)
    if args.label and Path(args.label).name != args.label:
        raise ValueError(f"--label is {args.label!r}; it becomes part of a file's name, so it cannot be a path")


def target_path(path: Path, mode: str, groupsize: int | None, label: str | None) -> Path:
    """Where the quantised file goes: beside the source, called after it and what was done."""
    folder, stem = (path, "model") if path.is_dir() else (path.parent, path.stem)
    label = f"_{label}" if label else ""
    return folder / f"{stem}{label}_{mode}{f'.g{groupsize}' if groupsize else ''}.pth"


def check_outputs(args: argparse.Namespace, target: Path, size: int) -> None:
    """Raise ValueError if a file could not be written, for want of space too, or would replace one this run needs."""
    path = Path(args.checkpoint_path)
    if target.exists() and target.resolve() in (path.resolve(), (path / "model.pth").resolve()):
        raise ValueError(f"cannot write {target}: it is the source")
    require_writable(target)
    require_space(target, size)
    if args.output_json is not None:
        require_writable(args.output_json, [path, args.check, args.calibration_file])
        if Path(args.output_json).resolve() == target.resolve():
            raise ValueError(f"cannot write {args.output_json}: the quantised model goes there")


def check_text(file: str, path: Path, vocab_size: int) -> list[int]:
    """The ids of the text to measure perplexity on. Raises ValueError if it cannot be read or is too short."""
    ids = encode(read_text(file), path, vocab_size)
    if len(ids) < 2:
        raise ValueError(f"the text {file} is one token long; perplexity needs 2 or more")
    return ids


def write_tokenizer(opened: ModelFile, folder: Path) -> None:
    """Put the tokenizer of a GGUF file beside what is made from it, unless there is one."""
    if opened.gguf is not None and not any((folder / f"tokenizer.{suffix}").exists() for suffix in ("json", "model")):
        save_tokenizer(opened.gguf, folder)


def main(**flags) -> None:
    """Keyword arguments are the command line's flags; `build_parser` has their defaults."""
    with init_tp() as ranks:  # so that one of them says it
        if ranks is not None:
            raise ValueError("quantise without torchrun, in one process: the file serves any number of ranks")
    args, began = argparse.Namespace(**flags), time.perf_counter()
    check_request(args)
    path, device, dtype = Path(args.checkpoint_path), pick_device(args.device), parse_dtype(args.dtype)
    spec = quant_spec(args.mode, args.groupsize)
    opened = open_model(path, args.model_name)
    table = new_table(opened, spec, path, args.head)
    target = target_path(path, args.mode, spec.groupsize, args.label)
    layout = opened.layout.quantized(table)
    before, after = opened.layout.bytes(dtype), layout.bytes(dtype)
    check_outputs(args, target, after)
    size = before + after if args.mode == GPTQ else after
    require_memory(size, device, f"the weights of {path}", "use a smaller model")
    text = check_text(args.check, path, opened.args.vocab_size) if args.check is not None else None
    windows = calibration_windows_of(args, opened.args) if args.mode == GPTQ else None

    n_thread = args.threads or torch.get_num_threads()
    # rounding waits for memory: more threads gain little, and on a busy machine they wait for each other
    torch.set_num_threads(n_thread if args.mode == GPTQ else args.threads or 1)
    say(f"Using device={device}")
    opened = replace(opened, tensors=dropping_page_cache(opened.tensors, path))
    if windows is None:
        tensors = read_tensors(opened, device, dtype, "Quantising", table)
    else:
        tensors = gptq_tensors(args, layout, device, windows)
    save_checkpoint(target, opened.args, {name: tensor.cpu() for name, tensor in tensors.items()}, table)
    say(f"Wrote {target}: {target.stat().st_size / GB:.2f} GB")
    write_tokenizer(opened, target.parent)
    layers = layer_facts(opened, tensors, table)
    del tensors
    seconds, peak = time.perf_counter() - began, peak_memory(device)
    torch.set_num_threads(n_thread)

    facts = {
        "args": flags,
        "target": str(target),
        "device": str(device),
        "torch": torch.__version__,
        "bytes_before": before,
        "bytes_after": after,
        "layers": layers,
        "perplexity_before": None if text is None else measure(path, args.model_name, text, device, dtype),
        "perplexity_after": None if text is None else measure(target, None, text, device, dtype),
        "seconds": seconds,
        "peak_memory_gb": peak / GB if peak else None,
    }
    report(facts)
    if args.output_json is not None:
        write_json(args.output_json, facts)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a model with int8 or int4 weights beside the float one: model_int8.pth, model_int4.g32.pth, "
        "model_int4-gptq.g32.pth. Every command reads it like any other."
    )
    where = parser.add_argument_group("model")
    where.add_argument(
        "--checkpoint_path",
        default=str(DEFAULT_CHECKPOINT),
        help="a float .pth or .gguf file, or a folder (default: %(default)s)",
    )
    where.add_argument("--model_name", help="registry name, for a gpt-fast file that does not say what it is")
    where.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    where.add_argument(
        "--dtype", default="bfloat16", help=f"of what stays float: {', '.join(DTYPES)} (default: %(default)s)"
    )
    where.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice, 1 to round to nearest)")
    what = parser.add_argument_group("quantisation")
    what.add_argument(
        "--mode",
        choices=("int8", "int4", GPTQ),
        default="int8",
        help="round to nearest, or by GPTQ, which looks at how the layers are used in a text (default: %(default)s)",
    )
    what.add_argument("--groupsize", type=int, help=GROUPSIZE_HELP)
    what.add_argument(
        "--head", choices=("int8", "int4", "float"), default="int8", help="the output layer (default: %(default)s)"
    )
    what.add_argument("--label", help="goes into the file's name: model_LABEL_int8.pth")
    text = parser.add_argument_group(f"calibration, with --mode {GPTQ}")
    text.add_argument(
        "--calibration_tasks", nargs="+", metavar="TASK", help="lm-eval tasks whose text to use (default: wikitext)"
    )
    text.add_argument("--include_path", metavar="FOLDER", help="lm-eval tasks of your own")
    text.add_argument("--calibration_file", metavar="FILE", help="use this text (UTF-8) instead")
    text.add_argument("--calibration_limit", type=int, default=64, help="windows of text (default: %(default)s)")
    text.add_argument(
        "--calibration_seq_length", type=int, default=512, help="tokens in a window (default: %(default)s)"
    )
    text.add_argument(
        "--percdamp", type=float, default=0.01, help="damping, as a share of the mean (default: %(default)s)"
    )
    text.add_argument("--blocksize", type=int, default=128, help="columns rounded at a time (default: %(default)s)")
    text.add_argument(
        "--act_order",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="round the most used inputs first (default: on)",
    )
    text.add_argument("--seed", type=int, default=1234, help="draws the windows (default: %(default)s)")
    after = parser.add_argument_group("what it cost")
    after.add_argument("--check", metavar="FILE", help="measure the perplexity of this text (UTF-8) before and after")
    after.add_argument("--output_json", metavar="PATH", help="write the sizes, the error of each layer, the perplexity")
    return parser


if __name__ == "__main__":
    cli.run(main, build_parser())
