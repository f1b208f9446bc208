"""A causal convolution of each channel, and the last inputs that it keeps of each row of a cache.

Shapes: B rows, S new tokens a row, C channels; of a cache N rows, W inputs, each in the slot of its position modulo W.
"""

import torch
import torch.nn as nn
from torch import Tensor


class RowStates(nn.Module):
    """What a layer keeps of the rows of a cache in the place of keys and values: its buffers, by row."""

    def copy_prefix(self, source: Tensor, target: Tensor, length: int) -> None:
        """Give rows target [n] what rows source [n] hold, which must stand at the end of the prefix."""
        for each in self.buffers():
            each[target] = each[source]


def read_inputs(kept: Tensor, rows: Tensor, first: Tensor) -> Tensor:
    """The inputs [B, W, C] before positions first [B] of kept [N, W, C]; zeros before a sequence begins."""
    places = first[:, None] + torch.arange(-kept.shape[1], 0, device=first.device)
    return kept[rows[:, None], places % kept.shape[1]].where((places >= 0)[..., None], 0)


def write_inputs(kept: Tensor, rows: Tensor, first: Tensor, counts: Tensor, inputs: Tensor) -> None:
    """Keep the last W of inputs [B, W + S, C]: those that were read, then those of S tokens.

    Only the first counts [B] of the tokens are the row's own.
    """
    n_kept = kept.shape[1]
    last = counts[:, None] + torch.arange(n_kept, device=first.device)  # [B, W]
    own = inputs.gather(1, last[..., None].expand(-1, -1, inputs.shape[-1]))
    kept[rows[:, None], (first[:, None] + last) % n_kept] = own


def convolved(inputs: Tensor, taps: Tensor, n_token: int) -> Tensor:
    """The last n_token of inputs [B, W + S, C], each with those before it [B, n_token, C].

    taps [C, n_tap]: the last is that of the token itself.
    """
    n_tap, end = taps.shape[1], inputs.shape[1]
    mixed = inputs[:, end - n_token :] * taps[:, -1]
    for i in range(1, n_tap):
        mixed = torch.addcmul(mixed, inputs[:, end - n_token - i : end - i], taps[:, n_tap - 1 - i])
    return mixed
