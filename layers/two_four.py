"""Linear layers of which 2 of each 4 successive inputs are kept (Mishra et al. 2021, arXiv 2104.08378).

Stored are the kept values, floats or int8 codes, in the order of the inputs, and of each in 2 bits its place among its
four: of bfloat16 9/16 of the bytes, of int8 5/8.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from layers.formats import PART, Int8Linear, QuantizedLinear, float_linear
from model import ModelArgs

UNIT = 8  # inputs, of which the places of the kept ones take a byte
MANY = 255  # in the place of two places, where more would have to be kept


def two_places(not_zero: int) -> int:
    """The places of the two of four inputs that are kept, 2 bits each, the first in the low ones.

    not_zero: a bit for each input. Where fewer than two are not 0, others are kept too, which are 0.
    """
    first, second, *others = sorted(range(4), key=lambda i: not not_zero >> i & 1)
    if any(not_zero >> i & 1 for i in others):
        return MANY
    return min(first, second) | max(first, second) << 2


PLACES = tuple(two_places(not_zero) for not_zero in range(16))


def compress(dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer, as files hold them, with the kept values in the place of its weight [out, in].

    weight: [out, in/2], floats or int8 codes as before. positions: uint8 [out, in/8], the first kept value in the low
    bits. The other tensors stay. A ValueError says that more than 2 of 4 inputs are not 0.
    """
    weight = dense["weight"]
    if weight.ndim != 2 or weight.shape[1] % UNIT:
        raise ValueError(f"a weight of the shape {list(weight.shape)} has no 2:4 form; it needs a multiple of 8 inputs")
    parts = [compressed(rows) for rows in weight.split(max(1, PART // weight.shape[1]))]
    values, positions = (torch.cat(each) for each in zip(*parts, strict=True))
    return dense | {"weight": values, "positions": positions}


def compressed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Kept values [out, in/2] and positions [out, in/8] of a weight [out, in]."""
    fours, device = weight.unflatten(-1, (-1, 4)), weight.device
    bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=device)
    not_zero = ((fours != 0) * bits).sum(-1, dtype=torch.int32)  # [out, in/4]
    places = torch.tensor(PLACES, dtype=torch.uint8, device=device)[not_zero]
    if (places == MANY).any():
        raise ValueError("more than 2 of 4 successive inputs are not 0, so the weight has no 2:4 form")
    index = torch.stack((places & 3, places >> 2), -1).long()
    return fours.gather(-1, index).flatten(-2), places[..., 0::2] | places[..., 1::2] << 4


def expand(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `compress`."""
    others = {name: tensor for name, tensor in stored.items() if name != "positions"}
    return others | {"weight": expanded(stored["weight"], stored["positions"])}


def expanded(values: Tensor, positions: Tensor) -> Tensor:  # [out, in/2], [out, in/8] -> [out, in]
    n_rows = max(1, PART // values.shape[1])
    pairs = zip(values.split(n_rows), positions.split(n_rows), strict=True)
    return torch.cat([expanded_rows(*pair) for pair in pairs])


def expanded_rows(values: Tensor, positions: Tensor) -> Tensor:
    places = torch.stack([positions >> 2 * i & 3 for i in range(4)], -1).flatten(-2)  # [out, in/2]
    pairs, index = (each.unflatten(-1, (-1, 2)) for each in (values, places.long()))
    return pairs.new_zeros(*pairs.shape[:-1], 4).scatter(-1, index, pairs).flatten(-2)


def checked_positions(name: str, read: Callable[[], Tensor]) -> Tensor:
    """The positions that `read` fetches, whose two places of each four inputs must be in order."""
    positions = read()
    for places in (positions & 15, positions >> 4) if positions.dtype == torch.uint8 else ():
        if not ((places & 3) < (places >> 2)).all():
            raise ValueError(f"{name} is damaged: of some four inputs it names no two, in order; write the file again")
    return positions


class TwoFourLinear(QuantizedLinear):
    """weight, floats or int8 codes, and positions as `compress` makes them; scales [out, 1] or [out, in/g] of codes."""

    def __init__(self, weight: Tensor, positions: Tensor, scales: Tensor | None = None, bias: Tensor | None = None):
        super().__init__(weight, scales, bias=bias)
        self.register_buffer("positions", positions.detach())

    @property
    def in_features(self) -> int:
        return 2 * self.weight.shape[-1]

    def dense(self) -> nn.Linear | Int8Linear:
        """The same layer with all its weights."""
        weight = expanded(self.weight, self.positions)
        if self.scales is None:
            return float_linear(weight, self.bias)
        return Int8Linear(weight, self.scales, bias=self.bias)

    def dequantize(self) -> Tensor:
        dense = self.dense()
        return dense.weight.float() if self.scales is None else dense.dequantize()


class PackedTwoFour(nn.Module):
    """A 2:4 layer in the order in which a CPU's instructions read it.

    weight: int8 [tiles, bytes], as which fused blocks know it; of each 32 inputs the positions of 16 outputs, then the
    kept values in their dtype. scales: bfloat16 [tiles, groups, 1, 16], None: floats. bias: float32 [tiles * 16].
    """

    LANES, GROUP = cpu.TILE, 32  # output rows of a tile; inputs, whose number is padded to a multiple

    def __init__(self, layer: TwoFourLinear):
        super().__init__()
        self.out_features = len(layer.weight)
        rows, inputs = -self.out_features % self.LANES, -layer.in_features % self.GROUP

        def tiles(tensor: Tensor, inputs: int) -> Tensor:  # [out, n] -> [tiles, 16, n + inputs]
            return F.pad(tensor, (0, inputs, 0, rows)).unflatten(0, (-1, self.LANES))

        positions = tiles(layer.positions, inputs // 8).unflatten(2, (-1, self.GROUP // 8)).transpose(1, 2)
        values = tiles(layer.weight, inputs // 2).unflatten(2, (-1, self.GROUP // 2)).permute(0, 2, 3, 1)
        blocks = [each.contiguous().view(torch.int8).flatten(2) for each in (positions, values)]
        self.register_buffer("weight", torch.cat(blocks, 2).flatten(1))
        scales = None if layer.scales is None else tiles(layer.scales, 0).transpose(1, 2)[:, :, None].contiguous()
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else F.pad(layer.bias.float(), (0, rows)))

    @staticmethod
    def fits(layer: TwoFourLinear, _: ModelArgs | None) -> bool:
        """Whether there are no scales, or bfloat16 ones for whole rows or for groups of at least 32 inputs."""
        if layer.scales is None:
            return True
        n_group = layer.scales.shape[1]
        wide = n_group == 1 or layer.in_features >= PackedTwoFour.GROUP * n_group
        return wide and layer.scales.dtype == torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y = torch.ops.gpt_faster.linear_two_four(x, self.weight, self.scales, self.bias)
        return y if y.shape[-1] == self.out_features else y[..., : self.out_features]
