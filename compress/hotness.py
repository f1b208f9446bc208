"""How often a text uses each expert and each neuron of the feed-forwards, and whether a part of them does most."""

from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from compress.walk import read_watched
from mixers.experts import MixtureOfExperts
from model import FeedForward, ModelArgs, Transformer

HOTTEST = 0.2  # the share whose coverage is told
PAYS = 1.5  # times the coverage of units that are used alike, from which a plan by hotness pays
TOP = 0.1  # of a token's neurons: those of most magnitude count as active where no activation is 0


def count_uses(model: Transformer, windows: Tensor) -> dict:
    """{"experts": {layer: [counts]}, "neurons": {layer: [counts]}} of the tokens in windows, int64 [n, S].

    A neuron is active where it is not 0, in a model whose activation is a ReLU; else in the tokens in which it is one
    of the tenth of most magnitude.
    """
    found = {"experts": {}, "neurons": {}}
    hooks = [hook for name, layer in model.named_modules() for hook in watch(name, layer, model.args, found)]
    read_watched(model, windows, hooks, "Counting")
    return {kind: {layer: counts.tolist() for layer, counts in each.items()} for kind, each in found.items()}


def watch(name: str, layer: nn.Module, args: ModelArgs, found: dict) -> list:
    """Hooks that count what is used in a mixture of experts, or in the feed-forward of a block."""
    number = name.split(".")[1] if name.startswith("layers.") else None
    if isinstance(layer, MixtureOfExperts):
        found["experts"][number] = torch.zeros(args.n_expert, dtype=torch.int64)
        return [layer.w2.register_forward_pre_hook(partial(count_experts, found["experts"][number]))]
    if isinstance(layer, FeedForward) and not name.endswith("shared"):
        exact = args.activation.startswith("relu")
        found["neurons"][number] = torch.zeros(layer.w2.weight.shape[1], dtype=torch.int64)
        return [layer.w2.register_forward_pre_hook(partial(count_neurons, found["neurons"][number], exact))]
    return []


def count_experts(counts: Tensor, _: nn.Module, inputs: tuple) -> None:
    counts += inputs[1].flatten().bincount(minlength=len(counts)).cpu()


def count_neurons(counts: Tensor, exact: bool, _: nn.Module, inputs: tuple) -> None:
    x = inputs[0].flatten(0, -2).abs()
    if exact:
        counts += (x > 0).sum(0).cpu()
    else:
        counts += x.topk(max(1, round(TOP * len(counts)))).indices.flatten().bincount(minlength=len(counts)).cpu()


def coverage(counts: list[int], share: float = HOTTEST) -> float:
    """The share of all uses that is of the most used `share` of the units."""
    ordered = sorted(counts, reverse=True)
    return sum(ordered[: max(1, round(share * len(ordered)))]) / max(1, sum(ordered))


def in_words(kind: str, layers: dict[str, list[int]]) -> str:
    """What a profile says of the experts or neurons of all layers."""
    each = {layer: coverage(counts) for layer, counts in layers.items()}
    n_unit = len(next(iter(layers.values())))
    alike = max(1, round(HOTTEST * n_unit)) / n_unit
    mean, low, high = sum(each.values()) / len(each), min(each, key=each.get), max(each, key=each.get)
    text = f"{kind}: the hottest {alike:.0%} do {mean:.0%} of the work "
    text += f"(from {each[low]:.0%} in layer {low} to {each[high]:.0%} in layer {high})"
    if mean < PAYS * alike:
        text += f"; a plan by hotness cannot pay: {kind} that are used alike would do {alike:.0%}"
    return text
