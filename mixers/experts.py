"""Mixture of experts: feed-forwards of which a gate chooses some for each token."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mixers.activations import ACTIVATIONS, activated
from mixers.norms import RMSNorm


def check_experts(args) -> None:
    """Raise ValueError if the fields of a `model.ModelArgs` that concern experts contradict each other."""
    n, used, groups = args.n_expert, args.n_expert_used, args.n_expert_group
    if not (used or 0) <= (n or 0) or bool(n) != bool(used):
        raise ValueError(f"n_expert_used is {used}; it must be from 1 to n_expert, {n}")
    for name in ("shared_size", "dense_layers", "n_expert_group"):
        if getattr(args, name) and not n:
            raise ValueError(f"{name} {getattr(args, name)} is for a model with n_expert, a mixture of experts")
    if bool(args.dense_layers) != bool(args.dense_size) or len(set(args.dense_layers)) >= args.n_layer:
        raise ValueError(f"dense_layers {args.dense_layers} need dense_size, {args.dense_size}, and other layers")
    if bool(groups) != bool(args.n_group_used):
        raise ValueError(f"n_expert_group {groups} needs n_group_used")
    if n and not args.gated:
        raise ValueError("gated is False, which is not supported for a model with n_expert, a mixture of experts")
    if args.separate_experts and (not args.shared_size or args.shared_gate or args.dense_layers):
        raise ValueError("separate_experts need shared_size, and neither shared_gate nor dense_layers")
    if groups and (
        n % groups or n // groups < 2 or args.n_group_used > groups or used > n // groups * args.n_group_used
    ):
        raise ValueError(
            f"{n} experts in {groups} groups, of which {args.n_group_used} are used, do not give {used} for each token"
        )


class Gate(nn.Linear):
    """Scores that choose or weigh experts; never quantised, because rounded ones choose others."""


class ExpertLinear(nn.Module):
    """A linear layer for each of E experts: weight [E, out, in], bias [E, out] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def expert(self, e: int) -> Callable[[Tensor], Tensor]:
        return partial(F.linear, weight=self.weight[e], bias=None if self.bias is None else self.bias[e])

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

    The gate's scores are shares of 1, or each is a number from 0 to 1 (DeepSeek-AI 2024): then a bias takes part in the
    choice. Experts may come in groups, of which the best are chosen first: by their best expert or, with a bias, by
    their two best. One more feed-forward, `shared`, may serve all tokens, weighted by a gate of its own (Qwen2-MoE) or
    not. The weight of each expert may be times a number of its own (Gemma 4). args: a `model.ModelArgs`.
    """

    waits_for_host = True  # which reads the choice of experts, so that no CUDA graph can hold this

    def __init__(self, args, shared: nn.Module | None):
        super().__init__()
        self.activation, self.shared = ACTIVATIONS[args.activation], shared
        self.n_used, self.normalize, self.scale = args.n_expert_used, args.normalize_experts, args.expert_scale
        self.n_group, self.n_group_used = args.n_expert_group, args.n_group_used
        self.gate = Gate(args.dim, args.n_expert, bias=args.ffn_bias)
        # float32 in every model, because a rounded one chooses others; the name is that of the paper's own files
        bias = torch.zeros(args.n_expert, dtype=torch.float32) if args.sigmoid_experts else None
        self.e_score_correction_bias = None if bias is None else nn.Parameter(bias)
        self.per_expert_scale = nn.Parameter(torch.ones(args.n_expert)) if args.separate_experts else None

        def experts(out: int, size: int) -> ExpertLinear:
            bias = torch.empty(args.n_expert, out) if args.ffn_bias else None
            return ExpertLinear(torch.empty(args.n_expert, out, size), bias)

        self.w13 = experts(2 * args.intermediate_size, args.dim)
        self.w2 = experts(args.dim, args.intermediate_size)
        self.shared_gate = Gate(args.dim, 1, bias=False) if shared is not None and args.shared_gate else None

    def forward(self, x: Tensor, judged: Tensor | None = None) -> Tensor:
        """x [B, S, dim] -> [B, S, dim]; judged [B, S, dim]: what the gate takes; None: x."""
        rows = x.flatten(0, 1)  # [T, dim]
        weights, chosen = self.choose(self.gate(rows if judged is None else judged.flatten(0, 1)).float())
        y = (self.run(rows, chosen).float() * weights[..., None]).sum(1).to(x.dtype).view_as(x)
        if self.shared is None:
            return y
        return y + (self.shared(x) if self.shared_gate is None else self.shared_gate(x).sigmoid() * self.shared(x))

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers [T, K] of the experts that scores [T, E] choose."""
        if self.e_score_correction_bias is None:
            weights, chosen = self.in_best_groups(scores.softmax(-1), n_best=1).topk(self.n_used)
        else:
            scores = scores.sigmoid()
            biased = scores + self.e_score_correction_bias
            chosen = self.in_best_groups(biased, n_best=2).topk(self.n_used).indices
            weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.per_expert_scale is not None:
            weights = weights * self.per_expert_scale[chosen]
        return (weights if self.scale == 1 else weights * self.scale), chosen

    def in_best_groups(self, scores: Tensor, n_best: int) -> Tensor:
        """scores [T, E], -inf in all groups of experts but those whose n_best experts are the best."""
        if self.n_group is None:
            return scores
        groups = scores.unflatten(1, (self.n_group, -1))  # [T, G, E/G]
        best = groups.topk(n_best).values.sum(-1).topk(self.n_group_used).indices
        kept = torch.zeros_like(groups[..., 0]).scatter(1, best, 1.0).bool()
        return groups.masked_fill(~kept[..., None], float("-inf")).flatten(1)

    def run(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [T, dim] through the experts chosen [T, K] -> [T, K, dim]."""
        return self.w2(activated(self.w13(x[:, None], chosen), self.activation), chosen)


class SeparateExperts(nn.Module):
    """Experts and a feed-forward for all tokens, each between norms of its own (Gemma 4). args: a `model.ModelArgs`."""

    def __init__(self, args, shared: nn.Module):
        super().__init__()
        self.shared, self.experts, self.eps = shared, MixtureOfExperts(args, None), args.norm_eps
        self.shared_norm, self.post_shared_norm = RMSNorm(args.dim, args), RMSNorm(args.dim, args)
        self.experts_norm, self.post_experts_norm = RMSNorm(args.dim, args), RMSNorm(args.dim, args)
        self.scale = nn.Parameter(torch.ones(args.dim))  # of what the gate takes

    def forward(self, x: Tensor) -> Tensor:  # [B, S, dim], not normalised
        judged = F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.scale * x.shape[-1] ** -0.5
        y = self.post_experts_norm(self.experts(self.experts_norm(x), judged))
        return self.post_shared_norm(self.shared(self.shared_norm(x))) + y
