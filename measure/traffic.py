"""The bytes that ranks give each other for a token. As a program it is started by torchrun, and rank 0 writes them:
`torchrun --standalone --nproc_per_node 2 -m measure.traffic MODEL DEVICE --output_json PATH`"""

import sys
from collections import Counter
from dataclasses import dataclass, field, fields

import torch

from engine.decode import decode_one_token
from engine.sampling import Sampling
from model import ModelArgs, Transformer
from ranks import Ranks, init_tp
from weights.checkpoint import load_model, random_model
from weights.files import write_json
from weights.registry import REGISTRY


@dataclass(frozen=True, eq=False)
class CountingRanks(Ranks):
    """Ranks that note how many bytes this one gives to each kind of collective."""

    sent: Counter = field(default_factory=Counter)

    @classmethod
    def of(cls, ranks: Ranks) -> "CountingRanks":
        return cls(*(getattr(ranks, each.name) for each in fields(Ranks)))

    def sum(self, x):
        self.sent["sum"] += x.nbytes
        return super().sum(x)

    def broadcast(self, x):
        self.sent["broadcast"] += x.nbytes
        return super().broadcast(x)

    def gather(self, x):
        self.sent["gather"] += x.nbytes
        return super().gather(x)


@torch.inference_mode()
def bytes_of_a_step(model: Transformer, sampling: Sampling) -> dict[str, int]:
    """Bytes that this rank gives to each kind of collective in one decoding step of one row. Its ranks must count."""
    token, pos = torch.zeros(2, 1, 1, dtype=torch.long, device=model.device)
    before = Counter(model.ranks.sent)
    decode_one_token(model, token, pos, model.new_cache(1, 16).view(), sampling)
    return dict(model.ranks.sent - before)


def predicted(args: ModelArgs, n_rank: int, itemsize: int) -> int:
    """The same by hand, greedy: two sums a block and the embedding's, of `dim` values; the best logit and its id."""
    return 0 if n_rank == 1 else (2 * args.n_layer + 1) * args.dim * itemsize + 4 + 4


def main(model: str, device: str, output: str) -> None:
    with init_tp() as ranks:
        ranks = CountingRanks.of(ranks)
        load = random_model if model in REGISTRY else load_model
        sent = bytes_of_a_step(load(model, ranks.place(device), ranks=ranks), Sampling(temperature=0))
        if ranks.is_first:
            write_json(output, sent)


if __name__ == "__main__":
    main(*sys.argv[1:3], sys.argv[4])
