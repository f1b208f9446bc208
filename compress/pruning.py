"""Pruning: weights become 0 where the layer's outputs on real text change least for it.

Wanda (Sun et al. 2023, arXiv 2306.11695) takes the least |weight| x norm of its input within each output row, and
leaves the others as they are. SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) goes through the columns as GPTQ
does: those still to come make up for what is pruned, and are rounded in the same pass if codes are asked for.

A pattern is "2:4", two zeros among each 4 successive inputs of an output, or the share of weights that become 0. What
is pruned is exactly 0 as it is stored: its code is 0, with scales that make 0 of that, also int4's.
"""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from compress.gptq import Grid, damped, inverse_root, settle_columns
from compress.walk import Visited, products, squares, walk_
from layers.formats import scales_and_zeros, stored, to_codes
from layers.quantized import QuantSpec
from layers.two_four import compress
from model import Transformer
from weights.layout import LEAVES

TWO_FOUR = "2:4"
MOST = 0.9  # of the weights that may be pruned
BLOCK = 128  # columns whose zeros SparseGPT chooses together, by a share, and after which all later ones are updated

Pattern = str | float


def parse_pattern(text: str) -> Pattern:
    """The pattern that a flag names."""
    if text == TWO_FOUR:
        return text
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= MOST:
        raise ValueError(f"--pattern is {text}; it must be 2:4, or the share of weights that become 0, up to {MOST}")
    return share


def require_fit(widths: dict[str, int], pattern: Pattern) -> None:
    """Refuse layers, with these numbers of inputs, that cannot have the pattern."""
    for name, width in widths.items():
        if pattern == TWO_FOUR and width % 8:
            raise ValueError(f"2:4 is stored for 8 inputs at a time, and {name} has {width}; give a share, such as 0.5")


def least(scores: Tensor, pattern: Pattern) -> Tensor:
    """Where the least scores [rows, n] are, two of each 4 successive ones or that share of each row: bool."""
    groups = scores.unflatten(1, (-1, 4)) if pattern == TWO_FOUR else scores[:, None]
    n_least = 2 if pattern == TWO_FOUR else round(pattern * scores.shape[1])
    chosen = groups.argsort(dim=-1, stable=True)[..., :n_least]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, chosen, True).flatten(1)


def symmetric_scales(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:  # [..., g] -> two of [..., 1]
    """As `scales_and_zeros`, with zeros of 0 for int4 too: code 0 is weight 0."""
    if bits == 8:
        return scales_and_zeros(groups, bits)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    limit = 1 << (bits - 1)
    scales = torch.maximum(high / (limit - 1), -low / limit).bfloat16().float()
    return scales, torch.zeros_like(scales)


def as_stored(
    W: Tensor, spec: QuantSpec, dtype: torch.dtype, name: str, scales: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of a pruned weight [out, in], zeros among them: floats in `dtype`, or codes as `spec` says.

    scales: [out, groups]; None: those that fit W.
    """
    if not spec.has_codes:
        return {"weight": W.to(dtype)}
    groups = W.unflatten(1, (spec.groups(W.shape[1], name), -1))
    scales = symmetric_scales(groups, spec.bits)[0] if scales is None else scales[..., None]
    zeros = torch.zeros_like(scales)
    return stored(to_codes(groups, scales, zeros, spec.bits).flatten(1), scales[..., 0], zeros[..., 0], spec.bits)


def magnitude_weight(weight: Tensor, pattern: Pattern, spec: QuantSpec, *, name: str) -> dict[str, Tensor]:
    """Prune the least weights of each row of weight [out, in]: tensors as `as_stored`."""
    W = weight.float()
    return as_stored(W.masked_fill(least(W.abs(), pattern), 0), spec, weight.dtype, name)


def wanda_weight(weight: Tensor, energy: Tensor, pattern: Pattern, spec: QuantSpec, *, name: str) -> dict[str, Tensor]:
    """Prune the least |w| x norm of its input in each row of weight [out, in]; energy [in]: the square of the norms."""
    W = weight.float()
    return as_stored(W.masked_fill(least(W.abs() * energy.sqrt(), pattern), 0), spec, weight.dtype, name)


def sparsegpt_weight(
    weight: Tensor, H: Tensor, pattern: Pattern, spec: QuantSpec, *, percdamp: float, name: str
) -> dict[str, Tensor]:
    """Prune weight [out, in] where w^2 / diag(U)^2 is least, given H [in, in], and round what is kept to codes, if any.

    U is the root of H^-1 that `inverse_root` makes, and w the weight with the errors of earlier columns compensated. A
    share is chosen among all rows of BLOCK columns, or of a group of scales if that is smaller. percdamp: damping of
    H, as a fraction of its mean diagonal.
    """
    n_in = weight.shape[1]
    groupsize = n_in // spec.groups(n_in, name)
    U = inverse_root(damped(H, percdamp), name)
    W = weight.float().masked_fill(H.diagonal() == 0, 0)
    prune = partial(least_harm, pattern=pattern)
    grid, scales = None, []
    for begin in range(0, n_in, groupsize):
        end = begin + groupsize
        if spec.has_codes:
            made = symmetric_scales(W[:, begin:end], spec.bits)
            grid = Grid(*(each.expand(-1, BLOCK) for each in made), spec.bits)
            scales.append(made[0])
        for i in range(begin, end, BLOCK):
            block = slice(i, min(i + BLOCK, end))
            width = 4 if pattern == TWO_FOUR else block.stop - i
            W[:, block], errors = settle_columns(W[:, block], U[block, block], grid, prune, width)
            W[:, block.stop :] -= errors @ U[block, block.stop :]
    return as_stored(W, spec, weight.dtype, name, torch.cat(scales, 1) if scales else None)


def least_harm(w: Tensor, d: Tensor, pattern: Pattern) -> Tensor:
    """Where pruning columns w [out, n] costs least, d [n] being their part of diag(U): bool [out, n]."""
    costs = (w / d).square()
    if pattern == TWO_FOUR:
        return least(costs, pattern)
    return least(costs.flatten()[None], pattern).view_as(w)


METHODS = {"wanda": (wanda_weight, squares), "sparsegpt": (sparsegpt_weight, products)}


@torch.no_grad()
def prune_(
    model: Transformer,
    windows: Tensor,
    table: dict[str, QuantSpec],
    method: str,
    pattern: Pattern,
    *,
    batch_size: int = 8,
    **how,
) -> dict[str, Tensor]:
    """Prune the layers in `table`, all in blocks, by one of METHODS: tensors by name, each `as_stored`.

    windows: the calibration text, int64 [n, S]. table: what each layer's kept weights become. how: percdamp of
    `sparsegpt_weight`. The weights in `model` are overwritten, by `walk_`. Experts that get no input are pruned by
    magnitude, and named on standard error.
    """
    make, of = METHODS[method]
    pruned = {}

    def change(visited: Visited) -> Tensor:
        name, how_stored = visited.name, {"pattern": pattern, "spec": table[visited.name]}
        without = partial(magnitude_weight, **how_stored, name=name)
        tensors = visited.changed(partial(make, **how_stored, **how), without, "pruned by magnitude", of)
        pruned.update({f"{name}.{key}": tensor for key, tensor in tensors.items()})
        return weight_of(tensors, table[name])

    walk_(model, windows, table, change, title="Pruning", batch_size=batch_size)
    return pruned


def packed(
    pruned: dict[str, Tensor], table: dict[str, QuantSpec], pattern: Pattern
) -> tuple[dict[str, Tensor], dict[str, QuantSpec]]:
    """The tensors of `prune_` as a file holds them, and its table: 2:4 of floats and int8 without the zeros.

    A share of weights, int4 and experts have no such form, and keep theirs.
    """
    tensors, made = dict(pruned), {}
    for name, spec in table.items():
        own = {leaf: pruned[f"{name}.{leaf}"] for leaf in LEAVES if f"{name}.{leaf}" in pruned}
        if pattern == TWO_FOUR and spec.bits in (None, 8) and own["weight"].ndim == 2:
            spec = replace(spec, pattern=TWO_FOUR)
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in compress(own).items()}
        if spec != QuantSpec():
            made[name] = spec
    return tensors, made


def weight_of(tensors: dict[str, Tensor], spec: QuantSpec) -> Tensor:
    """The weight for which the tensors of a layer stand."""
    return spec.layer(**tensors).dequantize() if spec.has_codes else tensors["weight"]


def by_magnitude(weights: dict[str, Tensor], table: dict[str, QuantSpec], pattern: Pattern) -> dict[str, Tensor]:
    """As `prune_`, by magnitude alone; weights [out, in], or of experts [E, out, in], by the names of their layers."""
    pruned = {}
    for name, spec in table.items():
        shape = weights[name].shape[:-1]
        tensors = magnitude_weight(weights[name].flatten(0, -2), pattern, spec, name=name)
        pruned.update({f"{name}.{key}": tensor.unflatten(0, shape) for key, tensor in tensors.items()})
    return pruned
