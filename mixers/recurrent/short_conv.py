"""A short convolution between two gates (LFM2, Liquid AI 2025): a layer whose state is the last inputs of its taps.

Shapes: B rows, S new tokens a row, C channels; of a cache N rows, W inputs.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from mixers.fields import check_fields
from mixers.recurrent.convolution import RowStates, convolved, read_inputs, write_inputs


@dataclass(frozen=True)
class ConvSizes:
    """Which layers are gated short convolutions, and their sizes."""

    layers: tuple[int, ...]
    width: int  # the channels, each of which is convolved by itself
    n_tap: int  # of the convolution: the token itself and the n_tap - 1 before it
    bias: bool = False  # of the convolution and of both linear layers

    def __post_init__(self):
        check_fields(self)
        if not self.layers or self.n_tap < 2:
            raise ValueError(f"short convolutions need layers, {self.layers}, and n_tap {self.n_tap} of 2 or more")

    def of_rank(self, n_rank: int) -> "ConvSizes":
        return replace(self, width=self.width // n_rank)


def is_short_conv(args, layer: int) -> bool:
    """Whether a layer is a gated short convolution. args: a `model.ModelArgs`."""
    return args.short_conv is not None and layer in args.short_conv.layers


class Inputs(NamedTuple):
    """What one layer keeps of the rows of a cache, see `convolution.py`."""

    inputs: Tensor  # [N, W, C] float32
    stands: Tensor  # [N, W] int64, the position of each input; -1: none

    def write(self, rows: Tensor, first: Tensor, counts: Tensor, inputs: Tensor) -> None:
        """As `write_inputs`; also where the kept inputs stand."""
        write_inputs(self.inputs, rows, first, counts, inputs)
        n_kept, first, stands = self.stands.shape[1], first[:, None], self.stands[rows]
        places = first + counts[:, None] + torch.arange(-n_kept, 0, device=first.device)  # [B, W]
        slots = places % n_kept
        before = stands.gather(1, slots)
        before = before.masked_fill(before >= first, -1)  # of tokens that were taken back
        self.stands[rows] = stands.scatter(1, slots, places.where(places >= first, before))


class ConvCache(RowStates):
    """`Inputs` of n_rows sequences, each of which can be taken back by up to `rewind` tokens."""

    def __init__(self, sizes: ConvSizes, n_rows: int, rewind: int, device: torch.device):
        super().__init__()
        n_kept = sizes.n_tap - 1 + rewind
        inputs = torch.zeros(n_rows, n_kept, sizes.width, dtype=torch.float32, device=device)
        self.register_buffer("inputs", inputs, persistent=False)
        self.register_buffer("stands", torch.full((n_rows, n_kept), -1, device=device), persistent=False)
        self.n_before = sizes.n_tap - 1

    def view(self, cache_rows: Tensor | None) -> tuple[Inputs, Tensor | None]:
        """What the layer takes beside its input; cache_rows as in `model.KVCache.view`."""
        return Inputs(self.inputs, self.stands), cache_rows

    def holds(self, row: int, length: int) -> bool:
        """Whether the inputs that the token after the first `length` tokens of a row needs are there."""
        return set(range(max(0, length - self.n_before), length)) <= set(self.stands[row].tolist())


class ShortConv(nn.Module):
    """A gated short convolution. wbcx holds the rows of the gate before it, of the gate after it, and of its input.

    args: a `model.ModelArgs`.
    """

    def __init__(self, args):
        super().__init__()
        sizes = args.short_conv
        self.wbcx = nn.Linear(args.dim, 3 * sizes.width, bias=sizes.bias)
        self.conv = nn.Conv1d(sizes.width, sizes.width, sizes.n_tap, groups=sizes.width, bias=sizes.bias)
        self.out = nn.Linear(sizes.width, args.dim, bias=sizes.bias)

    def forward(self, x: Tensor, pos: Tensor, counts: Tensor, *cache) -> Tensor:
        """x [B, S, dim] at consecutive pos [B, S] -> [B, S, dim].

        counts [B]: the first so many tokens of each row are its own, others are padding. cache: as `ConvCache.view`;
        none: the tokens begin their sequences.
        """
        B, S = pos.shape  # of pos: a compiled layer must know that both have as many tokens, to stand for later ones
        taps, first, rows = self.conv.weight.float()[:, 0], pos[:, 0], torch.arange(B, device=x.device)
        gate_before, gate_after, inputs = self.wbcx(x).float().chunk(3, -1)
        if cache:
            kept, cache_rows = cache
            rows = rows if cache_rows is None else cache_rows
            before = read_inputs(kept.inputs, rows, first)
        else:
            before = inputs.new_zeros(B, taps.shape[1] - 1, taps.shape[0])
        inputs = torch.cat((before, gate_before * inputs), 1)  # [B, W + S, C]
        if cache:
            kept.write(rows, first, counts, inputs)
        mixed = convolved(inputs, taps, S)
        mixed = mixed if self.conv.bias is None else mixed + self.conv.bias.float()
        return self.out((gate_after * mixed).to(x.dtype))
