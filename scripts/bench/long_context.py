"""Steps at late positions: over those at early ones, and with int8 keys and values over those in the model's dtype.

The cache is filled with random numbers, because how long a step takes does not depend on them. Caches take turns.
"""

import statistics
import time
from functools import partial
from pathlib import Path

import torch

from engine.cache import allocate, row_bytes, slots_for
from engine.decode import decode
from engine.engine import Engine, build_engine
from layers.quantized import quant_spec
from scripts.bench.report import Report, markdown, shared_flags, take_turns
from scripts.bench.sides import GREEDY
from weights.checkpoint import load_model, random_model
from weights.device import parse_cache_dtype
from weights.layout import weight_bytes
from weights.registry import REGISTRY

PARTS, SAME = ("found",), ("threads", "model")
PRECISIONS = {"bf16": None, "int8": "int8", "int4": "int4"}
POSITIONS = (108, 2148, 8000)
CACHES = (None, "int8")  # None: in the model's dtype
STEPS = 24  # of which the median counts


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/long-context.json", rounds=7, model="a checkpoint or a registry name")


def fill(report: Report, *, model: str, rounds: int, **_) -> None:
    for precision, mode in PRECISIONS.items():
        report.once(report.result["found"], precision, partial(measure, model, mode, rounds))


@torch.inference_mode()  # as decode runs: a tensor made outside is another form to the compiler
def measure(model: str, mode: str | None, rounds: int) -> dict:
    """A step at each position with each cache, in milliseconds, and the bytes that it reads."""
    path, load = (model, random_model) if model in REGISTRY else (Path(model), load_model)
    read, sides = {}, {}
    for cache_dtype in CACHES:
        loaded = load(path, quantize=quant_spec(mode, None))
        loaded.cache_dtype = parse_cache_dtype(cache_dtype)
        engine = build_engine(loaded, compile=True)  # one for each: a step is compiled for its first cache
        positions = [each for each in POSITIONS if each + STEPS < loaded.args.max_seq_length]
        cache = allocate(loaded, 1, slots_for(loaded.args, positions[-1] + STEPS))
        for buffer in (each for layer in set(cache.layers) for each in layer.buffers()):
            buffer.normal_() if buffer.is_floating_point() else buffer.random_(-100, 100)
        for position in positions:
            name = name_of(position, cache_dtype)
            read[name] = weight_bytes(loaded) + row_bytes(loaded, position)
            sides[name] = partial(step, engine, cache, position)
    return {"bytes": read, "steps": take_turns(rounds, sides)}


def name_of(position: int, cache_dtype: str | None) -> str:
    return f"position {position}, {cache_dtype or 'bf16'} cache"


def step(engine: Engine, cache, position: int) -> dict[str, float]:
    token, seconds, began = torch.zeros(1, 1, dtype=torch.long), [], time.perf_counter()
    for _ in decode(engine.model, cache, token, token + position, STEPS, GREEDY, engine.step):
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    return {"step_ms": 1000 * statistics.median(seconds)}


def table(result: dict) -> str:
    rows = []
    for precision, found in result["found"].items():
        first = name_of(POSITIONS[0], None)
        for name in found["steps"]:
            position, _, _ = name.partition(",")
            rows.append([f"{precision} weights, {name}", f"{found['steps'][name]['median']['step_ms']:.2f} ms"])
            rows[-1] += [of_another(found, name, first), of_another(found, f"{position}, bf16 cache", name)]
    heading = f"{result['model']}, {result['threads']} CPU threads"
    over = [f"step over that at {POSITIONS[0]} (bytes)", "bf16 cache's step over this (bytes)"]
    return markdown([heading, "step", *over], rows)


def of_another(found: dict, name: str, other: str) -> str:
    """How many times as long one step takes as another, and of how many times the bytes; empty for itself."""
    if name == other:
        return ""
    times, sizes = found["steps"], found["bytes"]
    took = times[name]["median"]["step_ms"] / times[other]["median"]["step_ms"]
    return f"{took:.2f} ({sizes[name] / sizes[other]:.2f})"
