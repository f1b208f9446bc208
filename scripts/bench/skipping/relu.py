"""Feed-forwards with a ReLU, most of whose neurons are inactive: alone, and in the decoding of a whole model.

Random weights. Alone, inputs are positive and the signs of a gate's weights decide whether its neuron is active; in a
model, large biases of the gates do. So the share that is inactive is exact, and which neurons are is random.
"""

import copy
import statistics
import time
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from engine.engine import Engine, build_engine
from layers.fastest import pack_
from layers.quantized import QuantSpec, quantize_
from layers.sparse import ReluFeedForward, RowsLinear, in_large_pages
from model import FeedForward, ModelArgs
from scripts.bench.peers.protocol import Case
from scripts.bench.report import take_turns
from scripts.bench.sides import measure_case
from weights.checkpoint import random_model
from weights.layout import weight_bytes

INACTIVE = (0.9, 0.5, 0.0)
LEAST_BYTES = 600_000_000  # of dense units side by side, so that no cache holds what one of them reads
FAR = 20.0  # a bias beyond all that a gate's weights add up to


def measure_units(args: ModelArgs, spec: QuantSpec | None, rounds: int, least_bytes: int = LEAST_BYTES) -> dict:
    """For each share of inactive neurons: microseconds of a unit, dense and sparse, and what the bytes read allow."""
    dense = side_by_side(dense_unit(crafted(args, 0.5), args, spec), least_bytes)
    x, found = torch.rand(1, 1, args.dim, generator=torch.Generator().manual_seed(0)).bfloat16() + 0.5, {}
    for inactive in INACTIVE:
        sparse = side_by_side(sparse_unit(crafted(args, inactive), args, spec), least_bytes)
        turns = take_turns(rounds, {"dense": partial(run_units, dense, x), "sparse": partial(run_units, sparse, x)})
        saved = inactive * skippable_bytes(sparse[0].feed_forward)
        ratio, allowed = gain(turns, "us"), bytes_of(dense[0]) / (bytes_of(dense[0]) - saved)
        found[f"{inactive:.0%} inactive"] = turns | {"ratio": ratio, "allowed": allowed}
    return found


def gain(turns: dict, key: str) -> float:
    """How many times faster the sparse side is: the median over rounds of what a round says."""
    pairs = zip(*(turns[side]["runs"] for side in ("dense", "sparse")), strict=True)
    ratio = statistics.median(dense[key] / sparse[key] for dense, sparse in pairs)
    return ratio if key == "us" else 1 / ratio


def crafted(args: ModelArgs, inactive: float) -> FeedForward:
    """A unit of which, for every positive input, that share of neurons is inactive."""
    unit, generator = FeedForward(args, args.intermediate_size), torch.Generator().manual_seed(0)
    for layer in (unit.w13, unit.w2):
        layer.weight.data = 0.02 * torch.randn(layer.weight.shape, generator=generator)
    gate = unit.w13.weight.data[: args.intermediate_size]
    gate.copy_(gate.abs() * signs(args.intermediate_size, inactive, generator)[:, None])
    return unit.bfloat16().requires_grad_(False)


def signs(size: int, inactive: float, generator: torch.Generator) -> Tensor:
    """-1 for that share of the neurons, drawn at random, and 1 for the others [size]."""
    order = torch.randperm(size, generator=generator)
    return torch.ones(size).index_fill(0, order[: round(inactive * size)], -1.0)


def sparse_unit(unit: FeedForward, args: ModelArgs, spec: QuantSpec | None) -> nn.Module:
    """A module whose `feed_forward` is the unit in its fastest form, as in a model of these args."""
    owner = nn.Module()
    owner.args, owner.dtype, owner.device, owner.feed_forward = args, torch.bfloat16, torch.device("cpu"), unit
    if spec is not None:
        quantize_(owner, {"feed_forward.w13": spec, "feed_forward.w2": spec})
    pack_(owner)
    return owner


def dense_unit(unit: FeedForward, args: ModelArgs, spec: QuantSpec | None) -> nn.Module:
    """... in the fastest form that it would have with an activation that is never 0."""
    return sparse_unit(unit, replace(args, activation="silu"), spec)


def side_by_side(owner: nn.Module, least_bytes: int) -> list[nn.Module]:
    """Copies of a unit that take so many bytes together, its weights in such pages as the unit's own."""
    copies = [copy.deepcopy(owner) for _ in range(int(least_bytes / bytes_of(owner)))]
    for layer in [layer for each in copies for layer in each.modules() if isinstance(layer, RowsLinear)]:
        for name, tensor in list(layer.named_buffers()):
            layer.register_buffer(name, in_large_pages(tensor))
    return [owner, *copies]


def bytes_of(owner: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in owner.state_dict().values())


def skippable_bytes(unit: ReluFeedForward) -> int:
    """Bytes that belong to single neurons, beside the gate's.

    The scales of the down projection belong to groups of neurons, hardly one of which has no active one.
    """
    skipped = ("up.weight", "up.scales", "down.weight")
    return sum(tensor.nbytes for name, tensor in unit.state_dict().items() if name in skipped)


@torch.inference_mode()
def run_units(owners: list[nn.Module], x: Tensor) -> dict[str, float]:
    """Microseconds of one unit, all being run one after another."""
    began = time.perf_counter()
    for owner in owners:
        owner.feed_forward(x)
    return {"us": 1e6 * (time.perf_counter() - began) / len(owners)}


def measure_decode(args: ModelArgs, spec: QuantSpec | None, inactive: float, new_tokens: int, rounds: int) -> dict:
    """Decoding of a whole model of this shape with a ReLU, beside that of one with a SiLU, which is dense."""
    sides = {"dense": "silu", "sparse": "relu"}
    models = {
        side: random_model(replace(args, ffn_bias=True, activation=name), quantize=spec) for side, name in sides.items()
    }
    units = [layer for layer in models["sparse"].modules() if isinstance(layer, ReluFeedForward)]
    for number, unit in enumerate(units):
        bias = FAR * signs(args.intermediate_size, inactive, torch.Generator().manual_seed(number))
        unit.gate.bias.data[: len(bias)] = bias.to(unit.gate.bias.dtype)
    engines, case = {side: build_engine(model, compile=True) for side, model in models.items()}, Case(1, 8, new_tokens)
    turns = take_turns(rounds, {side: partial(decode_rate, engine, case) for side, engine in engines.items()})
    read, saved = weight_bytes(models["dense"]), inactive * sum(map(skippable_bytes, units))
    return turns | {"ratio": gain(turns, "tok_s"), "allowed": read / (read - saved)}


def decode_rate(engine: Engine, case: Case) -> dict[str, float]:
    return {"tok_s": measure_case(engine, case)["decode_tok_s"]}
