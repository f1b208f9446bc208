"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounds a weight so that its layer's outputs on real text change least.

A layer's columns are rounded one by one. Each column's error is compensated by the columns still to come, as far as the
inputs seen in calibration allow: the second moments of these inputs are the Hessian H of the squared output error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compress.walk import Visited, walk_
from layers.formats import scales_and_zeros, stored, to_codes
from layers.quantized import LAYERS, QuantSpec, quantize_weight
from model import Transformer


def damped(H: Tensor, percdamp: float) -> Tensor:
    """H with percdamp times its mean diagonal added to the diagonal; an input that is always 0 gets 1."""
    diagonal = H.diagonal()
    return H + torch.where(diagonal > 0, percdamp * diagonal.mean(), 1).diag()


def inverse_root(H: Tensor, name: str) -> Tensor:
    """The upper triangular U with U^T U = H^-1; a singular H is refused by the layer's name."""
    L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    if failed:
        raise ValueError(f"the inputs of {name} vary too little; raise --percdamp or give more calibration text")
    R = L.flip(0, 1)  # upper, R R^T = H
    return torch.linalg.solve_triangular(R, torch.eye(len(H), device=H.device), upper=True)


@dataclass(frozen=True)
class Grid:
    """The numbers to which columns are rounded: code x scale + zero, each [out, n]."""

    scales: Tensor
    zeros: Tensor
    bits: int

    def nearest(self, w: Tensor, i: int) -> Tensor:  # [out] -> [out]
        """The numbers of column i that are nearest to w."""
        scales, zeros = self.scales[:, i], self.zeros[:, i]
        return to_codes(w, scales, zeros, self.bits) * scales + zeros


def settle_columns(
    W: Tensor,
    U: Tensor,
    grid: Grid | None,
    prune: Callable[[Tensor, Tensor], Tensor] | None = None,
    width: int = 1,
) -> tuple[Tensor, Tensor]:
    """Give the columns of W [out, n] their last values, each after it has compensated the errors of those before it.

    U [n, n] is their part of `inverse_root`. prune: whether each of the next `width` columns becomes 0, bool
    [out, width], for their values now and their part of diag(U). grid: None keeps floats. Returns the values, and
    errors / diag(U): [out, n].
    """
    settled, errors, is_pruned = torch.empty_like(W), torch.empty_like(W), None
    for i in range(W.shape[1]):
        if prune is not None and i % width == 0:
            group = slice(i, i + width)
            is_pruned = prune(W[:, group] - errors[:, :i] @ U[:i, group], U.diagonal()[group])
        w = W[:, i] - errors[:, :i] @ U[:i, i]
        kept = w if is_pruned is None else w.masked_fill(is_pruned[:, i % width], 0)
        settled[:, i] = kept if grid is None else grid.nearest(kept, i)
        errors[:, i] = (w - settled[:, i]) / U[i, i]
    return settled, errors


def gptq_weight(
    weight: Tensor, H: Tensor, spec: QuantSpec, *, percdamp: float, blocksize: int, act_order: bool, name: str
) -> dict[str, Tensor]:
    """Round weight [out, in] of layer `name`, given H [in, in]: the same tensors as `quantize_weight` makes.

    percdamp: damping of H, as a fraction of its mean diagonal. blocksize: after so many columns all later ones are
    updated; it changes the speed, not the result. act_order: round the inputs of most energy first; every group's scale
    is then chosen before any column is rounded, else when the group is reached.
    """
    n_group = spec.groups(weight.shape[1], name)
    groupsize = weight.shape[1] // n_group
    energy = H.diagonal()
    order = energy.argsort(descending=True, stable=True) if act_order else torch.arange(len(H), device=H.device)
    U = inverse_root(damped(H, percdamp)[order][:, order], name)
    W = weight.float().masked_fill(energy == 0, 0)
    scales, zeros = scales_and_zeros(W.unflatten(1, (n_group, -1)), spec.bits)  # [out, n_group, 1]
    W, group = W[:, order], order // groupsize
    for g in range(n_group):
        begin, end = g * groupsize, (g + 1) * groupsize
        if not act_order:
            scales[:, g], zeros[:, g] = scales_and_zeros(W[:, begin:end], spec.bits)
        for i in range(begin, end, blocksize):
            j = min(i + blocksize, end)
            block = slice(i, j)
            grid = Grid(scales[:, group[block], 0], zeros[:, group[block], 0], spec.bits)
            W[:, block], errors = settle_columns(W[:, block], U[block, block], grid)
            W[:, j:] -= errors @ U[block, j:]
    codes = to_codes(W, scales[:, group, 0], zeros[:, group, 0], spec.bits)
    return stored(codes[:, order.argsort()], scales[..., 0], zeros[..., 0], spec.bits)


@torch.no_grad()
def gptq_(
    model: Transformer, windows: Tensor, table: dict[str, QuantSpec], *, batch_size: int = 8, **how
) -> dict[str, Tensor]:
    """Round the layers in `table`, those in blocks by GPTQ, others to nearest: their tensors by name, as in our files.

    windows: the calibration text, int64 [n, S]. how: percdamp, blocksize, act_order of `gptq_weight`. The weight of a
    layer of a block is overwritten with the rounded one in `model`, by `walk_`; layers outside of blocks keep theirs.
    Experts that get no input are rounded to nearest, and named on standard error.
    """
    rounded = {}

    def change(visited: Visited) -> Tensor:
        spec, name = table[visited.name], visited.name
        to_nearest = partial(quantize_weight, spec=spec, name=name)
        rounded[name] = visited.changed(partial(gptq_weight, spec=spec, **how), to_nearest, "rounded to nearest")
        return LAYERS[spec.bits](**rounded[name]).dequantize()

    walk_(model, windows, table, change, title="Quantising", batch_size=batch_size)
    for name in table.keys() - rounded:
        rounded[name] = quantize_weight(model.get_submodule(name).weight, table[name], name)
    return {f"{name}.{key}": tensor for name in table for key, tensor in rounded[name].items()}
