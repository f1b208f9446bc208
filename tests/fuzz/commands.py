"""Flags of the commands: how any are drawn, and what takes them."""

import argparse
import contextlib
import io
import shutil
from pathlib import Path
from unittest.mock import patch

from hypothesis import strategies as st

import eval as evaluate
import generate
import quantize

COMMANDS = {"generate": generate, "eval": evaluate, "quantize": quantize}
PATHS = ["", ".", "model.pth", "missing", "no/such/folder/file", "text", "tokenizer.json", "out.json", "\n", "a" * 300]
SLOW = {"--compile", "--compile_prefill", "--help", "--version", "--tasks", "--calibration_tasks"}
SPECIFIC = {"--random_weights": ["stories15M", "", "nothing"], "--device": ["cpu", "mps", "cuda", "cuda:9", "x", ""]}
SPECIFIC |= {"--mode": ["int8", "int4", "x"], "--threads": ["0", "1", "-1", "9999999"]}
SPECIFIC |= {"--max_new_tokens": ["0", "1", "3", "-1", "600", "1e3"]}
SPECIFIC |= {"--num_samples": ["0", "1", "3", "-1", "1e3"]}  # a thousand would be a thousand answers
ARGUMENTS = [
    "0",
    "1",
    "2",
    "-1",
    "3.5",
    "1e-45",
    "1e400",
    "nan",
    "auto",
    "ngram",
    "int4",
    "float32",
    "the cat",
    "\ud800",
]
ARGUMENTS += [str(1 << 40), str(10**30), "", "é", *PATHS[:4]]


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [each for each in parser._actions if not set(each.option_strings) & SLOW]


@st.composite
def draw_flags(draw, _: Path):
    command = draw(st.sampled_from(sorted(COMMANDS)))
    argv = ["--checkpoint_path", "model.pth"] if draw(st.integers(0, 5)) else []
    if command == "eval" and draw(st.integers(0, 3)):
        argv += ["--perplexity", "text"]
    if command == "generate":
        argv += ["--max_new_tokens", "3", "--num_samples", "1"]
    options = options_of(COMMANDS[command].build_parser())
    for _ in range(draw(st.integers(0, 4))):
        option = draw(st.sampled_from(options))
        flag = draw(st.sampled_from(option.option_strings))
        takes_path = option.metavar in ("FILE", "PATH", "FOLDER") or "path" in flag or "file" in flag
        choices = SPECIFIC.get(flag) or list(option.choices or ()) or (PATHS if takes_path else ARGUMENTS)
        argv += [flag] if option.nargs == 0 else [flag, draw(st.sampled_from(choices))]
    return command, argv


def run_flags(valid: Path, folder: Path, case) -> None:
    name, argv = case
    for path in (valid / "ours").iterdir():
        shutil.copy(path, folder)
    (folder / "text").write_text("the cat sat on the mat and the dog ate the hat, he said\n" * 4)
    parser = COMMANDS[name].build_parser()
    fast = patch("measure.speed.measured_bandwidth", return_value=1.0)  # the true one reads 256 MB several times
    with contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()), fast:
        try:
            flags = vars(parser.parse_args(argv))
        except SystemExit as end:
            assert end.code == 2
            return
        try:
            COMMANDS[name].main(**flags)
        except OSError as error:  # the commands turn it into a line too
            assert error.strerror
