"""Mixture of experts: feed-forwards of which a gate chooses some for each token."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mixers.activations import ACTIVATIONS


class Gate(nn.Linear):
    """Scores that choose or weigh experts; never quantised, because rounded ones choose others."""


class ExpertLinear(nn.Module):
    """A linear layer for each of E experts: weight [E, out, in]."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def expert(self, e: int) -> Callable[[Tensor], Tensor]:
        return partial(F.linear, weight=self.weight[e])

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [T, K or 1, in] through the experts chosen [T, K] -> [T, K, out]."""
        return by_expert(self, x, chosen)


def by_expert(layer: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
    """x [T, K or 1, in] through the experts chosen [T, K] of `layer` -> [T, K, out].

    Each expert gets all its tokens at once, so its weight is read once, and that of one not chosen never.
    """
    x = x.expand(-1, chosen.shape[1], -1)
    y = x.new_empty(*chosen.shape, layer.weight.shape[1])
    for e in chosen.unique().tolist():
        own = chosen == e
        y[own] = layer.expert(e)(x[own])
    return y


class MixtureOfExperts(nn.Module):
    """Feed-forwards of which a gate chooses some for each token (Shazeer et al. 2017; Jiang et al. 2024).

    Another one, `shared`, may serve all tokens, weighted by a gate of its own (Qwen2-MoE). args: a `model.ModelArgs`.
    """

    def __init__(self, args, shared: nn.Module | None):
        super().__init__()
        self.activation, self.shared = ACTIVATIONS[args.activation], shared
        self.n_used, self.normalize = args.n_expert_used, args.normalize_experts
        self.gate = Gate(args.dim, args.n_expert, bias=False)
        self.w13 = ExpertLinear(torch.empty(args.n_expert, 2 * args.intermediate_size, args.dim))
        self.w2 = ExpertLinear(torch.empty(args.n_expert, args.dim, args.intermediate_size))
        self.shared_gate = None if shared is None else Gate(args.dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # [T, dim]
        weights, chosen = self.gate(rows).float().softmax(-1).topk(self.n_used)  # [T, K]
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        y = (self.run(rows, chosen).float() * weights[..., None]).sum(1).to(x.dtype).view_as(x)
        return y if self.shared is None else y + self.shared_gate(x).sigmoid() * self.shared(x)

    def run(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [T, dim] through the experts chosen [T, K] -> [T, K, dim]."""
        gate, up = self.w13(x[:, None], chosen).chunk(2, dim=-1)
        return self.w2(self.activation(gate, up), chosen)
