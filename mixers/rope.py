"""Rotary position embedding (Su et al. 2021), and how its frequencies are stretched beyond the trained context.

Or, in the place of it, an embedding of each position.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mixers.fields import check_fields
from mixers.layer_kinds import key_heads


@dataclass(frozen=True)
class RopeScaling:
    """How rope frequencies are stretched beyond the trained context.

    `linear` divides all by `factor` (Chen et al. 2023); `llama3` divides the low ones and blends between the two
    wavelengths (Llama 3.1); `yarn` does so between two numbers of turns within the trained context, and makes cosines
    and sines larger by `attention_factor` (Peng et al. 2023); `factors` divides each by its own number, as GGUF files
    store Llama 3.1's result; `longrope` does so by other numbers, `long_factors`, in contexts longer than the trained
    one, also for the tokens at their beginning (Ding et al. 2024); `proportional` divides all, and turns only the first
    `part` of the pairs (Gemma 4).
    """

    type: str
    factor: float = 1.0
    low_freq_factor: float = 1.0  # turns at which llama3 and yarn divide in full
    high_freq_factor: float = 4.0  # turns at which they do not divide
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    whole_pairs: bool = True  # yarn blends between whole numbers of rope pairs
    part: float = 1.0  # of the pairs, that proportional turns

    def __post_init__(self):
        if self.type not in ("factors", *ROPE_TYPES):
            raise ValueError(f"rope type {self.type!r} is not supported; supported: default, {', '.join(ROPE_TYPES)}")
        check_fields(self)
        needed = {"factors": (True, False), "longrope": (True, True)}.get(self.type, (False, False))
        if needed != (bool(self.factors), bool(self.long_factors)):
            raise ValueError(f"rope type {self.type!r} has other numbers than it needs in factors and long_factors")
        if self.part > 1:
            raise ValueError(f"part {self.part} of the rope pairs is more than all")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low > high or (low == high and self.type != "yarn"):  # yarn blends over a pair at least
            raise ValueError(f"low_freq_factor {low} is not below high_freq_factor {high}")

    def apply(self, freqs: Tensor, base: float, length: int = 0) -> Tensor:
        """Scale `freqs` [D/2], radians per position, the powers of 1 / base, for contexts of `length` tokens."""
        if self.type == "linear":
            return freqs / self.factor
        if self.type == "proportional":
            pairs = torch.arange(len(freqs), device=freqs.device)
            return (freqs / self.factor).masked_fill(pairs >= int(self.part * len(freqs)), 0)
        if self.type in ("factors", "longrope"):
            is_long = self.type == "longrope" and length > self.original_max_position_embeddings
            factors = self.long_factors if is_long else self.factors
            return freqs / torch.tensor(factors, dtype=freqs.dtype, device=freqs.device)
        keep = self.kept_by_yarn(freqs, base) if self.type == "yarn" else self.kept_by_llama3(freqs)
        # keep 1: a high frequency as it is; 0: a low one, divided
        return keep * freqs + (1 - keep) * freqs / self.factor

    def kept_by_llama3(self, freqs: Tensor) -> Tensor:
        turns = self.original_max_position_embeddings * freqs / (2 * math.pi)  # within the trained context
        return ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)

    def kept_by_yarn(self, freqs: Tensor, base: float) -> Tensor:
        n_pair = len(freqs)

        def pair_of(turns: float) -> float:
            return n_pair * math.log(self.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(base)

        first, last = pair_of(self.high_freq_factor), pair_of(self.low_freq_factor)
        if self.whole_pairs:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * n_pair - 1)
        pairs = torch.arange(n_pair, device=freqs.device, dtype=freqs.dtype)
        return 1 - ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)


ROPE_TYPES = ("linear", "llama3", "yarn", "longrope", "proportional")  # that a config.json can name


def rope_table(args, pos: Tensor, windowed: bool = False, length: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin [..., D/2] in float32 of the angles at pos [...] in a context of `length` tokens.

    args: a `model.ModelArgs`. windowed: for layers with a window.
    """
    base, scaling, growth, head_dim = args.rope_base, args.rope_scaling, 1.0, key_heads(args, windowed)[1]
    turned = args.rope_dim or head_dim
    if windowed and args.window_rope_base is not None:
        base, scaling = args.window_rope_base, None
    freqs = 1.0 / base ** (torch.arange(0, turned, 2, device=pos.device).float() / turned)
    if scaling is not None:
        freqs, growth = scaling.apply(freqs, base, length), scaling.attention_factor
    angles, still = pos.float()[..., None] * freqs, (0, (head_dim - turned) // 2)
    return F.pad(angles.cos() * growth, still, value=1.0), F.pad(angles.sin() * growth, still)


def has_finite_rope(args) -> bool:
    """Whether every angle of rope is a number, up to the last position."""
    last = torch.tensor(args.max_seq_length - 1, device="cpu")
    try:
        tables = rope_table(args, last) + rope_table(args, last, True) + rope_table(args, last, False, 1 << 30)
    except ArithmeticError:  # a logarithm of 0 or of infinity
        return False
    return all(table.isfinite().all() for table in tables)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, S, H, D]; cos, sin [B, S, 1, D/2]
    """Rotary position embedding over half-split pairs (Su et al. 2021; the layout of Hugging Face)."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class LearnedPositions(nn.Module):
    """An embedding of each position of the context. args: a `model.ModelArgs`."""

    def __init__(self, args):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(args.max_seq_length, args.dim))

    def forward(self, pos: Tensor) -> Tensor:  # [B, S] -> [B, S, dim]
        return F.embedding(pos.clamp(max=len(self.weight) - 1), self.weight)  # guesses may lie beyond the context
