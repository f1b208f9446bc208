"""Gated DeltaNet (Yang et al. 2025): a layer that sums up all tokens before in one matrix a head, its state.

Shapes: B rows, S new tokens a row, H value heads, K and V the sizes of a key and a value, W inputs, C their width.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mixers.compiled import surely_few
from mixers.experts import Gate
from mixers.fields import check_fields
from mixers.recurrent.convolution import RowStates, convolved, read_inputs, write_inputs

CHUNK = 64  # tokens of a prompt whose updates of the state are worked out together


@dataclass(frozen=True)
class DeltaSizes:
    """Which layers are gated DeltaNet, and their sizes."""

    layers: tuple[int, ...]
    n_key_head: int
    n_value_head: int  # neighbouring ones share a key head
    key_dim: int
    value_dim: int
    n_tap: int  # of the convolution: the token itself and the n_tap - 1 before it

    def __post_init__(self):
        check_fields(self)
        if not self.layers or self.n_value_head % self.n_key_head or self.n_tap < 2:
            raise ValueError(
                f"gated DeltaNet needs layers, {self.layers}, n_value_head {self.n_value_head} as a multiple of "
                f"n_key_head {self.n_key_head}, and n_tap {self.n_tap} of 2 or more"
            )

    @property
    def key_width(self) -> int:
        return self.n_key_head * self.key_dim

    @property
    def value_width(self) -> int:
        return self.n_value_head * self.value_dim

    @property
    def width(self) -> int:
        """Of what goes through the convolution: all of q, k and v."""
        return 2 * self.key_width + self.value_width

    def of_rank(self, n_rank: int) -> "DeltaSizes":
        return replace(self, n_key_head=self.n_key_head // n_rank, n_value_head=self.n_value_head // n_rank)


def is_delta(args, layer: int) -> bool:
    """Whether a layer is gated DeltaNet. args: a `model.ModelArgs`."""
    return args.delta is not None and layer in args.delta.layers


class States(NamedTuple):
    """What one layer keeps of the rows of a cache; a slot is a position modulo the number of slots."""

    states: Tensor  # [N, R, H, K, V] float32, at the position of the last token that each has taken in
    inputs: Tensor  # [N, W, C] float32, the last ones of the convolution
    stands: Tensor  # [N, R] int64, the position of each state; -1: none

    def read(self, rows: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """The state [B, H, K, V] and the inputs [B, W, C] before positions first [B]; zeros before a sequence begins.

        Where it begins, at position 0, the state is that of another, which must be forgotten.
        """
        state = self.states[rows, (first - 1) % self.states.shape[1]]
        return state, read_inputs(self.inputs, rows, first)

    def write(self, rows: Tensor, first: Tensor, counts: Tensor, states: Tensor, inputs: Tensor) -> None:
        """Keep states [B, n, H, K, V], those after the last n of S tokens, and of the inputs [B, W + S, C] the last.

        Only the first counts [B] of the tokens are the row's own; the others left the state as it was.
        """
        write_inputs(self.inputs, rows, first, counts, inputs)
        n_token = inputs.shape[1] - self.inputs.shape[1]
        steps = torch.arange(n_token - states.shape[1], n_token, device=first.device)
        places = first[:, None] + torch.minimum(steps, counts[:, None] - 1)  # [B, n]
        slots = places % self.states.shape[1]
        self.states[rows[:, None], slots] = states
        stands = self.stands[rows]
        stands = stands.masked_fill(stands >= first[:, None], -1)  # of tokens that were taken back
        self.stands[rows] = stands.scatter(1, slots, places.where(counts[:, None] > 0, stands.gather(1, slots)))


class DeltaCache(RowStates):
    """`States` of n_rows sequences, each of which can be taken back by up to `rewind` tokens."""

    def __init__(self, sizes: DeltaSizes, n_rows: int, rewind: int, device: torch.device):
        super().__init__()
        shape = (n_rows, 1 + rewind, sizes.n_value_head, sizes.key_dim, sizes.value_dim)
        inputs = (n_rows, sizes.n_tap - 1 + rewind, sizes.width)
        for name, each in (("states", shape), ("inputs", inputs)):
            self.register_buffer(name, torch.zeros(each, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("stands", torch.full(shape[:2], -1, device=device), persistent=False)

    def view(self, cache_rows: Tensor | None) -> tuple[States, Tensor | None]:
        """What the layer takes beside its input; cache_rows as in `model.KVCache.view`."""
        return States(self.states, self.inputs, self.stands), cache_rows

    def holds(self, row: int, length: int) -> bool:
        """Whether a state after the first `length` tokens of a row is there."""
        return length == 0 or bool((self.stands[row] == length - 1).any())


def steps(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """The gated delta rule, token by token, from a state [B, H, K, V].

    q, k [B, H, S, K]; v [B, H, S, V]; beta and decay, a logarithm, [B, H, S]. Returns the outputs [B, H, S, V] and the
    state after each token [B, S, H, K, V].
    """
    outputs, states, decay = [], [], decay.exp()
    for i in range(q.shape[2]):
        key, query, kept, rate = k[:, :, i], q[:, :, i], decay[:, :, i, None], beta[:, :, i, None]
        found, seen = (torch.stack((key, query), 2) @ state).unbind(2)  # [B, H, V], by one pass over the state
        delta = (v[:, :, i] - kept * found) * rate
        state = torch.addcmul(state * kept[..., None], key[..., None], delta[..., None, :])
        outputs.append(kept * seen + (query * key).sum(-1, keepdim=True) * delta)
        states.append(state)
    # of one token without a copy
    return torch.stack(outputs, 2), torch.stack(states, 1) if len(states) > 1 else state[:, None]


def chunks(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """As `steps`, by matrices of `CHUNK` tokens (Yang et al. 2024), but only the last state [B, 1, H, K, V].

    Within a chunk each token's update depends on those before it: a triangular system, solved for all chunks at once.
    """
    length, pad = q.shape[2], -q.shape[2] % CHUNK  # padding has beta 0 and decay 0: it leaves the state as it is
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, CHUNK)) for x in (q, k, v))  # [B, H, n, 64, D]
    beta, decay = (F.pad(x, (0, pad)).unflatten(2, (-1, CHUNK)) for x in (beta, decay))
    total = decay.cumsum(-1)  # since the chunk began
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    system = (beta[..., None] * k) @ k.mT * between
    known = beta[..., None] * torch.cat((v, k * total.exp()[..., None]), -1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    updates, from_state = solved.split((v.shape[-1], k.shape[-1]), -1)
    within, q = q @ k.mT * between, q * total.exp()[..., None]
    k = k * (total[..., -1:] - total).exp()[..., None]
    kept, outputs = total[..., -1].exp()[..., None, None], []
    for i in range(q.shape[2]):
        delta = updates[:, :, i] - from_state[:, :, i] @ state  # [B, H, 64, V]
        outputs.append(q[:, :, i] @ state + within[:, :, i] @ delta)
        state = state * kept[:, :, i] + k[:, :, i].mT @ delta
    return torch.cat(outputs, 2)[:, :, :length].contiguous(), state[:, None].clone()


# how many chunks a compiled prompt has is not known before it runs
chunks_operator = torch.library.custom_op("gpt_faster::delta_chunks", chunks, mutates_args=())


@chunks_operator.register_fake
def _(state, q, k, v, beta, decay):
    return v.new_empty(v.shape), state.new_empty(state[:, None].shape)


class GatedNorm(nn.Module):
    """Root mean square normalisation of each head, times the SiLU of a gate."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:  # [B, S, H, V], float32 and the model's dtype
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float() * F.silu(gate.float())).to(gate.dtype)


class DeltaNet(nn.Module):
    """Gated DeltaNet. wqkvz holds the rows of q, k, v and the output's gate z; gates those of beta and the decay.

    args: a `model.ModelArgs`.
    """

    def __init__(self, args):
        super().__init__()
        self.sizes = sizes = args.delta
        self.wqkvz = nn.Linear(args.dim, sizes.width + sizes.value_width, bias=False)
        self.gates = Gate(args.dim, 2 * sizes.n_value_head, bias=False)
        self.conv = nn.Conv1d(sizes.width, sizes.width, sizes.n_tap, groups=sizes.width, bias=False)
        # float32 in every model, as the state; the names are those of the paper's own files
        self.A_log = nn.Parameter(torch.zeros(sizes.n_value_head, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(sizes.n_value_head, dtype=torch.float32))
        self.norm = GatedNorm(sizes.value_dim, args.norm_eps)
        self.out = nn.Linear(sizes.value_width, args.dim, bias=False)

    def forward(self, x: Tensor, pos: Tensor, counts: Tensor, *cache) -> Tensor:
        """x [B, S, dim] at consecutive pos [B, S] -> [B, S, dim].

        counts [B]: the first so many tokens of each row are its own, others are padding. cache: as `DeltaCache.view`;
        none: the tokens begin their sequences.
        """
        B, S, _ = x.shape
        sizes, first, rows = self.sizes, pos[:, 0], torch.arange(B, device=x.device)
        inputs, z = self.wqkvz(x).split((sizes.width, sizes.value_width), -1)
        if cache:
            kept, cache_rows = cache
            rows = rows if cache_rows is None else cache_rows
            state, before = kept.read(rows, first)
        else:
            state = x.new_zeros(B, sizes.n_value_head, sizes.key_dim, sizes.value_dim, dtype=torch.float32)
            before = x.new_zeros(B, sizes.n_tap - 1, sizes.width, dtype=torch.float32)
        inputs = torch.cat((before, inputs.float()), 1)  # [B, W + S, C]
        heads, beta, decay = self.heads(inputs, S), *self.rates(x, counts)
        if cache and surely_few(S, kept.states.shape[1]):  # of so few each state is kept
            # a decay to nothing forgets without another pass over the state
            decay = decay.masked_fill(pos[:, None] == 0, float("-inf"))
            y, states = steps(state, *heads, beta, decay)
        else:
            state = state.where((first > 0)[:, None, None, None], 0)
            run = chunks_operator if torch.compiler.is_compiling() else chunks
            y, states = run(state, *heads, beta, decay)
        if cache:
            kept.write(rows, first, counts, states, inputs)
        return self.out(self.norm(y.transpose(1, 2), z.unflatten(-1, (-1, sizes.value_dim))).flatten(2))

    def heads(self, inputs: Tensor, n_token: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, S, D] of the last n_token of inputs [B, W + S, C]."""
        sizes, mixed = self.sizes, convolved(inputs, self.conv.weight.float()[:, 0], n_token)
        q, k, v = F.silu(mixed).split((sizes.key_width, sizes.key_width, sizes.value_width), -1)
        q, k = (x.unflatten(-1, (-1, sizes.key_dim)) for x in (q, k))
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        n_each = sizes.n_value_head // sizes.n_key_head
        q, k = (x.repeat_interleave(n_each, 2).transpose(1, 2) for x in (q * sizes.key_dim**-0.5, k))
        return q, k, v.unflatten(-1, (-1, sizes.value_dim)).transpose(1, 2)

    def rates(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """beta, the rate of learning, and the decay, a logarithm, [B, H, S]; both are 0 in padding."""
        own = torch.arange(x.shape[1], device=x.device) < counts[:, None]  # [B, S]
        beta, decay = self.gates(x).float().chunk(2, -1)
        decay = -self.A_log.float().exp() * F.softplus(decay + self.dt_bias.float())
        return tuple((rate * own[..., None]).transpose(1, 2) for rate in (beta.sigmoid(), decay))
