"""Train a small model to predict what a large one predicts: a draft for speculation, or a model of its own."""

if __name__ == "__main__":
    import cli

    cli.begin()

import argparse
import importlib.util
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # on CPUs, the pages of fresh tensors cost a fifth of a step
import torch
from torch import Tensor

import cli
from cli import say
from compress.distillation import KEPT_BYTES, Diverged, Plan, Step, Targets, Training
from compress.student import freeze_ends_, keep_zeros_, stood_for, stored_tensors, student_of, trainable
from compress.training_data import Writer, fingerprint, full_windows, keep_texts, split_off, training_text
from compress.training_state import StateFile, draw_curve
from engine.engine import Engine
from flags import check_counts, check_threads, checkpoint_path, model_flags, place_flags, say_device
from measure.acceptance import N_PROMPT, Text, greedy_texts, mean_accepted
from measure.perplexity import WINDOW, perplexity
from model import Transformer
from ranks import Ranks, init_tp, shared, speaks
from text.prompts import checked_ids
from text.tokenizer import Tokenizer, load_tokenizer, require_same_vocabulary, tokenizer_saved
from weights.checkpoint import load_model, open_model, save_checkpoint
from weights.device import free_memory, parse_dtype, pick_device, require_memory
from weights.files import require_space, require_writable, size_text, write_json
from weights.layout import ModelFile

K = 4  # guesses a round whose acceptance is measured
POINTS = 20  # of the curve, beside the first
SAY_S, SAVE_S = 10, 120  # seconds of training between two lines, and between two states that are kept
SAME = ("teacher", "finetune", "layers", "self_data", "steps", "minutes", "batch_size", "seq_length", "top_k")
SAME += ("temperature", "dtype", "seed", "adapter")  # flags without which a training cannot go on


def main(**flags) -> None:
    """Keyword arguments are the command line's flags; `build_parser` has their defaults."""
    with init_tp() as ranks:
        args = argparse.Namespace(**flags)
        check_request(args, ranks)
        job = open_job(args, ranks)
        if args.threads:
            torch.set_num_threads(args.threads)
        say_device(job.device, ranks)
        tokenizer = load_tokenizer(args.teacher, job.teacher.args.vocab_size)
        check_job(job, tokenizer, args)
        how = {"dequantize": args.dequantize, "adapter": args.adapter}
        load_teacher = partial(load_model, args.teacher, job.device, job.dtype, args.model_name, **how)
        teacher = load_teacher() if args.self_data else None
        windows, held_out = shared(ranks, lambda: read_data(job, teacher, tokenizer, args))
        settings = {name: flags[name] for name in SAME} | {"data": fingerprint(windows)}
        state_file = StateFile(job.target.with_suffix(".state"), settings)
        state = state_file.read() or {}
        teacher = teacher or load_teacher()
        training = begin(job, teacher, windows, args, ranks)
        run = Run(job, training, state_file, state.get("curve", []))
        if state:
            training.resume(state)
            say(f"Going on after step {training.step}, from {state_file.path}")
        run.texts = greedy_texts(teacher, held_out, tokenizer.eos_ids) if speaks(ranks) else []
        run.train()
        if speaks(ranks):
            report(run, teacher, held_out, flags)


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Job:
    """A teacher's file, a student's, and the file that is made."""

    teacher: ModelFile
    student: ModelFile
    folder: Path  # whose tokenizer the student has
    target: Path
    device: torch.device
    dtype: torch.dtype  # of the arithmetic

    @property
    def own_texts(self) -> Path:
        """The file of what the teacher writes itself."""
        return self.target.with_suffix(".jsonl")


def check_request(args: argparse.Namespace, ranks: Ranks | None) -> None:
    """Refuse arguments that cannot work, before anything slow."""
    for one, other in (("steps", "minutes"), ("layers", "finetune")):
        if (getattr(args, one) is None) == (getattr(args, other) is None):
            raise ValueError(f"give either --{one} or --{other}")
    if not args.data and not args.self_data:
        raise ValueError("give --data FILE to learn from, or let the teacher write N texts with --self_data N")
    check_counts(vars(args), "layers", "steps", "batch_size", "micro_batch", "seq_length", "top_k", "self_data")
    for name in ("minutes", "learning_rate", "temperature"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}; it must be above 0")
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed is {args.seed}; it must be from 0 to 2^63 - 1")
    if args.seq_length < 2:
        raise ValueError(f"--seq_length is {args.seq_length}; a window needs at least 2 tokens")
    if ranks is not None and args.batch_size % ranks.size:
        raise ValueError(f"--batch_size {args.batch_size} does not divide among {ranks.size} ranks; use a multiple")
    if args.dtype == "float16":
        raise ValueError("--dtype float16 is too narrow for gradients; use bfloat16 or float32")
    check_threads(args.threads)
    if args.chart is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError(f"--chart needs matplotlib; use: {sys.executable} -m pip install matplotlib")
        require_writable(args.chart, args.data)
    if args.output_json is not None:
        require_writable(args.output_json, [*args.data, args.teacher, args.finetune])


def open_job(args: argparse.Namespace, ranks: Ranks | None) -> Job:
    device, dtype = pick_device(args.device, ranks), parse_dtype(args.dtype)
    how = (args.model_name, args.dequantize, args.adapter)
    teacher = open_model(args.teacher, *how)
    if args.finetune is None:
        floats = open_model(args.teacher, args.model_name, True, args.adapter)
        source, student, end = Path(args.teacher), student_of(floats, args.layers), f"student-{args.layers}"
    else:
        source, student, end = Path(args.finetune), open_model(args.finetune), "distilled"
    folder, stem = (source, "model") if source.is_dir() else (source.parent, source.stem)
    target = Path(args.output or folder / f"{stem}_{end}.pth")
    return Job(teacher, student, folder, target, device, dtype)


def check_job(job: Job, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Refuse what cannot be done with these models or written here."""
    taken = [path.resolve() for path in (*job.teacher.paths, *job.student.paths)]
    if job.target.resolve() in taken or job.target.suffix != ".pth":
        why = "the model is read from it" if job.target.suffix == ".pth" else "its name must end in .pth"
        raise ValueError(f"cannot write {job.target}: {why}")
    tensors = job.student.layout.tensors
    if any(spec.has_codes and tensors[f"{name}.weight"].ndim == 3 for name, spec in job.student.table.items()):
        raise ValueError(f"{args.finetune} has quantised experts, which cannot be taught; start from the float file")
    require_writable(job.target)
    if args.self_data:
        require_writable(job.own_texts, args.data)
        if not args.data and tokenizer.chat_template is None:
            raise ValueError("the teacher has no chat template, in which it could write questions; give --data as well")
    require_space(job.target, job.student.layout.bytes(torch.bfloat16))
    if job.student.args.n_layer > job.teacher.args.n_layer:
        sizes = f"{job.student.args.n_layer} layers, and its teacher {job.teacher.args.n_layer}"
        raise ValueError(f"the student has {sizes}; a student is no deeper than its teacher")
    if args.finetune is not None:
        require_same_vocabulary(tokenizer, load_tokenizer(args.finetune, job.student.args.vocab_size), "student")
    ours, theirs = job.student.args.vocab_size, job.teacher.args.vocab_size
    if ours != theirs:
        raise ValueError(f"the student has {ours} tokens and its teacher {theirs}; they must have the same")
    context = min(model.args.max_seq_length for model in (job.student, job.teacher))
    if args.seq_length > context:
        raise ValueError(f"--seq_length {args.seq_length} is more than the model's context of {context}")
    # weights, gradients and two moments of each
    size = job.teacher.layout.bytes(job.dtype) + 4 * job.student.layout.bytes(torch.float32)
    require_memory(size, job.device, "the teacher and its student in training", "use fewer --layers")


def read_data(job: Job, teacher: Transformer | None, tokenizer: Tokenizer, args: argparse.Namespace) -> tuple:
    """The windows to train on [n, S], int32, and the ids that are measured on. teacher: None if it writes nothing."""
    held_out = None if args.check is None else read_ids([args.check], tokenizer)
    if args.data:
        ids, held_out = split_off(read_ids(args.data, tokenizer), held_out)
    if args.self_data:
        beginnings = full_windows(ids, min(N_PROMPT, job.teacher.args.max_seq_length // 2), 1) if args.data else None
        write_own_texts(job, teacher, tokenizer, beginnings, args)
        ids, held_out = split_off(read_ids([str(job.own_texts)], tokenizer), held_out)
    windows = full_windows(ids, args.seq_length, args.batch_size)
    if len(held_out) < 2:
        raise ValueError(f"the text to measure on is too short (tokens: {len(held_out)}); give more, or a --check FILE")
    return windows, held_out


def read_ids(paths: list[str], tokenizer: Tokenizer) -> list[int]:
    return checked_ids(tokenizer.encode(training_text(paths)), tokenizer)


def write_own_texts(
    job: Job, teacher: Transformer, tokenizer: Tokenizer, beginnings: Tensor | None, args: argparse.Namespace
) -> None:
    """Let the teacher write its file, after beginnings [n, tokens] or, without, questions and answers of its own."""
    settings = {name: str(getattr(args, name)) for name in ("teacher", "adapter", "dtype", "seed")}
    settings["data"] = None if beginnings is None else fingerprint(beginnings)
    writer = Writer(teacher, tokenizer, args.seed)
    write = writer.conversations if beginnings is None else partial(writer.continued, beginnings)
    keep_texts(job.own_texts, args.self_data, settings, write)


# ---------------------------------------------------------------- the training


def begin(job: Job, teacher: Transformer, windows: Tensor, args: argparse.Namespace, ranks: Ranks | None) -> Training:
    student, blocks = trainable(job.student, job.device), None
    if args.finetune is None:
        freeze_ends_(student)
        blocks = stood_for(teacher.args.n_layer, args.layers)
    else:
        keep_zeros_(student)
    names = ("steps", "minutes", "batch_size", "micro_batch", "learning_rate", "seed")
    plan = Plan(**{name: getattr(args, name) for name in names}, dtype=job.dtype)
    room = room_for_targets(student, job.device, ranks)
    return Training(student, Targets(teacher, windows, args.top_k, args.temperature, blocks, room), plan, ranks)


def room_for_targets(student: Transformer, device: torch.device, ranks: Ranks | None) -> int:
    """Bytes for what the teacher finds: a quarter of what the student's gradients and moments leave free."""
    free, coming = free_memory(device), 3 * sum(each.nbytes for each in student.parameters() if each.requires_grad)
    if free is None:
        return KEPT_BYTES
    if ranks is not None and device.type == "cpu":
        free //= ranks.size
    return max(0, free - coming) // 4


@dataclass
class Run:
    """A training with what is kept and told of it. texts: of the teacher, on which guesses are measured."""

    job: Job
    training: Training
    state_file: StateFile
    curve: list[dict]
    texts: list[Text] = ()

    def train(self) -> None:
        """Train to the end and write the student; whatever ends it early, the last whole step is kept."""
        ranks = self.training.ranks
        is_first = speaks(ranks)
        # torchrun kills its ranks right after a Ctrl-C: the first waits until it misses the others, and keeps the step
        with cli.postponed() if ranks is not None and is_first else nullcontext():
            try:
                self.follow(is_first)
                if is_first:
                    self.write()
            except Diverged as error:
                raise ValueError(f"{error}; use a smaller --learning_rate; {self.state_file.words}") from None
            except BaseException:
                if is_first and self.training.step:
                    with cli.undisturbed():
                        self.save()
                        say(f"Stopped: {self.state_file.words}")
                raise

    def follow(self, is_first: bool) -> None:
        """Train to the end; the first rank says, measures and saves on the way."""
        if is_first and not self.curve:
            self.mark(None, None)
        said = kept = self.training.seconds
        losses, before = [], self.training.progress()
        for step in self.training.run():
            losses.append(step.loss)
            is_point = int(step.progress * POINTS) > int(before * POINTS)
            before = step.progress
            if is_first and is_point:
                self.mark(step, sum(losses) / len(losses))
                losses = []
            if is_first and (is_point or step.seconds - said > SAY_S):
                said = step.seconds
                self.say(step)
            if is_first and step.seconds - kept > SAVE_S:
                kept = step.seconds
                self.save()

    def mark(self, step: Step | None, loss: float | None) -> None:
        """Add a point to the curve: the mean loss, or error of rows, since the last, and the guesses accepted now."""
        accepted = mean_accepted(self.training.student, self.texts, K)
        number, tokens, seconds = (step.number, step.tokens, step.seconds) if step else (0, 0, 0.0)
        point = {"step": number, "tokens": tokens, "seconds": seconds, "loss": None, "row_error": None}
        kind = "row_error" if step is not None and step.of_rows else "loss"
        point |= {kind: loss, "accepted": accepted}
        self.curve.append(point)

    def say(self, step: Step) -> None:
        of = "" if self.training.plan.steps is None else f" of {self.training.plan.steps}"
        accepted = self.curve[-1]["accepted"]
        guesses = "" if accepted is None else f", accepted {accepted:.2f} of {K}"
        left = step.seconds / step.progress * max(1 - step.progress, 0)
        rate = step.tokens / step.seconds
        what = "rows off by" if step.of_rows else "loss"
        say(f"Step {step.number}{of}: {what} {step.loss:.4f}{guesses}, {rate:.0f} tokens/s, {time_text(left)} left")

    def save(self) -> None:
        self.state_file.write(self.training.state() | {"curve": self.curve})

    def write(self) -> None:
        job = self.job
        tensors = stored_tensors(self.training.student, job.student.layout, torch.bfloat16)
        is_beside = job.folder.resolve() == job.target.parent.resolve()
        with tokenizer_saved(job.student.gguf, job.target.parent, None if is_beside else job.folder):
            save_checkpoint(job.target, job.student.args, tensors, job.student.table)
        self.state_file.remove()
        say(f"Wrote {job.target}: {size_text(job.target.stat().st_size)}")


def time_text(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


# ---------------------------------------------------------------- what it is worth


def report(run: Run, teacher: Transformer, held_out: list[int], flags: dict) -> None:
    """The table at the end, on standard output; the report and the chart that are asked for."""
    job, last = run.job, run.curve[-1]
    say("Measuring the held-out text ...")
    student = load_model(job.target, job.device, job.dtype)
    window = min(WINDOW, flags["seq_length"])
    perplexities = [perplexity(Engine(model), held_out, window=window).perplexity for model in (teacher, student)]
    accepted = mean_accepted(student, run.texts, K)
    sizes = [model.layout.bytes(torch.bfloat16) for model in (job.teacher, job.student)]
    print(f"{'':22}{'teacher':>14}{'student':>14}")
    print(f"{'layers':22}{job.teacher.args.n_layer:>14}{job.student.args.n_layer:>14}")
    print(f"{'weights':22}{size_text(sizes[0]):>14}{size_text(sizes[1]):>14}")
    print(f"{'perplexity':22}{perplexities[0]:>14.3f}{perplexities[1]:>14.3f}")
    print(f"{f'accepted of {K} guesses':22}{'':14}{'-' if accepted is None else f'{accepted:.2f}':>14}")
    print(f"Trained on {last['tokens']} tokens in {time_text(last['seconds'])}")
    print(f"As a draft: generate.py --checkpoint_path {job.teacher.paths[0]} --draft_checkpoint_path {job.target}")
    facts = {"args": flags, "target": str(job.target), "device": str(job.device), "torch": torch.__version__}
    facts |= {"bytes": sizes, "perplexity": perplexities, "accepted": accepted, "curve": run.curve}
    if flags["output_json"] is not None:
        write_json(flags["output_json"], facts)
    if flags["chart"] is not None:
        draw_curve(run.curve, K, flags["chart"])


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Train a small model to predict what a large one predicts.")
    place_flags(
        model_flags(parser, "who teaches: a .pth or .gguf file, or a folder", flag="--teacher"), "of the arithmetic: "
    )
    parser.set_defaults(dtype="float32")
    group = parser.add_argument_group("student")
    group.add_argument("--layers", type=int, metavar="N", help="a student of N of the teacher's blocks")
    text = "a student that is given, pruned or quantised: weights of 0 stay 0, and codes as they are"
    group.add_argument("--finetune", type=checkpoint_path, metavar="CKPT", help=text)
    text = "default: beside the teacher, model_student-N.pth, or beside the student, _distilled.pth"
    group.add_argument("--output", metavar="PATH", help=text)
    data_flags(parser.add_argument_group("data"))
    training_flags(parser.add_argument_group("training"))
    return parser


def data_flags(group) -> None:
    text = "texts in UTF-8, or JSON Lines with a text field"
    group.add_argument("--data", nargs="+", default=[], metavar="FILE", help=text)
    text = "a text to measure on (default: the last tenth of the data, which is then not trained on)"
    group.add_argument("--check", metavar="FILE", help=text)
    text = "train on N texts that the teacher writes, after beginnings from --data or, without, of its own: questions, "
    text += "with answers, in its chat template; they are kept beside the output (.jsonl)"
    group.add_argument("--self_data", type=int, metavar="N", help=text)
    text = "tokens of a window (default: %(default)s)"
    group.add_argument("--seq_length", type=int, default=512, metavar="N", help=text)
    group.add_argument("--chart", metavar="PATH", help="write a PNG of loss and acceptance (needs matplotlib)")
    group.add_argument("--output_json", metavar="PATH", help="write the report and the curve; - is standard output")


def training_flags(group) -> None:
    group.add_argument("--steps", type=int, metavar="N", help="how long, in steps: a seed then repeats it exactly")
    group.add_argument("--minutes", type=float, metavar="N", help="how long, in minutes")
    text = "windows of a step, on all ranks together (default: %(default)s)"
    group.add_argument("--batch_size", type=int, default=4, metavar="N", help=text)
    text = "windows that a rank computes at a time; their gradients add up (default: %(default)s)"
    group.add_argument("--micro_batch", type=int, default=1, metavar="N", help=text)
    text = "at most, after a warm-up and before a cosine (default: %(default)s)"
    group.add_argument("--learning_rate", type=float, default=1e-3, metavar="X", help=text)
    text = "of both distributions that are compared (default: %(default)s)"
    group.add_argument("--temperature", type=float, default=1.0, help=text)
    text = "the teacher's likeliest tokens that are compared one by one (default: %(default)s)"
    group.add_argument("--top_k", type=int, default=64, metavar="K", help=text)
    group.add_argument("--seed", type=int, default=1234, help="of the order of windows (default: %(default)s)")


if __name__ == "__main__":
    cli.run(main, build_parser())
