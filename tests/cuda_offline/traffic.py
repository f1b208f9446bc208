"""The bytes that the kernels of a decoding step move, from the code that inductor writes for a GPU.

python -m tests.cuda_offline.traffic Llama-3.1-8B int4 --ranks 1 --batches 1 8

Each batch is a line of JSON: {"batch", "seconds", "layer", "rest"}, the last two as {kind: [kernels, bytes]}: a kind is
a format of weights, or cuBLAS. The rest is what does not repeat with the layers.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace

import torch

from engine.cache import prefix_length
from engine.compile import compile_step
from engine.decode import decode_one_token
from model import ModelArgs
from scripts.bench.sides import PRECISIONS
from tests.cuda_offline.cases import GREEDY, fake_model, zeros
from tests.cuda_offline.generated import Generated, generated
from tests.cuda_offline.imagined_gpu import CUDA, FAKE
from tests.cuda_offline.wrapper import Launch, layer_of, recorded, storage
from tp import rank_args
from weights.registry import args_from_name

SLOTS = 512  # of the cache, of which the step attends to all but the last
LAYERS = 2  # that are traced; all between the writes to their caches is one layer
CUBLAS = {"aten.mm.out", "aten.addmm.out", "aten.bmm.out"}
CODES = {torch.int8: "int8", torch.uint8: "int4", torch.int32: "int4"}  # what a kernel reads most of; else bf16


def traced(args: ModelArgs, precision: str, n_rows: int) -> Generated:
    """The code of a greedy step of n_rows rows."""
    spec, head = PRECISIONS[precision]
    model = fake_model(args, spec, head=head)
    with FAKE, torch.inference_mode():
        cache = model.new_cache(n_rows, SLOTS)
        view = cache.view(length=prefix_length(cache, SLOTS))
    step = compile_step(decode_one_token, CUDA)
    return generated(step, model, zeros(n_rows, 1), zeros(n_rows, 1), view, GREEDY)


@dataclass(frozen=True)
class Traffic:
    """What the launches of a step of n_rows rows move. embedding: the storage of which as many rows are read."""

    n_rows: int
    embedding: int

    def bytes(self, launch: Launch) -> int:
        read = (
            each.nbytes // each.shape[0] * self.n_rows if storage(each) == self.embedding else each.nbytes
            for each in launch.read
        )
        slots = (SLOTS if each.shape[2:3] == (SLOTS,) else 1 for each in launch.written)  # of a cache, one of each row
        return sum(read) + sum(each.nbytes // n for each, n in zip(launch.written, slots, strict=True))

    def by_kind(self, launches: list[Launch]) -> dict[str, list[int]]:
        """Kernels and bytes, by what a kernel reads most of."""
        sums: dict[str, list[int]] = {}
        for launch in launches:
            largest = max(launch.read + launch.written, key=lambda each: each.nbytes)
            kind = "cuBLAS" if launch.name in CUBLAS else CODES.get(largest.dtype, "bf16")
            n, size = sums.get(kind, (0, 0))
            sums[kind] = [n + 1, size + self.bytes(launch)]
        return sums


def traffic(args: ModelArgs, made: Generated, n_rows: int) -> dict[str, dict[str, list[int]]]:
    """Kernels and bytes of one layer, and of all that does not repeat with the layers."""
    assert not args.tie_embeddings, "a head that is the embedding is read whole"
    record = recorded(made)
    read = (each for launch in record.launches for each in launch.read)
    embedding = next(each for each in read if each.shape == (args.vocab_size, args.dim))  # a head comes last
    of = Traffic(n_rows, storage(embedding))
    layer, rest = of.by_kind(layer_of(made, record)), of.by_kind(record.launches)
    for kind, (n, size) in layer.items():
        rest[kind] = [rest[kind][0] - args.n_layer * n, rest[kind][1] - args.n_layer * size]
    return {"layer": layer, "rest": rest}


def main(model: str, precision: str, ranks: int, batches: list[int], layers: int) -> None:
    args = args_from_name(model)
    args = replace(args if ranks == 1 else rank_args(args, ranks), n_layer=layers)
    for batch in batches:
        began = time.process_time()  # another process may keep the machine busy
        made = traced(args, precision, batch)
        seconds = time.process_time() - began
        print(json.dumps({"batch": batch, "seconds": seconds} | traffic(args, made, batch)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="registry name")
    parser.add_argument("precision", choices=PRECISIONS)
    parser.add_argument("--ranks", type=int, default=1, help="the part of one rank, without its sums over the ranks")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", type=int, default=LAYERS, help="default: %(default)s")
    main(**vars(parser.parse_args()))
