"""The operator of gated DeltaNet against its definition in float64, over all tokens of each row at once."""

import pytest
import torch
import torch.nn.functional as F

from kernels import cpu
from mixers.recurrent.delta_net import DeltaCache, DeltaSizes, steps

pytestmark = pytest.mark.skipif(not cpu.available(), reason="there are no operators for this processor")
SIZES = DeltaSizes((0,), n_key_head=2, n_value_head=4, key_dim=16, value_dim=64, n_tap=4)
N_GATE, EPS = 2 * SIZES.n_value_head, 1e-5
# of each call how many tokens a row has, and the own ones of three rows; each row is then taken back by some
CALLS = [(70, (70, 1, 30), 0), (1, (1, 1, 1), 2), (3, (3, 1, 2), 2), (130, (100, 0, 130), 1), (1, (1, 1, 1), 0)]
CALLS += [(4, (4, 2, 1), 3), (2, (0, 2, 1), 0), (65, (65, 65, 64), 0)]
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


def definition(x, gates, taps, rates, norm):
    """y [T, H V] of one sequence from its beginning, in float64. x [T, C + H V]; gates [T, 2 H]."""
    x, gates, taps, rates, norm = (each.double() for each in (x, gates, taps, rates, norm))
    inputs, z = x.split((SIZES.width, SIZES.value_width), -1)
    mixed = F.silu(F.conv1d(F.pad(inputs.T, (SIZES.n_tap - 1, 0)), taps.T[:, None], groups=SIZES.width)).T
    q, k, v = mixed.split((SIZES.key_width, SIZES.key_width, SIZES.value_width), -1)
    q, k, v = (each.unflatten(-1, (n, -1)) for each, n in zip((q, k, v), (2, 2, 4), strict=True))
    q, k = (each * torch.rsqrt(each.square().sum(-1, keepdim=True) + 1e-6) for each in (q, k))
    q, k, v = (each.repeat_interleave(4 // each.shape[1], 1).transpose(0, 1)[None] for each in (q, k, v))
    learn, decay = gates.chunk(2, -1)
    decay = rates[0] * F.softplus(decay + rates[1])
    state = torch.zeros(1, 4, SIZES.key_dim, SIZES.value_dim, dtype=torch.float64)
    y, _ = steps(state, q * SIZES.key_dim**-0.5, k, v, learn.sigmoid().T[None], decay.T[None])
    y = y[0].transpose(0, 1)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * norm).flatten(1) * F.silu(z)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("rewind", [0, 3])
def test_delta_net_equals_its_definition(dtype, rewind):
    """Prompts, steps and rounds of several tokens; rows that end early, are taken back, and held others before."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    weights = (random(SIZES.n_tap, SIZES.width) / 2, torch.stack((-random(4).exp(), random(4))), random(64))
    cache, rows = DeltaCache(SIZES, 5, rewind, torch.device("cpu")), torch.tensor([4, 0, 2])
    cache.states.copy_(random(*cache.states.shape).masked_fill(random(*cache.states.shape) > 1, float("nan")))
    read = [[torch.zeros(0, SIZES.width + SIZES.value_width, dtype=dtype), torch.zeros(0, N_GATE)] for _ in rows]
    for n_token, counts, taken_back in CALLS:
        x, gates = random(3, n_token, SIZES.width + SIZES.value_width).to(dtype), random(3, n_token, N_GATE)
        pos = torch.tensor([len(row[0]) for row in read])[:, None] + torch.arange(n_token)
        kept, _ = cache.view(rows)
        y = torch.ops.gpt_faster.delta_net(x, gates, pos, torch.tensor(counts), *weights, *kept, rows, EPS)
        assert y.dtype == dtype
        for b, count in enumerate(counts):
            read[b] = [torch.cat((row, new[b, :count])) for row, new in zip(read[b], (x, gates), strict=True)]
            wanted = definition(*read[b], *weights)[len(read[b][0]) - count :]
            torch.testing.assert_close(
                y[b, :count].double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=2e-5 if dtype == FLOAT32 else 1e-4
            )
            assert not y[b, count:].any()
            held = [n for n in range(1, len(read[b][0]) + 3) if cache.holds(int(rows[b]), n)]
            assert not count or held[-1] == len(read[b][0])
            back = min(taken_back, rewind, count - 1 if n_token <= 1 + rewind else 0)
            if back > 0:
                read[b] = [row[:-back] for row in read[b]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(1, 2, 16)}, "sizes do not fit"),
        ({"gates": torch.zeros(1, 2, N_GATE).double()}, "not float32"),
        ({"counts": torch.tensor([3])}, "more than 2 tokens"),
        ({"rows": torch.tensor([7])}, "row 7 is not in a cache of 5"),
    ],
)
def test_delta_net_refuses_what_does_not_fit(change, message):
    cache = DeltaCache(SIZES, 5, 0, torch.device("cpu"))
    arguments = {"x": torch.zeros(1, 2, SIZES.width + SIZES.value_width), "gates": torch.zeros(1, 2, N_GATE)}
    arguments |= {"pos": torch.tensor([[0, 1]]), "counts": torch.tensor([2])}
    arguments |= {"taps": torch.zeros(SIZES.n_tap, SIZES.width), "rates": torch.zeros(2, 4), "norm": torch.ones(64)}
    arguments |= {**cache.view(None)[0]._asdict(), "rows": None, "eps": EPS}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gpt_faster.delta_net(*(arguments | change).values())
