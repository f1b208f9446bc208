"""TEAL (Liu et al. 2024, arXiv 2408.14690): thresholds below which the inputs of a block's projections are skipped.

Of each block as many weights are skipped, on average over a text. Which projection skips how many of its inputs is
found step by step: the next inputs skipped are those of the projection in which that changes the block's output least,
for the weights that it saves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cli import listed, progress
from compress.walk import arguments_of, block_calls
from engine.engine import Engine
from layers.quantized import QuantSpec, replace_
from layers.sparse import Thresholded
from measure.perplexity import WINDOW, perplexity
from model import ModelArgs, Transformer
from weights.layout import Layout

PROJECTIONS = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")
STEP, MOST = 0.05, 0.95  # share of a projection's inputs that are skipped more at a time, and at most
SAMPLES = 1 << 20  # magnitudes of inputs that are sorted
Thresholds = list[list[float]]  # of each block's `PROJECTIONS`


def require_projections(args: ModelArgs) -> None:
    """Refuse a model whose blocks consist of other layers."""
    apart = ("n_expert", "kv_latent", "delta", "short_conv", "layer_input_size", "n_reusing_layer")
    if any(getattr(args, name) for name in apart):
        raise ValueError(f"--mode activations is not supported for models with {listed(apart)}")


def projection_sizes(layout: Layout) -> list[int]:
    """Weights of each of the `PROJECTIONS`, which are as large in every block."""
    layers = [layout.model.get_submodule(f"layers.0.{name}") for name in PROJECTIONS]
    return [layer.weight.shape[0] * layer.in_features for layer in layers]


def with_thresholds(table: dict[str, QuantSpec], thresholds: Thresholds) -> dict[str, QuantSpec]:
    """The table of a file's layers, once each block's projections have these thresholds."""
    named = {
        f"layers.{i}.{name}": threshold
        for i, of_block in enumerate(thresholds)
        for name, threshold in zip(PROJECTIONS, of_block, strict=True)
    }
    return table | {name: replace(table.get(name, QuantSpec()), threshold=each) for name, each in named.items()}


@dataclass
class Projection:
    """One of a block's projections: its layer, which skips nothing yet, and what it is given."""

    layer: Thresholded
    weights: int
    magnitudes: Tensor  # of its inputs, sorted
    share: float = 0.0  # of its inputs that it skips

    def skip(self, share: float) -> None:
        self.share, last = share, len(self.magnitudes) - 1
        self.layer.threshold = self.magnitudes[min(round(share * last), last)].item() if share else 0.0


def skippable_(model: Transformer) -> list[list[Thresholded]]:
    """Put layers that may skip inputs of every token in the place of all projections: those of each block."""
    blocks = []
    for i, block in enumerate(model.layers):
        layers = [Thresholded(block.get_submodule(name), 0.0) for name in PROJECTIONS]
        for name, layer in zip(PROJECTIONS, layers, strict=True):
            layer.most = 1 << 62  # tokens of a request
            replace_(model, f"layers.{i}.{name}", layer)
        blocks.append(layers)
    return blocks


def set_thresholds(layers: list[list[Thresholded]], thresholds: Thresholds) -> None:
    """Give the layers of `skippable_` these thresholds."""
    for of_block, values in zip(layers, thresholds, strict=True):
        for layer, threshold in zip(of_block, values, strict=True):
            layer.threshold = threshold


@dataclass(frozen=True)
class Quality:
    """What skipping inputs in every token of a text does to a model. divergence: of its predictions from those with all
    inputs, KL in nats a token. Noise that only makes predictions less sure can lower a perplexity, but not this."""

    perplexity: float
    divergence: float


def compare_thresholds(
    model: Transformer, layers: list[list[Thresholded]], found: Thresholds, uniform: Thresholds, ids: list[int]
) -> dict[str, Quality]:
    """The quality on ids with all inputs, with uniform thresholds and with those found."""
    nothing = [[0.0] * len(PROJECTIONS)] * len(layers)
    tried, window = {"all inputs": nothing, "uniform": uniform, "found": found}, min(WINDOW, model.args.max_seq_length)
    perplexities = []
    for each in tried.values():
        set_thresholds(layers, each)
        perplexities.append(perplexity(Engine(model), ids, window=window).perplexity)
    changes = divergences(model, layers, torch.tensor(ids), window, list(tried.values()))
    return dict(zip(tried, map(Quality, perplexities, changes), strict=True))


@torch.no_grad()
def divergences(
    model: Transformer, layers: list[list[Thresholded]], ids: Tensor, window: int, tried: list[Thresholds]
) -> list[float]:
    """KL divergence, in nats a token of ids [n], of what each list of thresholds predicts from what the first does."""
    sums = [0.0] * len(tried)
    for tokens in progress(ids.to(model.device).split(window), desc="Comparing", unit="window"):
        pos, exact = torch.arange(len(tokens), device=model.device), None
        for i, each in enumerate(tried):
            set_thresholds(layers, each)
            own = model(tokens[None], pos[None])[0].float().log_softmax(-1)
            exact = own if exact is None else exact
            sums[i] += F.kl_div(own, exact, reduction="sum", log_target=True).item()
    return [each / len(ids) for each in sums]


@torch.no_grad()
def find_thresholds(
    model: Transformer, weights: list[int], windows: Tensor, sparsity: float
) -> tuple[Thresholds, Thresholds]:
    """Thresholds of each block's `PROJECTIONS`, found step by step, and those that skip the same share in each of them.

    windows: the calibration text, int64 [n, S]. weights: of each projection. sparsity: the share of a block's weights
    that are not read. The layers of `model` are those of `skippable_`, and skip nothing afterwards.
    """
    found, uniform = [], []
    for _, block, batches in block_calls(model, windows, "Finding thresholds", batch_size=1):
        layers = [block.get_submodule(name) for name in PROJECTIONS]
        inputs = [magnitudes(layer, block, batches) for layer in layers]
        parts = [Projection(*each) for each in zip(layers, weights, inputs, strict=True)]
        exact = [block(*batch) for batch in batches]
        change = partial(error, block, batches, exact)
        for part in parts:
            part.skip(sparsity)
        uniform.append([layer.threshold for layer in layers])
        skip_greedily(parts, change, sparsity)
        found.append([layer.threshold for layer in layers])
        for part in parts:
            part.skip(0.0)
    return found, uniform


def magnitudes(layer: nn.Module, block: nn.Module, batches: list[tuple]) -> Tensor:
    """The sorted magnitudes of a layer's inputs, or of some of them evenly spread: float32."""
    found = torch.cat([arguments_of(layer, block, batch)[0].flatten() for batch in batches]).abs().float()
    if not found.isfinite().all():
        raise ValueError("the inputs of a layer are NaN or infinite; use --dtype float32 or another calibration text")
    return found[:: max(1, len(found) // SAMPLES)].sort().values


def error(block: nn.Module, batches: list[tuple], exact: list[Tensor]) -> float:
    """The squared distance of what a block returns from what it returned, in shares of each token's own numbers.

    Many models make those of a text's first token a hundred times larger, beside which no other token would count.
    """
    total = 0.0
    for batch, wanted in zip(batches, exact, strict=True):
        distance = (block(*batch) - wanted).float().square().sum(-1)
        total += (distance / wanted.float().square().sum(-1).clamp(min=1e-30)).sum().item()
    return total


def skip_greedily(parts: list[Projection], error: Callable[[], float], sparsity: float) -> None:
    """Skip inputs of the projections until that share of all weights is skipped; error(): of what they now skip."""
    for part in parts:
        part.skip(0.0)
    total, now = sum(part.weights for part in parts), 0.0
    costs = dict.fromkeys(range(len(parts)), 0.0)  # of the next step of each, for a weight that it saves
    while (left := sparsity * total - sum(part.share * part.weights for part in parts)) > 1e-6 * total:
        tried = {}
        while (i := min(costs, key=costs.get)) not in tried:  # an old cost is hardly above the new one
            part, before = parts[i], parts[i].share
            share = min(before + STEP, MOST, before + left / part.weights)
            part.skip(share)
            tried[i] = share, error()
            part.skip(before)
            costs[i] = (tried[i][1] - now) / ((share - before) * part.weights)
        share, now = tried[i]
        parts[i].skip(share)
        if share == MOST:
            del costs[i]
