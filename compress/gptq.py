"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounds a weight so that its layer's outputs on real text change least.

A layer's columns are rounded one by one. Each column's error is compensated by the columns still to come, as far as the
inputs seen in calibration allow: the second moments of these inputs are the Hessian H of the squared output error.
"""

import sys

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from cli import progress
from layers.quantized import LAYERS, QuantSpec, quantize_weight, scales_and_zeros, stored, to_codes
from model import Transformer

EXPERT_BYTES = 1 << 30  # of the Hessians of experts that are collected at a time


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


def round_columns(W: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round the columns of W [out, n] in turn, each after it has compensated the errors of those before it.

    U [n, n] is their part of `inverse_root`; scales, zeros [out, n]. Returns codes, and errors / diag(U): [out, n].
    """
    codes, errors = torch.empty_like(W), torch.empty_like(W)
    for i in range(W.shape[1]):
        w = W[:, i] - errors[:, :i] @ U[:i, i]
        codes[:, i] = to_codes(w, scales[:, i], zeros[:, i], bits)
        errors[:, i] = (w - (codes[:, i] * scales[:, i] + zeros[:, i])) / U[i, i]
    return codes, errors


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
    codes = torch.empty_like(W)
    for g in range(n_group):
        begin, end = g * groupsize, (g + 1) * groupsize
        if not act_order:
            scales[:, g], zeros[:, g] = scales_and_zeros(W[:, begin:end], spec.bits)
        for i in range(begin, end, blocksize):
            j = min(i + blocksize, end)
            block = slice(i, j)
            s, z = scales[:, group[block], 0], zeros[:, group[block], 0]
            codes[:, block], errors = round_columns(W[:, block], U[block, block], s, z, spec.bits)
            W[:, j:] -= errors @ U[block, j:]
    return stored(codes[:, order.argsort()], scales[..., 0], zeros[..., 0], spec.bits)


class Reached(Exception):
    """Ends a forward at a module, and carries the module's arguments."""


def arguments_of(module: nn.Module, block: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What `block(*batch)` calls `module` with; neither the module nor what comes after it is computed."""

    def stop(_, arguments):
        raise Reached(*arguments)

    with module.register_forward_pre_hook(stop):
        try:
            block(*batch)
        except Reached as reached:
            return reached.args
    raise AssertionError(f"{module} was not called")


def gptq_linear(
    layer: nn.Module, block: nn.Module, batches: list[tuple[Tensor, ...]], spec: QuantSpec, *, name: str, **how
) -> dict[str, Tensor]:
    """`gptq_weight` of a linear layer, for the mean of 2 x x^T over its inputs x, all tokens of all batches."""
    H = torch.zeros(2 * [layer.weight.shape[1]], device=layer.weight.device)
    n_tokens = sum(x.shape[0] * x.shape[1] for x, *_ in batches)
    for batch in batches:
        (x,) = arguments_of(layer, block, batch)
        x = x.flatten(0, -2).float()  # [tokens, in]
        H.addmm_(x.T, x, alpha=2 / n_tokens)
    require_finite(H, name)
    return gptq_weight(layer.weight, H, spec, name=name, **how)


def require_finite(H: Tensor, name: str) -> None:
    if not H.isfinite().all():
        raise ValueError(f"the inputs of {name} are NaN or infinite; use --dtype float32 or another calibration text")


def gptq_experts(
    layer: nn.Module, block: nn.Module, batches: list[tuple[Tensor, ...]], spec: QuantSpec, *, name: str, **how
) -> dict[str, Tensor]:
    """`gptq_weight` of each expert, for the inputs that are sent to it: tensors [E, ...].

    An expert that gets no input is rounded to nearest, and named on standard error.
    """
    n_expert, _, n_in = layer.weight.shape
    rounded, unreached = [], []
    for experts in torch.arange(n_expert).split(max(1, EXPERT_BYTES // (4 * n_in * n_in))):
        for e, H in zip(experts.tolist(), expert_hessians(layer, block, batches, experts, name), strict=True):
            if H.any():
                rounded.append(gptq_weight(layer.weight[e], H, spec, name=f"{name}, expert {e}", **how))
            else:
                unreached.append(e)
                rounded.append(quantize_weight(layer.weight[e], spec, name))
    if unreached:
        listed = ", ".join(map(str, unreached))
        tqdm.write(f"{name}: no token reached experts {listed}; they are rounded to nearest", file=sys.stderr)
    return {key: torch.stack([tensors[key] for tensors in rounded]) for key in rounded[0]}


def expert_hessians(
    layer: nn.Module, block: nn.Module, batches: list[tuple[Tensor, ...]], experts: Tensor, name: str
) -> Tensor:
    """The mean of 2 x x^T over the inputs x of each of some experts: [len(experts), in, in] float32."""
    n_in = layer.weight.shape[2]
    H, n_row = torch.zeros(len(experts), n_in, n_in, device=layer.weight.device), [0] * len(experts)
    for batch in batches:
        x, chosen = arguments_of(layer, block, batch)  # [T, K or 1, in], [T, K]
        x = x.expand(-1, chosen.shape[1], -1)
        for i, e in enumerate(experts.tolist()):
            rows = x[chosen == e].float()
            H[i].addmm_(rows.T, rows, alpha=2)
            n_row[i] += len(rows)
    H /= torch.tensor(n_row, device=H.device).clamp(min=1)[:, None, None]
    require_finite(H, name)
    return H


@torch.no_grad()
def gptq_(
    model: Transformer, windows: Tensor, table: dict[str, QuantSpec], *, batch_size: int = 8, **how
) -> dict[str, Tensor]:
    """Round the layers in `table`, those in blocks by GPTQ, others to nearest: their tensors by name, as in our files.

    windows: the calibration text, int64 [n, S]. how: percdamp, blocksize, act_order of `gptq_weight`. Each layer of a
    block is rounded for the inputs that it gets once all layers before it are rounded; so its weight in `model` is
    overwritten with the rounded one; layers outside of blocks keep theirs.
    """
    rounded = {}
    pos = torch.arange(windows.shape[1], device=model.device).repeat(batch_size, 1)
    parts = windows.to(model.device).split(batch_size)
    hidden = [model.embed(tokens, pos[: len(tokens)]) for tokens in parts]  # updated block by block
    contexts = model.contexts(pos, None)
    for i, block in enumerate(progress(model.layers, desc="Quantising", unit="block")):
        batches = [(x, *(each[: len(x)] for each in (pos, *contexts[i]))) for x in hidden]
        for name, layer in block.named_modules(prefix=f"layers.{i}"):  # in the order in which they run
            if name in table:
                round_layer = gptq_experts if layer.weight.ndim == 3 else gptq_linear
                rounded[name] = round_layer(layer, block, batches, table[name], name=name, **how)
                layer.weight.copy_(LAYERS[table[name].bits](**rounded[name]).dequantize())
        for x, *others in batches:
            x.copy_(block(x, *others))
    for name in table.keys() - rounded:
        rounded[name] = quantize_weight(model.get_submodule(name).weight, table[name], name)
    return {f"{name}.{key}": tensor for name in table for key, tensor in rounded[name].items()}
