"""Thresholds found on a text (TEAL): quality beside uniform ones, and decoding beside that with all inputs."""

import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from compress.activations import (
    compare_thresholds,
    find_thresholds,
    projection_sizes,
    skippable_,
    with_thresholds,
)
from compress.calibration import calibration_windows
from engine.engine import Engine, build_engine, generate
from layers.quantized import QuantSpec
from scripts.bench.report import take_turns
from scripts.bench.sides import GREEDY
from weights.checkpoint import load_model, open_model, read_tensors, save_checkpoint

N_WINDOW, LENGTH = 4, 512  # of the text that thresholds are found on
PROMPT = 16  # tokens of a held-out text, after which tokens are timed


def measure_quality(path: Path, sparsity: float, calibration: list[int], held_out: list[int]) -> dict:
    """Thresholds of all layers, and the `Quality` on a text with all inputs, with uniform ones, and with those found.

    Small inputs are skipped in every token, also of what is read at once.
    """
    model = load_model(path, apart=True)
    layers = skippable_(model)
    windows = calibration_windows(calibration, limit=N_WINDOW, seq_length=LENGTH, needed=LENGTH, seed=0)
    found, uniform = find_thresholds(model, projection_sizes(open_model(path).layout), windows, sparsity)
    result = {"sparsity": sparsity, "calibration_tokens": windows.numel(), "thresholds": found}
    qualities = compare_thresholds(model, layers, found, uniform, held_out)
    return result | {name: asdict(quality) for name, quality in qualities.items()}


def measure_decode(
    path: Path, spec: QuantSpec | None, thresholds: dict[str, list], prompt: list[int], new_tokens: int, rounds: int
) -> dict:
    """Tokens/s after a prompt with all inputs, and with each of these lists of thresholds, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        engines = {"all inputs": build_engine(load_model(path, quantize=spec), compile=True)}
        for name, found in thresholds.items():
            target = Path(folder) / "sparse.pth"
            write(path, target, found)
            engines[name] = build_engine(load_model(target, quantize=spec), compile=True)
            target.unlink()
        sides = {name: partial(decode_rate, engine, prompt, new_tokens) for name, engine in engines.items()}
        return take_turns(rounds, sides)


def write(path: Path, target: Path, thresholds: list[list[float]]) -> None:
    """The float model in `path`, with these thresholds of each block's projections."""
    source = open_model(path)
    tensors = read_tensors(source, torch.device("cpu"), torch.bfloat16, "Copying")
    save_checkpoint(target, source.args, tensors, with_thresholds(source.table, thresholds))


def decode_rate(engine: Engine, prompt: list[int], new_tokens: int) -> dict[str, float]:
    """Greedy tokens/s after the first, whose time is the prompt's."""
    times = [time.perf_counter() for _ in generate(engine, [prompt], new_tokens, GREEDY)]
    return {"tok_s": (new_tokens - 1) / (times[-1] - times[0])}
